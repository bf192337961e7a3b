"""Words for messages: what was perhaps meant, the first line of an error, how long something takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """All of ``known`` in one line, those most like ``name`` first."""
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
