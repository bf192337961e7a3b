"""Search spaces and draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from structgrad.experiments.space import SpaceError, draw, merged

SPACE: dict[str, Any] = {
    "lr": {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2},
    "dropout": {"distribution": "uniform", "low": 0.0, "high": 0.5},
    "kind": {"distribution": "choice", "values": ["a", "b", None]},
}


def test_a_draw_is_a_function_of_the_trial() -> None:
    first = draw(SPACE, {}, "table", "row", 3)
    assert draw(SPACE, {}, "table", "row", 3) == first
    assert draw({"lr": SPACE["lr"]}, {}, "table", "row", 3) == {"lr": first["lr"]}
    assert draw(SPACE, {}, "table", "row", 4) != first
    assert draw(SPACE, {}, "table", "other", 3) != first


def test_draws_follow_their_distributions() -> None:
    # Means of 4,000 draws within 4.4 standard errors: a false alarm in 1 of 1e5 of these three checks.
    draws = [draw(SPACE, {}, "t", "r", i) for i in range(4000)]
    logs = np.log10([d["lr"] for d in draws])
    assert logs.min() >= -4
    assert logs.max() <= -2
    assert abs(logs.mean() + 3) < 4.4 * (2 / math.sqrt(12)) / math.sqrt(4000)
    assert abs(np.mean([d["dropout"] for d in draws]) - 0.25) < 4.4 * (0.5 / math.sqrt(12)) / math.sqrt(4000)
    assert abs(np.mean([d["kind"] is None for d in draws]) - 1 / 3) < 4.4 * math.sqrt(2 / 9) / math.sqrt(4000)


def test_conditions() -> None:
    space = merged(SPACE, {"extra": {"distribution": "uniform", "low": 0, "high": 1, "when": {"kind": ["a", "b"]}}})
    for index in range(20):
        drawn = draw(space, {}, "t", "r", index)
        assert ("extra" in drawn) == (drawn["kind"] in ("a", "b"))
    fixed = merged({"x": {"distribution": "uniform", "low": 0, "high": 1, "when": {"estimator.kl": "utility"}}})
    assert "x" in draw(fixed, {"estimator.kl": "utility"}, 0)
    assert "x" not in draw(fixed, {"estimator.kl": "distribution"}, 0)


def test_later_spaces_override_and_null_takes_away() -> None:
    narrower = {"lr": {"distribution": "log_uniform", "low": 1e-3, "high": 2e-3}}
    assert merged(SPACE, narrower, {"kind": None, "dropout": None}) == narrower


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"x": {"distribution": "normal", "low": 0, "high": 1}}, "search.x: distribution normal is none of uniform"),
        ({"x": {"distribution": "uniform", "low": 0}}, "search.x: uniform takes high and low, not low"),
        ({"x": {"distribution": "uniform", "low": 1, "high": 1}}, "is empty"),
        ({"x": {"distribution": "log_uniform", "low": 0, "high": 1}}, "not positive"),
        ({"x": {"distribution": "choice", "values": []}}, "must be a list"),
        ({"x": {"distribution": "choice", "values": 3}}, "must be a list"),
        ({"x": {"distribution": "choice", "values": "abc"}}, "must be a list"),
        ({"x": {"distribution": "uniform", "low": None, "high": 1}}, "the bound None is no finite number"),
        ({"x": {"distribution": "uniform", "low": "a", "high": "b"}}, "the bound 'a' is no finite number"),
        ({"x": {"distribution": "uniform", "low": 0, "high": math.inf}}, "the bound inf is no finite number"),
        (
            {"x": {"distribution": "uniform", "low": 0, "high": 1, "when": 3}},
            "when takes keys with their values",
        ),
        ({"x": 3}, "search.x: 3 is no distribution"),
    ],
)
def test_errors(space: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        merged(space)


def test_conditions_in_a_circle() -> None:
    one = {"distribution": "uniform", "low": 0, "high": 1}
    with pytest.raises(SpaceError, match="wait for each other"):
        draw({"x": {**one, "when": {"y": 1}}, "y": {**one, "when": {"x": 1}}}, {}, 0)
