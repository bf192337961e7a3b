"""Minimum spanning trees, and the order of their edges as an execution trace.

Kruskal's algorithm takes edges in ascending order unless their ends are joined already. With independent exponentials
of rates ``exp(l)`` each step takes one of the edges between different components, with probability proportional to its
rate (Paulus et al. 2020, B.7; Struminsky et al. 2021, 2.3). All that the trace says about an edge is the step at which
its ends are joined (``joined_at``): it is in the running up to that step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from structgrad.algorithms.threads import run

_LOG_ZERO = -1e30  # finite: see matrix_tree


def minimum_spanning_tree(costs: Tensor, exists: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Exact minimum spanning trees of ``sign * costs``.

    Args:
        costs: ``[B, n, n]``, contiguous, read where ``exists``.
        exists: bool ``[B, n, n]``, contiguous, above the diagonal only.
        sign: -1 for maximum trees.

    Returns:
        symmetric vertices ``[B, n, n]``, edges ``i * n + j`` (i < j) in ascending order of cost ``[B, n - 1]``, then
        -1, and bool ``[B]``: whether the example is connected.
    """
    costs = costs.detach()
    if costs.device.type != "cpu":
        return torch_minimum_spanning_tree(costs, exists, sign)
    batch, n = costs.shape[:2]
    vertex = torch.zeros_like(costs)
    choices = torch.empty(batch, max(n - 1, 0), dtype=torch.int64)
    reached = torch.empty(batch, dtype=torch.bool)
    run(_spanning_tree_kernel, 5 * costs.numel(), costs, exists, sign, vertex, choices, reached)
    return vertex, choices, reached


