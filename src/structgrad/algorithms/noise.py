"""Standard noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_exponentials(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Standard exponential noise in float64, positive, on the device of ``like`` and in its shape unless one is given.

    In float64 because what is wanted is their logarithm or their quotient: in float32 the smallest value that torch
    draws is 2^-24, which cuts the tail of a Gumbel at 16.6 and makes ties there.
    """
    if shape is None:  # under vmap a tensor of its own for each example
        noise = torch.empty_like(like, dtype=torch.float64, memory_format=torch.contiguous_format)
    else:
        noise = torch.empty(shape, dtype=torch.float64, device=like.device)
    return noise.exponential_().clamp_min_(torch.finfo(torch.float64).tiny)
