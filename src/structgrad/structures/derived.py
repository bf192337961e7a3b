"""Oracles that follow from others: mixins for structures that have no better way of their own.

| mixin | needs | gives |
|---|---|---|
| :class:`Gibbs` | ``log_partition``, differentiable | ``marginals``, ``log_prob``, ``entropy``, distances |
| :class:`DynamicProgram` | one dynamic program, ``_total`` | all of :class:`Gibbs`, ``argmax``, ``sample`` |
| :class:`KBest` | ``argmax``, linear in the scores | ``top_k`` |
| :class:`ActiveSetProjection` | ``argmax``, linear in the scores | ``project``, ``sparsemap`` |

A structure inherits the mixins that it needs and overrides what it can do better. ``oracles`` lists
the result.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from structgrad.algorithms import active_set
from structgrad.algorithms.eager import refuse, transformed
from structgrad.algorithms.gradients import value_and_gradient
from structgrad.algorithms.k_best import best_first, k_best
from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation, best, draw, log_sum
from structgrad.algorithms.transforms import over_batch
from structgrad.common.private import break_graph, untraced
from structgrad.structures.base import SparseDistribution, Structure, derived_from, repeated
from structgrad.structures.far_scores import near_scores

# --- the Gibbs distribution -------------------------------------------------------------------------------------------


class Gibbs(Structure):
    """Gives a structure with a differentiable ``log_partition`` its ``marginals``, ``log_prob`` and
    ``entropy``.

    It also gives the distances between the distributions of two scores. Everything is computed in
    float64.
    """

    @derived_from("log_partition")
    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of the Gibbs distribution, the gradient of :meth:`log_partition`: ``[*batch,
        *parts]``.

        It is differentiable once less often than ``log_partition``.
        """
        self.check(scores, mask)
        return self._moments(self._wide(scores, mask), mask)[1].to(scores.dtype)

    @derived_from("log_partition")
    def log_prob(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``<vertex, scores> - log Z``: ``[*batch]``."""
        self.check(scores, mask)
        if "argmax" in self.oracles:
            self.check_vertex(vertex, scores, mask)
        wide = self._wide(scores, mask)
        return (self.inner(vertex.double(), wide, mask) - self.log_partition(wide, mask)).to(scores.dtype)

    @derived_from("log_partition")
    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log Z - <E[x], scores>`` in nats: ``[*batch]``."""
        self.check(scores, mask)
        wide = self._wide(scores, mask)
        log_z, mean = self._moments(wide, mask)
        return (log_z - self.inner(mean, wide, mask)).to(scores.dtype)

    @derived_from("log_partition")
    def cross_entropy(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log Z(q) - <E_p[x], q>``: ``[*batch]``."""
        p, q = self._pair(p_scores, q_scores, mask)
        mean = self._moments(p, mask)[1]
        return (self.log_partition(q, mask) - self.inner(mean, q, mask)).to(p_scores.dtype)

    @derived_from("log_partition")
    def kl(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log Z(q) - log Z(p) + <E_p[x], p - q>``, the Bregman divergence of log Z: ``[*batch]``."""
        p, q = self._pair(p_scores, q_scores, mask)
        log_z, mean = self._moments(p, mask)
        # The scores are subtracted first, so a term that they share causes no rounding.
        return (self.log_partition(q, mask) - log_z + self.inner(mean, p - q, mask)).to(p_scores.dtype)

    @derived_from("log_partition")
    def renyi(self, p_scores: Tensor, q_scores: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
        """``(log Z(alpha p + (1 - alpha) q) - alpha log Z(p) - (1 - alpha) log Z(q)) / (alpha - 1)``: ``[*batch]``."""
        if not 0 < alpha < math.inf or alpha == 1:
            raise ValueError(f"alpha must be positive and not 1 (the limit at 1 is kl); got {alpha}")
        p, q = self._pair(p_scores, q_scores, mask)
        mixed = self.log_partition(alpha * p + (1 - alpha) * q, mask)
        apart = alpha * self.log_partition(p, mask) + (1 - alpha) * self.log_partition(q, mask)
        return ((mixed - apart) / (alpha - 1)).to(p_scores.dtype)

    @derived_from("log_partition")
    def expected_hamming(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``sum_i m_i + n_i - 2 m_i n_i`` with the marginals m of p and n of q: ``[*batch]``."""
        p, q = self._pair(p_scores, q_scores, mask)
        m, n = self._moments(p, mask)[1], self._moments(q, mask)[1]
        return self.inner(m * (1 - n) + n * (1 - m), torch.ones_like(p), mask).to(p_scores.dtype)

    @derived_from("log_partition", "argmax")
    def minimum_bayes_risk(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``argmax(2 E[x] - 1)``; this is ``argmax(E[x])`` if all vertices have equally many parts."""
        self.check(scores, mask)
        with torch.no_grad():
            mean = self._moments(scores.double(), mask)[1]
        return self.argmax(2 * mean - 1, mask).to(scores.dtype)

    def _pair(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both scores in float64 and of one shape, checked."""
        ndim = self.layout.ndim
        if p_scores.shape[-ndim:] != q_scores.shape[-ndim:]:
            raise ValueError(
                f"p and q are distributions over the same parts; "
                f"got {list(p_scores.shape[-ndim:])} and {list(q_scores.shape[-ndim:])}"
            )
        p, q = torch.broadcast_tensors(p_scores, q_scores)
        self.check(p, mask)
        self.check(q, mask)
        if p.dtype != q.dtype:
            raise TypeError(f"p and q have scores of one precision; got {p.dtype} and {q.dtype}")
        exists = self.parts(p, mask)
        # Scores of missing parts may be NaN, which a difference or a product would spread.
        return torch.where(exists, p.double(), 0.0), torch.where(exists, q.double(), 0.0)

    def _wide(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Scores in float64. If all vertices have equally many parts, the largest score is
        subtracted.

        Then no digit is lost to a constant that the scores share.
        """
        wide = scores.double()
        if not self.constant_size or not scores.numel():
            return wide
        over = tuple(range(-self.layout.ndim, 0))
        largest = torch.where(self.parts(scores, mask), wide.detach(), -torch.inf).amax(over, keepdim=True)
        return wide - torch.where(largest.isfinite(), largest, 0.0)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``log Z`` ``[*batch]`` and ``E[x]`` ``[*batch, *parts]`` of float64 scores, both
        differentiable.

        Structures that compute both in one pass override this.
        """

        def log_partition(s: Tensor, exists: Tensor) -> Tensor:
            return self.log_partition(s, None if mask is None else exists)

        log_z, mean = value_and_gradient(log_partition, scores, self.parts(scores, mask))
        return log_z, self.layout.mirror(mean)


class DynamicProgram(Gibbs, abc.ABC):
    """Gives a structure with a dynamic program its ``argmax``, ``log_partition``, ``sample``, and
    :class:`Gibbs`.

    The program is written once, over a semiring (see :mod:`structgrad.algorithms.semirings`). It is
    in plain torch, so it runs on any device and has derivatives of any order.
    """

    @abc.abstractmethod
    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        """The program: the aggregate of all vertices, ``[*batch]``.

        Args:
            scores: float64 ``[*batch, *parts]``, ``IMPOSSIBLE`` where a part is missing.
            exists: bool ``[*batch, *parts]``.
            plus: aggregates alternatives along a dimension; the program adds the scores of what
                it combines. A vertex may use each aggregate once; otherwise a sample would draw
                it twice.

        The total is 0 for an example without parts and near ``IMPOSSIBLE`` for an example
        without a vertex.
        """

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The program's log-sum: ``[*batch]``, differentiable."""
        self.check(scores, mask)
        return self._checked(scores.double(), self.parts(scores, mask), log_sum).to(scores.dtype)

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The program's best vertex: ``[*batch, *parts]``, 0/1, no gradient."""
        return self._choose(utility, mask, best)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact Gibbs sample an example, drawn back through the program: ``[*batch, *parts]``,
        0/1, no gradient.
        """
        self.check(scores, mask)
        drawn = self._choose(repeated(self._wide(scores.detach(), mask), n), mask, draw)
        return drawn.to(scores.dtype)

    def _checked(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        total = self._total(torch.where(exists, scores, IMPOSSIBLE), exists, plus)
        refuse(total < IMPOSSIBLE / 2, f"has no vertex: {self.name} finds none among its parts")
        return total

    def _choose(self, scores: Tensor, mask: Tensor | None, plus: Aggregation) -> Tensor:
        self.check(scores, mask)

        def choose(scores: Tensor, exists: Tensor) -> tuple[Tensor]:
            return (value_and_gradient(lambda s, e: self._checked(s, e, plus), scores, exists)[1],)

        (vertex,) = over_batch(choose, scores.detach().double(), self.parts(scores, mask))
        return self.layout.mirror(vertex).to(scores.dtype)


# --- the k best -------------------------------------------------------------------------------------------------------


class KBest(Structure):
    """Gives a structure with an ``argmax`` its ``top_k``, by partition of the solution space."""

    @derived_from("argmax")
    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best vertices, exact and distinct (see
        :func:`structgrad.algorithms.k_best.k_best`).

        It takes k rounds of constrained argmaxes, one for each part that may change.

        Returns:
            vertices ``[*batch, k, *parts]``, best first, and their values ``[*batch, k]``,
            differentiable. They are 0 and -inf if an example has fewer than k vertices.
        """
        self.argmax(scores, mask)  # refuses examples without a vertex
        mask = None if mask is None else mask.expand(scores.shape)
        masks = () if mask is None else (mask,)
        found, real = over_batch(lambda s, *m: self._best(s, k, *m), scores.detach(), *masks)
        ndim = self.layout.ndim
        found, values = best_first(found, real, torch.where(self.parts(scores, mask), scores, 0.0).flatten(-ndim))
        shown = found.reshape(*found.shape[:-1], *scores.shape[-ndim:]).to(scores.dtype)
        return self.layout.mirror(shown), values

    def _best(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best vertices on the parts, bool ``[*batch, k, P]``, and whether each exists
        ``[*batch, k]``.
        """
        shape, batch = scores.shape[-self.layout.ndim :], scores.shape[: -self.layout.ndim]
        flat = scores.reshape(batch.numel(), *shape)
        exists = self.parts(scores, mask).reshape(flat.shape)
        filled = torch.where(exists, flat, 0.0)[:, None]
        masks = None if mask is None else mask.reshape(flat.shape)[:, None]

        def solve(allowed: Tensor, forced: Tensor) -> Tensor:
            where = (*allowed.shape[:2], *shape)
            own = None if masks is None else masks.expand(where)
            vertex = self._constrained_argmax(filled.expand(where), allowed.reshape(where), forced.reshape(where), own)
            return ((vertex > 0) & exists[:, None]).flatten(2)

        vertices, values = k_best(
            flat.flatten(1), exists.flatten(1), k, solve, same_size=self.constant_size, branches=self._branches(shape)
        )
        return vertices.reshape(*batch, *vertices.shape[1:]), (values > -torch.inf).reshape(*batch, k)

    def _constrained_argmax(self, scores: Tensor, allowed: Tensor, forced: Tensor, mask: Tensor | None) -> Tensor:
        """A best vertex with all ``forced`` parts and only ``allowed`` ones; arbitrary if there is
        none.

        The argmax finds it, with scores at which breaking one constraint costs more than all parts
        can gain. A structure that can meet constraints directly overrides this.

        Args:
            scores: ``[B, S, *parts]``, S subproblems an example; 0 where a part is missing.
            allowed: bool, of the same shape.
            forced: bool, of the same shape; these are allowed.
            mask: which parts exist.
        """
        wide = scores.double()
        penalty = 1 + 2 * wide.abs().flatten(-self.layout.ndim).sum(-1)[(..., *[None] * self.layout.ndim)]
        utility = torch.where(allowed, wide, -penalty) + torch.where(forced, penalty, 0.0)
        return self.argmax(self.layout.mirror(utility), mask)

    def _branches(self, shape: torch.Size) -> int | None:
        """How many parts of a vertex determine the rest, for parts of this shape; None: all of
        them.
        """
        return None


# --- projection -------------------------------------------------------------------------------------------------------


def sparsemap(
    structure: Structure,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    start: Tensor | None = None,
    max_iterations: int | None = None,
    tolerance: float = 1e-11,
) -> SparseDistribution:
    """A sparse distribution over vertices whose mean is the projection of the scores on conv(X).

    Args:
        structure: any structure with an ``argmax`` that is linear in the scores.
        scores: ``[*batch, *parts]``.
        mask: which parts exist.
        start: the first vertices of the active sets, ``[*batch, *parts]``; None: those of the
            argmax.
        max_iterations: stop after this many calls of the argmax, with the best distribution so far.
            None: continue until the solution.
        tolerance: the solution is reached when no vertex is further than the mean in the direction
            of the residual, up to this times the norm of the scores (or 1).

    Returns:
        at most (number of parts) + 1 vertices an example, affinely independent, in the dtype of the
        scores. The weights are differentiable. Their gradient is exact where the active set stays
        the same, that is almost everywhere.

    The function waits for the device in every iteration. Everything is computed in float64; see
    :mod:`structgrad.algorithms.active_set`.
    """
    if transformed(scores):
        raise NotImplementedError(
            f"sparsemap of {structure.name} has as many vertices as it needs, so it does not run under torch.func "
            "transforms; it takes leading batch dimensions, and torch.autograd gives its gradients"
        )
    structure.check(scores, mask)
    target, argmax, show = _flat(structure, near_scores(structure, scores, mask), mask)
    first = None if start is None else structure.layout.flatten(start).reshape(target.shape).double()
    vertices, rows, weights = active_set.sparse_distribution(
        target,
        argmax,
        start=first,
        pricing=_pricing(structure, scores.detach(), mask),
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    return SparseDistribution(show(vertices).to(scores.dtype), rows, weights.to(scores.dtype))


_active_set = untraced(over_batch)


def project(
    structure: Structure,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    max_iterations: int | None = None,
    tolerance: float = 1e-11,
) -> Tensor:
    """The nearest point of conv(X), differentiable: ``[*batch, *parts]``. Arguments as for
    :func:`sparsemap`.
    """
    structure.check(scores, mask)
    if not (torch.compiler.is_compiling() or transformed(scores)):
        scores = near_scores(structure, scores, mask)
    batch = scores.shape[: -structure.layout.ndim]
    with_face = transformed(scores) or (scores.requires_grad and torch.is_grad_enabled())

    def solve(scores: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
        target, argmax, _ = _flat(structure, scores, masks[0] if masks else None)
        found = active_set.nearest_point(
            target,
            argmax,
            with_face,
            pricing=_pricing(structure, scores, masks[0] if masks else None),
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        return tuple(part.reshape(*scores.shape[: -structure.layout.ndim], *part.shape[1:]) for part in found)

    if torch.compiler.is_compiling():  # if one graph was requested, this is the error message
        break_graph(f"the active-set projection of {structure.name} looks at values in every step")
    masks = () if mask is None else (mask.expand(scores.shape),)
    point, *face = (
        part.reshape(batch.numel(), *part.shape[len(batch) :]) for part in _active_set(solve, scores.detach(), *masks)
    )
    target, _, show = _flat(structure, scores, mask)
    if with_face:
        point = active_set.along_face(point, target, *face)
    return show(point).to(scores.dtype).reshape(scores.shape)


def _flat(
    structure: Structure, scores: Tensor, mask: Tensor | None
) -> tuple[Tensor, active_set.Argmax, Callable[[Tensor], Tensor]]:
    """Scores as float64 vectors ``[B, P]``, the argmax over such vectors, and a function that shows
    them as parts.
    """
    layout = structure.layout
    shape = scores.shape[-layout.ndim :]
    size = scores.shape[: -layout.ndim].numel()
    batched = scores.reshape(size, *shape)
    masks = None if mask is None else mask.expand(scores.shape).reshape(size, *shape)
    exists = layout.flatten(structure.parts(batched, masks))
    target = torch.where(exists, layout.flatten(batched), 0.0).double()

    def show(flat: Tensor) -> Tensor:
        return layout.unflatten(flat, shape)

    def argmax(directions: Tensor, rows: Tensor) -> Tensor:
        vertices = structure.argmax(show(directions), None if masks is None else masks[rows])
        return layout.flatten(vertices).double()

    return target, argmax, show


def _pricing(structure: Structure, scores: Tensor, mask: Tensor | None) -> active_set.Pricing | None:
    return structure.pricing(scores, mask) if isinstance(structure, ActiveSetProjection) else None


class ActiveSetProjection(Structure):
    """Gives a structure with an ``argmax`` its ``project`` and ``sparsemap`` by the active-set
    method.

    Sets with a closed-form projection need none of this.
    """

    def pricing(self, scores: Tensor, mask: Tensor | None = None) -> active_set.Pricing | None:
        """The argmax of these examples for compiled code that does all steps of the method; None if
        there is none.
        """
        return None

    @derived_from("argmax")
    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Euclidean projection of the scores on conv(X), by the active-set method: ``[*batch,
        *parts]``.

        It is differentiable (see :mod:`structgrad.algorithms.active_set`).
        """
        return project(self, scores, mask)

    @derived_from("argmax")
    def sparsemap(self, scores: Tensor, mask: Tensor | None = None) -> SparseDistribution:
        """At most (number of parts) + 1 vertices an example whose mean is :meth:`project`.

        The active-set method finds them. ``*batch`` is flattened into rows.
        """
        return sparsemap(self, scores, mask)
