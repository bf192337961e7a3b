"""Structured arithmetic is exempt from autocast: products in half precision would lose digits.

The model that makes the scores and the objective may run under autocast. The oracles and estimators
between them compute in the precision of the scores, or in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _device(arguments: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """The type of device of the first tensor, if autocast is on there."""
    for value in (*arguments, *named.values()):
        if isinstance(value, Tensor):
            kind = value.device.type
            return kind if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) else None
    return None


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with autocast switched off on the device of its first tensor."""

    @functools.wraps(function)
    def exempt(*arguments: P.args, **named: P.kwargs) -> R:
        kind = _device(arguments, named)
        if kind is None:
            return function(*arguments, **named)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **named)

    return exempt


def under_autocast_of(like: Tensor, function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with today's state of autocast on the device of ``like``, wherever it is called."""
    kind = _device((like,), {})
    if kind is None:
        return function
    dtype = torch.get_autocast_dtype(kind)

    @functools.wraps(function)
    def restored(*arguments: P.args, **named: P.kwargs) -> R:
        with torch.autocast(kind, dtype=dtype):
            return function(*arguments, **named)

    return restored


__all__ = ["under_autocast_of", "without_autocast"]
