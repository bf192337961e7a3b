"""Three ways to aggregate the alternatives of a dynamic program: their log-sum, the best one, or one drawn at random.

A dynamic program that adds the scores of what it combines and aggregates alternatives by ``plus(values, dim)`` computes
a log-partition function with :func:`log_sum` and a maximum with :func:`best`. Its gradient in the scores is then the
mean and a best vertex (Eisner 2016; Mensch and Blondel 2018). With :func:`draw`, which has the values of
:func:`log_sum` and sends its gradient to one alternative, drawn in proportion to its share, the gradient is an exact
sample: ancestral sampling, from the last aggregation back to the first (Rush 2020, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: ``(values, dim) -> aggregated``, without the dimension.
Aggregation = Callable[[Tensor, int], Tensor]

#: The value of what cannot be: finite, so that no difference of two such is NaN; far below any sum of scores, also of
#: the lowest number of float32, so that the exponential of the difference is 0. For float64 only.
IMPOSSIBLE = -1e300


def log_sum(values: Tensor, dim: int) -> Tensor:
    """``log sum exp``, differentiable to any order.

    Its gradient is a quotient of sums. That of ``torch.logsumexp``, ``exp(value - result)``, has the rounding of the
    result: 1e-9 at scores of 1e7, which times such a score is 1 % of an entropy.
    """
    top = values.detach().amax(dim, keepdim=True)
    return (values - top).exp().sum(dim).log() + top.squeeze(dim)


def best(values: Tensor, dim: int) -> Tensor:
    """The maximum; its gradient goes to one of the best alternatives."""
    return values.max(dim).values


def draw(values: Tensor, dim: int) -> Tensor:
    """``log sum exp``, whose gradient goes to one alternative, drawn anew for every aggregation."""
    drawn: Tensor = _Draw.apply(values, dim)
    return drawn


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(values)
        return values.logsumexp(dim)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        # The Gumbel-max trick; exponentials of float64 are never 0.
        noise = torch.empty_like(values, dtype=torch.float64).exponential_().log()
        choice = (values - noise).argmax(ctx.dim, keepdim=True)
        return torch.zeros_like(values).scatter(ctx.dim, choice, upstream.unsqueeze(ctx.dim)), None
