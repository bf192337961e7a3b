r"""Chu-Liu-Edmonds by path growing, and the events that are its execution trace.

Every node except the root picks its cheapest incoming edge. Nodes on a cycle of picks are
contracted to one node. The edges into it cost the difference between their cost and that of the
pick of the node where they end. The contracted node picks in turn. An *event* is one pick: event v
< n is the pick of node v, event n + t is that of the t-th contracted node.

The order of contraction does not change which cycles arise. Here a path of picks grows backwards
from the first node that is not yet connected to the root, so one pick is made at a time. Each
contraction costs O(n) for each node that it removes, O(n^2) in total (Tarjan 1977, for dense
graphs).

An event belongs to a set S of nodes (``inside``); the sets are nested or disjoint. A pick enters S
from outside. The edges that were picked before are inside S. So no edge has the infinite rate that
Algorithm 2 of Paulus et al. 2020 (B.8) needs. With exponential costs, the pick of S is an edge that
enters S, with probability proportional to its rate. Given the sets it is independent of the other
picks. The arborescence follows from the events in reverse order: a pick counts unless an edge that
already counts ends in its S.

``choices [B, E, 2]`` records two numbers for each event: the edge ``u * n + v`` and the event that
contracts it. They are -1 where there is none. E = max(2 n - 2, n).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import gradients, second_gradients, twin_needed
from structgrad.algorithms.eager import on_host, transformed, values_can_be_read
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.products import product
from structgrad.algorithms.semirings import IMPOSSIBLE
from structgrad.algorithms.threads import run
from structgrad.algorithms.transforms import over_batch
from structgrad.common.private import untraced

_DONE, _GONE, _FRESH = -2, -3, -1
#: Rates of one example are summed as they are, relative to the largest, if their logs differ by no
#: more than this. Reciprocals of sums then leave most of the range of float64 to their factors.
_SPREAD = 300.0
#: The flags allow reassociation and fused multiply-add only: infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract"}
_GPU_DONE, _GPU_GONE, _GPU_FRESH = (gpu.constant(name) for name in (_DONE, _GONE, _FRESH))
_NO_RATE = gpu.constant(IMPOSSIBLE)  # finite: see matrix_tree
#: The largest graph for one GPU program; plain torch handles larger ones.
LARGEST = 128


def n_events(n: int) -> int:
    """The largest possible number of picks on n nodes."""
    return max(2 * n - 2, n)


def minimum_arborescence(costs: Tensor, exists: Tensor, root: int, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Exact minimum arborescences of ``sign * costs``.

    Args:
        costs: ``[B, n, n]``, contiguous; entries outside ``exists`` are never read.
        exists: bool ``[B, n, n]``, contiguous; no loops, nothing into the root.
        root: the root of all examples.
        sign: -1 for maximum arborescences.

    Returns:
        vertices ``[B, n, n]``, choices ``[B, E, 2]``, and bool ``[B]``: whether an arborescence
        exists.
    """
    costs = costs.detach()
    if gpu.takes(costs, costs.shape[-1], LARGEST, on_cpu=True):
        found: tuple[Tensor, Tensor, Tensor] = _arborescence_operator(costs, exists, root, sign)
        return found
    if not on_host(costs):
        return torch_minimum_arborescence(costs, exists, root, sign)
    batch, n = costs.shape[:2]
    vertex = torch.zeros_like(costs)
    choices = torch.empty(batch, n_events(n), 2, dtype=torch.int64)
    reached = torch.ones(batch, dtype=torch.bool)
    if n:
        operations = 10 * costs.numel()
        run(_arborescence_kernel, operations, costs, exists, root, sign, vertex, choices, reached)
    return vertex, choices, reached


def inside(choices: Tensor, n: int) -> Tensor:
    """The nodes in the set of each event: bool ``[B, E, n]``."""
    if gpu.takes(choices, n, LARGEST, on_cpu=True):
        members: Tensor = _inside_operator(choices, n)
        return members
    if not on_host(choices):
        return torch_inside(choices, n)
    return over_batch(lambda c: (_compiled_inside(c, n),), choices)[0]


def log_entering(log_rates: Tensor, exists: Tensor, choices: Tensor) -> Tensor:
    """Log of the total rate of the edges that enter the set of each event: float64 ``[B, E]``.

    It is 0 where an event did not happen.
    """
    out: Tensor
    if gpu.takes(log_rates, log_rates.shape[-1], LARGEST, on_cpu=True):
        out = _log_entering_operator(log_rates, exists, choices, _inside_operator(choices, log_rates.shape[-1]))
        return out
    if on_host(log_rates) and not transformed(log_rates) and not transformed(choices):
        out = _compiled_log_entering(log_rates, exists, choices)
        return out
    return torch_log_entering(log_rates, exists, choices)


