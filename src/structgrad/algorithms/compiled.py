"""Functions compiled for the CPU by numba, which is imported when the first of them is called, and
by this file only.

numba takes as long to import as all of ``structgrad.structures``; many users of a structure on a
GPU, or of its description, never call compiled code.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

#: For ``fastmath``: all of it, except for assuming that NaN and infinity cannot occur.
FAST = {"contract", "reassoc", "nsz"}

_lock = threading.RLock()
#: Implementations for use in compiled functions that wait for numba: what they implement, options, and themselves.
_waiting: list[tuple[Callable[..., Any], dict[str, Any], Callable[..., Any]]] = []


class Compiled:
    """The result of :func:`njit` for a function. A call goes to numba's dispatcher of the function."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._function, self._options = function, options
        self._dispatcher: Any = None
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__

    def __call__(self, *arguments: Any) -> Any:
        """Run it, compiled for arguments of these types."""
        dispatcher = self._dispatcher
        return (self.dispatcher() if dispatcher is None else dispatcher)(*arguments)

    def dispatcher(self) -> Any:
        """Numba's. The compiled functions that this one calls are then global names of dispatchers, as numba needs."""
        with _lock:
            if self._dispatcher is None:
                self._dispatcher = _numba().njit(**self._options)(self._function)
                names = self._function.__globals__
                for name in self._function.__code__.co_names:
                    if isinstance(callee := names.get(name), Compiled):
                        names[name] = callee.dispatcher()
            return self._dispatcher


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: ``numba.njit`` with these options, at the first call."""
    return lambda function: Compiled(function, options)


def overload(function: Callable[..., Any], **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: ``numba.extending.overload`` of ``function`` with these options, when numba is imported."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _waiting.append((function, options, implementation))
        return implementation

    return register


def _numba() -> Any:
    """The module, which knows all overloads so far."""
    numba = importlib.import_module("numba")
    while _waiting:
        function, options, implementation = _waiting.pop()
        importlib.import_module("numba.extending").overload(function, **options)(implementation)
    return numba
