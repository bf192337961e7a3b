"""Perfect matchings of a bipartite graph: permutation matrices."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.assignment import assign, assign_compiled, greedy
from structgrad.algorithms.derivatives import implicit
from structgrad.algorithms.eager import values_can_be_read, warn_stopped
from structgrad.algorithms.plackett_luce import log_totals, takes_operator
from structgrad.algorithms.sinkhorn import central_duals, dual_step, potentials
from structgrad.common.ranges import check_count, check_range
from structgrad.structures import reading as readings
from structgrad.structures.base import Noise, Trace
from structgrad.structures.derived import ActiveSetProjection, KBest
from structgrad.structures.layout import Matrix
from structgrad.structures.relaxation import Relaxation, negative_entropy


class Matching(KBest, ActiveSetProjection):
    """Permutation matrices ``[*batch, n, n]``: ``x[i, j] = 1`` if row i is matched with column j.

    See Paulus et al. (2020, B.6). A row or column that touches no existing part is absent, so sizes
    may differ in a batch (mask the outer product of the present ones). As many rows as columns must
    be present, and a perfect matching must exist. Otherwise the oracles raise ``ValueError`` where
    values can be read.

    The partition function is a permanent, so there are no exact Gibbs oracles. Relaxations:

    - ``sinkhorn`` (also under the name ``categorical``): ``max_{x in conv X} <x, u> - sum x log
      x``.
    - ``euclidean``: ``min_{x in conv X} |x - u|^2 / 2``, the active-set projection (SparseMAP).

    **Trace.** The trace is that of the greedy algorithm of Struminsky et al. (2021, section 2.3):
    take the least entry, drop its row and column, repeat. Its vertex is a matching but in general
    *not* the best one: ``trace(E).vertex != argmax(-E)``. The Hungarian method, which finds the
    best one, has no stochastic invariant. ``choices[t] = i * n + j`` is the entry taken at step t,
    -1 after the last. An existing part must join every present row to every present column, because
    the greedy algorithm could otherwise end without a matching.

    Args:
        tolerance: the Sinkhorn iterations end when the errors of the row sums add up to at most
            this (columns sum to 1 exactly).
        max_iterations: the iterations also end after this many. Where values can be read, this
            gives a warning (:class:`~structgrad.algorithms.eager.StoppedEarly`). Plain torch always
            does this many where values cannot be read (see ``values_can_be_read``). On a GPU this
            concerns more than 64 rows; up to 64 rows one launch does all iterations.

    Raises:
        TypeError: if max_iterations is not a whole number.
        ValueError: for options out of range.
    """

    layout = Matrix()
    constant_size: ClassVar[bool] = True
    trace_is_argmax: ClassVar[bool] = False

    def __init__(self, *, tolerance: float = 1e-6, max_iterations: int = 1000) -> None:
        check_range("tolerance", tolerance, above=0)
        check_count("max_iterations", max_iterations)
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def own_relaxations(self) -> dict[str, Relaxation]:
        """The relaxation ``sinkhorn``, which is also ``categorical``."""
        return {
            name: Relaxation("sinkhorn", regularizer=negative_entropy, symmetric=True)
            for name in ("sinkhorn", "categorical")
        }

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; the matrix must be square."""
        super().check(scores, mask)
        if scores.shape[-1] != scores.shape[-2]:
            raise ValueError(f"scores over matchings have shape [..., n, n]; got {list(scores.shape)}")

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """The pairs of the first so many rows and columns."""
        both = lengths[..., None].expand(*lengths.shape, 2)
        return super().length_mask(both, scores)

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The best perfect matching, exact, by shortest augmenting paths, O(n^3):
        ``[*batch, n, n]``, no gradient.

        It is compiled and parallel over examples on the CPU, one launch on a GPU (up to 1024 rows),
        and batched torch elsewhere.
        """
        self.check(utility, mask)
        vertex, _ = self._assign(utility.detach(), mask)
        return vertex

    def _assign(self, utility: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best matching ``[*batch, n, n]`` and its dual variables ``[*batch, 2, n]``, float64."""
        if values_can_be_read(utility, mask):
            exists = None if mask is None else mask.expand(utility.shape)
            vertex, duals, feasible = assign_compiled(utility, exists)
            if not bool(feasible.all()):
                example = int((~feasible).flatten().nonzero()[0])
                raise ValueError(f"example {example} has no perfect matching under its mask")
            return vertex, duals
        n = utility.shape[-1]
        flat = utility.shape[:-2].numel(), n, n
        vertex, duals = assign(utility.reshape(flat), self.parts(utility, mask).reshape(flat))
        return vertex.reshape(utility.shape), duals.reshape(*utility.shape[:-2], 2, n)

    def _constrained_argmax(self, scores: Tensor, allowed: Tensor, forced: Tensor, mask: Tensor | None) -> Tensor:
        # A forced entry is the only one of its row and column.
        taken = forced.any(-1, keepdim=True) | forced.any(-2, keepdim=True)
        open_ = (allowed & (forced | ~taken)).flatten(0, 1)
        find = assign_compiled if values_can_be_read(scores, allowed) else assign
        return find(scores.flatten(0, 1), open_)[0].reshape(allowed.shape)

    def _branches(self, shape: torch.Size) -> int:
        return max(shape[-1] - 1, 0)  # the last entry of a matching follows from the others

    def sinkhorn(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """``max_{x in conv X} <x, u> - sum x log x``: ``[*batch, n, n]``, doubly stochastic,
        differentiable twice.

        Rows and columns are normalised in turn in the log domain (Sinkhorn 1964; Mena et al. 2018),
        in float64, at O(n^2) an iteration. The start is the dual variables of the best matching,
        which are the solution as the temperature goes to 0. From other starts the number of
        iterations grows with the scores. Every eighth iteration is followed by a Newton step on the
        dual, O(n^3), which is kept if it reduces the error.

        The gradient is that of the fixed point, by implicit differentiation of the dual optimality
        conditions. It costs O(n^3) whatever the number of iterations, and is exact up to the
        ``tolerance`` of the sums.
        """
        self.check(utility, mask)
        if not utility.numel():
            return utility.clone()
        exists = self.parts(utility, mask)
        log_k = torch.where(exists, utility, 0.0).double()
        rows, columns = exists.any(-1), exists.any(-2)
        with torch.no_grad():
            finite = torch.where(exists, log_k, -torch.inf)
            start = central_duals(finite, *self._assign(log_k, mask))
            f, g = potentials(start, finite, rows, columns, self.tolerance, self.max_iterations)
        point = torch.where(exists, (log_k + f.unsqueeze(-1) + g.unsqueeze(-2)).exp(), 0.0)
        off = torch.where(rows, (point.detach().sum(-1) - 1).abs(), 0.0).sum(-1)
        warn_stopped(off, 2 * self.tolerance, "Matching.sinkhorn", "row sums are off by")
        if not (utility.requires_grad and torch.is_grad_enabled()):
            return point.to(utility.dtype)
        fixed = point.detach()

        def moved(duals: Tensor) -> Tensor:
            f, g = duals.unbind(-2)
            return point * (f.unsqueeze(-1) + g.unsqueeze(-2)).exp()

        def sums(duals: Tensor) -> Tensor:
            at = moved(duals)
            return torch.stack([at.sum(-1), at.sum(-2)], -2)

        duals = implicit(
            torch.zeros_like(torch.stack([f, g], -2)),
            sums,
            lambda excess: torch.stack(dual_step(fixed, *excess.unbind(-2)), -2),
        )
        return moved(duals).to(utility.dtype)

    # --- the greedy trace -----------------------------------------------------------------------------------------

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Take the least entry and drop its row and column until none is left: ``choices`` ``[*batch, n]``."""
        self.check(exponentials, mask)
        exists = self.parts(exponentials, mask)
        self._check_complete(exists)
        costs = torch.where(exists, exponentials.detach(), torch.inf)
        n = costs.shape[-1]
        vertex, choices = greedy(costs.reshape(costs.shape[:-2].numel(), n, n))
        return Trace(vertex.reshape(costs.shape), choices.reshape(costs.shape[:-1]))

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log P(T = trace)`` (Struminsky et al., Algorithm 3), O(n^2): ``[*batch]``, differentiable."""
        self.check(log_rates, mask)
        finite = torch.where(self.parts(log_rates, mask), log_rates, 0.0).flatten(-2)
        happened = trace.choices >= 0
        taken = finite.gather(-1, trace.choices.clamp_min(0))
        total = self._log_totals(self._dropped(trace, log_rates, mask), finite, happened)
        return torch.where(happened, taken - total, 0.0).sum(-1)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """A fresh sample of ``E | T = trace``: ``[*batch, n, n]``, reparameterised in
        ``log_rates``; 1 where missing.

        The value of the entry taken at step t is the sum of the minima of the steps up to t. The
        others are memoryless. So an entry dropped at step t has the same sum plus a fresh
        exponential of its own rate.
        """
        self.check(log_rates, mask)
        exists = self.parts(log_rates, mask).flatten(-2)
        finite = torch.where(exists, log_rates.flatten(-2), 0.0).double()
        least, own = noise or self.conditional_noise(trace, log_rates)
        dropped = self._dropped(trace, log_rates, mask)
        happened = trace.choices >= 0
        times = (least * (-self._log_totals(dropped, finite, happened)).exp()).cumsum(-1)
        own = own.flatten(-2) * (-finite).exp()
        taken = (trace.vertex > 0).flatten(-2)
        total = times.gather(-1, dropped.clamp_max(times.shape[-1] - 1)) + torch.where(taken, 0.0, own)
        return torch.where(exists, total, 1.0).reshape(log_rates.shape)

    def _dropped(self, trace: Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The step at which every entry is taken or dropped: int64 ``[*batch, n * n]``; n for
        missing entries.
        """
        n = scores.shape[-1]
        step = torch.arange(n, device=scores.device)
        happened = trace.choices >= 0
        row = torch.where(happened, trace.choices // max(n, 1), n)
        column = torch.where(happened, trace.choices % max(n, 1), n)
        none = torch.full((*row.shape[:-1], n + 1), n, device=scores.device)
        by_row = none.scatter(-1, row, step.expand(row.shape))[..., :n]
        by_column = none.scatter(-1, column, step.expand(row.shape))[..., :n]
        first = torch.minimum(by_row.unsqueeze(-1), by_column.unsqueeze(-2))
        return torch.where(self.parts(scores, mask), first, n).flatten(-2)

    @staticmethod
    def _log_totals(dropped: Tensor, finite: Tensor, happened: Tensor) -> Tensor:
        """Log of the total rate that is left at every step: ``[*batch, n]``; 0 for a step that did
        not happen.
        """
        n = happened.shape[-1]
        if takes_operator(finite):
            return log_totals(torch.where(dropped < n, dropped, -1), finite, n)
        # Sum the entries dropped at one step first, then sum over the later steps.
        shape = (*happened.shape[:-1], n + 1)
        top = finite.new_full(shape, -torch.inf).scatter_reduce(-1, dropped, finite.detach(), "amax")
        weight = (finite - top.gather(-1, dropped)).exp()
        sums = finite.new_zeros(shape).scatter_add(-1, dropped, weight)[..., :n]
        by_step = torch.where(happened, sums, 1.0).log() + torch.where(happened, top[..., :n], 0.0)
        later = torch.ones(n, n, dtype=torch.bool, device=finite.device).triu()
        counted = later & happened.unsqueeze(-2) | ~happened.unsqueeze(-1)
        return torch.where(happened, torch.where(counted, by_step.unsqueeze(-2), -torch.inf).logsumexp(-1), 0.0)

    @staticmethod
    def _check_complete(exists: Tensor) -> None:
        if values_can_be_read(exists):
            rows, columns = exists.any(-1), exists.any(-2)
            full = (exists == (rows.unsqueeze(-1) & columns.unsqueeze(-2))).flatten(-2).all(-1)
            good = (full & (rows.sum(-1) == columns.sum(-1))).flatten()
            if not bool(good.all()):
                example = int((~good).nonzero()[0])
                raise ValueError(
                    "the greedy trace needs as many rows as columns and every part between them; "
                    f"example {example} lacks some"
                )

    def read(self, vertex: Tensor) -> Tensor:
        """The column of every row: int64 ``[*batch, n]``, -1 for absent rows."""
        return readings.heads(vertex.mT)

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return reading.shape[-1:] * 2

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        row = torch.arange(shape[0], device=reading.device).expand(reading.shape)
        return readings.entries(torch.stack([torch.where(reading < 0, reading, row), reading], -1), shape)

    def covered(self, vertex: Tensor) -> Tensor:
        on = vertex > 0
        return on.any(-1, keepdim=True) & on.any(-2, keepdim=True)

    def enumerate(self, *shape: int) -> Tensor:
        """All n! permutation matrices: ``[n!, n, n]``, float64; ``shape`` is ``(n, n)``."""
        n, m = shape
        if n != m:
            raise ValueError(f"scores over matchings have shape [n, n]; got {list(shape)}")
        self.check_listable(math.factorial(n), n, n)
        orders = torch.tensor(list(itertools.permutations(range(n))), dtype=torch.int64).reshape(math.factorial(n), n)
        return (orders.unsqueeze(-1) == torch.arange(n)).double()
