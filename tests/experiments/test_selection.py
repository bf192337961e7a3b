"""Selection rules against closed forms and cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from structgrad.experiments.selection import RULES, Cell, best_trial, ranking
from structgrad.experiments.statistics import difference, half_width


@pytest.mark.parametrize("n", [2, 3, 20, 25])
def test_the_bootstrap_agrees_with_resampling(n: int) -> None:
    # The relative error of a standard deviation over 1e5 draws is below 1 % here with far more than 99.9 %
    # confidence; the seed is fixed.
    generator = np.random.default_rng(n)
    validation, test = generator.normal(size=n), generator.normal(size=n)
    cell = best_trial(validation, test)
    assert cell.value == test[validation.argmax()]
    for found, draws in ((cell.shown, n), (cell.standard_error, round(n**0.5))):
        selected = generator.integers(0, n, size=(100_000, draws)).min(axis=1)
        assert found == pytest.approx(test[np.argsort(-validation)][selected].std(), rel=0.01)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_intervals_of_a_selection_cover_what_a_repeated_search_finds(n: int) -> None:
    """Qualities are normal, and validation and test see them with noise. Of 2,000 intervals 90 % or more cover the mean
    of all searches. With a coverage of 92 %, fewer have a probability below 1e-3 (binomial). Those of the paper's error
    miss more often with 20 trials, a quarter of the time. Two searches of the same are apart in 5 % at most.
    """
    generator = np.random.default_rng(n)
    quality = generator.normal(size=(2000, n))
    cells = [best_trial(q + generator.normal(0, 0.05, n), q + generator.normal(0, 0.05, n)) for q in quality]
    truth = np.mean([cell.value for cell in cells])
    covered = np.mean([abs(cell.value - truth) <= half_width(cell) for cell in cells])
    assert covered >= 0.9
    alone = [abs(c.value - truth) <= half_width(Cell(c.value, c.shown, c.shown, c.degrees)) for c in cells]
    assert np.mean(alone) < (0.8 if n == 20 else covered)
    gaps = [difference(ours, theirs) for ours, theirs in zip(cells[::2], cells[1::2], strict=True)]
    assert np.mean([gap.low > 0 or gap.high < 0 for gap in gaps]) <= 0.05


def test_by_hand() -> None:
    # Of two runs the better is missing from a resample with probability 1/4: a Bernoulli variable times 4.
    # One draw, the root of two, is either.
    cell = best_trial([0.1, 0.9], [1.0, 5.0])
    assert cell.value == 5.0
    assert cell.shown == pytest.approx(4 * np.sqrt(3 / 16))
    assert cell.standard_error == pytest.approx(2.0)
    # Equal test metrics: whatever is selected, the number is the same.
    assert best_trial([1.0, 2.0, 3.0], [7.0, 7.0, 7.0]).standard_error == 0.0
    assert best_trial([1.0], [3.0]) == Cell(3.0, None, None)


def test_ties_go_to_the_first_and_what_is_no_number_is_refused() -> None:
    assert ranking([1.0, 2.0, 2.0]).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="not a number"):
        ranking([1.0, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        best_trial([], [])


def test_over_seeds() -> None:
    values = [1.0, 2.0, 3.0]
    assert RULES["mean_and_standard_error"](values, values).show(digits=2) == "2.00 ± 0.58"
    deviation = RULES["mean_and_standard_deviation"](values, values)
    assert deviation.show(digits=2) == "2.00 ± 1.00"
    assert deviation.standard_error == pytest.approx(1 / 3**0.5)
    for rule in RULES.values():
        assert rule([1.0], [2.0]).show() == "2.0"
