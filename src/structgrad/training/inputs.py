"""Files of one's own that a run reads. The identity of a run has their names, not their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from structgrad.training.composition import Run
from structgrad.training.errors import RunError
from structgrad.training.folder import KEPT


def digests(run: Run) -> dict[str, str]:
    """Option of the task -> a hash of the file that it names, for files that exist."""
    found = {}
    for option, value in _texts("task", run.settings["task"]):
        if _is_file(value):
            with suppress(OSError), open(value, "rb") as stream:  # the data say so when they read it
                found[option] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return found


def check_unchanged(run: Run) -> None:
    """Compare the files with those of the run's first start.

    Raises:
        RunError: if one has changed. The results of the old content would pass as those of the new.
    """
    try:
        known = dict(json.loads((run.folder / "environment.json").read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):  # the run has not begun, or is from before
        return
    if not any((run.folder / kept).exists() for kept in KEPT):
        return  # nothing is kept of the old content
    for option, digest in digests(run).items():
        if known.get(option, digest) != digest:
            raise RunError(
                f"{option}: the file has changed since this run began; give it another name, or delete {run.folder}"
            )


def _texts(name: str, node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(f"{name}.{key}", value)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(f"{name}.{index}", value)


def _is_file(text: str) -> bool:
    try:
        return ("." in text or "/" in text) and Path(text).is_file()  # a word may be the name of a choice
    except (OSError, ValueError):  # too long, or with a null byte
        return False
