"""Words for messages: likely alternatives to a name, the first line of an error, a duration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """All of ``known`` in one line, the names most like ``name`` first."""
    names = list(known)
    alike = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return ", ".join([*alike, *(n for n in names if n not in alike)])


def first_line(error: BaseException) -> str:
    """The first line of a message; the name of the error if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def duration(seconds: float) -> str:
    """``45 s``, ``3.2 min``, ``5.1 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def options(thing: object, without: Iterable[str] = ()) -> str:
    """``temperature=0.5, n_samples=1``: constructor arguments that an object keeps under their
    names.

    Args:
        thing: the object.
        without: arguments to leave out.
    """
    parts = []
    for name, parameter in inspect.signature(type(thing)).parameters.items():
        if name in without or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in (kept := vars(thing)):
            value = kept[name]
            parts.append(f"{name}={value.__name__ if inspect.isclass(value) else repr(value)}")
    return ", ".join(parts)
