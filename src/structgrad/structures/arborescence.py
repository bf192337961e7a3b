"""Rooted directed spanning trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structgrad.algorithms import chu_liu_edmonds
from structgrad.algorithms.eager import refuse, values_can_be_read
from structgrad.structures import reading as readings
from structgrad.structures.base import Noise, Trace
from structgrad.structures.family_trees import Tree
from structgrad.structures.layout import Directed


class Arborescence(Tree):
    """Directed trees in which a fixed root reaches every node (Paulus et al. 2020, B.8; Struminsky
    et al. 2021, 2.3).

    Parts are the edges ``[i, j]``: i -> j of ``[n, n]``, off the diagonal and not into the root. A
    node that touches no existing part is absent. The root must reach every other node.

    ``argmax`` and ``trace`` are exact, O(n^2) for one example (Chu-Liu-Edmonds by path growing).
    ``log_partition``, ``marginals`` and ``sample`` are O(n^3) and work for any finite scores. They
    use an elimination without subtractions. On the CPU they use an inverse instead if it is
    certified to be right; see ``matrix_tree``. On a GPU each of these, and each quantity that the
    trace needs, is one launch (two for a sample) for at most 128 nodes. Larger graphs take a loop
    over nodes in plain torch.

    With ``single_root=True`` exactly one edge leaves the root, as in the trees of Universal
    Dependencies; by default any number does. A large number is then subtracted from the scores of
    the edges out of the root. A second such edge then never pays (Stanojevic and Cohen 2021, for the
    argmax). All oracles except those of the trace work, at the same cost on a GPU and in plain torch.
    On the CPU, marginals use the elimination instead of the inverse, and logarithms if scores spread
    over some hundred nats.

    Args:
        root: the node that reaches all others, the same in every example.
        single_root: whether exactly one edge leaves the root (none, if the root is alone).

    Raises:
        ValueError: for a negative root; from every oracle, if the root is not one of the n nodes;
            or (eager CPU code) if an example has a node that the root cannot reach, or with
            ``single_root`` scores that spread over more than 1e8.
    """

    def __init__(self, root: int = 0, single_root: bool = False) -> None:
        if root < 0:
            raise ValueError(f"root must be a node, 0 or more; got {root}")
        self.root = root
        self.single_root = single_root
        self.layout = Directed()

    def missing_oracles(self) -> frozenset[str]:
        """Those of the trace, for a single root."""
        return _OF_TRACE if self.single_root else frozenset()

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; graphs that are too small to have the root are refused
        too.
        """
        super().check(scores, mask)
        n = scores.shape[-1]
        if self.root >= n > 0:
            raise ValueError(f"root {self.root} is not one of the {n} nodes of scores {list(scores.shape)}")

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Edges off the diagonal and not into the root; no arborescence has the others."""
        head = torch.arange(scores.shape[-1], device=scores.device)
        return super().parts(scores, mask) & (head != self.root)

    # --- the Gibbs distribution -----------------------------------------------------------------------------------

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``E[x]``. A vector-Jacobian product costs twice as much. Second derivatives are in plain
        torch.
        """
        mean = self._rooted_marginals(scores, mask).reshape(scores.shape).to(scores.dtype)
        if self.single_root and scores.shape[-1]:
            refuse(mean.detach()[..., self.root, :].sum(-1) > 1.5, f"has no {self._lacking()}")
        return mean

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact sample for each example, without random walks; see ``matrix_tree.sample_arborescences``."""
        return self._arborescences(scores, mask, n).to(scores.dtype)

    # --- the trace ------------------------------------------------------------------------------------------------

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Chu-Liu-Edmonds on ``exponentials``; ``choices [*batch, E, 2]`` are its picks (see
        ``chu_liu_edmonds``).

        ``choices[..., e, 0]`` is the edge ``u * n + v`` that event e picks. ``choices[..., e, 1]``
        is the event that contracts it. E = max(2 n - 2, n).
        """
        if self.single_root:
            raise self._lacks()
        return self._minimum(exponentials, mask, sign=1.0)

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum over the picks: log rate minus log of the total rate of the edges that could have been picked."""
        if self.single_root:
            raise self._lacks()
        flat, exists = self._flat(log_rates, mask)
        choices = trace.choices.reshape(len(flat), *trace.choices.shape[-2:])
        picks = choices[..., 0]
        picked = flat.flatten(1).gather(1, picks.clamp_min(0)).double()
        log_p = torch.where(picks >= 0, picked - chu_liu_edmonds.log_entering(flat, exists, choices), 0.0)
        return log_p.sum(1).reshape(log_rates.shape[:-2]).to(log_rates.dtype)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """A sample of ``E | T``, made from the minima of the picks.

        Each edge gets the sum of the minima of the picks that it took part in. It also gets a fresh
        exponential unless it was picked. The minimum of a pick is exponential with the total rate
        of the edges that enter that node. It is independent of which edge was picked, and the edges
        that lose are memoryless.
        """
        if self.single_root:
            raise self._lacks()
        self.check(log_rates, mask)
        flat, exists = self._flat(log_rates.double(), mask)
        n = flat.shape[-1]
        choices = trace.choices.reshape(len(flat), *trace.choices.shape[-2:])
        happened = choices[..., 0] >= 0
        log_total = chu_liu_edmonds.log_entering(flat, exists, choices)
        steps, parts = noise or self.conditional_noise(trace, log_rates)
        minimum = torch.where(happened, steps.reshape(log_total.shape) * torch.exp(-log_total), 0.0)
        waited = chu_liu_edmonds.waiting(minimum, choices, n)
        log_means = torch.where(exists, -flat, 0.0).flatten(1)
        # Nothing is added where an event picked. Entry 0 stands for no event: it is no edge.
        means = torch.exp(log_means.scatter(1, choices[..., 0].clamp_min(0), -torch.inf)).reshape(flat.shape)
        return torch.where(exists, waited + parts.reshape(flat.shape) * means, 1.0).reshape(log_rates.shape)

    # --- vertices as integers -------------------------------------------------------------------------------------

    def read(self, vertex: Tensor) -> Tensor:
        """The head of every node: int64 ``[*batch, n]``, -1 for the root and for absent nodes."""
        return readings.heads(vertex)

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return reading.shape[-1:] * 2

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        return readings.entries_of_heads(reading)

    # --- the tests' oracle ----------------------------------------------------------------------------------------

    def enumerate(self, *shape: int) -> Tensor:
        """All ``n^(n - 2)`` arborescences of ``shape = (n, n)`` by trying ``n^(n - 1)`` parents: up to n = 8."""
        n = shape[-1]
        self.check_listable(n ** max(n - 2, 0), n, n)
        vertices = torch.zeros(1, n, n, dtype=torch.float64)
        others = [v for v in range(n) if v != self.root]
        if not others:
            return vertices
        every = torch.cartesian_prod(*[torch.arange(n)] * len(others)).reshape(-1, len(others))
        parent = torch.full((len(every), n), self.root)
        parent[:, others] = every
        ancestor = parent
        for _ in range(n):
            ancestor = parent.gather(1, ancestor)
        parent = parent[(ancestor == self.root).all(1)]
        vertices = torch.zeros(len(parent), n, n, dtype=torch.float64).scatter(1, parent[:, None, :], 1.0)
        vertices[:, self.root, self.root] = 0
        return vertices[vertices[:, self.root].sum(-1) == 1] if self.single_root else vertices

    # --- what tells it from other trees ---------------------------------------------------------------------------

    def _solve(self, costs: Tensor, exists: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
        if not self.single_root or not costs.shape[-1]:
            return chu_liu_edmonds.minimum_arborescence(costs, exists, self.root, sign)
        found = chu_liu_edmonds.minimum_arborescence(*self._behind(costs, exists)[:2], self.root, sign)
        vertex, choices, reached = found
        return vertex.to(costs.dtype), choices, reached & (vertex[:, self.root].sum(-1) <= 1)

    def _constrained(self, scores: Tensor, allowed: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        # A forced edge is the only one into its node.
        return scores, allowed & (forced | ~forced.any(-2, keepdim=True))

    def _rooted(self, flat: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        root = torch.full(flat.shape[:1], self.root, device=flat.device)
        if self.single_root and flat.shape[-1]:
            flat, exists, *_ = self._behind(flat, exists)
        return flat, exists, root

    def _unshifted(self, logz: Tensor, flat: Tensor, exists: Tensor) -> Tensor:
        if not self.single_root or not flat.shape[-1]:
            return logz
        _, _, shift, least = self._behind(flat, exists)
        logz = logz + torch.where(exists.flatten(1).any(1), shift, 0.0)
        # Without a tree of one root edge, those of two weigh less than any such tree would.
        return torch.where(logz.detach() < least - 1e-6 * (1 + least.abs()), -torch.inf, logz)

    def _behind(self, flat: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Subtract a number from the edges out of the root, so large that all trees with two of them
        together weigh e^-40 of the others.

        Returns:
            the new scores ``[B, n, n]`` in float64, ``exists``, the number ``[B]``, and a lower bound
            of the value of a tree ``[B]``.

        If all other edges exist, the further children of the root can become children of its first
        one. A second edge then gains no more than the largest difference between edges out of the
        root and others into the same node. Otherwise, no two trees differ by more than the sum over
        nodes of the differences between their edges.
        """
        n = flat.shape[-1]
        wide = flat.detach().double()
        high = wide.masked_fill(~exists, -torch.inf).amax(1)
        low = wide.masked_fill(~exists, torch.inf).amin(1)
        entered = exists.any(1)
        apart = torch.where(entered, high - low, 0.0).sum(1) + n * math.log(n)
        outside = torch.arange(n, device=flat.device) != self.root
        others = exists & outside[:, None]
        gain = wide[:, self.root] - wide.masked_fill(~others, torch.inf).amin(1)
        gain = torch.where(exists[:, self.root], gain, -torch.inf).amax(1).clamp_min(0.0) + math.log(n)
        pair = entered[:, :, None] & entered[:, None, :] & outside[:, None] & outside
        complete = (others == pair & ~torch.eye(n, dtype=torch.bool, device=flat.device)).flatten(1).all(1)
        shift = torch.where(complete, gain, apart) + 40.0
        if values_can_be_read(shift) and bool((shift > _WIDEST).any()):
            raise ValueError(
                f"scores of example {int((shift > _WIDEST).nonzero()[0])} spread over {float(shift.max()):.1g}; "
                f"trees with a single root keep their digits up to {_WIDEST:.0e}"
            )
        least = torch.where(entered, low, 0.0).sum(1)
        return torch.where(outside[:, None], flat.double(), flat.double() - shift[:, None, None]), exists, shift, least

    def _lacking(self) -> str:
        if self.single_root:
            return f"arborescence with one edge out of root {self.root} that reaches all nodes"
        return f"arborescence: some node cannot be reached from root {self.root}"


#: Oracles of Chu-Liu-Edmonds on exponentials; it cannot control the number of root edges.
_OF_TRACE = frozenset({"trace", "trace_log_prob", "conditional"})
#: Scores of a single root may spread over so much: then 1e-8 of them is left.
_WIDEST = 1e8
