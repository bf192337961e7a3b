"""Words for messages: likely alternatives to a name, the first line of an error, a duration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Self

#: The most names that :func:`nearest` lists.
_LISTED = 12


def nearest(name: str, known: Iterable[str]) -> str:
    """The names in one line, those most like ``name`` first; of many, how many more there are."""
    names = list(known)
    alike = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    ordered = [*alike, *(n for n in names if n not in alike)]
    rest = len(ordered) - _LISTED
    return ", ".join([*ordered[:_LISTED], f"and {rest} more"] if rest > 1 else ordered)


def first_line(error: BaseException) -> str:
    """The first line of a message; the name of the error if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def duration(seconds: float) -> str:
    """``45 s``, ``3.2 min``, ``5.1 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Configured:
    """A base class that remembers the arguments of the constructor, which :func:`options` shows."""

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """The object before its constructor. Copies and pickles are made without arguments; they bring the old ones."""
        if cls.__init__ is object.__init__ and (args or named):  # which Python overlooks beside a __new__
            raise TypeError(f"{cls.__name__}() takes no arguments")
        made = super().__new__(cls)
        # As simple as this, so that torch.compile can trace it. An iterator is read once, and cannot be copied.
        given = tuple([... if isinstance(value, Iterator) else value for value in args])
        given_by_name = {name: ... if isinstance(value, Iterator) else value for name, value in named.items()}
        # An nn.Module refuses attributes before its constructor, whose children would come twice.
        object.__setattr__(made, "_given", (given, given_by_name))
        return made


def options(thing: object, without: Iterable[str] = ()) -> str:
    """``temperature=0.5, n_samples=1``: the arguments of an object's constructor.

    The value is the one that the object keeps under the argument's name. Otherwise it is the one
    that was given, which only a :class:`Configured` object knows.

    Args:
        thing: the object.
        without: arguments to leave out.
    """
    parts = []
    signature = inspect.signature(type(thing))
    values = dict(vars(thing))
    if isinstance(thing, Configured):
        given, given_by_name = thing._given
        bound = signature.bind(*given, **given_by_name)
        bound.apply_defaults()
        values = bound.arguments | values
    for name, parameter in signature.parameters.items():
        if name in without or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        # Modules beside the object show themselves, as its children.
        if name in values and name not in vars(thing).get("_modules", {}):
            value = values[name]
            if inspect.isroutine(value) or inspect.isclass(value):
                text = value.__name__
            else:
                text = "..." if value is ... else repr(value)
            parts.append(f"{name}={text}")
    return ", ".join(parts)
