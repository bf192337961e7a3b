"""Matchings of a batch: exact linear assignment by shortest augmenting paths, and the greedy
algorithm.

Assignment is the algorithm of Jonker and Volgenant (1987) without its heuristic start. Rows are
added one at a time. Each is joined to a free column by a shortest path in reduced costs (Dijkstra);
then the dual variables are updated. It costs O(n^3) an example. There is a compiled version for the
CPU, a GPU kernel with one program an example, and a version in plain torch. The two compiled
versions do the same arithmetic in the same order, so they return the same matching, also among
ties.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.threads import run

#: The most rows that one program of a GPU assigns, and takes greedily (it holds the whole matrix).
LARGEST, LARGEST_GREEDY = 1024, 128


def assign_compiled(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best perfect matchings of the rows and columns that touch an existing entry, on the CPU.

    Args:
        utility: ``[batch, n, n]``, finite where ``exists``.
        exists: bool ``[batch, n, n]``.

    Returns:
        matchings ``[batch, n, n]`` in the dtype of ``utility``; optimal dual variables ``f, g``,
        float64 ``[batch, 2, n]``; and whether a matching exists, bool ``[batch]``. The duals
        satisfy ``utility_ij + f_i + g_j <= 0``, with equality where i and j are matched.
    """
    vertex = torch.zeros(utility.shape, dtype=utility.dtype)
    duals = torch.zeros(len(utility), 2, utility.shape[-1], dtype=torch.float64)
    feasible = torch.ones(len(utility), dtype=torch.bool)
    if vertex.numel():
        work = vertex.numel() * utility.shape[-1]
        run(_assign_all, work, utility.contiguous(), exists.contiguous(), vertex, duals, feasible)
    return vertex, duals, feasible


