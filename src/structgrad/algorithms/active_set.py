"""The nearest point of a polytope that is known by its argmax, by an active-set method: SparseMAP.

    min_{w in simplex over X}  |sum_x w_x x - t|^2 / 2

(Niculae et al. 2018; Correia et al. 2020, eq. 4).

The algorithm is that of Wolfe (1976) for the nearest point of a polytope. The active-set method of
Niculae et al. is an instance of it. It keeps an affinely independent *active set* S of vertices, so
the weights of x, their mean, are unique. It repeats these steps:

1. Ask the argmax for the vertex that is furthest in the direction of the residual ``t - x``.
2. If this vertex is no further than x, x is the projection, and the algorithm ends.
3. Otherwise add the vertex to S and move to the nearest point of the affine hull of S. If that
   point lies outside the simplex, stop at its boundary and drop the vertices whose weight is 0.

It ends at the exact solution after finitely many steps. All examples of a batch go through it
together, and each leaves when it has converged. A compiled step takes one argmax, and O(K M + K^2)
for K vertices of M ones each; after a vertex was dropped, up to O(K^3).

**Gradients.** As long as S stays the same, the weights are affine in t, and the mean moves by the
orthogonal projection on the linear hull of S. The projection on a polytope moves by the orthogonal
projection on the linear hull of the *face* F on which it lies. S is a subset of F that need not
span it, for two reasons:

- Ties (equal scores, as at initialisation). Two opposite corners of a square have its centre as
  their mean, but the projection can still move in all directions there.
- Many fractional parts (64 bits). The weights of successive vertices fall like powers of two.
  They fall below the resolution of float64 while directions are still missing.

Therefore :func:`project` looks for further vertices of F before it differentiates, by the argmax in
directions orthogonal to S. Its gradient is that of the projection in both cases.

The weights of :func:`sparsemap` have the gradient of the distribution that is returned, hence along
S only. Through them the mean has the gradient of :func:`project` exactly where S spans F. This
holds almost everywhere for up to about 40 parts. Sets with a closed-form projection need none of
this and override the methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from structgrad.algorithms.compiled import njit
from structgrad.algorithms.eager import has_warned, values_can_be_read, warn_stopped
from structgrad.algorithms.products import product
from structgrad.algorithms.threads import run

#: A weight below this has left the active set.
_ZERO = 1e-12
#: The seed of the random directions. They must be independent of the scores, so nobody else should
#: use this seed.
_PROBE_SEED = 7_046_029_254_386_353_131
#: The warning is given above this error.
_ORACLE = "the active-set method"
#: The limit if ``max_iterations`` is None: far beyond the number of steps that was ever observed.
_STEPS_A_PART = 100

#: ``(directions [b, P], rows int64 [b]) -> [b, P]``, float64: vertices of the examples ``rows`` that are furthest in
#: these directions.
Argmax = Callable[[Tensor, Tensor], Tensor]

#: The state of an example: it continues, it has converged, or it needs more slots.
GOING, CONVERGED, FULL = 0, 1, 2

#: A squared distance from the affine hull below this is rounding. A 0/1 vertex outside is further
#: away.
_DEPENDENT = 1e-12


def sparse_distribution(
    target: Tensor,
    argmax: Argmax,
    *,
    start: Tensor | None = None,
    pricing: Pricing | None = None,
    max_iterations: int | None = None,
    tolerance: float = 1e-11,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse distribution over vertices whose mean is the nearest point to the target.

    Args:
        target: float64 ``[B, P]``.
        argmax: the oracle by which the polytopes are known.
        start: float64 ``[B, P]``, the first vertices of the active sets. None: the argmax of
            the targets. If the mean has several sparse distributions, the start decides between
            them.
        pricing: the same argmax for compiled code, if there is one.
        max_iterations: stop after this many calls of the argmax, with the best distribution so
            far. None: continue until the solution.
        tolerance: the solution is reached when no vertex is further than the mean in the
            direction of the residual, up to this times the norm of the target (or 1).

    Returns:
        at most P + 1 affinely independent vertices an example, ``[N, P]``; the example of each
        vertex, int64 ``[N]``, ascending; and weights ``[N]``. The weights are
        differentiable. Their gradient is exact where the active set stays the same, that is
        almost everywhere.

    The function waits for the device in every iteration.
    """
    found = _minimise(target, argmax, max_iterations, tolerance, start, pricing)
    weights = found.weights + found.direction(_moves(found, target))
    rows, slots = found.active.nonzero(as_tuple=True)
    return found.vertices(rows, slots, target.shape[-1]), rows, weights[rows, slots]


