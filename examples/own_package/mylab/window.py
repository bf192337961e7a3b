"""A structure: one window of fixed width in a sequence."""

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse
from structgrad.structures import ActiveSetProjection, Gibbs, KBest, Vector


class Window(Gibbs, KBest, ActiveSetProjection):
    """The vectors with ``width`` neighbouring ones: ``n - width + 1`` vertices over ``n`` parts.

    Three oracles are written below. The mixins derive the others: marginals, log_prob and entropy from
    ``log_partition``; top_k, project and sparsemap from ``argmax``.

    Args:
        width: number of ones.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self, width: int) -> None:
        self.width, self.layout = width, Vector()

    def enumerate(self, *shape: int) -> Tensor:
        """All windows, left to right."""
        (n,) = shape
        start = torch.arange(max(n - self.width + 1, 0))[:, None]
        position = torch.arange(n)
        return ((position >= start) & (position < start + self.width)).double()

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The window of the highest sum."""
        every, values = self._values(utility, mask)
        return every[values.argmax(-1)]

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Over all windows."""
        return self._values(scores, mask)[1].logsumexp(-1)

    def _values(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        self.check(scores, mask)
        every = self.enumerate(scores.shape[-1]).to(scores)
        exists = self.parts(scores, mask)
        # A window over a missing part does not exist.
        crosses = (~exists).to(scores) @ every.T > 0
        refuse(crosses.all(-1), f"has no window of {self.width}")
        return every, (torch.where(exists, scores, 0.0) @ every.T).masked_fill(crosses, -torch.inf)
