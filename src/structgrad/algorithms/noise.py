"""Standard noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_exponentials(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Standard exponential noise in float64, positive, on the device of ``like``.

    Its shape is that of ``like`` unless ``shape`` is given. The type is float64 because callers
    take the logarithm or quotients of the noise. In float32 the smallest value that torch draws is
    2^-24, which cuts the tail of a Gumbel at 16.6 and makes ties there.
    """
    if shape is None:  # under vmap each example gets its own noise
        noise = torch.empty_like(like, dtype=torch.float64, memory_format=torch.contiguous_format)
    else:
        noise = torch.empty(shape, dtype=torch.float64, device=like.device)
    return noise.exponential_().clamp_min_(torch.finfo(torch.float64).tiny)
