"""Intervals against known quantiles and by simulation; verdicts that a larger error cannot buy."""

from __future__ import annotations

import itertools
import math
from string import ascii_lowercase

import numpy as np
import pytest

from structgrad.experiments.report import Line, Report, judge
from structgrad.experiments.selection import Cell, mean_and_standard_error
from structgrad.experiments.statistics import (
    bootstrap_interval,
    difference,
    half_width,
    improvement_interval,
    interquartile_mean,
    mean_over_tasks,
    performance_profile,
    probability_of_improvement,
    quantile,
    resampled,
)
from structgrad.experiments.tables import Claim, Column, Comparison, Row, Table


def cell(value: float, error: float | None, degrees: float = math.inf) -> Cell:
    return Cell(value, error, error, degrees)


def test_quantiles_of_tables() -> None:
    assert [round(quantile(degrees), 3) for degrees in (1, 2, 4, math.inf)] == [12.706, 4.303, 2.776, 1.960]
    assert half_width(cell(1.0, 0.5, 2)) == pytest.approx(4.303 * 0.5, rel=1e-3)
    assert half_width(cell(1.0, None)) is None


def test_welch_by_hand() -> None:
    # Variances of the means 1/4 and 1 with 9 and 4 degrees of freedom: (5/4)^2 / (1/144 + 1/4) = 6.08.
    gap = difference(cell(3.0, 0.5, 9), cell(1.0, 1.0, 4))
    assert gap.value == 2.0
    assert gap.half_width == pytest.approx(max(quantile(6.0811) * 1.25**0.5, quantile(4)), rel=1e-4)
    assert difference(cell(3.0, None), cell(1.0, 1.0)).half_width is None
    assert difference(cell(3.0, 0.0, 1), cell(1.0, 0.0, 1)).half_width == 0.0


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """At least 95 % of 2,000 intervals of two to five runs with unequal spreads: fewer than 93 % with a probability
    below 1e-4 (binomial)."""
    generator = np.random.default_rng(0)
    for n, m in ((2, 2), (2, 5), (3, 3), (5, 4)):
        covered = 0
        for _ in range(2000):
            ours, theirs = generator.normal(0, 1, n), generator.normal(0, 3, m)
            gap = difference(mean_and_standard_error(ours, ours), mean_and_standard_error(theirs, theirs))
            covered += gap.low <= 0 <= gap.high
        assert covered >= 0.93 * 2000, (n, m)


ERRORS = (0.0, *np.geomspace(1e-3, 1e3, 25), None)
DEGREES = (1, 2, 3, 9, 19, math.inf)


def test_an_interval_never_becomes_narrower_as_an_error_grows() -> None:
    for ours, theirs in itertools.product(DEGREES, repeat=2):
        for fixed in (0.0, 0.1, 1.0):
            widths = [difference(cell(0, e, ours), cell(0, fixed, theirs)).half_width for e in ERRORS]
            widths = [math.inf if width is None else width for width in widths]
            assert widths == sorted(widths)


def verdict(comparison: Comparison, *cells: Cell) -> str:
    """The decision on a claim of one comparison of rows a, b, ... with these cells."""
    column = Column("m", "M", "maximize", margin=1.0)
    rows = tuple(Row(name, name) for name in ascii_lowercase[: len(cells)])
    claim = Claim("c", (comparison,))
    table = Table("t", "T", {"m": column}, rows)
    run: tuple = (None,)  # type: ignore[type-arg]
    lines = tuple(Line(row, run, {"m": cell}) for row, cell in zip(rows, cells, strict=True))
    return judge(Report(table, "paper", "cpu", (), lines), claim).decision


COMPARISONS = (
    Comparison("m", better="a", than=("b",)),
    Comparison("m", not_worse="a", than=("b",)),
    Comparison("m", row="a", at_least=0.0),
    Comparison("m", row="a", at_most=0.0),
)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_inflating_an_error_never_turns_a_verdict_into_shown(comparison: Comparison) -> None:
    """Nor into contradicted: a larger error can only open."""
    seen = set()
    for gap, ours, theirs, fixed in itertools.product((-3, -1, -0.5, 0, 0.5, 3), DEGREES, DEGREES, (0.0, 0.3, 1.0)):
        for first in (True, False):
            found = []
            for error in ERRORS:
                inflated, other = cell(gap, error, ours), cell(0.0, fixed, theirs)
                if not first:
                    inflated, other = cell(gap, fixed, ours), cell(0.0, error, theirs)
                found.append(verdict(comparison, inflated, other))
            opened = found.index("open") if "open" in found else len(found)
            assert set(found[opened:]) <= {"open"}, (gap, ours, theirs, fixed, found)
            assert len(set(found[:opened])) <= 1
            seen |= set(found)
    assert seen == {"shown", "contradicted", "open"}


