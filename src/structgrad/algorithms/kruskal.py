"""Minimum spanning trees, and the order of their edges as an execution trace.

Kruskal's algorithm takes edges in ascending order unless their ends are joined already. Let the
costs be independent exponentials of rates ``exp(l)``. Then each step takes one of the edges between
different components, with probability proportional to its rate (Paulus et al. 2020, B.7; Struminsky
et al. 2021, 2.3). The trace says one thing about an edge: the step at which its ends are joined
(``joined_at``). Up to that step the edge can be taken.

The tree is grown from one node (Prim 1957), and its n - 1 edges are sorted: O(n^2) for a graph of n
nodes. ``joined_at`` merges components in that order, which is O(n^2) as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import second_gradients
from structgrad.algorithms.eager import on_host
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.semirings import IMPOSSIBLE
from structgrad.algorithms.threads import run
from structgrad.algorithms.transforms import over_batch

_NO_RATE = gpu.constant(IMPOSSIBLE)  # finite: see matrix_tree
#: The largest graph for one GPU program; plain torch handles larger ones.
LARGEST = 128


def minimum_spanning_tree(costs: Tensor, exists: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Exact minimum spanning trees of ``sign * costs``.

    Args:
        costs: ``[B, n, n]``, contiguous; only entries in ``exists`` are read.
        exists: bool ``[B, n, n]``, contiguous, above the diagonal only.
        sign: -1 for maximum trees.

    Returns:
        symmetric vertices ``[B, n, n]``; the edges ``i * n + j`` (i < j) in ascending order of cost
        ``[B, n - 1]``, then -1; and bool ``[B]``: whether the example is connected.
    """
    costs = costs.detach()
    if gpu.takes(costs, costs.shape[-1], LARGEST, on_cpu=True):
        found: tuple[Tensor, Tensor, Tensor] = _spanning_tree_operator(costs, exists, sign)
        return found
    if not on_host(costs):
        return torch_minimum_spanning_tree(costs, exists, sign)
    batch, n = costs.shape[:2]
    vertex = torch.zeros_like(costs)
    choices = torch.empty(batch, max(n - 1, 0), dtype=torch.int64)
    reached = torch.empty(batch, dtype=torch.bool)
    run(_spanning_tree_kernel, 5 * costs.numel(), costs, exists, sign, vertex, choices, reached)
    return vertex, choices, reached


def joined_at(choices: Tensor, n: int) -> Tensor:
    """The step at which i and j come into one component: int64 ``[B, n, n]``, symmetric, -1 if they never do."""
    if gpu.takes(choices, n, LARGEST, on_cpu=True):
        joined: Tensor = _joined_at_operator(choices, n)
        return joined
    if not on_host(choices):
        return torch_joined_at(choices, n)
    return over_batch(lambda c: (_compiled_joined_at(c, n),), choices)[0]


def log_running(log_rates: Tensor, exists: Tensor, joined: Tensor) -> Tensor:
    """Log of the total rate of the edges that can be taken at each step: float64 ``[B, n - 1]``.

    It is differentiable, and computed from the last step to the first. The edges of a step are
    those of the next step and those that are joined at this one, so nothing is subtracted. Steps
    that did not happen have a very low but finite value.
    """
    if gpu.takes(log_rates, log_rates.shape[-1], LARGEST):
        total: Tensor = _log_running_operator(log_rates, exists, joined)
        return total
    return torch_log_running(log_rates, exists, joined)


# --- plain torch ------------------------------------------------------------------------------------------------------