def torch_minimum_spanning_tree(costs: Tensor, exists: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`minimum_spanning_tree` for any device: Prim's algorithm on all examples at once, n - 1 times O(n)."""
    batch, n = costs.shape[:2]
    device = costs.device
    rows = torch.arange(batch, device=device)
    nodes = torch.arange(n, device=device)
    cost = torch.where(exists, sign * costs, torch.inf)
    cost = torch.minimum(cost, cost.transpose(1, 2))
    present = exists.any(1) | exists.any(2)
    waiting = present.clone()
    new = present.int().argmax(1) if n else rows.new_zeros(batch)
    nearest = torch.full_like(cost[:, 0], torch.inf) if n else cost.new_zeros(batch, 0)
    link = torch.zeros(batch, n, dtype=torch.int64, device=device)
    reached = torch.ones(batch, dtype=torch.bool, device=device)
    edges, lengths = [], []
    for _ in range(n - 1):
        waiting = waiting & (nodes != new[:, None])
        closer = cost[rows, new] < nearest
        nearest = torch.where(closer, cost[rows, new], nearest)
        link = torch.where(closer, new[:, None], link)
        # Waiting nodes first, even those at an infinite distance: taking one of these is what shows that the graph is
        # not connected.
        distance, new = torch.where(waiting, nearest.clamp(max=torch.finfo(cost.dtype).max), torch.inf).min(1)
        happened = waiting.any(1)
        reached &= ~happened | (nearest[rows, new] < torch.inf)
        other = link[rows, new]
        low, high = torch.minimum(new, other), torch.maximum(new, other)
        edges.append(torch.where(happened, low * n + high, -1))
        lengths.append(torch.where(happened, distance, torch.inf))
    if not edges:
        return torch.zeros_like(costs), rows.new_zeros(batch, max(n - 1, 0)), reached
    order = torch.stack(lengths, 1).argsort(dim=1, stable=True)
    choices = torch.stack(edges, 1).gather(1, order)
    taken = costs.new_zeros(batch, n * n).scatter_add(1, choices.clamp_min(0), (choices >= 0).to(costs.dtype))
    upper = taken.reshape(batch, n, n)
    return upper + upper.transpose(1, 2), choices, reached


def joined_at(choices: Tensor, n: int) -> Tensor:
    """The step at which i and j come into one component: int64 ``[B, n, n]``, symmetric, -1 if they never do."""
    if choices.device.type != "cpu":
        return torch_joined_at(choices, n)
    out = torch.empty(len(choices), n, n, dtype=torch.int64)
    run(_joined_at_kernel, 3 * out.numel(), choices.contiguous(), n, out)
    return out


def torch_joined_at(choices: Tensor, n: int) -> Tensor:
    """:func:`joined_at` for any device, one step at a time."""
    component = torch.arange(n, device=choices.device).expand(len(choices), n)
    out = torch.full((len(choices), n, n), -1, device=choices.device)
    for t in range(choices.shape[1]):
        edge = choices[:, t, None]
        ends = torch.cat([edge.clamp_min(0) // n, edge.clamp_min(0) % n], 1)
        keep, drop = component.gather(1, ends).split(1, 1)
        left = (component == keep) & (edge >= 0)
        right = (component == drop) & (edge >= 0)
        meet = left[:, :, None] & right[:, None, :]
        out = torch.where(meet | meet.transpose(1, 2), t, out)
        component = torch.where(right, keep, component)
    return out


def log_running(log_rates: Tensor, exists: Tensor, joined: Tensor) -> Tensor:
    """Log of the total rate of the edges in the running at each step: float64 ``[B, n - 1]``, differentiable.

    From the last step to the first: those in the running at the next step, and those joined at this one. Nothing is
    subtracted. Steps that did not happen have a very low but finite value.
    """
    batch, n = log_rates.shape[:2]
    steps = max(n - 1, 0)
    step = torch.where(exists, joined, steps).flatten(1)  # a last column takes what is no part
    rates = torch.where(exists, log_rates, 0).double().flatten(1)
    top = rates.new_full((batch, steps + 1), _LOG_ZERO).scatter_reduce(1, step, rates.detach(), "amax")
    total = torch.zeros_like(top).scatter_add(1, step, torch.exp(rates - top.gather(1, step)))
    happened = total[:, :steps] > 0
    joining = torch.where(happened, top[:, :steps] + torch.where(happened, total[:, :steps], 1).log(), _LOG_ZERO)
    return joining.flip(1).logcumsumexp(1).flip(1)


# --- compiled, CPU ---------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _spanning_tree_kernel(
    first: int, stride: int, costs: Any, exists: Any, sign: float, vertex: Any, choices: Any, reached: Any
) -> None:
    """Minimum spanning trees of ``sign * costs`` (symmetric in use, read above the diagonal) by Prim's algorithm.

    ``vertex [B, n, n]`` (zeroed) gets both triangles, ``choices [B, n - 1]`` the edges ``i * n + j``, i < j, cheapest
    first, then -1.
    """
    n = costs.shape[1]
    nearest = np.empty(n)
    via = np.empty(n, np.int64)
    waiting = np.empty(n, np.int64)
    length = np.empty(max(n - 1, 0))
    edge = np.empty(max(n - 1, 0), np.int64)
    for b in range(first, costs.shape[0], stride):
        start = -1
        count = 0
        for v in range(n):
            touches = False
            for u in range(v):
                touches = touches or exists[b, u, v]
            for u in range(v + 1, n):
                touches = touches or exists[b, v, u]
            if touches and start < 0:
                start = v
            elif touches:
                waiting[count] = v
                nearest[v] = math.inf
                count += 1
        reached[b] = True
        new = start
        steps = 0
        while count > 0:
            at = 0
            for t in range(count):
                v = waiting[t]
                i, j = (new, v) if new < v else (v, new)
                if exists[b, i, j]:
                    c = sign * costs[b, i, j]
                    if c < nearest[v]:
                        nearest[v] = c
                        via[v] = new
                if nearest[v] < nearest[waiting[at]]:
                    at = t
            new = waiting[at]
            if nearest[new] == math.inf:
                reached[b] = False
                break
            count -= 1
            waiting[at] = waiting[count]
            i, j = (new, via[new]) if new < via[new] else (via[new], new)
            vertex[b, i, j] = 1.0
            vertex[b, j, i] = 1.0
            length[steps] = nearest[new]
            edge[steps] = i * n + j
            steps += 1
        choices[b] = -1
        order = np.argsort(length[:steps])
        for t in range(steps):
            choices[b, t] = edge[order[t]]


@njit(cache=True, nogil=True)
def _joined_at_kernel(first: int, stride: int, choices: Any, n: int, out: Any) -> None:
    """``out [B, n, n]``: the step at which Kruskal's algorithm joins i and j, both ways; -1 if it never does."""
    comp = np.empty(n, np.int64)
    for b in range(first, choices.shape[0], stride):
        out[b] = -1
        for v in range(n):
            comp[v] = v
        for t in range(choices.shape[1]):
            if choices[b, t] < 0:
                break
            keep, drop = comp[choices[b, t] // n], comp[choices[b, t] % n]
            for i in range(n):
                if comp[i] == keep:
                    for j in range(n):
                        if comp[j] == drop:
                            out[b, i, j] = t
                            out[b, j, i] = t
            for j in range(n):
                if comp[j] == drop:
                    comp[j] = keep
