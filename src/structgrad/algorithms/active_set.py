"""The nearest point of a polytope that is known by its argmax, by an active-set method: SparseMAP.

    min_{w in simplex over X}  |sum_x w_x x - t|^2 / 2                         (Niculae et al. 2018; Correia et al.
    2020, eq. 4)

The algorithm is that of Wolfe (1976) for the nearest point of a polytope, of which the active-set method of Niculae
et al. is an instance. It keeps an affinely independent *active set* S of vertices, whose weights are therefore
unique, and repeats: ask the argmax for the vertex furthest in the direction of the residual ``t - x``; if it is no
further than x, x is the projection; else add it, move to the nearest point of the affine hull of S, and where that
leaves the simplex stop at its boundary and drop the vertices whose weight got 0. It ends after finitely many steps at
the exact solution. All examples of a batch go through it together, and leave as they converge.

**Gradients.** Where S stays as it is, the weights are affine in t, and the mean moves by the orthogonal projection on
the linear hull of S. The projection on a polytope moves by the orthogonal projection on the linear hull of the *face*
F on which it lies. S is a subset of F that need not span it, for two reasons. For ties (equal scores, as at
initialisation) fewer vertices do: two opposite corners of a square have its centre as their mean, where the
projection still moves in all directions. And with many fractional parts (64 bits) the weights of successive vertices
fall like powers of two, until they are below what float64 resolves while directions are still missing. Therefore
:func:`project` looks for further vertices of F, by the argmax in directions orthogonal to S, before it
differentiates: its gradient is that of the projection in both cases. The weights of :func:`sparsemap` have the
gradient of the distribution that is returned, hence along S only; through them the mean has the gradient of
:func:`project` exactly where S spans F, which is almost everywhere for up to some 40 parts. Sets with a closed-form
projection need none of this and override the methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

#: A weight below this has left the active set.
_ZERO = 1e-12
#: Directions must be independent of the scores, so this is no seed that anybody else would take.
_PROBE_SEED = 7_046_029_254_386_353_131
#: Safety net for ``max_iterations=None``: far beyond the number of steps that were ever seen.
_STEPS_A_PART = 100

#: ``(directions [b, P], rows int64 [b]) -> [b, P]``, float64: vertices of the examples ``rows`` that are furthest in
#: these directions.
Argmax = Callable[[Tensor, Tensor], Tensor]


def sparse_distribution(
    target: Tensor, argmax: Argmax, *, max_iterations: int | None = None, tolerance: float = 1e-11
) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse distribution over vertices whose mean is the nearest point to the target.

    Args:
        target: float64 ``[B, P]``.
        argmax: what the polytopes are known by.
        max_iterations: stop after so many calls of the argmax, with the best distribution so far; None: at the
            solution.
        tolerance: the solution is reached when no vertex is further in the direction of the residual than the mean,
            up to this times the norm of the target (or 1).

    Returns:
        at most P + 1 vertices an example, affinely independent, ``[N, P]``; the example each belongs to, int64
        ``[N]``, ascending; and weights ``[N]``, differentiable: the gradient is exact where the active set stays the
        same, that is almost everywhere.

    Waits for the device in every iteration.
    """
    found = _minimise(target, argmax, max_iterations, tolerance)
    weights = found.weights + found.direction(_moves(found.vertices, target))
    rows, slots = found.active.nonzero(as_tuple=True)
    return found.vertices[rows, slots], rows, weights[rows, slots]


def nearest_point(
    target: Tensor, argmax: Argmax, *, max_iterations: int | None = None, tolerance: float = 1e-11
) -> Tensor:
    """The nearest point to the target, differentiable: ``[B, P]``; arguments as for :func:`sparse_distribution`."""
    found = _minimise(target, argmax, max_iterations, tolerance)
    point = found.mean()
    if target.requires_grad:
        face = _span_face(target, argmax, found, point)
        point = point + _combine(face.direction(_moves(face.vertices, target)), face.vertices)
    return point


def _scale(target: Tensor) -> Tensor:
    """What rounding is relative to: ``[B]``."""
    size: Tensor = target.detach().norm(dim=-1)
    return size.clamp_min(1.0)


