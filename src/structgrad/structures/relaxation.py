"""Relaxations of a structure's argmax, described as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Regularizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Relaxation:
    """A point of conv(X), or a bespoke substitute, that stands in for the vertex ``argmax_x <x, u>``.

    Attributes:
        method: name of the structure's method ``(utility, mask) -> relaxed vertex``.
        regularizer: the term of one part in f, elementwise, where the relaxation is ``argmax_x <x, u> - f(x)`` over
            conv(X) and f is a sum over parts. None for another f, or for no f.
        symmetric: whether the Jacobian is symmetric, as that of every ``argmax_x <x, u> - f(x)`` with convex f.
        draws: how many independent utilities the method takes, ``[draws, *batch, *parts]``. None for one utility
            ``[*batch, *parts]``.
        takes_temperature: whether the method has the keyword ``temperature``, by which its utility was divided.
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