def assign(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Best perfect matchings on any device, without reading values.

    On a GPU this is one launch for at most :data:`LARGEST` rows. Otherwise plain torch takes O(n^2)
    steps of O(batch n) work each.

    Returns matchings and dual variables as :func:`assign_compiled`. Examples without a perfect
    matching get one of the rows that could be assigned.
    """
    n = utility.shape[-1]
    if gpu.takes(utility, n, LARGEST, on_cpu=True):
        matched: tuple[Tensor, Tensor] = _assign_operator(utility.detach(), exists)
        return matched
    cost = torch.where(exists, -utility.double(), torch.inf)
    batch = torch.arange(len(cost), device=cost.device)
    u, v = cost.new_zeros(2, len(cost), n)
    row_of = torch.full(v.shape, -1, device=cost.device)
    column = torch.arange(n, device=cost.device)
    for i in range(n):
        distance = torch.full_like(v, torch.inf)
        before, done = torch.full_like(row_of, -1), torch.zeros_like(v, dtype=torch.bool)
        row, last = torch.full_like(batch, i), torch.full_like(batch, -1)
        reached, sink = torch.zeros_like(u[:, 0]), torch.full_like(batch, -1)
        searching = exists[:, i].any(-1)
        for _ in range(i + 1):
            length = reached.unsqueeze(-1) + cost[batch, row] - u[batch, row].unsqueeze(-1) - v
            shorter = (length < distance) & ~done & searching.unsqueeze(-1)
            distance = torch.where(shorter, length, distance)
            before = torch.where(shorter, last.unsqueeze(-1), before)
            best, nearest = torch.where(done, torch.inf, distance).min(-1)
            searching = searching & best.isfinite()
            reached = torch.where(searching, best, reached)
            free = searching & (row_of[batch, nearest] < 0)
            sink = torch.where(free, nearest, sink)
            searching = searching & ~free
            done = done | (searching.unsqueeze(-1) & (column == nearest.unsqueeze(-1)))
            row = torch.where(searching, row_of[batch, nearest], row)
            last = torch.where(searching, nearest, last)
        found = sink >= 0
        gain = torch.where(done & found.unsqueeze(-1), reached.unsqueeze(-1) - distance, 0.0)
        v = v - gain
        u = u.scatter_add(-1, row_of.clamp_min(0), gain)  # gain is 0 where a column has no row
        u[:, i] += torch.where(found, reached, 0.0)
        for _ in range(i + 1):
            previous = before[batch, sink.clamp_min(0)]
            owner = torch.where(previous < 0, i, row_of[batch, previous.clamp_min(0)])
            here = (column == sink.unsqueeze(-1)) & (sink >= 0).unsqueeze(-1)
            row_of = torch.where(here, owner.unsqueeze(-1), row_of)
            sink = torch.where(sink >= 0, previous, sink)
    vertex = (row_of.unsqueeze(-2) == column.unsqueeze(-1)).to(utility.dtype)
    return vertex, torch.stack([u, v], -2)


def greedy(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Repeatedly take the least entry and drop its row and column. Among ties the first entry wins.

    Args:
        costs: ``[batch, n, n]``; infinite where there is no entry.

    Returns:
        matchings ``[batch, n, n]`` in the dtype of ``costs``; and the entries ``i * n + j`` in the
        order in which they were taken, then -1, int64 ``[batch, n]``. On a GPU this is one
        launch for at most :data:`LARGEST_GREEDY` rows. Otherwise it takes n steps of O(batch
        n^2) work.
    """
    n = costs.shape[-1]
    if gpu.takes(costs, n, LARGEST_GREEDY, on_cpu=True):
        taken: tuple[Tensor, Tensor] = _greedy_operator(costs.detach())
        return taken
    place = torch.arange(n, device=costs.device)
    left, vertex = costs, torch.zeros_like(costs)
    choices = [torch.zeros(len(costs), 0, dtype=torch.int64, device=costs.device)]
    for _ in range(n):
        choice = left.flatten(-2).argmin(-1)
        row = (place == (choice // n).unsqueeze(-1)).unsqueeze(-1)
        column = (place == (choice % n).unsqueeze(-1)).unsqueeze(-2)
        found = (row & column & left.isfinite()).any(-1).any(-1)
        vertex = torch.where(row & column & found[..., None, None], 1.0, vertex)
        choices.append(torch.where(found, choice, -1).unsqueeze(-1))
        left = torch.where(row | column, torch.inf, left)
    return vertex, torch.cat(choices, -1)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _assign(utility: Any, exists: Any, row_of: Any, u: Any, v: Any, distance: Any, before: Any, done: Any) -> bool:
    """Assign the rows of one example that have an existing entry.

    Returns False if not all of these rows, or not all columns, can be assigned.
    """
    n = utility.shape[0]
    assigned = 0
    for j in range(n):
        row_of[j], u[j], v[j] = -1, 0.0, 0.0
    for i in range(n):
        absent = True
        for j in range(n):
            before[j], done[j], distance[j] = -1, False, math.inf
            absent = absent and not exists[i, j]
        if absent:
            continue
        assigned += 1
        row, last, reached = i, -1, 0.0
        while True:
            best, nearest = math.inf, -1
            for j in range(n):
                if not done[j]:
                    if exists[row, j]:
                        length = reached - utility[row, j] - u[row] - v[j]
                        if length < distance[j]:
                            distance[j], before[j] = length, last
                    if distance[j] < best:
                        best, nearest = distance[j], j
            if nearest < 0:
                return False
            reached = best
            if row_of[nearest] < 0:
                break
            done[nearest] = True
            row, last = row_of[nearest], nearest
        u[i] += reached
        for j in range(n):
            if done[j]:
                u[row_of[j]] += reached - distance[j]
                v[j] -= reached - distance[j]
        while before[nearest] >= 0:
            row_of[nearest] = row_of[before[nearest]]
            nearest = before[nearest]
        row_of[nearest] = i
    columns = 0
    for j in range(n):
        for i in range(n):
            if exists[i, j]:
                columns += 1
                break
    return columns == assigned


@njit(cache=True, nogil=True)
def _assign_all(first: int, stride: int, utility: Any, exists: Any, vertex: Any, duals: Any, feasible: Any) -> None:
    n = utility.shape[1]
    row_of, before, done = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)
    distance = np.empty(n)
    for b in range(first, len(utility), stride):
        feasible[b] = _assign(utility[b], exists[b], row_of, duals[b, 0], duals[b, 1], distance, before, done)
        if feasible[b]:
            for j in range(n):
                if row_of[j] >= 0:
                    vertex[b, row_of[j], j] = 1


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example.


@gpu.jit
def _gpu_assign(utility_ptr, exists_ptr, vertex_ptr, duals_ptr, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One lane works on one column. ``u`` is the dual variable of the row matched with a column."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    within = column < n
    row_of = tl.full([SIZE], -1, tl.int32)
    u, v = tl.zeros([SIZE], tl.float64), tl.zeros([SIZE], tl.float64)
    for i in range(n):
        distance = tl.full([SIZE], float("inf"), tl.float64)
        before = tl.full([SIZE], -1, tl.int32)
        done = column < 0
        row, last, sink = i + 0 * tl.sum(before, 0), tl.max(before, 0), tl.max(before, 0)
        reached = tl.sum(tl.zeros([SIZE], tl.float64), 0)
        u_row = reached
        searching = sink < 0
        while searching:
            place = b * n * n + row * n + column
            exists = tl.load(exists_ptr + place, mask=within, other=0) != 0
            length = reached - tl.load(utility_ptr + place, mask=within, other=0.0).to(tl.float64) - u_row - v
            shorter = exists & (length < distance) & (done == 0)
            distance = tl.where(shorter, length, distance)
            before = tl.where(shorter, last, before)
            open_ = tl.where(done, float("inf"), distance)
            best, nearest = tl.min(open_, 0), tl.argmin(open_, 0)
            owner = gpu.entry(row_of, nearest)
            reachable = best < float("inf")
            reached = tl.where(reachable, best, reached)
            sink = tl.where(reachable & (owner < 0), nearest, sink)
            searching = reachable & (owner >= 0)
            done = done | ((column == nearest) & (row_of >= 0))
            u_row = gpu.entry(u, nearest)
            row, last = owner, nearest
        gain = tl.where(sink >= 0, tl.where(done, reached - distance, 0.0), 0.0)
        u += gain
        v -= gain
        while sink >= 0:
            previous = gpu.entry(before, sink)
            here = column == sink
            row_of = tl.where(here, tl.where(previous >= 0, gpu.entry(row_of, previous), i), row_of)
            u = tl.where(here, tl.where(previous >= 0, gpu.entry(u, previous), reached), u)
            sink = previous
    for i in range(n):
        here = row_of == i
        tl.store(vertex_ptr + b * n * n + i * n + column, tl.where(here, 1.0, 0.0), mask=within)
        tl.store(duals_ptr + b * 2 * n + i, tl.sum(tl.where(here, u, 0.0), 0))
    tl.store(duals_ptr + b * 2 * n + n + column, v, mask=within)


@gpu.jit
def _gpu_greedy(costs_ptr, vertex_ptr, choices_ptr, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Works on the whole matrix in registers."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    row, column = at[:, None], at[None, :]
    within = (row < n) & (column < n)
    place = b * n * n + row * n + column
    left = tl.load(costs_ptr + place, mask=within, other=float("inf"))
    taken = within & (row < 0)
    for step in range(n):
        least = tl.min(left, 1)
        i = tl.argmin(least, 0)
        j = tl.sum(tl.where(at == i, tl.argmin(left, 1), 0), 0)
        found = tl.min(least, 0) < float("inf")
        taken = taken | ((row == i) & (column == j) & (left < float("inf")))
        tl.store(choices_ptr + b * n + step, tl.where(found, i * n + j, -1).to(tl.int64))
        left = tl.where((row == i) | (column == j), float("inf"), left)
    tl.store(vertex_ptr + place, tl.where(taken, 1.0, 0.0), mask=within)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::assign", mutates_args=())
def _assign_operator(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Matchings and dual variables."""
    if not gpu.launches(utility):
        return assign_compiled(utility, exists)[:2]
    n = utility.shape[-1]
    vertex, duals = _assign_fake(utility, exists)
    size = gpu.block(n)
    warps = min(max(size // 32, 1), 8)
    gpu.launch(_gpu_assign, len(utility) if n else 0, utility, exists, vertex, duals, n, warps=warps, SIZE=size)
    return vertex, duals


@_assign_operator.register_fake
def _assign_fake(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    duals = utility.new_empty(len(utility), 2, utility.shape[-1], dtype=torch.float64)
    return utility.new_empty(utility.shape), duals


@torch.library.custom_op("structgrad::greedy_matching", mutates_args=())
def _greedy_operator(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Matchings and the entries in the order in which they are taken."""
    if not gpu.launches(costs):
        return greedy(costs)
    n = costs.shape[-1]
    vertex, choices = _greedy_fake(costs)
    size = gpu.block(max(n, 16))
    warps = max(size * size // 512, 1)
    gpu.launch(_gpu_greedy, len(costs) if n else 0, costs, vertex, choices, n, warps=warps, SIZE=size)
    return vertex, choices


@_greedy_operator.register_fake
def _greedy_fake(costs: Tensor) -> tuple[Tensor, Tensor]:
    return costs.new_empty(costs.shape), costs.new_empty(costs.shape[:-1], dtype=torch.int64)
