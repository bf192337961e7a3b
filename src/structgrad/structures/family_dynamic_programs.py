"""The common code of structures with a dynamic program: everything except the recursion."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from structgrad.algorithms import hypergraph
from structgrad.algorithms.active_set import Pricing
from structgrad.algorithms.eager import on_host, refuse, values_can_be_read
from structgrad.algorithms.gradients import value_and_gradient
from structgrad.algorithms.hypergraph import Hypergraph, filled
from structgrad.algorithms.k_best import best_first
from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation
from structgrad.algorithms.transforms import over_batch
from structgrad.common.private import constant_when_traced
from structgrad.common.ranges import check_count
from structgrad.structures.base import repeated
from structgrad.structures.derived import ActiveSetProjection, DynamicProgram


class Derivations(DynamicProgram, ActiveSetProjection):
    """Structures that are the derivations of a hypergraph (see
    :mod:`structgrad.algorithms.hypergraph`).

    A subclass writes its recursion once, as that graph, and every oracle follows. ``argmax``,
    ``top_k``, ``log_partition``, ``marginals``, ``sample``, ``log_prob`` and ``entropy`` are passes
    over the graph. They are linear in the number of its edges (``top_k`` times k), compiled on the
    CPU and in plain torch elsewhere. ``project`` and ``sparsemap`` use the active-set method on
    ``argmax``. ``log_partition`` and ``marginals`` have derivatives of any order; the first of each
    is compiled.

    Raises:
        ValueError: from every oracle, in eager CPU code, if an example has no vertex.
    """

    # --- what tells them apart ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        """The recursion for parts of this shape. Implementations should cache the graphs."""

    @abc.abstractmethod
    def _size(self, exists: Tensor) -> Tensor:
        """The index of an example's goal in the graph: int64 ``[*batch]``, from bool ``[*batch,
        *parts]``.
        """

    # --- every oracle ---------------------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log sum_x exp <x, s>``: ``[*batch]``, differentiable."""
        if not _compiled(scores, mask):
            return super().log_partition(scores, mask)
        slope = torch.is_grad_enabled() and scores.requires_grad
        log_z, _ = hypergraph.moments(*self._read(scores, mask), slope)
        return self._known(log_z, scores).to(scores.dtype)

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A best vertex: ``[*batch, *parts]``, 0/1, no gradient."""
        if not _compiled(utility, mask):
            return super().argmax(utility, mask)
        value, vertex = hypergraph.argmax(*self._read(utility.detach(), mask))
        self._known(value, utility)
        chosen: Tensor = vertex.reshape(utility.shape).to(utility.dtype)
        return chosen

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact Gibbs sample an example: ``[*batch, *parts]``, 0/1, no gradient."""
        if not _compiled(scores, mask):
            return super().sample(scores, mask, n)
        self.check(scores, mask)
        batch, parts = self._split(scores)
        shape = (repeated(scores, 1 if n is None else n).shape[0], batch.numel(), self._graph(parts)[1])
        uniform = torch.rand(shape, dtype=torch.float64, device=scores.device)
        wide = self._wide(scores.detach(), mask)
        value, vertex = hypergraph.sample(*self._read(wide, mask), uniform)
        self._known(value, scores)
        drawn: Tensor = vertex.reshape(scores.shape if n is None else (n, *scores.shape)).to(scores.dtype)
        return drawn

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best vertices, exact and distinct: ``[*batch, k, *parts]`` and ``[*batch, k]``.

        Raises:
            TypeError: if k is not a whole number.
            ValueError: for k < 1.
        """
        check_count("k", k)
        self.check(scores, mask)
        exists = self.parts(scores, mask)
        batch, parts = self._split(scores)
        if _compiled(scores, mask):
            values, vertices = hypergraph.top_k(*self._read(scores.detach(), mask), k)
            self._known(values[:, 0], scores)
            values, vertices = values.reshape(*batch, k), vertices.reshape(*batch, k, *parts)
        else:
            values, vertices = over_batch(lambda s, e: self._best(s, e, k), scores.detach(), exists)
        real = values > IMPOSSIBLE / 2
        gains = torch.where(exists, scores, 0.0).flatten(-len(parts))
        found, values = best_first((vertices.flatten(-len(parts)) > 0) & real[..., None], real, gains)
        return found.reshape(*batch, k, *parts).to(scores.dtype), values

    def pricing(self, scores: Tensor, mask: Tensor | None = None) -> Pricing | None:
        """The argmax, for the active-set method in compiled code."""
        if not values_can_be_read(scores, mask):
            return None
        return hypergraph.pricing(*self._read(scores, mask)[1:])

    def _best(self, scores: Tensor, exists: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values ``[*batch, k]`` and the k best vertices ``[*batch, k, *parts]``, in plain torch."""
        parts = self._split(scores)[1]
        graph = self._hypergraph(parts)
        flat, goal = filled(scores, exists).flatten(-len(parts)), graph.goal(self._size(exists))
        found = [value_and_gradient(lambda s, g, r=r: graph.best_totals(s, g, k)[..., r], flat, goal) for r in range(k)]
        values, vertices = torch.stack([v for v, _ in found], -1), torch.stack([x for _, x in found], -2)
        return values, vertices.unflatten(-1, parts)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if not _compiled(scores, mask):
            return super()._moments(scores, mask)
        log_z, mean = hypergraph.moments(*self._read(scores, mask), True)
        return self._known(log_z, scores), mean.reshape(scores.shape)

    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        graph = self._hypergraph(self._split(scores)[1])
        return graph.total(scores.flatten(-self.layout.ndim), graph.goal(self._size(exists)), plus)

    def check_shape_listable(self, *shape: int) -> None:
        """For :meth:`enumerate`: refuse a shape with too many vertices. The graph counts them.

        Raises:
            ValueError: with the number of vertices.
        """
        graph, parts = self._hypergraph(torch.Size(shape)), torch.zeros(shape)
        self.check_listable(graph.count(int(graph.goal(self._size(self.parts(parts))))), *shape)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _split(self, scores: Tensor) -> tuple[torch.Size, torch.Size]:
        return scores.shape[: -self.layout.ndim], scores.shape[-self.layout.ndim :]

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """Checked scores and which parts exist ``[B, P]``, sizes ``[B]``, and the number of the graph."""
        self.check(scores, mask)
        batch, parts = self._split(scores)
        exists = self.parts(scores, mask)
        # Without a mask all examples have the same size.
        size = self._size(exists if mask is not None else self.parts(scores.new_empty(parts))).expand(batch)
        flat = (batch.numel(), parts.numel())
        return scores.reshape(flat), exists.reshape(flat), size.reshape(batch.numel()), self._graph(parts)[0]

    def _graph(self, parts: torch.Size) -> tuple[int, int]:
        """The number of the graph for parts of this shape, and the largest number of nodes in a
        derivation.
        """
        if torch.compiler.is_compiling():
            return self._kept(*parts)
        graph = self._hypergraph(parts)
        return graph.number, graph.depth

    @constant_when_traced
    def _kept(self, *parts: int) -> tuple[int, int]:
        """The same while a step is compiled. The step may run when no cache has the graph any more."""
        graph = self._hypergraph(torch.Size(parts))
        _KEPT.add(graph)
        return graph.number, graph.depth

    def _known(self, value: Tensor, scores: Tensor) -> Tensor:
        """``[B] -> [*batch]``; refuses examples without a vertex."""
        shown = value.reshape(self._split(scores)[0])
        refuse(~(shown > IMPOSSIBLE / 2), f"has no vertex: {self.name} finds none among its parts")
        return shown


#: Graphs to which compiled steps refer by number.
_KEPT: set[Hypergraph] = set()


def _compiled(scores: Tensor, mask: Tensor | None) -> bool:
    """Whether the compiled passes accept these inputs: on the CPU, outside ``torch.func``
    transforms.
    """
    if torch.compiler.is_compiling():
        return on_host(scores)
    return values_can_be_read(scores, mask)


def last(exists: Tensor) -> Tensor:
    """The index of the last True plus one, 0 if there is none: bool ``[*batch, n]`` -> int64
    ``[*batch]``.
    """
    number = torch.arange(1, 1 + exists.shape[-1], device=exists.device)
    return torch.nn.functional.pad(exists * number, (1, 0)).amax(-1)