@dataclass
class _ActiveSet:
    """Vertices ``[B, K, P]`` in slots, which slots are used ``[B, K]``, weights ``[B, K]`` (0 where unused), inner
    products of the vertices ``[B, K, K]``.
    """

    vertices: Tensor
    active: Tensor
    weights: Tensor
    gram: Tensor

    def mean(self) -> Tensor:
        """``[B, P]``."""
        return _combine(self.weights, self.vertices)

    def select(self, rows: Tensor) -> _ActiveSet:
        """The examples of these rows (indices or bool)."""
        return _ActiveSet(self.vertices[rows], self.active[rows], self.weights[rows], self.gram[rows])

    def widen(self, slots: int) -> None:
        """Have so many slots."""
        more = slots - self.active.shape[1]
        self.vertices = pad(self.vertices, (0, 0, 0, more))
        self.active, self.weights = pad(self.active, (0, more)), pad(self.weights, (0, more))
        self.gram = pad(self.gram, (0, more, 0, more))

    def add(self, vertex: Tensor, which: Tensor) -> Tensor:
        """Give a vertex ``[B, P]`` to the examples ``which`` (bool ``[B]``), with weight 0; the slots ``[B]``."""
        if bool(self.active.all(-1)[which].any()):
            self.widen(2 * self.active.shape[1])
        slot = self.active.int().argmin(-1)
        rows = which.nonzero().squeeze(-1)
        at = slot[rows]
        self.vertices[rows, at] = vertex[rows]
        products = (self.vertices[rows] @ vertex[rows].unsqueeze(-1)).squeeze(-1)
        self.gram[rows, at] = products
        self.gram[rows, :, at] = products
        self.active[rows, at] = True
        self.weights[rows, at] = 0.0
        return slot

    def direction(self, moves: Tensor) -> Tensor:
        """How the weights of the nearest point of aff(S) move, ``[B, K]``, as the products of t with the vertices move
        by
        ``moves`` ``[B, K]``: solves ``G d + mu 1 = moves, 1'd = 0`` over the active set; linear and differentiable in
        ``moves``.
        """
        # Vertices with a 1 appended are linearly independent where they are affinely, so G + 11' is positive definite.
        both = self.active.unsqueeze(-1) & self.active.unsqueeze(-2)
        system = torch.where(both, self.gram + 1.0, 0.0) + (~self.active).to(self.gram).diag_embed()
        used = self.active.to(moves)
        solved = torch.cholesky_solve(
            torch.stack([torch.where(self.active, moves, 0.0), used], -1), torch.linalg.cholesky(system)
        )
        free, constant = solved.unbind(-1)
        return free - constant * (free.sum(-1) / constant.sum(-1)).unsqueeze(-1)


def _combine(weights: Tensor, vertices: Tensor) -> Tensor:
    """``[B, K], [B, K, P]`` -> ``[B, P]``."""
    return (weights.unsqueeze(-2) @ vertices).squeeze(-2)


