"""The ``metrics.csv`` of a run, for everything that reads it while the run may write it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def metric_rows(file: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value of every line, without a last one that is only half-written; nothing if there is no file.

    Damaged lines are left out as well. A run that continues refuses them.
    """
    with suppress(FileNotFoundError):
        complete, _, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        for line in complete.splitlines()[1:]:
            with suppress(ValueError):
                step, name, value = line.rsplit(",", 2)
                yield int(step), name, float(value)
