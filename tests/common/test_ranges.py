"""Options that count things are whole numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from structgrad import estimators
from structgrad.common.ranges import check_count
from structgrad.structures import (
    BudgetSubset,
    Constituency,
    CorrelatedKSubset,
    HiddenMarkov,
    KSubset,
    LinearChain,
    OneHot,
)


@pytest.mark.parametrize("value", [2.0, 2.5, True, "2", None])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("k", KSubset),
        ("k", CorrelatedKSubset),
        ("budget", BudgetSubset),
        ("labels", LinearChain),
        ("labels", Constituency),
        ("states", HiddenMarkov),
        ("n_samples", lambda n: estimators.SST(OneHot(), n_samples=n)),
        ("n_samples", lambda n: estimators.Reinforce(OneHot(), n_samples=n)),
        ("n_samples", lambda n: estimators.REBAR(OneHot(), n_samples=n)),
        ("n_conditional", lambda n: estimators.GumbelRao(OneHot(), n_conditional=n)),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_count_is_a_whole_number(name: str, make: Callable[[object], object], value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a whole number; got {value!r}"):
        make(value)


def test_integers_of_numpy_are_counts() -> None:
    check_count("k", np.int64(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1 and at most 3; got 4"):
        check_count("k", 4, most=3)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        KSubset(0)
