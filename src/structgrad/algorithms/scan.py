"""Products of a sequence of matrices over a semiring, in a number of steps that is logarithmic in
its length.

Neighbours are multiplied, then neighbours of the products, and so on. This is a parallel scan
(Blelloch 1990) of which only the last value is kept. For n matrices of size C it takes O(n C^3)
work and memory, in about ``log2(n)`` launches of each kernel. A loop from left to right would take
O(n C^2) in n launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation


def chain_total(scores: Tensor, length: Tensor, plus: Aggregation) -> Tensor:
    """The aggregate of all paths through the first ``length`` matrices; 0 if ``length`` is 0.

    Args:
        scores: float64 ``[*batch, n, C, C]``, ``IMPOSSIBLE`` for a missing transition.
        length: int64 ``[*batch]``.
        plus: aggregates alternatives along a dimension. Each aggregate is part of a path at most
            once.

    Returns:
        ``[*batch]``, differentiable as often as ``plus``; near ``IMPOSSIBLE`` if there is no path.
    """
    n, labels = scores.shape[-3], scores.shape[-1]
    device = scores.device
    if not n:
        return scores.sum((-3, -2, -1))  # an empty sum, but connected to the graph
    beyond = (torch.arange(n, device=device) >= length[..., None])[..., None, None]
    unit = scores.new_zeros(labels, labels)
    unit = unit.masked_fill(~torch.eye(labels, dtype=torch.bool, device=device), IMPOSSIBLE)
    left = torch.where(beyond, unit, scores)
    while left.shape[-3] > 1:
        pairs = left.shape[-3] // 2
        both = left[..., : 2 * pairs, :, :].unflatten(-3, (pairs, 2))
        product = plus(both[..., 0, :, :, None] + both[..., 1, None, :, :], -2)
        # Otherwise sums of impossible values would grow without bound.
        product = torch.where(product < IMPOSSIBLE / 2, IMPOSSIBLE, product)
        left = torch.cat([product, left[..., 2 * pairs :, :, :]], -3)
    return torch.where(length > 0, plus(left[..., 0, :, :].flatten(-2), -1), 0.0)
