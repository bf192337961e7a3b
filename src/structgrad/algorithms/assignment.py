"""Exact linear assignment for a batch: shortest augmenting paths, compiled for the CPU and in plain torch.

Both run the algorithm of Jonker and Volgenant (1987) without its heuristic start: rows are added one at a time, each
by a shortest path in reduced costs (Dijkstra) to a free column, after which the dual variables are updated. O(n^3) an
example.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from structgrad.algorithms.threads import run


@njit(cache=True, nogil=True)
def _assign(utility: Any, exists: Any, row_of: Any, u: Any, v: Any, distance: Any, before: Any, done: Any) -> bool:
    """Assign the rows of one example that have an existing entry; False if they, or the columns, cannot all be."""
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


def assign_compiled(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best perfect matchings of the rows and columns that touch an existing entry, on the CPU.

    Args:
        utility: ``[batch, n, n]``, finite where ``exists``.
        exists: bool ``[batch, n, n]``.

    Returns:
        matchings ``[batch, n, n]`` in the dtype of ``utility``; optimal dual variables ``f, g``, float64 ``[batch, 2,
        n]``, such that ``utility_ij + f_i + g_j <= 0`` with equality where matched; and whether there is a matching,
        bool ``[batch]``.
    """
    vertex = torch.zeros(utility.shape, dtype=utility.dtype)
    duals = torch.zeros(len(utility), 2, utility.shape[-1], dtype=torch.float64)
    feasible = torch.ones(len(utility), dtype=torch.bool)
    if vertex.numel():
        work = vertex.numel() * utility.shape[-1]
        run(_assign_all, work, utility.contiguous(), exists.contiguous(), vertex, duals, feasible)
    return vertex, duals, feasible


def assign(utility: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch for any device, without reading values; O(n^2) steps of O(batch n) work each.

    Returns matchings and dual variables as :func:`assign_compiled`. Examples without a perfect matching get one of the
    rows that could be assigned.
    """
    n = utility.shape[-1]
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
