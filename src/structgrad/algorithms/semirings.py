"""Three ways to aggregate the alternatives of a dynamic program: log-sum, maximum, random draw.

A dynamic program adds the scores of what it combines, and aggregates alternatives by ``plus(values,
dim)``. With :func:`log_sum` it computes a log-partition function and with :func:`best` a maximum.
The gradient in the scores is then the mean or a best vertex (Eisner 2016; Mensch and Blondel 2018).

:func:`draw` has the values of :func:`log_sum`. It sends its gradient to one alternative, drawn in
proportion to its share. The gradient of the program is then an exact sample. This is ancestral
sampling from the last aggregation back to the first (Rush 2020, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: ``(values, dim) -> aggregated``, without that dimension.
Aggregation = Callable[[Tensor, int], Tensor]

#: The value of an impossible event, for float64 only. It is finite, so the difference of two is not
#: NaN. It is far below any sum of scores, even of the lowest float32 number, so the exponential of
#: the difference is 0.
IMPOSSIBLE = -1e300


def log_sum(values: Tensor, dim: int) -> Tensor:
    """``log sum exp``, differentiable to any order.

    Its gradient is a quotient of sums. The gradient of ``torch.logsumexp``, ``exp(value -
    result)``, suffers from the rounding of the result. At scores of 1e7 that error is 1e-9;
    multiplied by such a score it is 1 % of an entropy.
    """
    top = values.detach().amax(dim, keepdim=True)
    return (values - top).exp().sum(dim).log() + top.squeeze(dim)


def best(values: Tensor, dim: int) -> Tensor:
    """The maximum; its gradient goes to one of the best alternatives."""
    return values.max(dim).values


def draw(values: Tensor, dim: int) -> Tensor:
    """``log sum exp``. Its gradient goes to one alternative, drawn anew for every aggregation."""
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
