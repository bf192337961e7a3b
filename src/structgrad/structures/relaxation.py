"""Relaxations of a structure's argmax, described as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Regularizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Relaxation:
    """A relaxation replaces the vertex ``argmax_x <x, u>`` by a point of conv(X), or by a bespoke
    substitute.

    Attributes:
        method: name of the structure's method ``(utility, mask) -> relaxed vertex``.
        regularizer: the term of one part in f, elementwise, if the relaxation is ``argmax_x <x, u>
            - f(x)`` over conv(X) and f is a sum over parts. None for another f, or for no f.
        symmetric: whether the Jacobian is symmetric, as for every ``argmax_x <x, u> - f(x)`` with
            convex f.
        draws: the number of independent utilities of the method, ``[draws, *batch, *parts]``. None
            for one utility ``[*batch, *parts]``.
        takes_temperature: whether the method has the keyword ``temperature``, the divisor of its
            utility.
    """

    method: str
    regularizer: Regularizer | None = None
    symmetric: bool = False
    draws: int | None = None
    takes_temperature: bool = False


def half_square(x: Tensor) -> Tensor:
    """``x^2 / 2``: the regularizer of Euclidean projections."""
    return x.square() / 2


def negative_entropy(x: Tensor) -> Tensor:
    """``x log x - x``: the regularizer of categorical relaxations and of Sinkhorn's."""
    return torch.xlogy(x, x) - x


def negative_binary_entropy(x: Tensor) -> Tensor:
    """``x log x + (1 - x) log(1 - x)``: the regularizer of relaxations with independent bits."""
    return torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)


__all__ = ["Regularizer", "Relaxation", "half_square", "negative_binary_entropy", "negative_entropy"]