def test_not_worse_is_judged_by_its_margin() -> None:
    """The case that was called shown for its error: -0.6 with a standard error of 3.5."""
    comparison = COMPARISONS[1]
    assert verdict(comparison, cell(-0.6, 3.5, 2), cell(0.0, 1.0, 2)) == "open"
    assert verdict(comparison, cell(-0.6, 0.05, 2), cell(0.0, 0.05, 2)) == "shown"
    assert verdict(comparison, cell(-1.6, 0.05, 2), cell(0.0, 0.05, 2)) == "contradicted"


@pytest.mark.parametrize("kind", ["better", "not_worse"])
def test_chance_contradicts_a_claim_of_many_comparisons_as_rarely_as_one_of_one(kind: str) -> None:
    """Of a row with 20 others that lie on the limit. In 400 draws more than 38 have a probability below 1e-4, if each
    has one of 5 % (binomial). With the intervals of single comparisons there are 72.
    """
    generator = np.random.default_rng(0)
    comparison = Comparison("m", than=tuple(ascii_lowercase[1:21]), **{kind: "a"})
    truth = 0.0 if kind == "better" else 1.0  # the margin
    wrong, alone = 0, 0
    for _ in range(400):
        runs = [generator.normal(truth if place else 0.0, 1.0, 5) for place in range(21)]
        cells = [mean_and_standard_error(values, values) for values in runs]
        wrong += verdict(comparison, *cells) == "contradicted"
        alone += any(difference(cells[0], other).high < -truth for other in cells[1:])
    assert wrong <= 38
    assert alone > 38
    assert verdict(comparison, cell(0.0, 0.1, 4), *[cell(5.0, 0.1, 4)] * 20) == "contradicted"


def normal(*shapes: tuple[float, int], seed: int = 0) -> list[np.ndarray]:
    """A task a pair: its mean and its number of runs; standard deviation 1."""
    generator = np.random.default_rng(seed)
    return [generator.normal(mean, 1.0, n) for mean, n in shapes]


def test_statistics_over_tasks_by_hand() -> None:
    scores = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 100.0])]
    assert interquartile_mean(scores) == pytest.approx((2 + 3 + 4 + 5) / 4)  # without the outlier
    assert performance_profile(scores, np.array([-1.0, 1.0, 50.0])).tolist() == [1.0, (0.5 + 1) / 2, (0 + 0.25) / 2]
    assert probability_of_improvement([np.array([1.0, 3.0])], [np.array([1.0, 2.0])]) == (0.5 + 0 + 1 + 1) / 4
    cell = mean_over_tasks([np.array([0.0, 2.0]), np.array([4.0, 4.0])])
    assert (cell.value, cell.standard_error, cell.degrees) == (2.5, 0.5, 1.0)  # of one task's two runs
    assert mean_over_tasks([np.array([0.0]), np.array([1.0, 2.0])]).standard_error is None


def test_the_stratified_bootstrap_covers() -> None:
    """Of two tasks with ten runs each. A percentile bootstrap of so few runs covers about 93 %; fewer than 84 % of 200
    intervals then have a probability below 1e-4 (binomial).
    """
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(interquartile_mean, normal((0.0, 10), (0.0, 10), seed=seed), resamples=200)
        covered += low <= 0.0 <= high
    assert covered >= 0.84 * 200


def test_resampling_stays_within_tasks() -> None:
    scores = [np.zeros(5), np.ones(7)]
    assert [task.tolist() for task in resampled(scores, np.random.default_rng(0))] == [[0.0] * 5, [1.0] * 7]
    low, high = improvement_interval([np.full(5, 2.0)], [np.ones(5)])
    assert (low, high) == (1.0, 1.0)
