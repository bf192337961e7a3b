"""The search space of a sweep: the ``search`` key of a configuration, and draws from it.

A draw depends on the trial's number only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Space = dict[str, dict[str, Any]]
_KEYS = {"uniform": {"low", "high"}, "log_uniform": {"low", "high"}, "choice": {"values"}}


class SpaceError(ValueError):
    """A search space is wrong; the message is one line."""


def merged(*spaces: Mapping[str, Any]) -> Space:
    """Merge spaces. Later ones override earlier ones; null removes a hyper-parameter.

    Raises:
        SpaceError: for an unknown distribution, for one with wrong keys or values, or for an empty
            range.
    """
    together: dict[str, Any] = {}
    for space in spaces:
        together.update(space)
    for key, value in together.items():
        if value is not None and not isinstance(value, Mapping):
            raise SpaceError(f"search.{key}: {value!r} is no distribution; null removes a hyper-parameter")
    chosen: Space = {key: dict(value) for key, value in together.items() if value is not None}
    for key, value in chosen.items():
        _check(key, value)
    return chosen


def _check(key: str, value: Mapping[str, Any]) -> None:
    kind = value.get("distribution")
    if kind not in _KEYS:
        raise SpaceError(f"search.{key}: distribution {kind} is none of {', '.join(_KEYS)}")
    given = set(value) - {"distribution", "when"}
    if given != _KEYS[kind]:
        raise SpaceError(
            f"search.{key}: {kind} takes {' and '.join(sorted(_KEYS[kind]))}, not {', '.join(sorted(given))}"
        )
    if not isinstance(value.get("when", {}), Mapping):
        raise SpaceError(f"search.{key}: when takes keys with their values, not {value['when']!r}")
    if kind == "choice":
        if (
            not isinstance(value["values"], list)
            or not value["values"]
            or any(isinstance(v, list | dict) for v in value["values"])
        ):
            raise SpaceError(f"search.{key}: values must be a list of numbers, words or null")
        return
    for bound in (value["low"], value["high"]):
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            raise SpaceError(f"search.{key}: the bound {bound!r} is no finite number")
    if not value["low"] < value["high"] or (kind == "log_uniform" and value["low"] <= 0):
        raise SpaceError(f"search.{key}: the range [{value['low']}, {value['high']}] is empty or not positive")


def sample(space: Space, given: Mapping[str, Any], suggest: Callable[[str, Mapping[str, Any]], Any]) -> dict[str, Any]:
    """One value for each hyper-parameter whose condition holds.

    ``when: {key: value or [values]}`` draws a hyper-parameter only if another one, or a key of the
    configuration, has (one of) those values.

    Args:
        space: hyper-parameter -> distribution.
        given: values of configuration keys in conditions.
        suggest: draws one value.

    Raises:
        SpaceError: if two hyper-parameters wait for each other, or a condition has an unknown
            key.
    """
    drawn: dict[str, Any] = {}
    waiting = dict(space)
    while waiting:
        ready = [k for k, v in waiting.items() if all(c not in waiting for c in v.get("when", {}))]
        if not ready:
            raise SpaceError(f"search: the conditions of {', '.join(waiting)} wait for each other")
        for key in ready:
            value = waiting.pop(key)
            if all(_holds(condition, values, drawn, given) for condition, values in value.get("when", {}).items()):
                drawn[key] = suggest(key, value)
    return drawn


def _holds(condition: str, values: Any, drawn: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    allowed = values if isinstance(values, list) else [values]
    return drawn.get(condition, given.get(condition)) in allowed


def draw(space: Space, given: Mapping[str, Any], *trial: object) -> dict[str, Any]:
    """A random draw that is a function of ``trial`` alone, e.g. (table, row, number).

    Every hyper-parameter has its own generator, so a new one does not change the draws of the
    others.
    """

    def suggest(key: str, value: Mapping[str, Any]) -> Any:
        digest = hashlib.sha256("/".join(map(str, (*trial, key))).encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16]))
        if value["distribution"] == "choice":
            return value["values"][int(generator.integers(len(value["values"])))]
        if value["distribution"] == "uniform":
            return float(generator.uniform(value["low"], value["high"]))
        return math.exp(float(generator.uniform(math.log(value["low"]), math.log(value["high"]))))

    return sample(space, given, suggest)
