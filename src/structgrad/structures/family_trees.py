"""What directed and undirected spanning trees have in common."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms import matrix_tree
from structgrad.algorithms.eager import refuse_transforms, values_can_be_read
from structgrad.algorithms.k_best import k_best
from structgrad.structures.base import Trace
from structgrad.structures.derived import ActiveSetProjection


class Tree(ActiveSetProjection, abc.ABC):
    """Spanning trees over the parts ``[n, n]``; what tells them apart is at the end."""

    constant_size: ClassVar[bool] = True

    # --- the best one ---------------------------------------------------------------------------------------------

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A tree of highest utility, exact."""
        return self._minimum(utility, mask, sign=-1.0).vertex

    def _minimum(self, costs: Tensor, mask: Tensor | None, sign: float) -> Trace:
        flat, exists = self._flat(costs, mask)
        vertex, choices, reached = self._solve(flat, exists, sign)
        self._refuse(~reached, costs)
        return Trace(vertex.reshape(costs.shape), choices.reshape(*costs.shape[:-2], *choices.shape[1:]))

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best trees, exact, by at most ``k (n - 1) + 1`` argmaxes; see ``k_best``."""
        self.argmax(scores, mask)  # refuses what has no vertex
        flat, exists = self._flat(scores, mask)

        def solve(allowed: Tensor, forced: Tensor) -> Tensor:
            costs, open_ = self._constrained(flat[:, None].expand(allowed.shape), allowed, forced)
            vertex, _, _ = self._solve(costs.flatten(0, 1), open_.flatten(0, 1), -1.0)
            return (vertex.reshape(allowed.shape) > 0) & exists[:, None]

        vertices, values = k_best(flat, exists, k, solve)
        shown = self.layout.mirror(vertices.to(scores.dtype))
        batch = scores.shape[:-2]
        return shown.reshape(*batch, *shown.shape[1:]), values.reshape(*batch, k)

    # --- the Gibbs distribution -----------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log sum_x exp <x, s>`` by the matrix-tree theorem."""
        return self._log_partition(scores, mask).to(scores.dtype)

    def log_prob(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``<vertex, s> - log Z``."""
        log_partition = self._log_partition(scores, mask)
        return (self.inner(vertex.double(), scores.double(), mask) - log_partition).to(scores.dtype)

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log Z - <mu, s>``, in float64 inside."""
        wide = scores.double()
        expected = self.inner(self.marginals(wide, mask), torch.where(self.parts(wide, mask), wide, 0.0), mask)
        return (self._log_partition(wide, mask) - expected).to(scores.dtype)

    def _log_partition(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        logz = matrix_tree.log_partition(*self._rooted(*self._flat(scores, mask)))
        self._refuse(logz == -torch.inf, scores)
        return logz.reshape(scores.shape[:-2])

    # --- helpers --------------------------------------------------------------------------------------------------

    def _flat(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores and existing parts, checked, ``[B, n, n]`` and contiguous."""
        self.check(scores, mask)
        refuse_transforms(scores, self.name)
        batch = scores.shape[:-2].numel()
        exists = self.parts(scores, mask).reshape(batch, *scores.shape[-2:])
        return scores.reshape(exists.shape).contiguous(), exists.contiguous()

    def _refuse(self, unreached: Tensor, scores: Tensor) -> None:
        """Raise if an example (of the flattened batch) has no tree, where that can be seen for free."""
        if values_can_be_read(unreached) and bool(unreached.any()):
            index = int(unreached.nonzero()[0, 0])
            example = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), scores.shape[:-2] or (1,)))
            raise ValueError(f"example {example} has no {self._lacking()}")

    # --- what tells them apart ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _solve(self, costs: Tensor, exists: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
        """The trees of least ``sign * costs`` ``[B, n, n]``, what the algorithm chose, and whether there is a tree."""

    @abc.abstractmethod
    def _constrained(self, scores: Tensor, allowed: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and parts, of the shape of the arguments, of which the best tree has all ``forced`` parts."""

    @abc.abstractmethod
    def _rooted(self, flat: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, parts ``[B, n, n]`` and roots ``[B]`` of the arborescences that are summed over."""

    @abc.abstractmethod
    def _lacking(self) -> str:
        """What an example without a tree lacks, and why, for the message."""
