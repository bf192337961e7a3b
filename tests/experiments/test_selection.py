"""Selection rules against closed forms and cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from structgrad.experiments.selection import RULES, Cell, best_trial, ranking


@pytest.mark.parametrize("n", [2, 3, 20, 25])
def test_the_bootstrap_agrees_with_resampling(n: int) -> None:
    # The relative error of a standard deviation over 1e5 draws is below 1 % here with far more than 99.9 %
    # confidence; the seed is fixed.
    generator = np.random.default_rng(n)
    validation, test = generator.normal(size=n), generator.normal(size=n)
    cell = best_trial(validation, test)
    assert cell.value == test[validation.argmax()]
    selected = generator.integers(0, n, size=(100_000, n)).min(axis=1)
    assert cell.standard_error == pytest.approx(test[np.argsort(-validation)][selected].std(), rel=0.01)


def test_by_hand() -> None:
    # Of two runs the better is missing from a resample with probability 1/4: a Bernoulli variable times 4.
    cell = best_trial([0.1, 0.9], [1.0, 5.0])
    assert cell.value == 5.0
    assert cell.standard_error == pytest.approx(4 * np.sqrt(3 / 16), rel=0.01)
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
