"""A structure: several windows of fixed width in a sequence, e.g. the passages that explain a rating (task l2x)."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation
from structgrad.structures import ActiveSetProjection, DynamicProgram, KBest, Vector


class Windows(DynamicProgram, KBest, ActiveSetProjection):
    """The vectors whose ones are ``k`` windows of ``width`` neighbouring parts that do not overlap.

    One dynamic program is written below. The mixins derive argmax, log_partition, sample and what follows from these.
    Steps: the number of parts; memory k a step.

    Args:
        k: number of windows.
        width: of each.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self, k: int, width: int) -> None:
        self.k, self.width, self.layout = k, width, Vector()

    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        n, width = scores.shape[-1], self.width
        nothing = F.pad(scores.new_zeros(*scores.shape[:-1], 1), (0, self.k), value=IMPOSSIBLE)
        # Best, or sum, of 0 to k windows among the first i parts: [*batch, k + 1].
        first = [nothing] * min(width, n + 1)
        for end in range(width, n + 1):
            window = scores[..., end - width : end].sum(-1, keepdim=True)
            with_it = F.pad(first[end - width][..., :-1] + window, (1, 0), value=IMPOSSIBLE)
            first.append(plus(torch.stack([first[end - 1], with_it], -1), -1))
        return first[n][..., self.k]

    def enumerate(self, *shape: int) -> Tensor:
        """All placements: choose k of the places that are left when each window takes one."""
        (n,) = shape
        places = torch.combinations(torch.arange(max(n - self.k * (self.width - 1), 0)), self.k)
        start = places + (self.width - 1) * torch.arange(self.k)
        position = torch.arange(n)
        inside = (position >= start[..., None]) & (position < start[..., None] + self.width)
        return inside.any(1).double()
