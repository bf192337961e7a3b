"""The capped simplex, ``0 <= x <= 1, sum x = k``: projections on it, and its points as mixtures of
vertices.

Everything here works on flat parts, ``[*batch, n]``, with a bool tensor ``exists`` of the same
shape.

- Projection: the threshold is the root of a piecewise linear function, which Newton's method finds
  (Cominetti, Mascarenhas and Silva 2014). A step is O(n), and a few steps are enough.
- Mixtures: level sets by size, or systematic sampling (Madow 1949); O(n log n) for the sorting.
- Binary entropy: the multiplier of the limited multi-label projection (Amos et al. 2019), by
  Newton's method inside a bracket, O(n) a step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.threads import run

#: Newton's method within a bracket ends after a few steps. Bisection, its worst case, ends well
#: before this limit.
_NEWTON_STEPS = 200
#: The number of steps where values are not read, so that the end is not seen. Each step at least
#: halves the bracket.
_BLIND_STEPS = 60
#: The threshold of a projection is found when the sum is right up to this fraction of it, ...
_EXACT_MASS = 1e-14
#: ... or when the bracket is this small, relative to its own size (or 1).
_EXACT_THRESHOLD = 1e-15
#: The multiplier of the sigmoids is found when the sum is right up to this fraction of it.
_SMOOTH_MASS = 1e-13
_GPU_SMOOTH_MASS, _GPU_STEPS = gpu.constant(_SMOOTH_MASS), gpu.constant(_BLIND_STEPS)
_GPU_NEWTON_STEPS, _GPU_EXACT_MASS = gpu.constant(_NEWTON_STEPS), gpu.constant(_EXACT_MASS)
_GPU_EXACT_THRESHOLD = gpu.constant(_EXACT_THRESHOLD)
#: The most parts that one program of a GPU holds.
LARGEST = 16384


def project_capped_simplex(scores: Tensor, exists: Tensor, total: int) -> Tensor:
    """``argmin_x ||x - scores||^2`` over ``0 <= x <= 1, sum x = total``: ``[*batch, n]``, exact and
    differentiable.

    The solution is ``clip(scores - tau, 0, 1)``. Here tau is the root of a piecewise linear
    function with breakpoints at ``scores`` and ``scores - 1``. On the CPU a compiled kernel finds
    the right piece by Newton's method. So does a GPU kernel, one program an example, for at most
    :data:`LARGEST` parts. Elsewhere sorting finds it (O(n log n)). On the piece, tau is a mean.

    Args:
        scores: ``[*batch, n]``, finite everywhere.
        exists: ``[*batch, n]``; at least ``total`` parts exist in every example.
        total: the sum.
    """
    if gpu.takes(scores, scores.shape[-1], LARGEST):
        return _project_by_operator(scores, exists, total, False)
    if values_can_be_read(scores):
        return _project(scores, exists, total, False)
    return project_in_torch(scores, exists, total)


def project_budget(scores: Tensor, exists: Tensor, budget: int) -> Tensor:
    """``argmin_x ||x - scores||^2`` over ``0 <= x <= 1, sum x <= budget``: ``[*batch, n]``, exact,
    differentiable.

    It is ``clip(scores, 0, 1)`` if that is within the budget, otherwise
    :func:`project_capped_simplex`.
    """
    if gpu.takes(scores, scores.shape[-1], LARGEST):
        return _project_by_operator(scores, exists, budget, True)
    if values_can_be_read(scores):
        return _project(scores, exists, budget, True)
    return _project_budget_in_torch(scores, exists, budget)


def nested_decomposition(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A point of the unit cube as a mixture of its upper level sets ``{i : point_i >= threshold}``.

    There are at most n + 1 vertices, and each contains the next. No chain with this mean has fewer.
    The weights are differences of sorted entries.

    Args:
        point: ``[B, n]`` in [0, 1].

    Returns:
        vertices ``[N, n]``, rows ``[N]``, weights ``[N]`` (positive, differentiable).
    """
    ordered = point.sort(dim=-1, descending=True).values
    upper = torch.nn.functional.pad(ordered, (1, 0), value=1.0)
    weights = upper - torch.nn.functional.pad(ordered, (0, 1))
    rows, index = (weights > 0).nonzero(as_tuple=True)
    # Index 0 is the empty set, which has weight 1 - max.
    threshold = torch.where(index == 0, math.inf, upper.detach()[rows, index])
    vertices = (point.detach()[rows] >= threshold[:, None]).to(point.dtype)
    return vertices, rows, weights[rows, index]


