"""The command that installs the package today. A release changes only this place."""

from __future__ import annotations


def install(extra: str) -> str:
    """The command that installs an extra, for messages. The package is on no index, so it names
    none.
    """
    return f"pip install '.[{extra}]' in a checkout of structgrad"
