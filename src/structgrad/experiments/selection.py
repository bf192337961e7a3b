"""From the runs of a row to its numbers: pure functions of validation and test metrics.

Every rule takes ``validation`` ``[n]`` and ``test`` ``[n]``, one entry for each finished run, and
returns a :class:`Cell`. A table names its rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Attributes:
        value: e.g. a mean.
        standard_error: of the value; None if one run cannot tell.
        shown: the number after the ±: the standard error, or what the paper gives in its place.
        degrees: degrees of freedom of the standard error: the number of runs minus one, infinite if
            unknown.
    """

    value: float
    standard_error: float | None
    shown: float | None
    degrees: float = math.inf

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        """``value ± shown``."""
        value = f"{self.value * scale:.{digits}f}"
        return value if self.shown is None else f"{value} ± {self.shown * scale:.{digits}f}"

    def scaled(self, scale: float) -> Cell:
        """The cell in other units."""
        error, shown = (None if e is None else e * abs(scale) for e in (self.standard_error, self.shown))
        return Cell(self.value * scale, error, shown, self.degrees)


Rule = Callable[[ArrayLike, ArrayLike], Cell]


def ranking(validation: ArrayLike) -> NDArray[np.intp]:
    """Indices of runs from the best (greatest) validation metric to the worst; ties in the given
    order.

    Raises:
        ValueError: without runs, or if one has a validation metric that is not a number.
    """
    metric = np.asarray(validation, dtype=float)
    if metric.ndim != 1 or not len(metric):
        raise ValueError("a selection needs at least one run")
    if np.isnan(metric).any():
        raise ValueError("a validation metric is not a number: such a run cannot be ranked")
    return np.argsort(-metric, kind="stable")


def best_trial(validation: ArrayLike, test: ArrayLike) -> Cell:
    """Test metric of the run with the greatest validation metric. Its errors bootstrap the whole
    selection.

    As in Paulus et al. (2020), D.3, n runs are drawn with replacement from the n runs, and the best
    of them is selected. What is shown after the ± is the standard deviation of its test metric. It is
    exact, over all repetitions, while the paper draws 10^5. One run has no error.

    The best of n runs is too often the best of n draws from them, so this deviation is too small for
    an interval. With 20 runs it misses a quarter of the time. The standard error, of which intervals
    are made, therefore draws only the root of n (the m out of n bootstrap of Bickel et al. 1997).
    """
    order = ranking(validation)
    sorted_test = np.asarray(test, dtype=float)[order]
    if len(order) == 1:
        return Cell(float(sorted_test[0]), None, None)
    few = round(math.sqrt(len(order)))
    error, shown = (bootstrap(sorted_test, draws) for draws in (few, len(order)))
    return Cell(float(sorted_test[0]), error, shown, len(order) - 1)


def bootstrap(sorted_test: NDArray[np.float64], draws: int) -> float:
    """Standard deviation of the selected test metric over resampled selections, all of them.

    The best of m draws with replacement from n runs has a rank of at least r with probability
    ``(1 - r / n) ** m``. This is the limit of infinitely many resamples.

    Args:
        sorted_test: ``[n]``, from the run with the best validation metric to the worst.
        draws: m.
    """
    n = len(sorted_test)
    at_least = (1 - np.arange(n + 1) / n) ** draws
    probability = at_least[:-1] - at_least[1:]
    offsets = sorted_test - sorted_test[0]  # equal metrics have exactly no spread
    seen = probability > 0  # a metric that is never selected may be anything
    probability, offsets = probability[seen], offsets[seen]
    mean = float((probability * offsets).sum())
    return math.sqrt(float((probability * (offsets - mean) ** 2).sum()))


def mean_and_standard_error(validation: ArrayLike, test: ArrayLike) -> Cell:
    """Mean over runs (seeds), with its standard error. The validation metric is not used."""
    mean, deviation, n = _moments(test)
    error = None if deviation is None else deviation / math.sqrt(n)
    return Cell(mean, error, error, n - 1)


def mean_and_standard_deviation(validation: ArrayLike, test: ArrayLike) -> Cell:
    """Mean and standard deviation over runs (seeds). The validation metric is not used."""
    mean, deviation, n = _moments(test)
    return Cell(mean, None if deviation is None else deviation / math.sqrt(n), deviation, n - 1)


def _moments(test: ArrayLike) -> tuple[float, float | None, int]:
    """Mean, standard deviation and number; equal numbers have exactly no spread, one number has no deviation."""
    values = np.asarray(test, dtype=float)
    offsets = values - values[0]
    deviation = float(offsets.std(ddof=1)) if len(values) > 1 else None
    return float(values[0] + offsets.mean()), deviation, len(values)


#: Name in a table's file -> rule.
RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (best_trial, mean_and_standard_error, mean_and_standard_deviation)
}


def count(runs: Sequence[object]) -> str:
    """``1 run``, ``3 runs``."""
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"
