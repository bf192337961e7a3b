"""Matchings of a batch: exact linear assignment by shortest augmenting paths, and the greedy
algorithm.

Assignment is the algorithm of Jonker and Volgenant (1987). Rows are joined to free columns one at a
time by a shortest path in reduced costs (Dijkstra); then the dual variables are updated. It costs
O(n^3) an example. There is a compiled version for the CPU, a GPU kernel with one program an
example, and a version in plain torch.

The compiled versions have the start of that paper, so that few rows need a path. They subtract the
least cost of every row, then of every column, and match rows with their nearest columns. Each row
that is left takes its nearest column (augmenting row reduction). The dual variable of that column
falls until the second choice of the row is as near, and the row that owned the column goes on. The
two compiled versions do the same arithmetic in the same order, so they return the same matching,
also among ties.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.eager import transformed
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.threads import run

#: The most rows that one program of a GPU assigns, and takes greedily (it holds the whole matrix).
LARGEST, LARGEST_GREEDY = 1024, 128
#: For the compiled version, in the place of a mask.
_NONE_MISSING = np.empty((0, 0, 0), np.bool_)


def assign_compiled(utility: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Best perfect matchings of the rows and columns that touch an existing entry, on the CPU.

    Args:
        utility: ``[*batch, n, n]``, finite where ``exists``.
        exists: bool ``[*batch, n, n]``; None if every entry exists.

    Returns:
        matchings ``[*batch, n, n]`` in the dtype of ``utility``; optimal dual variables ``f, g``,
        float64 ``[*batch, 2, n]``; and whether a matching exists, bool ``[*batch]``. The duals
        satisfy ``utility_ij + f_i + g_j <= 0``, with equality where i and j are matched.
    """
    batch, n = utility.shape[:-2], utility.shape[-1]
    vertex = torch.empty(utility.shape, dtype=utility.dtype)
    duals = torch.empty(*batch, 2, n, dtype=torch.float64)
    feasible = torch.ones(batch, dtype=torch.bool)
    if size := vertex.numel():
        # Views of arrays cost a quarter of views of tensors, which is seen for small matrices.
        matrices = -1, n, n
        present = _NONE_MISSING if exists is None else exists.contiguous().numpy().reshape(matrices)
        run(
            _assign_all,
            size * n,
            utility.detach().contiguous().numpy().reshape(matrices),
            present,
            vertex.numpy().reshape(matrices),
            duals.numpy().reshape(-1, 2, n),
            feasible.numpy().reshape(-1),
        )
    return vertex, duals, feasible


