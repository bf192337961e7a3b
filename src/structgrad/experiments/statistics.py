"""Intervals, and what they decide. A larger error makes an interval wider, and never a verdict firmer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy.special import ndtri, stdtrit

from structgrad.experiments.selection import Cell

#: Of every interval.
LEVEL = 0.95

Decision = Literal["shown", "contradicted", "open"]


@dataclass(frozen=True)
class Difference:
    """Between two numbers of a table.

    Attributes:
        value: ours minus theirs.
        half_width: of its interval at the level 95 %; None where one side has no error.
    """

    value: float
    half_width: float | None

    @property
    def low(self) -> float:
        """The lower end of the interval; minus infinity without one."""
        return -math.inf if self.half_width is None else self.value - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return math.inf if self.half_width is None else self.value + self.half_width

    def decide(self, limit: float, sign: float = 1.0) -> Decision:
        """Whether ``sign * difference > limit``: yes or no where the whole interval says so, else open."""
        low, high = (self.low, self.high) if sign > 0 else (-self.high, -self.low)
        return "shown" if low > limit else "contradicted" if high < limit else "open"

    def show(self, digits: int = 1) -> str:
        """``+1.2 [-0.3, +2.7]``."""
        value = f"{self.value:+.{digits}f}"
        return value if self.half_width is None else f"{value} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def quantile(degrees: float, level: float = LEVEL) -> float:
    """How many standard errors an interval reaches to each side: Student's t, the normal law at infinity."""
    return float(stdtrit(degrees, (1 + level) / 2) if math.isfinite(degrees) else ndtri((1 + level) / 2))


def half_width(cell: Cell, level: float = LEVEL) -> float | None:
    """Of Student's t interval around a number; None without an error."""
    if cell.standard_error is None:
        return None
    return quantile(cell.degrees, level) * cell.standard_error if cell.standard_error else 0.0


def difference(ours: Cell, theirs: Cell, level: float = LEVEL) -> Difference:
    """Ours minus theirs with Welch's interval, which is never narrower than that of either number alone.

    Welch (1947): Student's t with the degrees of freedom of Satterthwaite. With two or three runs on each side those
    grow so fast with the smaller of the two errors that the interval becomes narrower as that error grows. A noisier
    row would then buy a verdict; the interval of the noisier number alone, which is the limit at no other error, is
    therefore a lower bound.
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
