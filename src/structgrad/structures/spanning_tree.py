"""Undirected spanning trees."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.structures import _kruskal, _matrix_tree
from structgrad.structures._k_best import k_best_trees
from structgrad.structures._tree_kernels import refuse_transforms
from structgrad.structures.arborescence import Arborescence
from structgrad.structures.base import Trace, values_can_be_read
from structgrad.structures.layout import Layout
from structgrad.structures.sparsemap import ActiveSetProjection


class SpanningTree(ActiveSetProjection):
    """Spanning trees of an undirected graph (Paulus et al. 2020, B.7; Struminsky et al. 2021, 2.3).

    Parts are the edges ``[i, j]``, i < j, of ``[n, n]``; scores are read above the diagonal, vertices and marginals are
    symmetric. A node that touches no existing part is absent; the others must be connected.

    ``argmax`` is exact, O(n^2) for one example (Prim). ``log_partition``, ``marginals`` and ``sample`` are O(n^3) and
    use no subtraction: a spanning tree is an arborescence from any one node. The ``trace`` is the order in which
    Kruskal's algorithm takes the edges. Derivatives, ``vmap`` and ``torch.compile`` are as for :class:`Arborescence`.

    Raises:
        ValueError: from every oracle, in eager CPU code, if an example is not connected.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layout = Layout("undirected")

    # --- the best one ---------------------------------------------------------------------------------------------

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A maximum spanning tree, exact."""
        return self._minimum(utility, mask, sign=-1.0).vertex

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Kruskal's algorithm on ``exponentials``; ``choices [*batch, n - 1]`` are its edges ``i * n + j``, i < j, in
        order.
        """
        return self._minimum(exponentials, mask, sign=1.0)

    def _minimum(self, costs: Tensor, mask: Tensor | None, sign: float) -> Trace:
        flat, exists = self._flat(costs, mask)
        vertex, choices, reached = _kruskal.minimum_spanning_tree(flat, exists, sign)
        self._refuse(~reached, costs)
        return Trace(vertex.reshape(costs.shape), choices.reshape(*costs.shape[:-2], choices.shape[1]))

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best spanning trees, exact, by at most ``k (n - 1) + 1`` argmaxes; see ``_k_best``."""
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        self.argmax(scores, mask)  # refuses what has no vertex
        flat, exists = self._flat(scores, mask)

        def solve(allowed: Tensor, forced: Tensor) -> Tensor:
            costs = torch.where(forced, torch.inf, flat[:, None]).flatten(0, 1)
            vertex = _kruskal.minimum_spanning_tree(costs, allowed.flatten(0, 1), -1.0)[0]
            return (vertex.reshape(allowed.shape) > 0) & exists[:, None]

        vertices, valid = k_best_trees(flat, exists, k, solve)
        values = (vertices * torch.where(exists, flat, 0)[:, None]).sum((-2, -1)).masked_fill(~valid, -torch.inf)
        shown = self.layout.mirror(vertices.to(scores.dtype))
        return shown.reshape(*scores.shape[:-2], *shown.shape[1:]), values.reshape(*scores.shape[:-2], k)

    # --- the Gibbs distribution -----------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log sum_x exp <x, s>`` by the matrix-tree theorem."""
        return self._log_partition(scores, mask).to(scores.dtype)

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``E[x]``, symmetric; its vector-Jacobian products cost about as much again."""
        # Towards or away from the root: the two cases exclude each other; their rounded probabilities may add up to 1 +
        # 1e-7.
        mean = _matrix_tree.marginals(*self._rooted(*self._flat(scores, mask)))
        return (mean + mean.transpose(1, 2)).clamp(max=1).reshape(scores.shape)

    def sample(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """One exact sample for each example, without random walks; see ``_matrix_tree.sample_arborescences``."""
        self._log_partition(scores.detach(), mask)
        tree = _matrix_tree.sample_arborescences(*self._rooted(*self._flat(scores, mask)))
        return (tree + tree.transpose(1, 2)).reshape(scores.shape)

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
        logz = _matrix_tree.log_partition(*self._rooted(*self._flat(scores, mask)))
        self._refuse(logz == -torch.inf, scores)
        return logz.reshape(scores.shape[:-2])

    # --- the trace ------------------------------------------------------------------------------------------------

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum over Kruskal's steps: log rate of the edge minus log of the total rate of the edges between different
        components.
        """
        flat, exists = self._flat(log_rates, mask)
        choices = trace.choices.reshape(len(flat), trace.choices.shape[-1])
        joined = _kruskal.joined_at(choices, flat.shape[-1])
        chosen = flat.flatten(1).gather(1, choices.clamp_min(0)).double()
        log_p = torch.where(choices >= 0, chosen - _kruskal.log_running(flat, exists, joined), 0.0)
        return log_p.sum(1).reshape(log_rates.shape[:-2]).to(log_rates.dtype)

    def conditional(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """``E | T``: step t comes an exponential time after the one before, at the total rate of the edges then in the
        running.

        The chosen edge has the time of its step. An edge whose ends are joined by another one stays in the running
        until then, so it has that time plus a fresh exponential.
        """
        flat, exists = self._flat(log_rates, mask)
        n = flat.shape[-1]
        choices = trace.choices.reshape(len(flat), trace.choices.shape[-1])
        joined = _kruskal.joined_at(choices, n)
        log_total = _kruskal.log_running(flat, exists, joined)
        gaps = torch.empty_like(log_total).exponential_() * torch.exp(-log_total)
        times = torch.where(choices >= 0, gaps, 0.0).cumsum(1)
        rates = torch.where(exists, flat, 0).double()
        fresh = torch.empty_like(rates).exponential_() * torch.exp(-rates)
        fresh = fresh.masked_fill(trace.vertex.reshape(flat.shape) > 0, 0.0)
        # A first column, so that there is one for n < 2 as well; pairs that are never joined are no parts.
        times = torch.cat([times.new_zeros(len(flat), 1), times], 1)
        waited = times.gather(1, (joined + 1).flatten(1)).reshape(flat.shape)
        return torch.where(exists, waited + fresh, 1.0).reshape(log_rates.shape).to(log_rates.dtype)

    # --- the tests' oracle ----------------------------------------------------------------------------------------

    def enumerate(self, *shape: int) -> Tensor:
        """All ``n^(n - 2)`` trees of ``shape = (n, n)``: the arborescences from node 0 without their directions; up to
        n = 7.
        """
        directed = Arborescence(root=0).enumerate(*shape)
        return directed + directed.transpose(1, 2)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _flat(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores and existing parts, checked, ``[B, n, n]`` and contiguous."""
        self.check(scores, mask)
        refuse_transforms(scores, self.name)
        batch = scores.shape[:-2].numel()
        exists = self.parts(scores, mask).reshape(batch, *scores.shape[-2:])
        return scores.reshape(exists.shape).contiguous(), exists.contiguous()

    def _rooted(self, flat: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and edges in both directions, and the first present node as the root."""
        both = self.layout.mirror(torch.where(exists, flat, 0.0))
        exists = exists | exists.transpose(1, 2)
        root = exists.any(1).int().argmax(1) if flat.shape[-1] else exists.new_zeros(len(flat), dtype=torch.int64)
        return both, exists, root

    def _refuse(self, unreached: Tensor, scores: Tensor) -> None:
        """Raise if an example (of the flattened batch) is not connected, where that can be seen for free."""
        if values_can_be_read(unreached) and bool(unreached.any()):
            index = int(unreached.nonzero()[0, 0])
            example = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), scores.shape[:-2] or (1,)))
            raise ValueError(f"example {example} has no spanning tree: its nodes are not connected")
