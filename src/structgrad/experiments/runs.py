"""Finished runs, as their summaries."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Summary:
    """One finished run.

    Attributes:
        structure, estimator, task, budget: the choices in the groups of that name.
        seed: of everything random.
        metrics: name -> value, as logged by the test.
        content: the whole summary file.
    """

    task: str
    structure: str
    estimator: str
    budget: str
    seed: int
    metrics: dict[str, float]
    content: dict[str, Any]


def load(folder: Path) -> list[Summary]:
    """All summaries in a folder of ``results/``, or below a folder of runs.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is not a summary; names the file.
    """
    files = sorted(folder.glob("*.json")) or sorted(folder.glob("**/summary.json"))
    if not files:
        raise FileNotFoundError(f"no finished run in {folder}")
    summaries = []
    for file in files:
        try:
            content = json.loads(file.read_text())
            keys = ("task", "structure", "estimator", "budget", "seed", "metrics")
            summaries.append(Summary(**{key: content[key] for key in keys}, content=content))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not the summary of a run: {error!r}") from error
    return summaries


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, with its standard error (None for a single run)."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Cell:
        """From one value a seed."""
        numbers = list(values)
        error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), error, len(numbers))

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        """``mean ± standard error``."""
        mean = f"{self.mean * scale:.{digits}f}"
        return mean if self.error is None else f"{mean} ± {self.error * scale:.{digits}f}"
