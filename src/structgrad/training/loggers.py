"""The metrics file of a run folder, and Weights & Biases."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from structgrad.training.errors import RunError

_HEAD = ["step", "metric", "value"]


class MetricsFile(Logger):
    """Appends every metric to ``metrics.csv``, one line ``step,metric,value`` each.

    When a run is resumed, Lightning's own CSV logger deletes the file of the interrupted run. This
    one keeps it, without the lines after the checkpoint from which the run continues.

    Args:
        folder: folder of the run.
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
        """Delete what was logged after the first ``step`` steps, which are numbered from 0, and a
        half-written line.

        Raises:
            RunError: if this class did not write the file.
        """
        if not self.file.is_file():
            return
        try:
            with self.file.open(newline="", encoding="utf-8") as stream:
                head, *rows = list(csv.reader(stream)) or [_HEAD]
            if rows and len(rows[-1]) < 3:
                rows.pop()  # a kill left it half-written
            kept = [row for row in rows if int(row[0]) < step]
            for _, _, value in kept:
                float(value)
            if head != _HEAD:
                raise ValueError(f"it starts with {','.join(head)}")
        except (ValueError, IndexError, csv.Error) as error:
            raise RunError(
                f"the metrics file {self.file} is damaged or not of a run ({error}); delete it to go on without it"
            ) from error
        self._write("w", [_HEAD, *kept])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the metrics."""
        rows: list[list[Any]] = [[step or 0, name, float(value)] for name, value in metrics.items() if name != "epoch"]
        if not self.file.exists():
            rows.insert(0, _HEAD)
        self._write("a", rows)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in ``config.yaml`` beside this file."""

    def _write(self, mode: str, rows: list[list[Any]]) -> None:
        with self.file.open(mode, newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)


class WandbSteps(WandbLogger):
    """Lightning's logger, with the training step as the step of Weights & Biases.

    Lightning leaves the counting to the client, which starts at 0 in every process that works
    offline.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under that step."""
        extra = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({**metrics, **extra}, step=step)
