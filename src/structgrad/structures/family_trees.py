"""The common code of directed and undirected spanning trees."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms import matrix_tree
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.transforms import over_batch
from structgrad.structures import reading as readings
from structgrad.structures.base import Trace, repeated
from structgrad.structures.derived import ActiveSetProjection, Gibbs, KBest


class Tree(Gibbs, KBest, ActiveSetProjection, abc.ABC):
    """Spanning trees over the parts ``[n, n]``. The methods in which they differ are at the end."""

    constant_size: ClassVar[bool] = True

    # --- the best one ---------------------------------------------------------------------------------------------

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A tree of highest utility, exact."""
        return self._minimum(utility, mask, sign=-1.0).vertex

    def _minimum(self, costs: Tensor, mask: Tensor | None, sign: float) -> Trace:
        self.check(costs, mask)

        def solve(costs: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
            vertex, choices, reached = self._solve(*_matrices(costs, exists), sign)
            self._refuse(~reached, costs)
            return vertex.reshape(costs.shape), choices.reshape(*costs.shape[:-2], *choices.shape[1:])

        return Trace(*over_batch(solve, costs.detach(), self.parts(costs, mask)))

    def _constrained_argmax(self, scores: Tensor, allowed: Tensor, forced: Tensor, mask: Tensor | None) -> Tensor:
        costs, open_ = self._constrained(scores, allowed, forced)
        vertex, _, reached = self._solve(costs.flatten(0, 1).contiguous(), open_.flatten(0, 1), -1.0)
        # Without a tree, the chosen edges may be as many as a tree has, but contain a cycle.
        return (vertex * reached[:, None, None]).reshape(allowed.shape)

    def _branches(self, shape: torch.Size) -> int:
        return max(shape[-1] - 1, 0)  # the number of edges of a tree

    # --- the Gibbs distribution -----------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log sum_x exp <x, s>`` by the matrix-tree theorem."""
        return self._log_partition(scores, mask).to(scores.dtype)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._log_partition(scores, mask), self.marginals(scores, mask)

    def _log_partition(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        flat, exists = self._flat(scores, mask)
        logz = self._unshifted(matrix_tree.log_partition(*self._rooted(flat, exists)), flat, exists)
        self._refuse(logz == -torch.inf, scores)
        return logz.reshape(scores.shape[:-2])

    def _rooted_marginals(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Marginals ``[B, n, n]`` of the arborescences over which the partition function sums."""
        flat, exists, root = self._rooted(*self._flat(scores, mask))
        mean = matrix_tree.marginals(flat, exists, root)
        if values_can_be_read(mean):
            empty = mean.detach().sum((1, 2)) == 0  # without a tree, and of an example without parts
            if bool(empty.any()):
                self._refuse(empty & exists.flatten(1).any(1), scores)
        return mean

    # --- vertices as integers -------------------------------------------------------------------------------------

    def covered(self, vertex: Tensor) -> Tensor:
        return readings.among_touched(vertex)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _flat(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores and existing parts, checked, ``[B, n, n]`` and contiguous."""
        self.check(scores, mask)
        return _matrices(scores, self.parts(scores, mask))

    def _arborescences(self, scores: Tensor, mask: Tensor | None, n: int | None) -> Tensor:
        """Samples of the arborescences over which the partition function sums."""
        self.check(scores, mask)

        def draw(scores: Tensor, exists: Tensor, uniform: Tensor) -> tuple[Tensor]:
            flat, exists = _matrices(scores, exists)
            if values_can_be_read(flat):
                logz = matrix_tree.log_partition(*self._rooted(flat, exists))
                self._refuse(self._unshifted(logz, flat, exists) == -torch.inf, scores)
            noise = uniform.movedim(scores.dim() - 2, 0)
            trees = matrix_tree.sample_arborescences(
                *self._rooted(flat, exists), noise.reshape(noise.shape[0] * len(flat), *flat.shape[1:])
            )
            return (trees.reshape(noise.shape).movedim(0, scores.dim() - 2),)

        shape = repeated(scores, 1 if n is None else n).shape
        uniform = torch.rand(shape, dtype=torch.float64, device=scores.device).movedim(0, scores.dim() - 2)
        trees = over_batch(draw, scores.detach(), self.parts(scores, mask), uniform)[0].movedim(scores.dim() - 2, 0)
        return trees[0] if n is None else trees

    def _refuse(self, unreached: Tensor, scores: Tensor) -> None:
        """Raise if an example (of the flattened batch) has no tree, where reading values is free."""
        if values_can_be_read(unreached) and bool(unreached.any()):
            index = int(unreached.nonzero()[0, 0])
            example = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), scores.shape[:-2] or (1,)))
            raise ValueError(f"example {example} has no {self._lacking()}")

    # --- what tells them apart ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _solve(self, costs: Tensor, exists: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
        """The trees of least ``sign * costs`` ``[B, n, n]``, the algorithm's choices, and whether a
        tree exists.
        """

    @abc.abstractmethod
    def _constrained(self, scores: Tensor, allowed: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and parts, in the arguments' shape, whose best tree has all ``forced`` parts."""

    @abc.abstractmethod
    def _rooted(self, flat: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, parts ``[B, n, n]`` and roots ``[B]`` of the arborescences over which the
        partition function sums.
        """

    def _unshifted(self, logz: Tensor, flat: Tensor, exists: Tensor) -> Tensor:
        """Log Z ``[B]`` of the scores, from that of :meth:`_rooted`; -inf where there is no tree."""
        return logz

    @abc.abstractmethod
    def _lacking(self) -> str:
        """The message's words for what an example without a tree lacks, and why."""


def _matrices(scores: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """``[*batch, n, n]`` -> ``[B, n, n]``, contiguous."""
    shape = (scores.shape[:-2].numel(), *scores.shape[-2:])
    return scores.reshape(shape).contiguous(), exists.reshape(shape).contiguous()