def nearest_point(
    target: Tensor,
    argmax: Argmax,
    with_face: bool = False,
    *,
    pricing: Pricing | None = None,
    max_iterations: int | None = None,
    tolerance: float = 1e-11,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest point to the target ``[B, P]``, and on request the face on which it lies.

    The face is given as the arguments of :func:`along_face`. The other arguments are those of
    :func:`sparse_distribution`.
    """
    found = _minimise(target, argmax, max_iterations, tolerance, pricing=pricing)
    point = found.mean(target.shape[-1])
    face = _span_face(target, argmax, found, point) if with_face else found
    return point, face.ones, face.active, face.gram


def along_face(point: Tensor, target: Tensor, ones: Tensor, active: Tensor, gram: Tensor) -> Tensor:
    """The nearest point ``[B, P]``, differentiable in the target: it moves along its face."""
    face = _ActiveSet(ones, active, gram.new_zeros(()), gram)
    return point + face.combine(face.direction(_moves(face, target)), target.shape[-1])


@dataclass
class Slots:
    """Active sets of a batch, for compiled code: ``[B, K, M]``, ``[B]``, ``[B, K]``, and twice ``[B, K, K]``."""

    ones: Tensor
    count: Tensor
    weights: Tensor
    system: Tensor
    factor: Tensor

    def arrays(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.ones, self.count, self.weights, self.system, self.factor

    def widen(self, slots: int, most: int, size: int) -> None:
        """Make room for this many slots and for vertices of up to ``most`` parts."""
        more = slots - self.weights.shape[1]
        self.ones = pad(self.ones, (0, most - self.ones.shape[2], 0, more), value=size).contiguous()
        self.weights = pad(self.weights, (0, more)).contiguous()
        self.system = pad(self.system, (0, more, 0, more)).contiguous()
        self.factor = pad(self.factor, (0, more, 0, more)).contiguous()


@dataclass(frozen=True)
class Pricing:
    """An argmax that compiled code can call itself, for all steps of an example at once.

    Attributes:
        most: the most parts of a vertex.
        run: ``(target, slots, status, steps, tolerance, limit)``. It continues every example that
            is :data:`GOING` until its status changes or it has done ``limit`` steps.
    """

    most: int
    run: Callable[[Tensor, Slots, Tensor, Tensor, Tensor, int], None]


# --- plain torch ------------------------------------------------------------------------------------------------------


def _scale(target: Tensor) -> Tensor:
    """The size ``[B]`` to which rounding errors are relative."""
    size: Tensor = target.detach().norm(dim=-1)
    return size.clamp_min(1.0)


@dataclass
class _ActiveSet:
    """The active sets of a batch, each with vertices in K slots.

    There are four tensors. One holds the indices of the parts of each vertex ``[B, K, M]`` (P where
    a vertex has fewer than M). The others say whether a slot is used ``[B, K]``, and hold weights
    ``[B, K]`` (0 where unused) and the inner products of the vertices ``[B, K, K]``.
    """

    ones: Tensor
    active: Tensor
    weights: Tensor
    gram: Tensor

    @staticmethod
    def of(vertex: Tensor) -> _ActiveSet:
        """One vertex ``[B, P]`` an example."""
        ones = _indices(vertex).unsqueeze(1)
        weights = vertex.new_ones(ones.shape[:2])
        return _ActiveSet(ones, weights > 0, weights, (vertex * vertex).sum(-1)[:, None, None])

    def mean(self, size: int) -> Tensor:
        """``[B, P]``, P being ``size``."""
        return self.combine(self.weights, size)

    def combine(self, weights: Tensor, size: int) -> Tensor:
        """The sum of the vertices with these weights ``[B, K]``: ``[B, P]``."""
        spread = weights.unsqueeze(-1).expand(self.ones.shape).flatten(1)
        return weights.new_zeros(len(weights), size + 1).scatter_add(1, self.ones.flatten(1), spread)[:, :size]

    def products(self, direction: Tensor) -> Tensor:
        """The products of the vertices with a direction ``[B, P]``: ``[B, K]``."""
        return pad(direction, (0, 1)).gather(1, self.ones.flatten(1)).reshape(self.ones.shape).sum(-1)

    def vertices(self, rows: Tensor, slots: Tensor, size: int) -> Tensor:
        """The vertices in some slots: ``[N, P]``."""
        return self.weights.new_zeros(len(rows), size + 1).scatter(1, self.ones[rows, slots], 1.0)[:, :size]

    def select(self, rows: Tensor) -> _ActiveSet:
        """The active sets of these examples (indices or bool)."""
        return _ActiveSet(*(getattr(self, part.name)[rows] for part in fields(self)))

    def widen(self, slots: int, most: int, size: int) -> None:
        """Make room for this many slots and for vertices of up to ``most`` parts."""
        more = slots - self.active.shape[1]
        self.ones = pad(self.ones, (0, most - self.ones.shape[2], 0, more), value=size)
        self.active, self.weights = pad(self.active, (0, more)), pad(self.weights, (0, more))
        self.gram = pad(self.gram, (0, more, 0, more))

    def add(self, vertex: Tensor, which: Tensor) -> Tensor:
        """Add a vertex ``[B, P]`` to the examples ``which`` (bool ``[B]``) with weight 0.

        Returns the slots ``[B]``.
        """
        slots, most, size = self.active.shape[1], self.ones.shape[2], vertex.shape[-1]
        ones = _indices(vertex)
        if bool(self.active.all(-1)[which].any()):
            slots += 1 + slots // 2
        self.widen(slots, max(most, ones.shape[-1]), size)
        ones = pad(ones, (0, self.ones.shape[2] - ones.shape[-1]), value=size)
        slot = self.active.int().argmin(-1)
        rows = which.nonzero().squeeze(-1)
        at = slot[rows]
        self.ones[rows, at] = ones[rows]
        products = self.products(vertex)[rows]
        self.gram[rows, at] = products
        self.gram[rows, :, at] = products
        self.active[rows, at] = True
        self.weights[rows, at] = 0.0
        return slot

    def direction(self, moves: Tensor) -> Tensor:
        """:func:`_direction` of this set."""
        return _direction(self.active, self.gram, moves)


def _direction(active: Tensor, gram: Tensor, moves: Tensor) -> Tensor:
    """The direction ``[B, K]`` in which the weights of the nearest point of aff(S) move.

    ``moves`` ``[B, K]`` says how the products of t with the vertices move. This solves ``G d + mu 1
    = moves, 1'd = 0`` over the active set. It is linear and differentiable in ``moves``.
    """
    # Vertices with a 1 appended are linearly independent where they are affinely, so G + 11' is positive definite.
    both = active.unsqueeze(-1) & active.unsqueeze(-2)
    system = torch.where(both, gram + 1.0, 0.0) + (~active).to(gram).diag_embed()
    right = torch.stack([torch.where(active, moves, 0.0), active.to(moves)], -1)
    free, constant = torch.cholesky_solve(right, torch.linalg.cholesky(system)).unbind(-1)
    return free - constant * (free.sum(-1) / constant.sum(-1)).unsqueeze(-1)


def _indices(vertex: Tensor) -> Tensor:
    """The indices of the parts of vertices ``[B, P]``: ``[B, M]``, P where one has fewer than M."""
    rows, parts = vertex.nonzero(as_tuple=True)
    place = vertex.cumsum(-1)[rows, parts].long() - 1
    most = int(place.max()) + 1 if len(place) else 0
    indices = torch.full((len(vertex), most), vertex.shape[-1], device=vertex.device)
    indices[rows, place] = parts
    return indices


def _moves(found: _ActiveSet, target: Tensor) -> Tensor:
    """Products of the vertices with the target ``[B, K]``. Their value is 0; they carry the
    gradient.
    """
    return found.products(target - target.detach())


@torch.no_grad()
def _minimise(
    target: Tensor,
    argmax: Argmax,
    max_iterations: int | None,
    tolerance: float,
    start: Tensor | None = None,
    pricing: Pricing | None = None,
) -> _ActiveSet:
    """Wolfe's algorithm for a batch."""
    if values_can_be_read(target):
        return _minimise_compiled(target.detach(), argmax, max_iterations, tolerance, start, pricing)
    target, scale = target.detach(), _scale(target)
    rows = torch.arange(len(target), device=target.device)
    now, size = _ActiveSet.of(argmax(target, rows) if start is None else start), target.shape[-1]
    going = torch.ones_like(scale, dtype=torch.bool)
    finished: list[tuple[Tensor, _ActiveSet]] = []
    limit = _STEPS_A_PART * (target.shape[-1] + 1) if max_iterations is None else max_iterations
    for _ in range(limit):
        if not len(rows):
            break
        point = now.mean(size)
        residual = target - point
        vertex = torch.zeros_like(point)
        left = going.nonzero().squeeze(-1)
        vertex[left] = argmax(residual[left], rows[left])
        gap = ((vertex - point) * residual).sum(-1)
        going = going & (gap > tolerance * scale)
        slot = now.add(vertex, going)
        _descend(now, now.products(residual), going.clone())
        # A vertex that leaves at once shows that the rest is rounding.
        going = going & now.active.gather(-1, slot.unsqueeze(-1)).squeeze(-1)
        # Dropping the finished examples copies the others, so do it only when it halves the work.
        if 2 * int(going.sum()) <= len(rows):
            finished.append((rows[~going], now.select(~going)))
            rows, now, target, scale = rows[going], now.select(going), target[going], scale[going]
            going = going[going]
    if bool(going.any()) and max_iterations is None:
        raise RuntimeError(f"the active-set method did not converge within {limit} iterations")
    if bool(going.any()):
        _warn(target[going], now.select(going), argmax, rows[going], tolerance)
    finished.append((rows, now))
    slots = max(part.active.shape[1] for _, part in finished)
    most = max(part.ones.shape[2] for _, part in finished)
    for _, part in finished:
        part.widen(slots, most, size)
    order = torch.cat([r for r, _ in finished]).argsort()
    return _ActiveSet(*(torch.cat([getattr(of, part.name) for _, of in finished])[order] for part in fields(now)))


def _descend(now: _ActiveSet, moves: Tensor, pending: Tensor) -> None:
    """Move the weights of the pending examples (bool ``[B]``) towards the nearest point of aff(S).

    Vertices at which the path leaves conv(S) are dropped, until the nearest point is inside.
    ``moves`` ``[B, K]`` are the products of the vertices with the residual.
    """
    while bool(pending.any()):
        rows = pending.nonzero().squeeze(-1)
        active, weights, gram = now.active[rows], now.weights[rows], now.gram[rows]
        step = _direction(active, gram, moves[rows])
        goal = weights + step
        leaving = active & (goal <= _ZERO)
        # How far each decreasing weight can go before it is 0. The first one to get there leaves.
        reach = torch.where(leaving, weights / (weights - goal).clamp_min(_ZERO), torch.inf)
        length, blocking = reach.min(-1)
        inside = ~leaving.any(-1)
        moved = torch.where(inside.unsqueeze(-1), goal, weights + length.clamp_max(1.0).unsqueeze(-1) * step)
        slots = torch.arange(moved.shape[-1], device=moved.device)
        dropped = leaving & ((moved <= _ZERO) | (slots == blocking.unsqueeze(-1)))
        kept = active & ~dropped
        moved = torch.where(kept, moved, 0.0)
        moved = moved / moved.sum(-1, keepdim=True)
        now.active[rows], now.weights[rows] = kept, moved
        pending[rows] = ~inside
        moves[rows] -= product(gram, (moved - weights).unsqueeze(-1)).squeeze(-1)


def _warn(target: Tensor, stopped: _ActiveSet, argmax: Argmax, rows: Tensor, tolerance: float) -> None:
    """Warn about examples that reached the limit of steps."""
    if has_warned(_ORACLE):
        return
    reached = stopped.mean(target.shape[-1])
    residual = target - reached
    gap = ((argmax(residual, rows) - reached) * residual).sum(-1)
    what = "a vertex is further in the direction of the residual, relative to the norm of the scores, by"
    warn_stopped(gap / _scale(target), tolerance, _ORACLE, what)


@torch.no_grad()
def _span_face(target: Tensor, argmax: Argmax, found: _ActiveSet, point: Tensor) -> _ActiveSet:
    """Add vertices (of weight 0) to the active sets until they span the faces on which the points
    lie.

    If S does not span the face, a random direction orthogonal to aff(S) is not constant on the
    face, with probability one. So almost always a single call of the argmax is enough, and it finds
    nothing.
    """
    face = found.select(torch.arange(len(point), device=point.device))
    residual, scale = target.detach() - point, _scale(target)
    # A residual of rounding size means that the scores are in the polytope: every direction is along the face.
    residual = torch.where((residual.norm(dim=-1) > 1e-10 * scale).unsqueeze(-1), residual, 0.0)
    generator = torch.Generator(device=point.device).manual_seed(_PROBE_SEED)
    going = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(point.shape[-1] + 1):
        noise = torch.randn(point.shape, generator=generator, device=point.device, dtype=point.dtype)
        along = face.combine(face.direction(face.products(noise)), point.shape[-1])
        across = noise - along
        # Small enough not to leave the face, unless another vertex is almost as good.
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


# --- CPU kernels ------------------------------------------------------------------------------------------------------
# For one example. The vertices of the active set are the first ``count`` slots. ``ones [K, M]`` are
# indices of parts, P (``size``) where a vertex has fewer than M. ``system [K, K]`` holds the inner
# products plus 1, ``factor`` its Cholesky factor.


def _minimise_compiled(
    target: Tensor,
    argmax: Argmax,
    max_iterations: int | None,
    tolerance: float,
    start: Tensor | None,
    pricing: Pricing | None,
) -> _ActiveSet:
    """The same algorithm in compiled code, except for the argmax. Finished examples stop."""
    size = target.shape[-1]
    everybody = torch.arange(len(target))
    first = _ActiveSet.of((argmax(target, everybody) if start is None else start).detach())
    system = first.gram + 1.0
    count = torch.ones(len(target), dtype=torch.int64)
    slots = Slots(first.ones.int(), count, first.weights, system, system.sqrt())
    slots.widen(min(16, size + 2), max(first.ones.shape[2], pricing.most if pricing else 0), size)
    status = torch.full((len(target),), GOING, dtype=torch.int8)
    steps = torch.zeros(len(target), dtype=torch.int64)
    limit = _STEPS_A_PART * (size + 1) if max_iterations is None else max_iterations
    enough = tolerance * _scale(target)
    while bool((going := (status == GOING) & (steps < limit)).any()):
        if pricing is not None:
            pricing.run(target, slots, status, steps, enough, limit)
        else:
            rows = going.nonzero().squeeze(-1)
            residual = target.new_empty(len(rows), size)
            run(_residuals_kernel, 20 * residual.numel(), rows, target, *slots.arrays(), residual)
            ones = _indices(argmax(residual, rows)).int()
            most = max(slots.ones.shape[2], ones.shape[1])
            slots.widen(slots.weights.shape[1], most, size)
            ones = pad(ones, (0, most - ones.shape[1]), value=size).contiguous()
            work = 40 * slots.system[0].numel() * len(rows)
            run(_steps_kernel, work, rows, residual, ones, *slots.arrays(), status, steps, enough)
        if bool((status == FULL).any()):
            slots.widen(slots.weights.shape[1] + slots.weights.shape[1] // 2, slots.ones.shape[2], size)
            status[status == FULL] = GOING
    going = status == GOING
    if bool(going.any()) and max_iterations is None:
        raise RuntimeError(f"the active-set method did not converge within {limit} iterations")
    used = int(slots.count.max()) if len(target) else 1
    active = torch.arange(used) < slots.count[:, None]
    weights = torch.where(active, slots.weights[:, :used], 0.0)
    found = _ActiveSet(slots.ones[:, :used].long(), active, weights, slots.system[:, :used, :used] - 1.0)
    if bool(going.any()):
        _warn(target[going], found.select(going), argmax, everybody[going], tolerance)
    return found


@njit(cache=True)
def residual_of(target, ones, count, weights, residual):  # type: ignore[no-untyped-def]
    """``residual[:] = target - mean``."""
    size = len(target)
    residual[:] = target
    for s in range(count):
        for t in range(ones.shape[1]):
            if ones[s, t] == size:
                break
            residual[ones[s, t]] -= weights[s]


@njit(cache=True)
def _product(residual, ones):  # type: ignore[no-untyped-def]
    total = 0.0
    for t in range(len(ones)):
        if ones[t] == len(residual):
            break
        total += residual[ones[t]]
    return total


@njit(cache=True)
def _factorise(first, count, system, factor):  # type: ignore[no-untyped-def]
    """Compute the rows ``first`` and later of the Cholesky factor.

    Returns False if the last vertex depends on the others.
    """
    for i in range(first, count):
        for j in range(i):
            total = system[i, j]
            for t in range(j):
                total -= factor[i, t] * factor[j, t]
            factor[i, j] = total / factor[j, j]
        total = system[i, i]
        for t in range(i):
            total -= factor[i, t] * factor[i, t]
        if total < _DEPENDENT:
            return False
        factor[i, i] = np.sqrt(total)
    return True


@njit(cache=True)
def _solve(count, factor, free, constant):  # type: ignore[no-untyped-def]
    """Solve for both right sides, in place."""
    for i in range(count):
        one, other = free[i], constant[i]
        for t in range(i):
            one -= factor[i, t] * free[t]
            other -= factor[i, t] * constant[t]
        free[i], constant[i] = one / factor[i, i], other / factor[i, i]
    for i in range(count - 1, -1, -1):
        free[i] /= factor[i, i]
        constant[i] /= factor[i, i]
        one, other = free[i], constant[i]
        for t in range(i):
            free[t] -= factor[i, t] * one
            constant[t] -= factor[i, t] * other


@njit(cache=True)
def step(residual, vertex, ones, count, weights, system, factor, enough):  # type: ignore[no-untyped-def]
    """Add a vertex (the indices of its parts ``[M]``) to the active set ``count [1]``, and descend.

    See :func:`_descend`. Returns the new state of the example.
    """
    k, size = count[0], len(residual)
    room = len(weights)
    moves, free, constant = np.empty(room), np.empty(room), np.empty(room)
    here = 0.0
    for s in range(k):
        moves[s] = _product(residual, ones[s])
        here += weights[s] * moves[s]
    gain = _product(residual, vertex)
    if gain - here <= enough:
        return CONVERGED
    if k == room:
        return FULL
    among = np.zeros(size + 1, np.bool_)
    parts = 0
    for t in range(len(vertex)):
        ones[k, t] = vertex[t]
        if vertex[t] < size:
            among[vertex[t]] = True
            parts += 1
    for s in range(k):
        common = 1.0
        for t in range(ones.shape[1]):
            if ones[s, t] == size:
                break
            common += among[ones[s, t]]
        system[k, s], system[s, k] = common, common
    system[k, k] = 1.0 + parts
    weights[k], moves[k] = 0.0, gain
    if not _factorise(k, k + 1, system, factor):
        return CONVERGED  # only rounding is left
    new = k
    k += 1
    while True:
        free[:k], constant[:k] = moves[:k], 1.0
        _solve(k, factor, free, constant)
        shift = free[:k].sum() / constant[:k].sum()
        length, blocking = np.inf, -1
        for s in range(k):
            free[s] -= shift * constant[s]
            if weights[s] + free[s] <= _ZERO:
                reach = weights[s] / max(-free[s], _ZERO)
                if reach < length:
                    length, blocking = reach, s
        length = min(length, 1.0)
        if blocking < 0:
            total = 0.0
            for s in range(k):
                weights[s] += free[s]
                total += weights[s]
            weights[:k] /= total
            break
        kept, first, total = 0, k, 0.0
        for s in range(k):
            leaving = weights[s] + free[s] <= _ZERO
            moved = weights[s] + length * free[s]
            if leaving and (s == blocking or moved <= _ZERO):
                first = min(first, kept)
                free[s] = -weights[s]
                constant[s] = 0.0
            else:
                free[s] = moved - weights[s]
                constant[s] = 1.0
                total += moved
                kept += 1
        for s in range(k):
            if constant[s] > 0.0:
                free[s] = (weights[s] + free[s]) / total - weights[s]
        for s in range(k):
            if constant[s] > 0.0:
                for t in range(k):
                    moves[s] -= system[s, t] * free[t]
        at = 0
        for s in range(k):
            if constant[s] > 0.0:
                weights[at], moves[at] = weights[s] + free[s], moves[s]
                if at < s:
                    ones[at] = ones[s]
                    system[at, :k] = system[s, :k]
                if s == new:
                    new = at
                at += 1
            elif s == new:
                new = -1
        at = 0
        for s in range(k):
            if constant[s] > 0.0:
                if at < s:
                    system[:kept, at] = system[:kept, s]
                at += 1
        k = kept
        if not _factorise(first, k, system, factor):
            break
    count[0] = k
    # A vertex that leaves at once shows that the rest is rounding.
    return GOING if new >= 0 else CONVERGED


@njit(cache=True, nogil=True)
def _residuals_kernel(first, stride, rows, target, ones, count, weights, system, factor, residual):  # type: ignore[no-untyped-def]
    for i in range(first, len(rows), stride):
        b = rows[i]
        residual_of(target[b], ones[b], count[b], weights[b], residual[i])


@njit(cache=True, nogil=True)
def _steps_kernel(  # type: ignore[no-untyped-def]
    first, stride, rows, residual, vertex, ones, count, weights, system, factor, status, steps, enough
):
    for i in range(first, len(rows), stride):
        b = rows[i]
        status[b] = step(residual[i], vertex[i], ones[b], count[b : b + 1], weights[b], system[b], factor[b], enough[b])
        steps[b] += status[b] != FULL