def waiting(minima: Tensor, choices: Tensor, n: int) -> Tensor:
    """The sum of ``minima [B, E]`` over the events that an edge could have been picked in, for each edge.

    That is, for u -> v, over the events whose set contains v but not u. It is linear and
    differentiable to any order.

    Returns:
        ``[B, n, n]`` in the dtype of the minima.
    """
    if values_can_be_read(minima, choices):
        waited: Tensor = _compiled_waiting(minima, choices, n)
        return waited
    return torch_waiting(minima, choices, n)


def entering(weights: Tensor, choices: Tensor) -> Tensor:
    """The transpose of :func:`waiting`: sums of ``weights [B, n, n]`` over the edges that enter the
    set of each event.

    They are 0 where an event did not happen, ``[B, E]``.
    """
    if values_can_be_read(weights, choices):
        sums: Tensor = _compiled_entering(weights, choices)
        return sums
    return torch_entering(weights, choices)


# --- plain torch ------------------------------------------------------------------------------------------------------


def torch_minimum_arborescence(
    costs: Tensor, exists: Tensor, root: int, sign: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum arborescences on any device: one pick of every example at a time, 2 n - 2 times
    O(n^2).
    """
    batch, n = costs.shape[:2]
    limit, device = n_events(n), costs.device
    rows = torch.arange(batch, device=device)
    slots = torch.arange(n, device=device).expand(batch, n)
    # A slot holds one (contracted) node: cost and head of its cheapest edge from every original
    # node.
    cost = torch.where(exists, sign * costs.double(), torch.inf).transpose(1, 2).contiguous()
    head = slots[:, :, None].expand(batch, n, n).clone()
    slot_of = slots.clone()
    event_of = slots.clone()
    present = exists.any(1) | exists.any(2)
    place = torch.where(present & (slots != root), _FRESH, _DONE)  # position on the path, or one of the names above
    best = torch.zeros(batch, n, dtype=torch.float64, device=device)
    members = torch.zeros(batch, limit, n, dtype=torch.bool, device=device)
    members[:, :n] = torch.eye(n, dtype=torch.bool, device=device)
    edge = torch.full((batch, limit), -1, device=device)
    into = torch.full((batch, limit), -1, device=device)
    events = torch.full((batch,), n, device=device)
    length = torch.zeros(batch, dtype=torch.int64, device=device)
    reached = torch.ones(batch, dtype=torch.bool, device=device)
    for _ in range(limit if n else 0):
        fresh = place == _FRESH
        starts = length == 0
        active = ~starts | fresh.any(1)
        s = torch.where(starts, fresh.int().argmax(1), (place == length[:, None] - 1).int().argmax(1))
        length = torch.where(active, length.clamp_min(1), length)
        place[rows, s] = torch.where(active, length - 1, place[rows, s])
        lowest, u = cost[rows, s].min(1)
        v = head[rows, s, u]
        event = event_of[rows, s]
        edge[rows, event] = torch.where(active, u * n + v, edge[rows, event])
        best[rows, s] = lowest
        reached &= ~active | lowest.isfinite()
        r = slot_of[rows, u]
        met = place[rows, r]
        closes = active & (met >= 0)
        grows = active & (met == _FRESH)
        ends = active & (met == _DONE)
        # The path has reached a new node, ...
        place[rows, r] = torch.where(grows, length, met)
        # ... or a node that the root reaches, ...
        place = torch.where(ends[:, None] & (place >= 0), _DONE, place)
        # ... or itself: the slots of the cycle merge into slot r.
        ring = closes[:, None] & (place >= met[:, None])
        beyond = torch.where(ring[:, :, None], cost - best[:, :, None], torch.inf)
        merged, which = beyond.min(1)
        in_ring = ring.gather(1, slot_of)
        merged = merged.masked_fill(in_ring, torch.inf)
        cost[rows, r] = torch.where(closes[:, None], merged, cost[rows, r])
        head[rows, r] = torch.where(closes[:, None], head.gather(1, which[:, None])[:, 0], head[rows, r])
        slot_of = torch.where(in_ring, r[:, None], slot_of)
        new = events.clamp(max=limit - 1)
        old = torch.where(ring, event_of, limit)
        into = torch.cat([into, into[:, :1]], 1).scatter(1, old, new[:, None].expand(batch, n))[:, :limit]
        members[rows, new] |= in_ring
        event_of[rows, r] = torch.where(closes, new, event_of[rows, r])
        place = torch.where(ring & (slots != r[:, None]), _GONE, place)
        events = events + closes.long()
        length = torch.where(closes, met + 1, torch.where(ends, 0, length + grows.long()))
    happened = edge >= 0
    taken = torch.zeros(batch, n, dtype=torch.bool, device=device)
    counts = torch.zeros_like(happened)
    for e in reversed(range(limit)):
        counts[:, e] = happened[:, e] & ~(members[:, e] & taken).any(1)
        taken = taken | (counts[:, e, None] & (slots == edge[:, e, None] % n))
    vertex = costs.new_zeros(batch, n * n).scatter_add(1, edge.clamp_min(0), counts.to(costs.dtype))
    return vertex.reshape(batch, n, n), torch.stack([edge, into], -1), reached


def torch_inside(choices: Tensor, n: int) -> Tensor:
    """:func:`inside` for any device."""
    batch, limit = choices.shape[:2]
    members = torch.zeros(batch, limit, n, dtype=torch.bool, device=choices.device)
    members[:, :n] = torch.eye(n, dtype=torch.bool, device=choices.device)
    for e in range(n, limit):
        members[:, e] = (members[:, :e] & (choices[:, :e, 1] == e)[:, :, None]).any(1)
    return members


def torch_log_entering(log_rates: Tensor, exists: Tensor, choices: Tensor) -> Tensor:
    """:func:`log_entering` for any device, one event at a time."""
    members = inside(choices, log_rates.shape[-1])
    totals = []
    for e in range(choices.shape[1]):
        enters = exists & members[:, e, None, :] & ~members[:, e, :, None]
        happened = choices[:, e, 0] >= 0
        # An example without this event sums over everything instead, so that no gradient is NaN; the result is dropped.
        rates = torch.where(enters | ~happened[:, None, None], torch.where(exists, log_rates, 0).double(), -torch.inf)
        totals.append(torch.where(happened, rates.flatten(1).logsumexp(1), 0.0))
    return torch.stack(totals, 1) if totals else log_rates.new_zeros(choices.shape[:2], dtype=torch.float64)


def torch_waiting(minima: Tensor, choices: Tensor, n: int) -> Tensor:
    """:func:`waiting` for any device."""
    members = inside(choices, n).to(minima.dtype)
    happened = torch.where(choices[..., 0] >= 0, minima, 0.0)
    return product((1 - members).transpose(1, 2), happened[:, :, None] * members)


def torch_entering(weights: Tensor, choices: Tensor) -> Tensor:
    """:func:`entering` for any device."""
    members = inside(choices, weights.shape[-1]).to(weights.dtype)
    sums = (product(1 - members, weights) * members).sum(-1)
    return torch.where(choices[..., 0] >= 0, sums, 0.0)


# --- CPU kernels ------------------------------------------------------------------------------------------------------
# The set of a contracted node is the union of the sets that it contracts. So what enters it from u
# is a sum of theirs, and the events that an edge waits for are those of the larger set and one more.
# Either takes O(n) an event.


def _compiled_inside(choices: Tensor, n: int) -> Tensor:
    out = torch.empty(*choices.shape[:-1], n, dtype=torch.bool)
    batch, events = choices.shape[:-2].numel(), choices.shape[-2]
    flat = choices.reshape(batch, events, 2).contiguous()
    run(_inside_kernel, 2 * out.numel(), flat, out.view(batch, events, n))
    return out


class _LogEntering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_rates: Tensor, exists: Tensor, choices: Tensor) -> Tensor:
        out, weights, tops = _sum_rates(log_rates, exists, choices)
        ctx.save_for_backward(log_rates, exists, choices, out, weights, tops)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        log_rates, exists, choices, value, weights, tops = ctx.saved_tensors
        if twin_needed(upstream):
            return *gradients(lambda r: torch_log_entering(r, exists, choices), [log_rates], [upstream]), None, None
        return _shares(log_rates, exists, choices, value, weights, tops, upstream), None, None


def _sum_rates(log_rates: Tensor, exists: Tensor, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`log_entering`, the rates ``[B, n, n]`` relative to the largest, and its log ``[B]``.

    The log is infinite, and the rates are not computed, for examples whose rates spread too far.
    """
    batch = len(log_rates)
    out = torch.empty(choices.shape[:2], dtype=torch.float64)
    weights, tops = torch.empty(log_rates.shape, dtype=torch.float64), torch.empty(batch, dtype=torch.float64)
    run(_log_entering_kernel, 10 * log_rates.numel(), log_rates, exists, choices, out, weights, tops)
    return out, weights, tops


def _shares(
    log_rates: Tensor,
    exists: Tensor,
    choices: Tensor,
    value: Tensor,
    weights: Tensor,
    tops: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The vector-Jacobian product of :func:`log_entering`, from the results of :func:`_sum_rates`."""
    out = torch.zeros_like(log_rates, memory_format=torch.contiguous_format)
    arguments = log_rates, exists, choices, value, weights, tops, upstream.contiguous(), out
    run(_log_entering_backward_kernel, 5 * log_rates.numel(), *arguments)
    return out


class _Waiting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, minima: Tensor, choices: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(choices)
        out = minima.new_empty(len(minima), n, n)
        run(_waiting_kernel, 5 * out.numel(), minima.contiguous(), choices.contiguous(), out)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return entering(upstream, *ctx.saved_tensors), None, None


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, choices: Tensor) -> Tensor:
        ctx.save_for_backward(choices)
        ctx.n = weights.shape[-1]
        out = weights.new_empty(choices.shape[:2])
        run(_entering_kernel, 5 * weights.numel(), weights.contiguous(), choices.contiguous(), out)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (choices,) = ctx.saved_tensors
        return waiting(upstream, choices, ctx.n), None


_compiled_log_entering = untraced(_LogEntering.apply)
_compiled_waiting, _compiled_entering = untraced(_Waiting.apply), untraced(_Entering.apply)


@njit(cache=True)
def _contract(exists: Any, root: int, cost: Any, head: Any, members: Any, choices: Any) -> int:
    """Chu-Liu-Edmonds on ``cost[v, u]``, the cost of u -> v (+inf where missing; overwritten).

    The module's docstring explains the algorithm. It writes ``choices [E, 2]`` and, for each event,
    ``members [E, n]``, the nodes of its set. ``head [n, n]`` is scratch memory: the original node
    where each slot's cheapest edge from u ends. Returns the number of events, or -1 if a node
    cannot be reached.
    """
    n = exists.shape[0]
    done, fresh = -2, -1
    events: int = n
    scratch = np.empty((4, n), np.int64)
    # For a node: its slot. For a slot: its event and its place on the path.
    comp, owner, place, path = scratch[0], scratch[1], scratch[2], scratch[3]
    best = np.empty(n)
    for v in range(n):
        comp[v] = v
        owner[v] = v
        place[v] = fresh
        for u in range(n):
            members[v, u] = u == v
            head[v, u] = v
    choices[:] = -1
    place[root] = done
    for start in range(n):
        s = comp[start]
        if place[s] != fresh:
            continue
        touches = False
        for u in range(n):
            touches = touches or exists[u, start] or exists[start, u]
        if not touches:
            continue
        length = 1
        path[0] = s
        place[s] = 0
        while True:
            s = path[length - 1]
            u = 0
            for x in range(1, n):
                if cost[s, x] < cost[s, u]:
                    u = x
            if cost[s, u] == math.inf:
                return -1
            choices[owner[s], 0] = u * n + head[s, u]
            best[s] = cost[s, u]
            r = comp[u]
            if place[r] == done:
                for t in range(length):
                    place[path[t]] = done
                break
            if place[r] == fresh:
                path[length] = r
                place[r] = length
                length += 1
                continue
            # A cycle: the path from r on becomes one node, which takes r's slot.
            first = place[r]
            for x in range(n):
                cost[r, x] -= best[r]
                members[events, x] = members[owner[r], x]
            choices[owner[r], 1] = events
            for t in range(first + 1, length):
                s = path[t]
                choices[owner[s], 1] = events
                for x in range(n):
                    c = cost[s, x] - best[s]
                    if c < cost[r, x]:
                        cost[r, x] = c
                        head[r, x] = head[s, x]
                    if members[owner[s], x]:
                        members[events, x] = True
            for x in range(n):
                if members[events, x]:
                    comp[x] = r
                    cost[r, x] = math.inf
            owner[r] = events
            events += 1
            length = first + 1
    return events


@njit(cache=True, nogil=True)
def _arborescence_kernel(
    first: int, stride: int, costs: Any, exists: Any, root: int, sign: float, vertex: Any, choices: Any, reached: Any
) -> None:
    """Write minimum arborescences of ``sign * costs``.

    The outputs are ``vertex [B, n, n]`` (zeroed), ``choices [B, E, 2]`` and ``reached [B]``.
    """
    n = costs.shape[1]
    cost, head = np.empty((n, n)), np.empty((n, n), np.int64)
    members, taken = np.empty((choices.shape[1], n), np.bool_), np.empty(n, np.bool_)
    for b in range(first, costs.shape[0], stride):
        for u in range(n):
            for v in range(n):
                cost[v, u] = sign * costs[b, u, v] if exists[b, u, v] else math.inf
        events = _contract(exists[b], root, cost, head, members, choices[b])
        reached[b] = events >= 0
        taken[:] = False
        for e in range(events - 1, -1, -1):
            edge = choices[b, e, 0]
            if edge >= 0:
                blocked = False
                for x in range(n):
                    blocked = blocked or (members[e, x] and taken[x])
                if not blocked:
                    taken[edge % n] = True
                    vertex[b, edge // n, edge % n] = 1.0


@njit(cache=True)
def _inside(choices: Any, n: int, members: Any) -> None:
    """Which nodes are in the set of each event, from the ``choices [E, 2]`` of one example."""
    for e in range(choices.shape[0]):
        for v in range(n):
            members[e, v] = e == v
    for e in range(choices.shape[0]):
        parent = choices[e, 1]
        if parent >= 0:
            for v in range(n):
                members[parent, v] = members[parent, v] or members[e, v]


@njit(cache=True, nogil=True)
def _inside_kernel(first: int, stride: int, choices: Any, out: Any) -> None:
    """``out [B, E, n]``: the nodes in the set of each event."""
    for b in range(first, choices.shape[0], stride):
        _inside(choices[b], out.shape[2], out[b])


@njit(cache=True, fastmath=_FAST)
def _sum_entering(weights: Any, choices: Any, members: Any, sums: Any, out: Any) -> None:
    """:func:`entering` for one example. ``sums [E, n]``: what enters the set of an event from each node."""
    n = weights.shape[0]
    limit = choices.shape[0]
    for u in range(n):
        for v in range(n):
            sums[v, u] = weights[u, v]
    sums[n:] = 0.0
    for e in range(limit):
        total = 0.0
        if choices[e, 0] >= 0:
            for u in range(n):
                total += 0.0 if members[e, u] else sums[e, u]
            larger = choices[e, 1]
            if larger >= 0:
                for u in range(n):
                    sums[larger, u] += sums[e, u]
        out[e] = total


@njit(cache=True)
def _sum_waiting(minima: Any, choices: Any, members: Any, sums: Any) -> None:
    """:func:`waiting` for one example, transposed, into ``sums [:n]``. ``sums [E, n]``: up to the
    set of an event, from the outside.
    """
    n = members.shape[1]
    for e in range(choices.shape[0] - 1, -1, -1):
        own = minima[e] if choices[e, 0] >= 0 else 0.0
        larger = choices[e, 1]
        for u in range(n):
            before = sums[larger, u] if larger >= 0 else 0.0
            sums[e, u] = 0.0 if members[e, u] else before + own


@njit(cache=True, nogil=True)
def _entering_kernel(first: int, stride: int, weights: Any, choices: Any, out: Any) -> None:
    """``out [B, E]``: :func:`entering`."""
    n, limit = weights.shape[1], choices.shape[1]
    members, sums = np.empty((limit, n), np.bool_), np.empty((limit, n))
    for b in range(first, weights.shape[0], stride):
        _inside(choices[b], n, members)
        _sum_entering(weights[b], choices[b], members, sums, out[b])


@njit(cache=True, nogil=True)
def _waiting_kernel(first: int, stride: int, minima: Any, choices: Any, out: Any) -> None:
    """``out [B, n, n]``: :func:`waiting`."""
    n, limit = out.shape[1], choices.shape[1]
    members, sums = np.empty((limit, n), np.bool_), np.empty((limit, n))
    for b in range(first, minima.shape[0], stride):
        _inside(choices[b], n, members)
        _sum_waiting(minima[b], choices[b], members, sums)
        for u in range(n):
            for v in range(n):
                out[b, u, v] = sums[v, u]


@njit(cache=True, nogil=True)
def _log_entering_kernel(
    first: int, stride: int, log_rates: Any, exists: Any, choices: Any, out: Any, weights: Any, tops: Any
) -> None:
    """Write what :func:`_sum_rates` returns: ``out [B, E]``, ``weights [B, n, n]`` and ``tops [B]``."""
    n, limit = log_rates.shape[1], choices.shape[1]
    members, sums = np.empty((limit, n), np.bool_), np.empty((limit, n))
    for b in range(first, log_rates.shape[0], stride):
        top, least = -math.inf, math.inf
        for u in range(n):
            for v in range(n):
                if exists[b, u, v]:
                    top, least = max(top, log_rates[b, u, v]), min(least, log_rates[b, u, v])
        _inside(choices[b], n, members)
        if top - least > _SPREAD:
            tops[b] = math.inf
            for e in range(limit):
                out[b, e] = _log_entering_one(log_rates[b], exists[b], members[e]) if choices[b, e, 0] >= 0 else 0.0
            continue
        tops[b] = top
        for u in range(n):
            for v in range(n):
                weights[b, u, v] = math.exp(log_rates[b, u, v] - top) if exists[b, u, v] else 0.0
        _sum_entering(weights[b], choices[b], members, sums, out[b])
        for e in range(limit):
            if choices[b, e, 0] >= 0:
                out[b, e] = top + math.log(out[b, e])


@njit(cache=True)
def _log_entering_one(log_rates: Any, exists: Any, members: Any) -> float:
    """Log of the total rate of the edges of an example that enter one set ``members [n]``, for any rates."""
    n = log_rates.shape[0]
    top = -math.inf
    for u in range(n):
        if not members[u]:
            for v in range(n):
                if members[v] and exists[u, v]:
                    top = max(top, log_rates[u, v])
    total = 0.0
    for u in range(n):
        if not members[u]:
            for v in range(n):
                if members[v] and exists[u, v]:
                    total += math.exp(log_rates[u, v] - top)
    return top + math.log(total)


@njit(cache=True, nogil=True)
def _log_entering_backward_kernel(
    first: int,
    stride: int,
    log_rates: Any,
    exists: Any,
    choices: Any,
    value: Any,
    weights: Any,
    tops: Any,
    upstream: Any,
    out: Any,
) -> None:
    """The vector-Jacobian product of :func:`log_entering` into ``out [B, n, n]`` (zeroed by the caller)."""
    n, limit = log_rates.shape[1], choices.shape[1]
    members, sums, shares = np.empty((limit, n), np.bool_), np.empty((limit, n)), np.empty(limit)
    for b in range(first, log_rates.shape[0], stride):
        _inside(choices[b], n, members)
        if tops[b] < math.inf:
            for e in range(limit):
                shares[e] = upstream[b, e] * math.exp(tops[b] - value[b, e]) if choices[b, e, 0] >= 0 else 0.0
            _sum_waiting(shares, choices[b], members, sums)
            for u in range(n):
                for v in range(n):
                    out[b, u, v] = weights[b, u, v] * sums[v, u]
            continue
        for e in range(limit):
            if choices[b, e, 0] < 0 or upstream[b, e] == 0.0:
                continue
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            out[b, u, v] += upstream[b, e] * math.exp(log_rates[b, u, v] - value[b, e])


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# Blocks [SIZE, SIZE] in registers.


@gpu.jit
def _gpu_arborescence(
    costs_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    vertex_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    reached_ptr: tl.tensor,
    root: tl.tensor,
    sign: tl.tensor,
    n: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """One program an example does the steps of :func:`torch_minimum_arborescence`, which explains
    the names.
    """
    b = tl.program_id(0).to(tl.int64)
    slots, names = tl.arange(0, SIZE), tl.arange(0, 2 * SIZE)
    i, j = slots[:, None], slots[None, :]
    within = (i < n) & (j < n)
    at = b * n * n + j * n + i  # cost[slot, source]
    exists = tl.load(exists_ptr + at, mask=within, other=0) != 0
    cost = tl.where(exists, sign * tl.load(costs_ptr + at, mask=exists, other=0.0).to(tl.float64), float("inf"))
    head = i + tl.zeros([SIZE, SIZE], tl.int32)
    slot_of, event_of = slots, slots
    present = tl.max(exists.to(tl.int32), 1) + tl.max(exists.to(tl.int32), 0) > 0
    place = tl.where(present & (slots != root), _GPU_FRESH, _GPU_DONE)
    best = tl.zeros([SIZE], tl.float64)
    picked, into = tl.full([2 * SIZE], -1, tl.int32), tl.full([2 * SIZE], -1, tl.int32)
    length, lost = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    events = length + n
    for _ in range(limit):
        start = tl.min(tl.where(place == _GPU_FRESH, slots, SIZE), 0)
        s = tl.where(length > 0, tl.min(tl.where(place == length - 1, slots, SIZE), 0), start)
        costs_of_s = gpu.row(cost, s)
        lowest, u = tl.min(costs_of_s, 0), tl.argmin(costs_of_s, 0)
        lost = tl.where((s < SIZE) & (lowest == float("inf")), 1, lost)
        if (s < SIZE) & (lost == 0):
            length = tl.maximum(length, 1)
            place = tl.where(slots == s, length - 1, place)
            best = tl.where(slots == s, lowest, best)
            event = gpu.entry(event_of, s)
            picked = tl.where(names == event, u * n + gpu.entry(gpu.row(head, s), u), picked)
            r = gpu.entry(slot_of, u)
            met = gpu.entry(place, r)
            if met == _GPU_FRESH:  # the path has reached a new node, ...
                place = tl.where(slots == r, length, place)
                length += 1
            elif met == _GPU_DONE:  # ... or a node that the root reaches, ...
                place = tl.where(place >= 0, _GPU_DONE, place)
                length = 0
            else:  # ... or itself: the slots of the cycle merge into slot r.
                ring = place >= met
                beyond = tl.where(ring[:, None], cost - best[:, None], float("inf"))
                merged, which = tl.min(beyond, 0), tl.argmin(beyond, 0)
                in_ring = tl.sum(tl.where(slot_of[:, None] == j, ring[None, :].to(tl.int32), 0), 1) > 0
                merged = tl.where(in_ring, float("inf"), merged)
                heads = tl.sum(tl.where(i == which[None, :], head, 0), 0)
                cost = tl.where(i == r, merged[None, :], cost)
                head = tl.where(i == r, heads[None, :], head)
                slot_of = tl.where(in_ring, r, slot_of)
                old = tl.sum(tl.where((event_of[None, :] == names[:, None]) & ring[None, :], 1, 0), 1) > 0
                into = tl.where(old, events, into)
                event_of = tl.where(slots == r, events, event_of)
                place = tl.where(ring & (slots != r), _GPU_GONE, place)
                length = met + 1
                events += 1
    tl.store(reached_ptr + b, lost == 0)
    # From the last event to the first. An event that counts excludes the events whose set contains
    # its edge's head.
    parent = tl.full([SIZE], -1, tl.int32)
    counts = picked >= 0
    for back in range(limit):
        e = limit - 1 - back
        if gpu.entry(counts.to(tl.int32), e) > 0:
            v = gpu.entry(picked, e) % n
            parent = tl.where(slots == v, gpu.entry(picked, e) // n, parent)
            while (v != e) & (v >= 0):
                counts = counts & (names != v)
                v = gpu.entry(into, v)
    tl.store(vertex_ptr + b * n * n + i * n + j, tl.where(parent[None, :] == i, 1.0, 0.0), mask=within)
    event_ptr = choices_ptr + (b * limit + names) * 2
    tl.store(event_ptr, picked.to(tl.int64), mask=names < limit)
    tl.store(event_ptr + 1, into.to(tl.int64), mask=names < limit)


@gpu.jit
def _gpu_inside(
    choices_ptr: tl.tensor, inside_ptr: tl.tensor, n: tl.tensor, limit: tl.tensor, SIZE: tl.constexpr
) -> None:
    """One program works on one node: it goes from the node's own event to the events that contract
    it.
    """
    b, v = (tl.program_id(0) // n).to(tl.int64), tl.program_id(0) % n
    names = tl.arange(0, 2 * SIZE)
    found = names < 0
    e = v.to(tl.int64)
    while e >= 0:
        found = found | (names == e)
        e = tl.load(choices_ptr + (b * limit + e) * 2 + 1)
    tl.store(inside_ptr + (b * limit + names) * n + v, found, mask=names < limit)


@gpu.jit
def _gpu_log_entering(
    log_rates_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    inside_ptr: tl.tensor,
    total_ptr: tl.tensor,
    n: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """One program works on one event."""
    e = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, SIZE)
    i, j = nodes[:, None], nodes[None, :]
    at = (e // limit) * n * n + i * n + j
    heads = tl.load(inside_ptr + e * n + nodes, mask=nodes < n, other=0) != 0
    exists = tl.load(exists_ptr + at, mask=(i < n) & heads[None, :] & (heads == 0)[:, None], other=0) != 0
    rates = tl.where(exists, tl.load(log_rates_ptr + at, mask=exists, other=0.0).to(tl.float64), _NO_RATE)
    top = tl.max(tl.max(rates, 1), 0)
    value = top + tl.log(tl.sum(tl.sum(tl.exp(rates - top), 1), 0))
    tl.store(total_ptr + e, tl.where(tl.load(choices_ptr + 2 * e) >= 0, value, 0.0))


@gpu.jit
def _gpu_log_entering_backward(
    log_rates_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    inside_ptr: tl.tensor,
    total_ptr: tl.tensor,
    upstream_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """One program an example adds up each edge's share of the total rate, over the events that
    could pick it.
    """
    b = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, SIZE)
    i, j = nodes[:, None], nodes[None, :]
    within = (i < n) & (j < n)
    at = b * n * n + i * n + j
    exists = tl.load(exists_ptr + at, mask=within, other=0) != 0
    rates = tl.load(log_rates_ptr + at, mask=exists, other=0.0).to(tl.float64)
    grad = tl.zeros([SIZE, SIZE], tl.float64)
    for event in range(limit):
        e = b * limit + event
        if tl.load(choices_ptr + 2 * e) >= 0:
            heads = tl.load(inside_ptr + e * n + nodes, mask=nodes < n, other=0) != 0
            enters = exists & heads[None, :] & (heads == 0)[:, None]
            share = tl.exp(tl.where(enters, rates - tl.load(total_ptr + e), _NO_RATE))
            grad += tl.load(upstream_ptr + e) * share
    tl.store(out_ptr + at, grad, mask=within)


def _launch(kernel: Any, programs: int, n: int, *arguments: Tensor | float) -> None:
    size = gpu.block(n)
    gpu.launch(kernel, programs, *arguments, n, n_events(n), warps=gpu.warps(size * size), SIZE=size)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::chu_liu_edmonds_arborescence", mutates_args=())
def _arborescence_operator(costs: Tensor, exists: Tensor, root: int, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    if not gpu.launches(costs):
        return minimum_arborescence(costs, exists, root, sign)
    batch, n = costs.shape[:2]
    vertex, choices, reached = _arborescence_fake(costs, exists, root, sign)
    _launch(_gpu_arborescence, batch if n else 0, n, costs, exists, vertex, choices, reached, root, sign)
    return vertex, choices, reached


@_arborescence_operator.register_fake
def _arborescence_fake(costs: Tensor, exists: Tensor, root: int, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = costs.shape[:2]
    choices = costs.new_empty(batch, n_events(n), 2, dtype=torch.int64)
    reached = (torch.empty if n else torch.ones)(batch, dtype=torch.bool, device=costs.device)
    return costs.new_empty(costs.shape), choices, reached


@torch.library.custom_op("structgrad::chu_liu_edmonds_inside", mutates_args=())
def _inside_operator(choices: Tensor, n: int) -> Tensor:
    if not gpu.launches(choices):
        return inside(choices, n)
    members = choices.new_empty(*choices.shape[:2], n, dtype=torch.bool)
    _launch(_gpu_inside, len(choices) * n, n, choices, members)
    return members


@_inside_operator.register_fake
def _inside_fake(choices: Tensor, n: int) -> Tensor:
    return choices.new_empty(*choices.shape[:2], n, dtype=torch.bool)


@torch.library.custom_op("structgrad::chu_liu_edmonds_log_entering", mutates_args=())
def _log_entering_operator(log_rates: Tensor, exists: Tensor, choices: Tensor, members: Tensor) -> Tensor:
    if not gpu.launches(log_rates):
        return _sum_rates(*(t.contiguous() for t in (log_rates, exists, choices)))[0]
    total = log_rates.new_empty(choices.shape[:2], dtype=torch.float64)
    arguments = log_rates, exists, choices, members, total
    _launch(_gpu_log_entering, total.numel(), log_rates.shape[-1], *arguments)
    return total


@_log_entering_operator.register_fake
def _log_entering_fake(log_rates: Tensor, exists: Tensor, choices: Tensor, members: Tensor) -> Tensor:
    return log_rates.new_empty(choices.shape[:2], dtype=torch.float64)


@torch.library.custom_op("structgrad::chu_liu_edmonds_log_entering_backward", mutates_args=())
def _entering_shares_operator(
    log_rates: Tensor, exists: Tensor, choices: Tensor, members: Tensor, total: Tensor, upstream: Tensor
) -> Tensor:
    if not gpu.launches(log_rates):
        log_rates, exists, choices = log_rates.contiguous(), exists.contiguous(), choices.contiguous()
        return _shares(log_rates, exists, choices, *_sum_rates(log_rates, exists, choices), upstream)
    out = log_rates.new_empty(log_rates.shape)
    arguments = log_rates, exists, choices, members, total, upstream, out
    _launch(_gpu_log_entering_backward, len(log_rates), log_rates.shape[-1], *arguments)
    return out


def _log_entering_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _entering_shares_operator(*ctx.saved_tensors, upstream), None, None, None


def _entering_shares_backward(ctx: Any, again: Tensor) -> tuple[Tensor | None, ...]:
    log_rates, exists, choices, _, _, upstream = ctx.saved_tensors
    found = second_gradients(lambda r: torch_log_entering(r, exists, choices), log_rates, upstream, again)
    return found[0], None, None, None, None, found[1]


_log_entering_operator.register_autograd(_log_entering_backward, setup_context=gpu.save_all)
_entering_shares_operator.register_fake(gpu.like_first)
_entering_shares_operator.register_autograd(_entering_shares_backward, setup_context=gpu.save_inputs)