def systematic_decomposition(point: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """A point of the unit cube as the mixture that systematic sampling draws from.

    With ``C`` the cumulative sums of the point and u uniform on [0, 1), part i is chosen if an
    integer shifted by u lies in ``[C_{i-1}, C_i)``. Every vertex has floor(sum) or ceil(sum) parts,
    and there are at most n + 1.

    Args:
        point: ``[B, n]`` in [0, 1], whose sum lies between ``low`` and ``high`` up to rounding.
        low: fewest ones of a vertex.
        high: most ones.

    Returns:
        vertices ``[N, n]``, rows ``[N]``, weights ``[N]`` (positive, differentiable).
    """
    fixed = (point.detach() >= 1).double()
    interior = (point.detach() > 0) & (fixed == 0)
    cumulative = torch.where(interior, point.double(), 0.0).cumsum(-1)
    # Rounding must not break these: the last sum is within the bounds, and no step is longer than
    # 1.
    ones = fixed.sum(-1, keepdim=True)
    left = interior.sum(-1, keepdim=True) - interior.cumsum(-1)
    cumulative = torch.minimum(torch.maximum(cumulative, low - ones - left), high - ones)
    whole = cumulative.detach().floor()
    fraction = cumulative - whole
    breaks = torch.nn.functional.pad(fraction.sort(dim=-1).values, (1, 0))
    weights = torch.nn.functional.pad(breaks, (0, 1), value=1.0).diff(dim=-1)
    rows, index = (weights > 0).nonzero(as_tuple=True)
    # ceil(C - u) without rounding: the whole part, and one more if the fraction exceeds u.
    offset = breaks.detach()[rows, index][:, None]
    reached = whole[rows] + (fraction.detach()[rows] > offset)
    vertices = torch.nn.functional.pad(reached, (1, 0)).diff(dim=-1) + fixed[rows]
    return vertices.to(point.dtype), rows, weights[rows, index].to(point.dtype)


def decompose_by_size(
    point: Tensor, low: int, high: int, method: Literal["systematic", "sorted"]
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`systematic_decomposition` in the order of the parts, or with the largest entries
    first.

    Raises:
        ValueError: for another method.
    """
    if method == "systematic":
        return systematic_decomposition(point, low, high)
    if method != "sorted":
        raise ValueError(f"method must be systematic or sorted; got {method!r}")
    ordered, origin = point.sort(dim=-1, descending=True)
    vertices, rows, weights = systematic_decomposition(ordered, low, high)
    return torch.zeros_like(vertices).scatter(-1, origin[rows], vertices), rows, weights


@torch.no_grad()
def binary_multiplier(scores: Tensor, exists: Tensor, total: int) -> Tensor:
    """The nu that solves ``sum sigmoid(scores - nu) = total``: ``[*batch, 1]``.

    It is 0 where at most ``total`` parts exist. Newton's method inside a bracket finds it, in
    float64. Let ``u_k`` be the k-th largest score. At ``u_{k+1} - log k`` the k + 1 largest scores
    alone reach the total; at ``u_k + log(n - k)`` the rest cannot lift the sum to the total. On a
    GPU one program an example takes all steps, for at most :data:`LARGEST` parts.
    """
    present = exists.sum(-1, keepdim=True)
    padded = torch.nn.functional.pad(scores.masked_fill(~exists, -math.inf), (0, 1), value=-math.inf)
    last, following = padded.topk(total + 1, dim=-1).values[..., -2:].split(1, dim=-1)
    solvable = present > total
    low = torch.where(solvable, following - math.log(total), 0.0)
    high = torch.where(solvable, last + (present - total).clamp(min=1).to(scores.dtype).log(), 0.0)
    nu = torch.where(solvable, (last + following) / 2, 0.0)
    n = scores.shape[-1]
    if gpu.takes(scores, n, LARGEST):
        size = nu.numel()
        flat = (scores.reshape(size, n), exists.reshape(size, n), *(x.reshape(size) for x in (low, high, nu)))
        found: Tensor = _multiplier_operator(*flat, total)
        return torch.where(solvable, found.reshape(nu.shape), 0.0)
    for _ in range(_BLIND_STEPS):
        chosen = torch.where(exists, (scores - nu).sigmoid(), 0.0)
        excess = chosen.sum(-1, keepdim=True) - total
        if values_can_be_read(excess) and not bool((solvable & (excess.abs() > _SMOOTH_MASS * total)).any()):
            break
        low, high = torch.where(excess >= 0, nu, low), torch.where(excess >= 0, high, nu)
        step = nu + excess / torch.where(exists, chosen * (1 - chosen), 0.0).sum(-1, keepdim=True)
        nu = torch.where((step > low) & (step < high), step, (low + high) / 2)
    return nu


# --- plain torch ------------------------------------------------------------------------------------------------------


def _project_budget_in_torch(scores: Tensor, exists: Tensor, budget: int) -> Tensor:
    free = scores.clamp(0, 1) * exists
    bound = project_in_torch(scores, exists, min(budget, scores.shape[-1]))
    return torch.where(free.sum(-1, keepdim=True) <= budget, free, bound)


def project_in_torch(scores: Tensor, exists: Tensor, total: int | Tensor) -> Tensor:
    """:func:`project_capped_simplex` by sorting, in plain torch; a tensor of totals is ``[*batch, 1]``."""
    if not scores.shape[-1]:
        return scores.clone()
    # Relative to the largest, in float64: nothing cancels at +-100, and not all is lost at the lowest number.
    top = torch.where(exists, scores, -math.inf).amax(-1, keepdim=True).detach().double()
    wide = torch.where(exists, scores.double() - torch.where(top.isfinite(), top, 0.0), 0.0)
    with torch.no_grad():
        floor = wide.amin(-1, keepdim=True) - 1
        ordered = torch.where(exists, wide, -math.inf).sort(dim=-1, descending=True).values
        prefix = torch.nn.functional.pad(torch.where(ordered.isfinite(), ordered, 0.0).cumsum(-1), (1, 0))
        points = torch.cat([torch.where(exists, wide, floor), torch.where(exists, wide - 1, floor)], -1)
        ascending = ordered.flip(-1).contiguous()
        above = ordered.shape[-1] - torch.searchsorted(ascending, points, right=True)
        capped = ordered.shape[-1] - torch.searchsorted(ascending, points + 1, right=True)
        mass = capped + prefix.gather(-1, above) - prefix.gather(-1, capped) - (above - capped) * points
        start = torch.where(mass >= total, points, floor).amax(-1, keepdim=True)
        ones = exists & (wide - 1 > start)
        interior = exists & (wide > start) & ~ones
        count = interior.sum(-1, keepdim=True).clamp(min=1)
    relative = torch.where(interior, wide - start, 0.0)
    tau = (relative.sum(-1, keepdim=True) + ones.sum(-1, keepdim=True) - total) / count
    return torch.where(interior, (relative - tau).clamp(0, 1), ones.to(wide.dtype)).to(scores.dtype)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


def _project(scores: Tensor, exists: Tensor, total: int, at_most: bool) -> Tensor:
    projected: Tensor = _Projection.apply(scores, exists, total, at_most)
    return projected


class _Projection(torch.autograd.Function):
    """The compiled projection; its Jacobian subtracts the mean over the entries strictly inside (0, 1)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, exists: Tensor, total: int, at_most: bool) -> Tensor:  # type: ignore[override]
        n = scores.shape[-1]
        flat = scores.detach().reshape(-1, n).contiguous() if n else scores.detach().reshape(0, 0)
        point = torch.zeros_like(flat)
        is_bound = torch.ones(len(flat), dtype=torch.bool)
        rows = exists.reshape(flat.shape).contiguous()
        run(_project_rows, 20 * flat.numel(), flat, rows, total, at_most, point, is_bound)
        ctx.save_for_backward(scores, exists, point, is_bound)
        ctx.total, ctx.at_most = total, at_most
        return point.reshape(scores.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scores, exists, point, is_bound = ctx.saved_tensors
        if twin_needed(upstream):
            twin = _project_budget_in_torch if ctx.at_most else project_in_torch
            return *gradients(lambda s: twin(s, exists, ctx.total), [scores], [upstream]), None, None, None
        out = torch.zeros_like(point)
        flat = upstream.reshape(point.shape).contiguous()
        run(_project_rows_backward, 4 * point.numel(), point, is_bound, flat, out)
        return out.reshape(upstream.shape), None, None, None


@njit(nogil=True, cache=True)
def _project_rows(first, stride, scores, exists, total, at_most, point, is_bound):  # type: ignore[no-untyped-def]
    """Project every ``stride``-th row of ``scores`` ``[B, n]``; say whether the sum was binding
    ``[B]``.
    """
    batch, n = scores.shape
    for b in range(first, batch, stride):
        if at_most:
            mass = 0.0
            for i in range(n):
                if exists[b, i]:
                    mass += min(max(scores[b, i], 0.0), 1.0)
            if mass <= total:
                is_bound[b] = False
                for i in range(n):
                    if exists[b, i]:
                        point[b, i] = min(max(scores[b, i], 0.0), 1.0)
                continue
        # Missing parts are put below every threshold.
        low, high = np.inf, -np.inf
        for i in range(n):
            if exists[b, i]:
                low = min(low, scores[b, i])
                high = max(high, scores[b, i])
        row = np.empty(n)
        for i in range(n):
            # Relative to the largest, in float64: nothing cancels at +-100.
            row[i] = np.float64(scores[b, i]) - high if exists[b, i] else -np.inf
        low, high = np.float64(low) - high - 1.0, 0.0
        # Newton's method on a piecewise linear function, kept within a shrinking bracket; it ends on the exact piece.
        tau = max(-1.0, low) if total == 1 else low + (high - low) * 0.5
        for _ in range(_NEWTON_STEPS):
            mass = 0.0
            interior = 0
            for i in range(n):
                value = row[i] - tau
                mass += min(max(value, 0.0), 1.0)
                interior += 1 if 0.0 < value < 1.0 else 0
            excess = mass - total
            if excess >= 0:
                low = tau
            else:
                high = tau
            if abs(excess) <= _EXACT_MASS * total or high - low <= _EXACT_THRESHOLD * max(1.0, -low):
                break
            step = tau + excess / interior if interior > 0 else np.inf
            tau = step if low < step < high else 0.5 * (low + high)
        for i in range(n):
            point[b, i] = min(max(row[i] - tau, 0.0), 1.0)


@njit(nogil=True, cache=True)
def _project_rows_backward(first, stride, point, is_bound, upstream, out):  # type: ignore[no-untyped-def]
    """The (symmetric) Jacobian of every row times a vector."""
    batch, n = point.shape
    for b in range(first, batch, stride):
        shift = 0.0
        if is_bound[b]:
            interior = 0
            for i in range(n):
                if 0.0 < point[b, i] < 1.0:
                    shift += upstream[b, i]
                    interior += 1
            shift /= max(interior, 1)
        for i in range(n):
            if 0.0 < point[b, i] < 1.0:
                out[b, i] = upstream[b, i] - shift


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example.


@gpu.jit
def _gpu_project(scores_ptr, exists_ptr, point_ptr, is_bound_ptr, n, total, AT_MOST: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)
    score = tl.load(scores_ptr + b * n + part, mask=part < n, other=0.0).to(tl.float64)
    exists = tl.load(exists_ptr + b * n + part, mask=part < n, other=0) != 0
    largest = tl.max(tl.where(exists, score, -float("inf")), 0)
    # Missing parts are below every threshold.
    row = tl.where(exists, score - tl.where(exists, largest, 0.0), -float("inf"))
    low, high = tl.min(tl.where(exists, row, 0.0), 0) - 1.0, tl.zeros((), tl.float64)
    free = tl.where(exists, tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0)
    bound = tl.sum(free, 0) > total if AT_MOST else low < high
    tau = tl.where(total == 1, tl.maximum(low, -1.0), low * 0.5)
    left, searching = _GPU_NEWTON_STEPS, bound
    while searching:
        value = row - tau
        mass = tl.sum(tl.minimum(tl.maximum(value, 0.0), 1.0), 0)
        interior = tl.sum(((value > 0.0) & (value < 1.0)).to(tl.int32), 0)
        excess = mass - total
        low, high = tl.where(excess >= 0, tau, low), tl.where(excess >= 0, high, tau)
        left -= 1
        wide = high - low > _GPU_EXACT_THRESHOLD * tl.maximum(-low, 1.0)
        searching = (tl.abs(excess) > _GPU_EXACT_MASS * total) & wide & (left > 0)
        step = tau + excess / tl.maximum(interior, 1)
        safe = (interior > 0) & (step > low) & (step < high)
        tau = tl.where(searching, tl.where(safe, step, 0.5 * (low + high)), tau)
    projected = tl.where(bound, tl.minimum(tl.maximum(row - tau, 0.0), 1.0), free)
    tl.store(point_ptr + b * n + part, projected, mask=part < n)
    tl.store(is_bound_ptr + b, bound)


@gpu.jit
def _gpu_project_backward(point_ptr, is_bound_ptr, upstream_ptr, out_ptr, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)
    value = tl.load(point_ptr + b * n + part, mask=part < n, other=0.0)
    interior = (value > 0.0) & (value < 1.0)
    gradient = tl.where(interior, tl.load(upstream_ptr + b * n + part, mask=part < n, other=0.0), 0.0)
    mean = tl.sum(gradient, 0) / tl.maximum(tl.sum(interior.to(tl.int32), 0), 1)
    shift = tl.where(tl.load(is_bound_ptr + b) != 0, mean, 0.0)
    tl.store(out_ptr + b * n + part, tl.where(interior, gradient - shift, 0.0), mask=part < n)


def _warps(parts: int) -> int:
    return min(max(gpu.block(parts) // 256, 1), 32)


@gpu.jit
def _gpu_multiplier(scores_ptr, exists_ptr, low_ptr, high_ptr, start_ptr, multiplier_ptr, n, total, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)
    score = tl.load(scores_ptr + b * n + part, mask=part < n, other=0.0)
    exists = tl.load(exists_ptr + b * n + part, mask=part < n, other=0) != 0
    below, above, nu = tl.load(low_ptr + b), tl.load(high_ptr + b), tl.load(start_ptr + b)
    left, searching = _GPU_STEPS, total > 0
    while searching:
        chosen = tl.where(exists, 1.0 / (1.0 + tl.exp(nu - score)), 0.0)
        excess = tl.sum(chosen, 0) - total
        left -= 1
        searching = (tl.abs(excess) > _GPU_SMOOTH_MASS * total) & (left > 0)
        below, above = tl.where(excess >= 0, nu, below), tl.where(excess >= 0, above, nu)
        slope = tl.sum(chosen * (1.0 - chosen), 0)
        step = nu + excess / tl.where(slope > 0.0, slope, 1.0)
        interior = (slope > 0.0) & (step > below) & (step < above)
        nu = tl.where(searching, tl.where(interior, step, (below + above) / 2), nu)
    tl.store(multiplier_ptr + b, nu)


# --- operators --------------------------------------------------------------------------------------------------------


def _project_by_operator(scores: Tensor, exists: Tensor, total: int, at_most: bool) -> Tensor:
    n = scores.shape[-1]
    batch = scores.shape[:-1].numel()
    point: Tensor = _projection_operator(scores.reshape(batch, n), exists.reshape(batch, n), total, at_most)[0]
    return point.reshape(scores.shape)


@torch.library.custom_op("structgrad::project_capped_simplex", mutates_args=())
def _projection_operator(scores: Tensor, exists: Tensor, total: int, at_most: bool) -> tuple[Tensor, Tensor]:
    """The projection ``[B, n]``, and whether the sum was a binding constraint ``[B]``."""
    point, is_bound = _projection_fake(scores, exists, total, at_most)
    batch, n = scores.shape
    constants = {"AT_MOST": int(at_most), "SIZE": gpu.block(n)}
    tensors = (scores, exists, point, is_bound)
    gpu.launch(_gpu_project, batch, *tensors, n, total, warps=_warps(n), **constants)
    return point, is_bound


@_projection_operator.register_fake
def _projection_fake(scores: Tensor, exists: Tensor, total: int, at_most: bool) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), exists.new_empty(len(exists))


@torch.library.custom_op("structgrad::project_capped_simplex_backward", mutates_args=())
def _projection_backward_operator(point: Tensor, is_bound: Tensor, upstream: Tensor) -> Tensor:
    out = torch.empty_like(point)
    batch, n = point.shape
    tensors = (point, is_bound, upstream, out)
    gpu.launch(_gpu_project_backward, batch, *tensors, n, warps=_warps(n), SIZE=gpu.block(n))
    return out


_projection_backward_operator.register_fake(gpu.like_first)


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _projection_backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return _projection_backward_operator(*ctx.saved_tensors, upstream), None, None, None


def _save_jacobian(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _jacobian_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    # The Jacobian is symmetric, and the same on the whole piece.
    return None, None, _projection_backward_operator(*ctx.saved_tensors, upstream)


_projection_operator.register_autograd(_projection_backward, setup_context=_save_projection)
_projection_backward_operator.register_autograd(_jacobian_backward, setup_context=_save_jacobian)


@torch.library.custom_op("structgrad::sigmoid_multiplier", mutates_args=())
def _multiplier_operator(
    scores: Tensor, exists: Tensor, low: Tensor, high: Tensor, start: Tensor, total: int
) -> Tensor:
    """The multiplier ``[B]``; arbitrary for examples that have none."""
    multiplier = torch.empty_like(start)
    n = scores.shape[1]
    tensors = (scores, exists, low, high, start, multiplier)
    gpu.launch(_gpu_multiplier, len(scores), *tensors, n, total, warps=_warps(n), SIZE=gpu.block(n))
    return multiplier


@_multiplier_operator.register_fake
def _multiplier_fake(scores: Tensor, exists: Tensor, low: Tensor, high: Tensor, start: Tensor, total: int) -> Tensor:
    return torch.empty_like(start)