def torch_minimum_spanning_tree(costs: Tensor, exists: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum spanning trees on any device: Prim's algorithm for all examples at once, n - 1 times
    O(n).
    """
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


def torch_log_running(log_rates: Tensor, exists: Tensor, joined: Tensor) -> Tensor:
    """The same as :func:`log_running`, for any device and differentiable to any order."""
    batch, n = log_rates.shape[:2]
    steps = max(n - 1, 0)
    step = torch.where(exists, joined, steps).flatten(1)  # the last column takes entries that are no part
    rates = torch.where(exists, log_rates, 0).double().flatten(1)
    top = rates.new_full((batch, steps + 1), IMPOSSIBLE).scatter_reduce(1, step, rates.detach(), "amax")
    total = torch.zeros_like(top).scatter_add(1, step, torch.exp(rates - top.gather(1, step)))
    happened = total[:, :steps] > 0
    joining = torch.where(happened, top[:, :steps] + torch.where(happened, total[:, :steps], 1).log(), IMPOSSIBLE)
    return joining.flip(1).logcumsumexp(1).flip(1)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


def _compiled_joined_at(choices: Tensor, n: int) -> Tensor:
    out = torch.empty(*choices.shape[:-1], n, n, dtype=torch.int64)
    batch = choices.shape[:-1].numel()
    flat = choices.reshape(batch, choices.shape[-1]).contiguous()
    run(_joined_at_kernel, 3 * out.numel(), flat, n, out.view(batch, n, n))
    return out


@njit(cache=True, nogil=True)
def _spanning_tree_kernel(
    first: int, stride: int, costs: Any, exists: Any, sign: float, vertex: Any, choices: Any, reached: Any
) -> None:
    """Minimum spanning trees of ``sign * costs`` (symmetric in use, read above the diagonal) by
    Prim's algorithm.

    ``vertex [B, n, n]`` (zeroed) gets both triangles. ``choices [B, n - 1]`` gets the edges ``i * n
    + j``, i < j, cheapest first, then -1.
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


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# Blocks [SIZE, SIZE] in registers.


@gpu.jit
def _gpu_spanning_tree(
    costs_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    vertex_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    reached_ptr: tl.tensor,
    sign: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Like ``_spanning_tree_kernel``, one program an example."""
    b = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, SIZE)
    i, j = nodes[:, None], nodes[None, :]
    within = (i < n) & (j < n)
    at = b * n * n + tl.minimum(i, j) * n + tl.maximum(i, j)
    exists = tl.load(exists_ptr + at, mask=within, other=0) != 0
    cost = tl.where(exists, sign * tl.load(costs_ptr + at, mask=exists, other=0.0).to(tl.float64), float("inf"))
    waiting = tl.max(exists.to(tl.int32), 0) > 0
    new = tl.min(tl.where(waiting, nodes, SIZE), 0)
    nearest = tl.full([SIZE], float("inf"), tl.float64)
    link, parent = tl.zeros([SIZE], tl.int32), tl.full([SIZE], -1, tl.int32)
    length, taken = nearest, tl.full([SIZE], -1, tl.int64)
    for step in range(n - 1):
        waiting = waiting & (nodes != new)
        closer = gpu.row(cost, new) < nearest
        nearest = tl.where(closer, gpu.row(cost, new), nearest)
        link = tl.where(closer, new, link)
        distance = tl.where(waiting, nearest, float("inf"))
        least = tl.min(distance, 0)
        found = tl.min(tl.where((distance == least) & (distance < float("inf")), nodes, SIZE), 0)
        if found < SIZE:
            other = gpu.entry(link, found)
            low, high = tl.minimum(found, other), tl.maximum(found, other)
            parent = tl.where(nodes == found, other, parent)
            length = tl.where(nodes == step, least, length)
            taken = tl.where(nodes == step, low * n + high, taken)
            new = found
    tl.store(reached_ptr + b, tl.max((waiting & (nodes != new)).to(tl.int32), 0) == 0)
    tl.store(
        vertex_ptr + b * n * n + i * n + j,
        tl.where((parent[None, :] == i) | (parent[:, None] == j), 1.0, 0.0),
        mask=within,
    )
    before = (length[:, None] < length[None, :]) | ((length[:, None] == length[None, :]) & (i < j))
    rank = tl.sum(before.to(tl.int32), 0)
    tl.store(choices_ptr + b * (n - 1) + rank, taken, mask=nodes < n - 1)


@gpu.jit
def _gpu_joined_at(choices_ptr: tl.tensor, joined_ptr: tl.tensor, n: tl.tensor, SIZE: tl.constexpr) -> None:
    """Like ``_joined_at_kernel``, one program an example."""
    b = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, SIZE)
    component = nodes
    out = tl.full([SIZE, SIZE], -1, tl.int32)
    for t in range(n - 1):
        edge = tl.load(choices_ptr + b * (n - 1) + t).to(tl.int32)
        if edge >= 0:
            keep, drop = gpu.entry(component, edge // n), gpu.entry(component, edge % n)
            left, right = component == keep, component == drop
            out = tl.where((left[:, None] & right[None, :]) | (right[:, None] & left[None, :]), t, out)
            component = tl.where(right, keep, component)
    within = (nodes < n)[:, None] & (nodes < n)[None, :]
    tl.store(joined_ptr + b * n * n + nodes[:, None] * n + nodes[None, :], out.to(tl.int64), mask=within)


@gpu.jit
def _gpu_log_running(
    log_rates_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    joined_ptr: tl.tensor,
    total_ptr: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """One program works on one step."""
    b, t = (tl.program_id(0) // (n - 1)).to(tl.int64), tl.program_id(0) % (n - 1)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    within = (i < n) & (j < n)
    at = b * n * n + i * n + j
    exists = tl.load(exists_ptr + at, mask=within, other=0) != 0
    running = exists & (tl.load(joined_ptr + at, mask=exists, other=-1) >= t)
    rates = tl.where(running, tl.load(log_rates_ptr + at, mask=running, other=0.0).to(tl.float64), _NO_RATE)
    top = tl.max(tl.max(rates, 1), 0)
    tl.store(total_ptr + tl.program_id(0), top + tl.log(tl.sum(tl.sum(tl.exp(rates - top), 1), 0)))


@gpu.jit
def _gpu_log_running_backward(
    log_rates_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    joined_ptr: tl.tensor,
    total_ptr: tl.tensor,
    upstream_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """One program an example adds up each edge's share of the total rate, over the steps that can
    take it.
    """
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    within = (i < n) & (j < n)
    at = b * n * n + i * n + j
    exists = tl.load(exists_ptr + at, mask=within, other=0) != 0
    rates = tl.load(log_rates_ptr + at, mask=exists, other=0.0).to(tl.float64)
    until = tl.load(joined_ptr + at, mask=exists, other=-1)
    grad = tl.zeros([SIZE, SIZE], tl.float64)
    for t in range(n - 1):
        of_step = b * (n - 1) + t
        share = tl.exp(tl.where(until >= t, rates - tl.load(total_ptr + of_step), _NO_RATE))
        grad += tl.load(upstream_ptr + of_step) * share
    tl.store(out_ptr + at, grad, mask=within)


def _launch(kernel: Any, programs: int, n: int, *arguments: Tensor | float) -> None:
    size = gpu.block(n)
    gpu.launch(kernel, programs if n else 0, *arguments, n, warps=gpu.warps(size * size), SIZE=size)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::kruskal_spanning_tree", mutates_args=())
def _spanning_tree_operator(costs: Tensor, exists: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    if not gpu.launches(costs):
        return minimum_spanning_tree(costs, exists, sign)
    vertex, choices, reached = _spanning_tree_fake(costs, exists, sign)
    _launch(_gpu_spanning_tree, len(costs), costs.shape[-1], costs, exists, vertex, choices, reached, sign)
    return vertex, choices, reached


@_spanning_tree_operator.register_fake
def _spanning_tree_fake(costs: Tensor, exists: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = costs.shape[:2]
    choices = costs.new_empty(batch, max(n - 1, 0), dtype=torch.int64)
    reached = (torch.empty if n else torch.ones)(batch, dtype=torch.bool, device=costs.device)
    return costs.new_empty(costs.shape), choices, reached


@torch.library.custom_op("structgrad::kruskal_joined_at", mutates_args=())
def _joined_at_operator(choices: Tensor, n: int) -> Tensor:
    if not gpu.launches(choices):
        return joined_at(choices, n)
    joined = choices.new_empty(len(choices), n, n)
    _launch(_gpu_joined_at, len(choices), n, choices, joined)
    return joined


@_joined_at_operator.register_fake
def _joined_at_fake(choices: Tensor, n: int) -> Tensor:
    return choices.new_empty(len(choices), n, n)


@torch.library.custom_op("structgrad::kruskal_log_running", mutates_args=())
def _log_running_operator(log_rates: Tensor, exists: Tensor, joined: Tensor) -> Tensor:
    batch, n = log_rates.shape[:2]
    total = log_rates.new_empty(batch, max(n - 1, 0), dtype=torch.float64)
    _launch(_gpu_log_running, total.numel(), n, log_rates, exists, joined, total)
    return total


@_log_running_operator.register_fake
def _log_running_fake(log_rates: Tensor, exists: Tensor, joined: Tensor) -> Tensor:
    batch, n = log_rates.shape[:2]
    return log_rates.new_empty(batch, max(n - 1, 0), dtype=torch.float64)


@torch.library.custom_op("structgrad::kruskal_log_running_backward", mutates_args=())
def _running_shares_operator(
    log_rates: Tensor, exists: Tensor, joined: Tensor, total: Tensor, upstream: Tensor
) -> Tensor:
    out = log_rates.new_empty(log_rates.shape)
    arguments = log_rates, exists, joined, total, upstream, out
    _launch(_gpu_log_running_backward, len(log_rates), log_rates.shape[-1], *arguments)
    return out


def _log_running_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _running_shares_operator(*ctx.saved_tensors, upstream), None, None


def _running_shares_backward(ctx: Any, again: Tensor) -> tuple[Tensor | None, ...]:
    log_rates, exists, joined, _, upstream = ctx.saved_tensors
    found = second_gradients(lambda r: torch_log_running(r, exists, joined), log_rates, upstream, again)
    return found[0], None, None, None, found[1]


_log_running_operator.register_autograd(_log_running_backward, setup_context=gpu.save_all)
_running_shares_operator.register_fake(gpu.like_first)
_running_shares_operator.register_autograd(_running_shares_backward, setup_context=gpu.save_inputs)
