"""Undirected spanning trees."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms import kruskal
from structgrad.structures.arborescence import Arborescence
from structgrad.structures.base import Noise, Trace
from structgrad.structures.family_trees import Tree
from structgrad.structures.layout import Undirected


class SpanningTree(Tree):
    """Spanning trees of an undirected graph (Paulus et al. 2020, B.7; Struminsky et al. 2021, 2.3).

    Parts are the edges ``[i, j]``, i < j, of ``[n, n]``. Scores are read above the diagonal;
    vertices and marginals are symmetric. A node that touches no existing part is absent. The others
    must be connected.

    ``argmax`` is exact, O(n^2) for one example (Prim). ``log_partition``, ``marginals`` and
    ``sample`` are O(n^3) and use no subtraction, because a spanning tree is an arborescence from
    any one node. The ``trace`` is the order in which Kruskal's algorithm takes the edges.
    Derivatives, ``vmap``, ``torch.compile`` and GPUs are as for :class:`Arborescence`.

    Raises:
        ValueError: from every oracle, in eager CPU code, if an example is not connected.
    """

    is_ordinal: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layout = Undirected()

    # --- the Gibbs distribution -----------------------------------------------------------------------------------

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``E[x]``, symmetric. A vector-Jacobian product costs about as much again."""
        # An edge points towards or away from the root, never both. Rounded, the two may add up to 1
        # + 1e-7.
        mean = self._rooted_marginals(scores, mask)
        return (mean + mean.transpose(1, 2)).clamp(max=1).reshape(scores.shape)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact sample for each example, without random walks; see ``matrix_tree.sample_arborescences``."""
        tree = self._arborescences(scores, mask, n)
        return tree + tree.transpose(-1, -2)

    # --- the trace ------------------------------------------------------------------------------------------------

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Kruskal's algorithm on ``exponentials``.

        ``choices [*batch, n - 1]`` are its edges ``i * n + j``, i < j, in order.
        """
        return self._minimum(exponentials, mask, sign=1.0)

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum over Kruskal's steps: log rate of the edge minus log of the total rate of all edges
        between components.
        """
        flat, exists = self._flat(log_rates, mask)
        choices = trace.choices.reshape(len(flat), trace.choices.shape[-1])
        joined = kruskal.joined_at(choices, flat.shape[-1])
        chosen = flat.flatten(1).gather(1, choices.clamp_min(0)).double()
        log_p = torch.where(choices >= 0, chosen - kruskal.log_running(flat, exists, joined), 0.0)
        return log_p.sum(1).reshape(log_rates.shape[:-2]).to(log_rates.dtype)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """A sample of ``E | T``, made from the times of Kruskal's steps.

        Step t comes an exponential time after the step before, at the total rate of the edges that
        could be taken. The chosen edge has the time of its step. An edge whose ends are joined by
        another edge could be taken until then. So it has that time plus a fresh exponential.
        """
        self.check(log_rates, mask)
        flat, exists = self._flat(log_rates.double(), mask)
        n = flat.shape[-1]
        choices = trace.choices.reshape(len(flat), trace.choices.shape[-1])
        joined = kruskal.joined_at(choices, n)
        log_total = kruskal.log_running(flat, exists, joined)
        steps, parts = noise or self.conditional_noise(trace, log_rates)
        gaps = steps.reshape(log_total.shape) * torch.exp(-log_total)
        times = torch.where(choices >= 0, gaps, 0.0).cumsum(1)
        log_means = torch.where(exists, -flat, 0.0).masked_fill(trace.vertex.reshape(flat.shape) > 0, -torch.inf)
        fresh = parts.reshape(flat.shape) * torch.exp(log_means)
        # The first column exists for n < 2 as well. Pairs that are never joined are no parts.
        times = torch.cat([times.new_zeros(len(flat), 1), times], 1)
        waited = times.gather(1, (joined + 1).flatten(1)).reshape(flat.shape)
        return torch.where(exists, waited + fresh, 1.0).reshape(log_rates.shape)

    # --- the tests' oracle ----------------------------------------------------------------------------------------

    def enumerate(self, *shape: int) -> Tensor:
        """All ``n^(n - 2)`` trees of ``shape = (n, n)``, up to n = 8: arborescences without their directions."""
        self.check_listable(shape[-1] ** max(shape[-1] - 2, 0), *shape)
        directed = Arborescence(root=0).enumerate(*shape)
        return directed + directed.transpose(1, 2)

    # --- what tells it from other trees ---------------------------------------------------------------------------

    def _solve(self, costs: Tensor, exists: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
        return kruskal.minimum_spanning_tree(costs, exists, sign)

    def _constrained(self, scores: Tensor, allowed: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(forced, torch.inf, scores), allowed

    def _rooted(self, flat: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same edges in both directions, from the first present node."""
        both = self.layout.mirror(torch.where(exists, flat, 0.0))
        exists = exists | exists.transpose(1, 2)
        root = exists.any(1).int().argmax(1) if flat.shape[-1] else exists.new_zeros(len(flat), dtype=torch.int64)
        return both, exists, root

    def _lacking(self) -> str:
        return "spanning tree: its nodes are not connected"
