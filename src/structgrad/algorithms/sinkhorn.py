"""Sinkhorn scaling to doubly stochastic matrices, in the log domain with Newton steps on the dual.

Rows and columns are normalised in turn (Sinkhorn 1964; Mena et al. 2018), in float64, at O(n^2) an
iteration. Every eighth iteration is followed by a Newton step, O(n^3), which is kept if it reduces
the error. The code is plain torch. On a GPU one program an example does all iterations and stops
when that example is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.products import product

#: The number of iterations between Newton steps.
NEWTON_EVERY = 8
#: Added to the sums of rows and columns, because the solution of the Newton step is not unique.
RIDGE = 1e-10
#: The largest number of rows for one GPU program.
LARGEST = 64
_GPU_RIDGE = gpu.constant(RIDGE)


def potentials(
    g: Tensor, log_k: Tensor, rows: Tensor, columns: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """``f, g`` ``[*batch, n]`` that make ``exp(log_k + f 1^T + 1 g^T)`` doubly stochastic; 0 where
    absent.

    Args:
        g: the start, float64 ``[*batch, n]``.
        log_k: float64 ``[*batch, n, n]``, -inf for a missing entry.
        rows: which rows exist, bool ``[*batch, n]``.
        columns: which columns exist, likewise.
        tolerance: stop when the errors of the row sums add up to at most this.
        max_iterations: the largest number of iterations. In plain torch, where values are not read,
            it is always reached.
    """
    n = log_k.shape[-1]
    if gpu.takes(log_k, n, LARGEST, on_cpu=True):
        flat, exist = log_k.reshape(-1, n, n), (x.reshape(-1, n) for x in (rows, columns))
        found = _potentials_operator(g.reshape(-1, n), flat, *exist, tolerance, max_iterations)
        return found[0].reshape(g.shape), found[1].reshape(g.shape)

    def normalize(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact columns for this f; logs of the row sums without f; the largest error of a row."""
        g = torch.where(columns, -(log_k + f.unsqueeze(-1)).logsumexp(-2), 0.0)
        row_sum = (log_k + g.unsqueeze(-2)).logsumexp(-1)
        return g, row_sum, torch.where(rows, (row_sum + f).expm1().abs(), 0.0).sum(-1)

    row_sum = (log_k + g.unsqueeze(-2)).logsumexp(-1)
    for iteration in range(1, max_iterations + 1):
        f = torch.where(rows, -row_sum, 0.0)
        g, row_sum, error = normalize(f)
        if values_can_be_read(log_k) and bool((error < tolerance).all()):
            break
        if iteration % NEWTON_EVERY == 0:
            point = (log_k + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
            excess = torch.where(rows, point.sum(-1) - 1, 0.0)
            trial = f + dual_step(point, excess, torch.zeros_like(excess))[0]
            trial_g, trial_sum, trial_error = normalize(trial)
            better = (trial_error < error).unsqueeze(-1)
            f, g = torch.where(better, trial, f), torch.where(better, trial_g, g)
            row_sum = torch.where(better, trial_sum, row_sum)
    return f, g


def dual_step(point: Tensor, row_excess: Tensor, column_excess: Tensor) -> tuple[Tensor, Tensor]:
    """The first-order moves of f and g that remove the excesses ``[*batch, n]`` from the sums of
    ``point``.

    Solves ``[[R, P], [P^T, C]] d(f, g) = -excess``. The matrix is singular along (1, -1) of every
    connected block, where f + g does not change; a ridge picks one of the solutions. Linear and
    differentiable in the excesses.
    """
    transposed = point.transpose(-1, -2)
    row_sum, column_sum = point.sum(-1), point.sum(-2)
    row_sum = torch.where(row_sum > 0, row_sum, 1.0) + RIDGE
    column_sum = torch.where(column_sum > 0, column_sum, 1.0) + RIDGE
    schur = column_sum.diag_embed() - product(transposed, point / row_sum.unsqueeze(-1))
    right = column_excess - product(transposed, (row_excess / row_sum).unsqueeze(-1)).squeeze(-1)
    # Positive definite for any point, because of its own sums and the ridge. A check would wait for
    # the device.
    factor, _ = torch.linalg.cholesky_ex(schur)
    move_g = -torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    move_f = -(row_excess + product(point, move_g.unsqueeze(-1)).squeeze(-1)) / row_sum
    return move_f, move_g


def central_duals(log_k: Tensor, vertex: Tensor, duals: Tensor) -> Tensor:
    """Column duals of the best matching, moved from a corner of the optimal face into its interior.

    Rename rows to their columns. Then reduced costs c >= 0 allow any shift p with ``c_ij + p_j -
    p_i >= 0``. Take the shortest distances from i, averaged over all ends. They give every entry at
    least 1/n of the gap of its cheapest cycle.
    """
    n = log_k.shape[-1]
    rows = vertex.any(-1)
    cost = -(log_k + duals[..., 0, :, None] + duals[..., 1, None, :])
    partner = vertex.argmax(-1).unsqueeze(-2).expand(cost.shape)
    cost = torch.where(rows.unsqueeze(-2), cost.gather(-1, partner), torch.inf).clamp_min(0.0)
    distance = _distances(cost)
    # Unreachable nodes are as far away as if no path existed.
    far = 1 + n * torch.where(cost.isfinite(), cost, 0.0).amax((-2, -1), keepdim=True)
    shift = torch.minimum(distance, far).mean(-1)
    return duals[..., 1, :] - product(shift.unsqueeze(-2), vertex).squeeze(-2)


# --- plain torch ------------------------------------------------------------------------------------------------------


def _distances(cost: Tensor) -> Tensor:
    """The lengths of shortest paths between all pairs, by Floyd and Warshall: ``[*batch, n, n]``, 0
    on the diagonal.
    """
    n = cost.shape[-1]
    if gpu.takes(cost, n, LARGEST, on_cpu=True):
        found: Tensor = _distances_operator(cost.reshape(-1, n, n))
        return found.reshape(cost.shape)
    distance = cost.clone()
    for k in range(n):
        distance = torch.minimum(distance, distance[..., k, None] + distance[..., k, None, :])
    distance.diagonal(dim1=-2, dim2=-1).zero_()
    return distance


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example, the matrix in registers.


@gpu.jit
def _log_sum(x, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log-sum-exp; 0 where all entries are -inf."""
    top = tl.max(x, AXIS)
    some = top > -float("inf")
    top = tl.where(some, top, 0.0)
    total = tl.sum(tl.exp(x - tl.expand_dims(top, AXIS)), AXIS)
    return tl.where(some, top + tl.log(tl.where(some, total, 1.0)), 0.0)


@gpu.jit
def _normalize(f, log_k, rows, columns):  # type: ignore[no-untyped-def]
    """Exact columns for this f; logs of the row sums without f; the error of the rows."""
    g = tl.where(columns, -_log_sum(log_k + f[:, None], 0), 0.0)
    row_sum = _log_sum(log_k + g[None, :], 1)
    return g, row_sum, tl.sum(tl.where(rows, tl.abs(tl.exp(row_sum + f) - 1.0), 0.0), 0)


@gpu.jit
def _newton(point, excess, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The move of f that removes this excess from the rows."""
    at = tl.arange(0, SIZE)
    row_sum, column_sum = tl.sum(point, 1), tl.sum(point, 0)
    row_sum = tl.where(row_sum > 0.0, row_sum, 1.0) + _GPU_RIDGE
    column_sum = tl.where(column_sum > 0.0, column_sum, 1.0) + _GPU_RIDGE
    schur = tl.where(at[:, None] == at[None, :], column_sum[None, :], 0.0)
    transposed = tl.trans(point)
    for k in range(n):
        schur -= gpu.column(transposed, k)[:, None] * (gpu.row(point, k) / gpu.entry(row_sum, k))[None, :]
    right = -tl.sum(transposed * (excess / row_sum)[None, :], 1)
    # The matrix is positive definite, so elimination needs no exchange of rows.
    for k in range(n):
        row, pivot = (
            gpu.row(schur, k),
            gpu.entry(gpu.row(schur, k), k),
        )
        factor = tl.where(at == k, 0.0, gpu.column(schur, k) / pivot)
        right -= factor * gpu.entry(right, k)
        schur -= factor[:, None] * row[None, :]
    move = -right / tl.sum(tl.where(at[:, None] == at[None, :], schur, 0.0), 0)
    return -(excess + tl.sum(point * move[None, :], 1)) / row_sum


@gpu.jit
def _gpu_potentials(  # type: ignore[no-untyped-def]
    g_start_ptr,
    log_k_ptr,
    rows_ptr,
    columns_ptr,
    f_end_ptr,
    g_end_ptr,
    n,
    tolerance,
    most,
    EVERY: tl.constexpr,
    SIZE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    within = at < n
    place = b * n * n + at[:, None] * n + at[None, :]
    log_k = tl.load(log_k_ptr + place, mask=within[:, None] & within[None, :], other=-float("inf"))
    row = tl.load(rows_ptr + b * n + at, mask=within, other=0) != 0
    column = tl.load(columns_ptr + b * n + at, mask=within, other=0) != 0
    g = tl.load(g_start_ptr + b * n + at, mask=within, other=0.0)
    row_sum = _log_sum(log_k + g[None, :], 1)
    f = tl.zeros([SIZE], tl.float64)
    iteration, searching = 0, most > 0
    while searching:
        f = tl.where(row, -row_sum, 0.0)
        g, row_sum, error = _normalize(f, log_k, row, column)
        iteration += 1
        searching = (error >= tolerance) & (iteration < most)
        if (error >= tolerance) & (iteration % EVERY == 0):
            point = tl.exp(log_k + f[:, None] + g[None, :])
            excess = tl.where(row, tl.sum(point, 1) - 1.0, 0.0)
            trial = f + _newton(point, excess, n, SIZE)
            trial_g, trial_sum, trial_error = _normalize(trial, log_k, row, column)
            better = trial_error < error
            f, g = tl.where(better, trial, f), tl.where(better, trial_g, g)
            row_sum = tl.where(better, trial_sum, row_sum)
    tl.store(f_end_ptr + b * n + at, f, mask=within)
    tl.store(g_end_ptr + b * n + at, g, mask=within)


@gpu.jit
def _gpu_distances(cost_ptr, distance_ptr, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    within = (at < n)[:, None] & (at < n)[None, :]
    place = b * n * n + at[:, None] * n + at[None, :]
    found = tl.load(cost_ptr + place, mask=within, other=float("inf"))
    for k in range(n):
        into = tl.min(tl.where(at[None, :] == k, found, float("inf")), 1)
        out = tl.min(tl.where(at[:, None] == k, found, float("inf")), 0)
        found = tl.minimum(found, into[:, None] + out[None, :])
    tl.store(distance_ptr + place, tl.where(at[:, None] == at[None, :], 0.0, found), mask=within)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::sinkhorn_potentials", mutates_args=())
def _potentials_operator(
    g: Tensor, log_k: Tensor, rows: Tensor, columns: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    if not gpu.launches(g):
        return potentials(g, log_k, rows, columns, tolerance, max_iterations)
    f_end, g_end = _potentials_fake(g)
    n, size = g.shape[1], gpu.block(max(g.shape[1], 16))
    arguments = (g, log_k, rows, columns, f_end, g_end, n, tolerance, max_iterations)
    warps = size * size // 256
    gpu.launch(_gpu_potentials, len(g) if n else 0, *arguments, warps=warps, EVERY=NEWTON_EVERY, SIZE=size)
    return f_end, g_end


@_potentials_operator.register_fake
def _potentials_fake(g: Tensor, *_: Tensor | float) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape), g.new_empty(g.shape)


@torch.library.custom_op("structgrad::shortest_paths", mutates_args=())
def _distances_operator(cost: Tensor) -> Tensor:
    if not gpu.launches(cost):
        return _distances(cost)
    distance = gpu.like_first(cost)
    n, size = cost.shape[1], gpu.block(max(cost.shape[1], 16))
    gpu.launch(_gpu_distances, len(cost) if n else 0, cost, distance, n, warps=size * size // 256, SIZE=size)
    return distance


_distances_operator.register_fake(gpu.like_first)
