"""What the structures of dynamic programs have in common: everything but the recursion."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse, values_can_be_read
from structgrad.algorithms.gradients import value_and_gradient
from structgrad.algorithms.hypergraph import Hypergraph, known
from structgrad.algorithms.k_best import best_first
from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation
from structgrad.structures.derived import ActiveSetProjection, DynamicProgram


class Derivations(DynamicProgram, ActiveSetProjection):
    """Structures that are the derivations of a hypergraph (see :mod:`structgrad.algorithms.hypergraph`).

    A subclass writes its recursion once, as that graph, and has every oracle from it: ``argmax``, ``top_k``,
    ``log_partition``, ``marginals``, ``sample``, ``log_prob`` and ``entropy`` by passes over the graph, linear in the
    number of its edges (``top_k`` times k), compiled on the CPU and in plain torch elsewhere; ``project`` and
    ``sparsemap`` by the active-set method on ``argmax``. ``log_partition`` and ``marginals`` have derivatives of any
    order; the first of each is compiled.

    Raises:
        ValueError: from every oracle, in eager CPU code, if an example has no vertex.
    """

    # --- what tells them apart ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        """The recursion for parts of this shape; the graphs should be cached."""

    @abc.abstractmethod
    def _size(self, exists: Tensor) -> Tensor:
        """Which of the graph's goals an example has: int64 ``[*batch]``, of bool ``[*batch, *parts]``."""

    # --- every oracle ---------------------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log sum_x exp <x, s>``: ``[*batch]``, differentiable."""
        if not values_can_be_read(scores):
            return super().log_partition(scores, mask)
        if torch.is_grad_enabled() and scores.requires_grad:
            return self._moments(scores, mask)[0].to(scores.dtype)
        graph, flat, goal = self._flat(scores, mask)
        return self._known(graph.log_partition(flat, goal), scores).to(scores.dtype)

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A best vertex: ``[*batch, *parts]``, 0/1, no gradient."""
        if not values_can_be_read(utility):
            return super().argmax(utility, mask)
        graph, flat, goal = self._flat(utility.detach(), mask)
        value, vertex = graph.argmax(flat, goal)
        self._known(value, utility)
        return vertex.reshape(utility.shape).to(utility.dtype)

    def sample(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """One exact Gibbs sample an example: ``[*batch, *parts]``, 0/1, no gradient."""
        if not values_can_be_read(scores):
            return super().sample(scores, mask)
        graph, flat, goal = self._flat(scores.detach(), mask)
        value, vertex = graph.sample(flat, goal)
        self._known(value, scores)
        return vertex.reshape(scores.shape).to(scores.dtype)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best vertices, exact and distinct: ``[*batch, k, *parts]`` and ``[*batch, k]``.

        Raises:
            ValueError: for k < 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        graph, flat, goal = self._flat(scores.detach(), mask)
        if values_can_be_read(scores):
            values, vertices = graph.top_k(flat, goal, k)
            self._known(values[:, 0], scores)
        else:
            each = [
                value_and_gradient(lambda s, g, r=r: graph.best_totals(s, g, k)[:, r], flat, goal) for r in range(k)
            ]
            values, vertices = torch.stack([v for v, _ in each], 1), torch.stack([x for _, x in each], 1)
        real, (batch, parts) = values > IMPOSSIBLE / 2, self._split(scores)
        known = torch.where(self.parts(scores, mask), scores, 0.0).reshape(flat.shape)
        found, values = best_first((vertices > 0) & real[..., None], real, known)
        return found.reshape(*batch, k, *parts).to(scores.dtype), values.reshape(*batch, k)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if not values_can_be_read(scores):
            return super()._moments(scores, mask)
        graph, flat, exists, goal = self._read(scores, mask)
        log_z, mean = graph.moments(flat, exists, goal)
        return self._known(log_z, scores), mean.reshape(scores.shape)

    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        graph = self._hypergraph(self._split(scores)[1])
        return graph.total(scores.flatten(-self.layout.ndim), graph.goal(self._size(exists)), plus)

    def check_shape_listable(self, *shape: int) -> None:
        """For :meth:`enumerate`: refuse parts of a shape with too many vertices, which the graph counts.

        Raises:
            ValueError: with the number of vertices.
        """
        graph, parts = self._hypergraph(torch.Size(shape)), torch.zeros(shape)
        self.check_listable(graph.count(int(graph.goal(self._size(self.parts(parts))))), *shape)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _split(self, scores: Tensor) -> tuple[torch.Size, torch.Size]:
        return scores.shape[: -self.layout.ndim], scores.shape[-self.layout.ndim :]

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Hypergraph, Tensor, Tensor, Tensor]:
        """The graph, checked scores and which parts exist ``[B, P]``, and goals ``[B]``."""
        self.check(scores, mask)
        batch, parts = self._split(scores)
        graph, exists = self._hypergraph(parts), self.parts(scores, mask)
        # Without a mask all examples are of one size.
        size = self._size(exists if mask is not None else self.parts(scores.new_empty(parts)))
        goal = graph.goal(size).expand(batch)
        flat = (batch.numel(), parts.numel())
        return graph, scores.reshape(flat).contiguous(), exists.reshape(flat), goal.reshape(batch.numel())

    def _flat(self, scores: Tensor, mask: Tensor | None) -> tuple[Hypergraph, Tensor, Tensor]:
        """The graph, scores ``[B, P]`` that say themselves which parts are missing, and goals ``[B]``."""
        graph, flat, exists, goal = self._read(scores, mask)
        return graph, known(flat, exists), goal

    def _known(self, value: Tensor, scores: Tensor) -> Tensor:
        """``[B] -> [*batch]``; refuses examples without a vertex."""
        shown = value.reshape(self._split(scores)[0])
        refuse(~(shown > IMPOSSIBLE / 2), f"has no vertex: {self.name} finds none among its parts")
        return shown


def last(exists: Tensor) -> Tensor:
    """One more than the index of the last True, 0 if there is none: bool ``[*batch, n]`` -> int64 ``[*batch]``."""
    number = torch.arange(1, 1 + exists.shape[-1], device=exists.device)
    return torch.nn.functional.pad(exists * number, (1, 0)).amax(-1)
