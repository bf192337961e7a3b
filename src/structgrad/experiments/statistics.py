"""Intervals, and decisions from them. A larger error makes an interval wider, and a verdict never
firmer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from structgrad.experiments.selection import Cell, mean_and_standard_error

#: The confidence level of every interval.
LEVEL = 0.95

Decision = Literal["shown", "contradicted", "open"]


@dataclass(frozen=True)
class Difference:
    """The difference between two numbers of a table.

    Attributes:
        value: ours minus theirs.
        half_width: half the width of its 95 % interval; None if one side has no error.
    """

    value: float
    half_width: float | None

    @property
    def low(self) -> float:
        """The lower end of the interval; minus infinity without one."""
        return -math.inf if self.half_width is None else self.value - self.half_width

    @property
    def high(self) -> float:
        """The upper end; infinity without an interval."""
        return math.inf if self.half_width is None else self.value + self.half_width

    def decide(self, limit: float, sign: float = 1.0) -> Decision:
        """Whether ``sign * difference > limit``: yes or no if the whole interval agrees, otherwise
        open.
        """
        low, high = (self.low, self.high) if sign > 0 else (-self.high, -self.low)
        return "shown" if low > limit else "contradicted" if high < limit else "open"

    def show(self, digits: int = 1) -> str:
        """``+1.2 [-0.3, +2.7]``."""
        value = f"{self.value:+.{digits}f}"
        return value if self.half_width is None else f"{value} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def simultaneous(comparisons: int) -> float:
    """The level of an interval which, used for each of several comparisons, holds for all of them at
    once with :data:`LEVEL` (Bonferroni).
    """
    return 1 - (1 - LEVEL) / comparisons


def quantile(degrees: float, level: float = LEVEL) -> float:
    """The half-width of an interval in standard errors: Student's t, and the normal distribution at
    infinity.
    """
    return float(stdtrit(degrees, (1 + level) / 2) if math.isfinite(degrees) else ndtri((1 + level) / 2))


def half_width(cell: Cell, level: float = LEVEL) -> float | None:
    """The half-width of Student's t interval around a number; None without an error."""
    if cell.standard_error is None:
        return None
    return quantile(cell.degrees, level) * cell.standard_error if cell.standard_error else 0.0


def difference(ours: Cell, theirs: Cell, level: float = LEVEL) -> Difference:
    """Ours minus theirs with Welch's interval, which is never narrower than that of either number
    alone.

    Welch (1947) uses Student's t with the degrees of freedom of Satterthwaite. With two or three
    runs on each side, these grow so fast with the smaller of the two errors that the interval
    becomes narrower as that error grows. A noisier row would then buy a verdict. Therefore the
    interval of the noisier number alone, the limit at no other error, is a lower bound.
    """
    value = ours.value - theirs.value
    mine, other = half_width(ours, level), half_width(theirs, level)
    if mine is None or other is None:
        return Difference(value, None)
    squares = [float(cell.standard_error or 0.0) ** 2 for cell in (ours, theirs)]
    total = sum(squares)
    if total == 0.0:
        return Difference(value, 0.0)
    inverse = sum((s / total) ** 2 / cell.degrees for s, cell in zip(squares, (ours, theirs), strict=True))
    welch = quantile(1 / inverse if inverse else math.inf, level) * math.sqrt(total)
    return Difference(value, max(welch, mine, other))


# --- over several tasks: Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical Precipice

#: The number of resamples and the seed of the bootstrap.
RESAMPLES = 2000
#: With fewer runs a task the bootstrap's intervals are too narrow; Student's t replaces it.
ENOUGH = 5

#: Scores of a method: one array ``[runs]`` for each task.
Scores = Sequence[NDArray[np.float64]]


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of all runs of all tasks (section 4.3): robust as a median, and twice as efficient."""
    values = np.sort(np.concatenate(list(scores)))
    cut = int(0.25 * len(values))
    return float(values[cut : len(values) - cut].mean())


def mean_over_tasks(scores: Scores) -> Cell:
    """Mean over tasks of the means over runs. Its error has the degrees of freedom of
    Satterthwaite.
    """
    cells = [mean_and_standard_error(task, task) for task in scores]
    value = float(np.mean([cell.value for cell in cells]))
    if any(cell.standard_error is None for cell in cells):
        return Cell(value, None, None)
    squares = [float(cell.standard_error or 0.0) ** 2 for cell in cells]
    total = sum(squares)
    error = math.sqrt(total) / len(cells)
    if total == 0.0:
        return Cell(value, 0.0, 0.0, min(cell.degrees for cell in cells))
    degrees = 1 / sum((s / total) ** 2 / cell.degrees for s, cell in zip(squares, cells, strict=True))
    return Cell(value, error, error, degrees)


def resampled(scores: Scores, generator: np.random.Generator) -> Scores:
    """Runs drawn with replacement within each task (stratified)."""
    return [task[generator.integers(0, len(task), len(task))] for task in scores]


def bootstrap_interval(
    statistic: Callable[[Scores], float], scores: Scores, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of a statistic by the stratified bootstrap (section 4.1)."""
    generator = np.random.default_rng(0)
    found = np.sort([statistic(resampled(scores, generator)) for _ in range(resamples)])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def performance_profile(scores: Scores, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fraction of runs above each threshold, ``[thresholds]``; every task has the same weight
    (section 4.2).
    """
    shares = [(task[:, None] > thresholds[None, :]).mean(0) for task in scores]
    return np.asarray(np.mean(shares, axis=0))


def probability_of_improvement(ours: Scores, theirs: Scores) -> float:
    """The probability that our run beats one of theirs on a random task; ties count half (section
    4.3).
    """
    wins = [
        ((mine[:, None] > other[None, :]) + 0.5 * (mine[:, None] == other[None, :])).mean()
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return float(np.mean(wins))


def improvement_interval(ours: Scores, theirs: Scores, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of :func:`probability_of_improvement`; both methods are resampled within
    each task.
    """
    generator = np.random.default_rng(0)
    draws = [
        probability_of_improvement(resampled(ours, generator), resampled(theirs, generator)) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