def assign(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Best perfect matchings on any device, without reading values.

    On a GPU this is one launch for at most :data:`LARGEST` rows. Otherwise plain torch takes O(n^2)
    steps of O(batch n) work each.

    Returns matchings and dual variables as :func:`assign_compiled`. Examples without a perfect
    matching get one of the rows that could be assigned.
    """
    n = utility.shape[-1]
    if not transformed(exists) and gpu.takes(utility, n, LARGEST, on_cpu=True):
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


# The scans select instead of branching, as no processor guesses which of two random numbers is less.
# Functions have one end and call none: otherwise numba counts references, which takes as long.


@njit(cache=True)
def _reduce(cost: Any, row_of: Any, column_of: Any, u: Any, v: Any) -> bool:
    """Subtract the least of each row, then of each column, and give columns to rows nearest to them.

    It writes the duals ``u, v [n]``, ``row_of [n]`` (-1 for a free column) and ``column_of [n]`` (-1
    for a row that waits; rows without an entry do not). It returns whether there are as many rows as
    columns with an entry.
    """
    n = len(cost)
    for i in range(n):
        best, nearest = math.inf, -1
        for j in range(n):
            length = cost[i, j]
            less = length < best
            best = length if less else best
            nearest = j if less else nearest
        u[i], column_of[i] = best, nearest
        v[i], row_of[i] = math.inf, -1
    for i in range(n):
        least = u[i]
        for j in range(n):
            length, best = cost[i, j] - least, v[j]
            v[j] = length if length < best else best
    more = 0
    for i in range(n):
        nearest = column_of[i]
        if nearest < 0:
            u[i], column_of[i] = 0.0, n
        elif row_of[nearest] < 0:
            row_of[nearest] = i
        else:
            column_of[i] = -1
        more += nearest >= 0
        if v[i] == math.inf:
            v[i] = 0.0
        else:
            more -= 1
    return more == 0


@njit(cache=True)
def _take_nearest(cost: Any, row: int, row_of: Any, u: Any, v: Any) -> int:
    """Augmenting row reduction: ``row`` takes its nearest column, whose owner takes another.

    It stops at a row whose second choice is as near as the first, and returns that row; -1 if no row
    is left. It also stops after 4 n moves, because the duals may fall in tiny steps.
    """
    n = len(cost)
    moves = 4 * n
    while moves and row >= 0:
        best, second, nearest = math.inf, math.inf, -1
        for j in range(n):
            length = cost[row, j] - v[j]
            less = length < best
            loser = best if less else length
            second = loser if loser < second else second
            best = length if less else best
            nearest = j if less else nearest
        if second == math.inf:  # the row has one entry
            second = best
        owner = row_of[nearest]
        if owner < 0 or best < second:
            u[row] = second
            v[nearest] -= second - best
            row_of[nearest] = row
            row = owner
            moves -= 1
        else:
            u[row] = best
            moves = 0
    return row


@njit(cache=True)
def _augment(cost: Any, root: int, row_of: Any, u: Any, v: Any, distance: Any, before: Any, done: Any) -> bool:
    """Join the row ``root`` to a free column by a shortest path; False if there is no path."""
    n = len(cost)
    for j in range(n):
        before[j], done[j], distance[j] = -1, False, math.inf
    row, last, reached, nearest = root, -1, 0.0, -1
    while row >= 0:
        best, nearest = math.inf, -1
        for j in range(n):
            if not done[j]:
                length = reached + cost[row, j] - u[row] - v[j]
                if length < distance[j]:
                    distance[j], before[j] = length, last
                if distance[j] < best:
                    best, nearest = distance[j], j
        reached, last = best, nearest
        row = row_of[nearest] if nearest >= 0 else -1
        if row >= 0:
            done[nearest] = True
    if nearest >= 0:
        u[root] += reached
        for j in range(n):
            if done[j]:
                u[row_of[j]] += reached - distance[j]
                v[j] -= reached - distance[j]
        while before[nearest] >= 0:
            row_of[nearest] = row_of[before[nearest]]
            nearest = before[nearest]
        row_of[nearest] = root
    return nearest >= 0


@njit(cache=True, nogil=True)
def _assign_all(first: int, stride: int, utility: Any, exists: Any, vertex: Any, duals: Any, feasible: Any) -> None:
    """Write ``vertex [B, n, n]``, ``duals [B, 2, n]`` and ``feasible [B]``.

    ``exists`` is ``[B, n, n]``, or empty if every entry exists.
    """
    n = utility.shape[1]
    cost, distance, done = np.empty((n, n)), np.empty(n), np.empty(n, np.bool_)
    row_of, column_of, before = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    entries = cost.reshape(n * n)
    for b in range(first, len(utility), stride):
        values, ones = utility[b].reshape(n * n), vertex[b].reshape(n * n)
        if len(exists) > 0:
            present = exists[b].reshape(n * n)
            for e in range(n * n):
                entries[e] = -values[e] if present[e] else math.inf
        else:
            for e in range(n * n):
                entries[e] = -values[e]
        for e in range(n * n):
            ones[e] = 0
        u, v = duals[b, 0], duals[b, 1]
        possible = _reduce(cost, row_of, column_of, u, v)
        for i in range(n):
            if possible and column_of[i] < 0:
                left = _take_nearest(cost, i, row_of, u, v)
                possible = left < 0 or _augment(cost, left, row_of, u, v, distance, before, done)
        feasible[b] = possible
        if possible:
            for j in range(n):
                if row_of[j] >= 0:
                    ones[row_of[j] * n + j] = 1


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example.


@gpu.jit
def _gpu_costs(utility_ptr, exists_ptr, place, within):  # type: ignore[no-untyped-def]
    exists = tl.load(exists_ptr + place, mask=within, other=0) != 0
    return tl.where(exists, -tl.load(utility_ptr + place, mask=within, other=0.0).to(tl.float64), float("inf"))


@gpu.jit
def _gpu_assign(utility_ptr, exists_ptr, vertex_ptr, duals_ptr, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One lane works on one column, and on the row of that number.

    ``u`` is the dual variable of the row matched with a column, ``least`` that of a row before.
    """
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    within = column < n
    at = b * n * n + column
    row_of, waits = tl.full([SIZE], -1, tl.int32), tl.full([SIZE], 0, tl.int32)
    u, least = tl.zeros([SIZE], tl.float64), tl.zeros([SIZE], tl.float64)
    v = tl.full([SIZE], float("inf"), tl.float64)
    for i in range(n):
        cost = _gpu_costs(utility_ptr, exists_ptr, at + i * n, within)
        best, nearest = tl.min(cost, 0), tl.argmin(cost, 0)
        present = best < float("inf")
        best = tl.where(present, best, 0.0)
        v = tl.minimum(v, cost - best)
        free = gpu.entry(row_of, nearest) < 0
        here = column == tl.where(present & free, nearest, -1)
        row_of, u = tl.where(here, i, row_of), tl.where(here, best, u)
        least = tl.where(column == i, best, least)
        waits = tl.where(column == tl.where(present & (free == 0), i, -1), 1, waits)
    v = tl.where(v < float("inf"), v, 0.0)
    for i in range(n):
        none = tl.full([], -1, tl.int32)
        row = tl.where(gpu.entry(waits, i) > 0, i, none)
        u_row, steps = gpu.entry(least, i), none + 1
        bids = row >= 0
        while bids:
            length = _gpu_costs(utility_ptr, exists_ptr, at + row * n, within) - v
            best, nearest = tl.min(length, 0), tl.argmin(length, 0)
            second = tl.min(tl.where(column == nearest, float("inf"), length), 0)
            second = tl.where(second < float("inf"), second, best)
            owner = gpu.entry(row_of, nearest)
            takes = (owner < 0) | (best < second)
            u_row = tl.where(takes, gpu.entry(u, nearest), best)
            here = column == tl.where(takes, nearest, -1)
            u, v, row_of = (
                tl.where(here, second, u),
                tl.where(here, v - (second - best), v),
                tl.where(here, row, row_of),
            )
            row = tl.where(takes, owner, row)
            steps += 1
            bids = takes & (owner >= 0) & (steps < 4 * n)
        root, root_u = row, u_row
        distance = tl.full([SIZE], float("inf"), tl.float64)
        before = tl.full([SIZE], -1, tl.int32)
        done = column < 0
        last, sink = none, none
        reached = tl.full([], 0.0, tl.float64)
        searching = row >= 0
        while searching:
            cost = _gpu_costs(utility_ptr, exists_ptr, at + row * n, within)
            length = reached + cost - u_row - v
            shorter = (length < distance) & (done == 0)
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
            row_of = tl.where(here, tl.where(previous >= 0, gpu.entry(row_of, previous), root), row_of)
            u = tl.where(here, tl.where(previous >= 0, gpu.entry(u, previous), root_u + reached), u)
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
