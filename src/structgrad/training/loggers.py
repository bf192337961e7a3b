"""The metrics file of a run folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only


class MetricsFile(Logger):
    """Appends every metric to ``metrics.csv``, one line ``step,metric,value`` each.

    Lightning's own CSV logger deletes the file of an interrupted run when it is resumed; this one keeps it, less
    the lines after the checkpoint that the run continues from.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return "metrics"

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget what was logged after the first ``step`` steps, which are numbered from 0, and half-written lines."""
        if not self.file.exists():
            return
        with self.file.open(newline="") as stream:
            rows = [row for row in csv.reader(stream) if len(row) == 3]
        kept = [row for row in rows[1:] if row[0].isdigit() and int(row[0]) < step]
        self._write("w", [["step", "metric", "value"], *kept])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append."""
        rows: list[list[Any]] = [[step or 0, name, float(value)] for name, value in metrics.items() if name != "epoch"]
        if not self.file.exists():
            rows.insert(0, ["step", "metric", "value"])
        self._write("a", rows)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in ``config.yaml`` beside this file."""

    def _write(self, mode: str, rows: list[list[Any]]) -> None:
        with self.file.open(mode, newline="") as stream:
            csv.writer(stream).writerows(rows)