def _moves(vertices: Tensor, target: Tensor) -> Tensor:
    """Products of the vertices with the target, 0 in value: what carries the gradient. ``[B, K]``."""
    return (vertices @ (target - target.detach()).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def _minimise(target: Tensor, argmax: Argmax, max_iterations: int | None, tolerance: float) -> _ActiveSet:
    """Wolfe's algorithm for a batch."""
    target, scale = target.detach(), _scale(target)
    rows = torch.arange(len(target), device=target.device)
    first = argmax(target, rows).unsqueeze(1)
    ones = first.new_ones(first.shape[:2])
    now = _ActiveSet(first, ones > 0, ones, first @ first.transpose(-1, -2))
    finished: list[tuple[Tensor, _ActiveSet]] = []
    limit = _STEPS_A_PART * (target.shape[-1] + 1) if max_iterations is None else max_iterations
    for _ in range(limit):
        if not len(rows):
            break
        point = now.mean()
        residual = target[rows] - point
        vertex = argmax(residual, rows)
        gap = ((vertex - point) * residual).sum(-1)
        new = gap > tolerance * scale[rows]
        slot = now.add(vertex, new)
        _descend(now, target[rows], new.clone())
        # A vertex that leaves again at once says that the rest is rounding.
        going = new & now.active.gather(-1, slot.unsqueeze(-1)).squeeze(-1)
        if not bool(going.all()):
            finished.append((rows[~going], now.select(~going)))
            rows, now = rows[going], now.select(going)
    if len(rows) and max_iterations is None:
        raise RuntimeError(f"the active-set method did not converge within {limit} iterations")
    finished.append((rows, now))
    slots = max(part.active.shape[1] for _, part in finished)
    for _, part in finished:
        part.widen(slots)
    order = torch.cat([r for r, _ in finished]).argsort()
    parts = [part for _, part in finished]
    return _ActiveSet(
        torch.cat([p.vertices for p in parts])[order],
        torch.cat([p.active for p in parts])[order],
        torch.cat([p.weights for p in parts])[order],
        torch.cat([p.gram for p in parts])[order],
    )


def _descend(now: _ActiveSet, target: Tensor, pending: Tensor) -> None:
    """Move the weights of the pending examples (bool ``[B]``) towards the nearest point of aff(S), dropping vertices on
    the way out of conv(S), until it is inside.
    """
    while bool(pending.any()):
        rows = pending.nonzero().squeeze(-1)
        part = now.select(rows)
        residual = target[rows] - part.mean()
        step = part.direction((part.vertices @ residual.unsqueeze(-1)).squeeze(-1))
        goal = part.weights + step
        leaving = part.active & (goal <= _ZERO)
        # How far each leaving weight can go before it is 0; the first one to get there leaves.
        reach = torch.where(leaving, part.weights / (part.weights - goal).clamp_min(_ZERO), torch.inf)
        length, blocking = reach.min(-1)
        inside = ~leaving.any(-1)
        moved = torch.where(inside.unsqueeze(-1), goal, part.weights + length.clamp_max(1.0).unsqueeze(-1) * step)
        slots = torch.arange(moved.shape[-1], device=moved.device)
        dropped = leaving & ((moved <= _ZERO) | (slots == blocking.unsqueeze(-1)))
        kept = part.active & ~dropped
        moved = torch.where(kept, moved, 0.0)
        now.active[rows] = kept
        now.weights[rows] = moved / moved.sum(-1, keepdim=True)
        pending[rows] = ~inside


@torch.no_grad()
def _span_face(target: Tensor, argmax: Argmax, found: _ActiveSet, point: Tensor) -> _ActiveSet:
    """Add vertices (of weight 0) to the active sets until they span the faces on which the points lie.

    A random direction orthogonal to aff(S) is constant on the face only if S spans it, with probability one; so
    almost always this is a single call of the argmax, which finds nothing.
    """
    face = found.select(torch.arange(len(point), device=point.device))
    residual, scale = target.detach() - point, _scale(target)
    # A residual of rounding size means that the scores are in the polytope: every direction is along the face.
    residual = torch.where((residual.norm(dim=-1) > 1e-10 * scale).unsqueeze(-1), residual, 0.0)
    generator = torch.Generator(device=point.device).manual_seed(_PROBE_SEED)
    going = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(point.shape[-1] + 1):
        noise = torch.randn(point.shape, generator=generator, device=point.device, dtype=point.dtype)
        along = _combine(face.direction((face.vertices @ noise.unsqueeze(-1)).squeeze(-1)), face.vertices)
        across = noise - along
        # Small enough not to leave the face, unless another one is as good up to this.
        size = residual.norm(dim=-1)
        size = torch.where(size > 0, 1e-6 * size, 1.0).unsqueeze(-1)
        rows = going.nonzero().squeeze(-1)
        vertex = torch.zeros_like(point)
        vertex[rows] = argmax((residual + size * across)[rows], rows)
        away = vertex - point
        going = going & ((away * residual).sum(-1) >= -1e-9 * scale) & ((away * across).sum(-1) > 1e-6)
        if not bool(going.any()):
            break
        face.add(vertex, going)
    return face
