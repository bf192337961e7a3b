r"""Chu-Liu-Edmonds by path growing, and the events that are its execution trace.

Every node but the root picks its cheapest incoming edge. Nodes on a cycle of picks become one node, whose incoming
edges cost what they cost beyond the pick of the node that they end in; it picks in turn. An *event* is one pick: event
v < n is the pick of node v, event n + t that of the t-th contracted node. The order of contraction does not change
which cycles arise; here a path of picks grows backwards from the first node not yet connected to the root, so one pick
is made at a time and each contraction costs O(n) for each node that it removes: O(n^2) in total (Tarjan 1977, for dense
graphs).

What an event stands for is a set S of nodes (``inside``); the sets are nested or disjoint. A pick enters S from
outside. The edges picked before are inside S, so none has the infinite rate of Algorithm 2 of Paulus et al. 2020 (B.8):
with exponential costs the pick of S is an edge entering S with probability proportional to its rate, independently of
the other picks given the sets. The arborescence is found by going through the events from the last to the first: a pick
counts unless one that counts already ends in its S.

``choices [B, E, 2]`` records for each event the edge ``u * n + v`` and the event that contracts it; -1 where there is
none. E = max(2 n - 2, n).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.threads import run, untraced

_DONE, _GONE, _FRESH = -2, -3, -1


def n_events(n: int) -> int:
    """How many picks there may be on n nodes."""
    return max(2 * n - 2, n)


def minimum_arborescence(costs: Tensor, exists: Tensor, root: int, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Exact minimum arborescences of ``sign * costs``.

    Args:
        costs: ``[B, n, n]``, contiguous; what lies outside ``exists`` is never looked at.
        exists: bool ``[B, n, n]``, contiguous; no loops, nothing into the root.
        root: of all examples.
        sign: -1 for maximum arborescences.

    Returns:
        vertices ``[B, n, n]``, choices ``[B, E, 2]``, and bool ``[B]``: whether an arborescence exists.
    """
    costs = costs.detach()
    if costs.device.type != "cpu":
        return torch_minimum_arborescence(costs, exists, root, sign)
    batch, n = costs.shape[:2]
    vertex = torch.zeros_like(costs)
    choices = torch.empty(batch, n_events(n), 2, dtype=torch.int64)
    reached = torch.ones(batch, dtype=torch.bool)
    if n:
        operations = 10 * costs.numel()
        run(_arborescence_kernel, operations, costs, exists, root, sign, vertex, choices, reached)
    return vertex, choices, reached


def torch_minimum_arborescence(
    costs: Tensor, exists: Tensor, root: int, sign: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`minimum_arborescence` for any device: one pick of every example at a time, 2 n - 2 times O(n^2)."""
    batch, n = costs.shape[:2]
    limit, device = n_events(n), costs.device
    rows = torch.arange(batch, device=device)
    slots = torch.arange(n, device=device).expand(batch, n)
    # A slot holds one (contracted) node: cost and head of its cheapest edge from every original node.
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
        # The path has come to a new node, ...
        place[rows, r] = torch.where(grows, length, met)
        # ... or to one that the root reaches, ...
        place = torch.where(ends[:, None] & (place >= 0), _DONE, place)
        # ... or to itself: slots of the cycle merge into slot r.
        ring = closes[:, None] & (place >= met[:, None])
        beyond = torch.where(ring[:, :, None], cost - best[:, :, None], torch.inf)
        merged, which = beyond.min(1)
        inside = ring.gather(1, slot_of)
        merged = merged.masked_fill(inside, torch.inf)
        cost[rows, r] = torch.where(closes[:, None], merged, cost[rows, r])
        head[rows, r] = torch.where(closes[:, None], head.gather(1, which[:, None])[:, 0], head[rows, r])
        slot_of = torch.where(inside, r[:, None], slot_of)
        new = events.clamp(max=limit - 1)
        old = torch.where(ring, event_of, limit)
        into = torch.cat([into, into[:, :1]], 1).scatter(1, old, new[:, None].expand(batch, n))[:, :limit]
        members[rows, new] |= inside
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


def inside(choices: Tensor, n: int) -> Tensor:
    """Which nodes each event stands for: bool ``[B, E, n]``."""
    if choices.device.type != "cpu":
        return torch_inside(choices, n)
    out = torch.empty(*choices.shape[:2], n, dtype=torch.bool)
    run(_inside_kernel, 2 * out.numel(), choices, out)
    return out


def torch_inside(choices: Tensor, n: int) -> Tensor:
    """:func:`inside` for any device."""
    batch, limit = choices.shape[:2]
    members = torch.zeros(batch, limit, n, dtype=torch.bool, device=choices.device)
    members[:, :n] = torch.eye(n, dtype=torch.bool, device=choices.device)
    for e in range(n, limit):
        members[:, e] = (members[:, :e] & (choices[:, :e, 1] == e)[:, :, None]).any(1)
    return members


class _LogEntering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_rates: Tensor, exists: Tensor, choices: Tensor) -> Tensor:
        out = torch.empty(choices.shape[:2], dtype=torch.float64)
        run(_entering_kernel, 20 * log_rates.numel(), log_rates, exists, choices, out)
        ctx.save_for_backward(log_rates, exists, choices, out)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        log_rates, exists, choices, value = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients(lambda r: torch_log_entering(r, exists, choices), [log_rates], [upstream]), None, None
        out = torch.zeros_like(log_rates)
        arguments = (log_rates, exists, choices, value, upstream.contiguous(), out)
        run(_entering_backward_kernel, 20 * log_rates.numel(), *arguments)
        return out, None, None


_compiled_log_entering = untraced(_LogEntering.apply)


def log_entering(log_rates: Tensor, exists: Tensor, choices: Tensor) -> Tensor:
    """Log of the total rate of the edges that enter what each event stands for: float64 ``[B, E]``, 0 where none
    happened.
    """
    if log_rates.device.type == "cpu":
        out: Tensor = _compiled_log_entering(log_rates, exists, choices)
        return out
    return torch_log_entering(log_rates, exists, choices)


def torch_log_entering(log_rates: Tensor, exists: Tensor, choices: Tensor) -> Tensor:
    """:func:`log_entering` for any device, one event at a time."""
    members = torch_inside(choices, log_rates.shape[-1])
    totals = []
    for e in range(choices.shape[1]):
        enters = exists & members[:, e, None, :] & ~members[:, e, :, None]
        happened = choices[:, e, 0] >= 0
        # An example without this event sums over everything instead, so that no gradient is NaN; the result is dropped.
        rates = torch.where(enters | ~happened[:, None, None], torch.where(exists, log_rates, 0).double(), -torch.inf)
        totals.append(torch.where(happened, rates.flatten(1).logsumexp(1), 0.0))
    return torch.stack(totals, 1) if totals else log_rates.new_zeros(choices.shape[:2], dtype=torch.float64)


# --- compiled, CPU ---------------------------------------------------------------------------------------------------


@njit(cache=True)
def _contract(exists: Any, root: int, cost: Any, head: Any, members: Any, choices: Any) -> int:
    """Chu-Liu-Edmonds on ``cost[v, u]`` (of u -> v, +inf where missing; overwritten); see above for the algorithm.

    Writes ``choices [E, 2]`` and, for each event, ``members [E, n]``, the nodes that it stands for. ``head [n, n]`` is
    scratch memory: of each slot's cheapest edge from u, the original node that it ends in. Returns how many events
    there were, or -1 if a node cannot be reached.
    """
    n = exists.shape[0]
    done, fresh = -2, -1
    events: int = n
    scratch = np.empty((4, n), np.int64)
    # Of a node: its slot. Of a slot: the event that it stands for, and its place on the path.
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
            # A cycle: everything on the path from r on becomes one node, which takes r's slot.
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
    """Minimum arborescences of ``sign * costs``: ``vertex [B, n, n]`` (zeroed), ``choices [B, E, 2]``,
    ``reached [B]``.
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
    """Which nodes each event stands for, from the ``choices [E, 2]`` of one example."""
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
    """``out [B, E, n]``: which nodes each event stands for."""
    for b in range(first, choices.shape[0], stride):
        _inside(choices[b], out.shape[2], out[b])


@njit(cache=True, nogil=True)
def _entering_kernel(first: int, stride: int, log_rates: Any, exists: Any, choices: Any, out: Any) -> None:
    """``out [B, E]``: log of the total rate of the edges that enter what an event stands for; 0 where none happened."""
    n = log_rates.shape[1]
    limit = choices.shape[1]
    members = np.empty((limit, n), np.bool_)
    for b in range(first, log_rates.shape[0], stride):
        _inside(choices[b], n, members)
        for e in range(limit):
            out[b, e] = 0.0
            if choices[b, e, 0] < 0:
                continue
            top = -math.inf
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            top = max(top, log_rates[b, u, v])
            total = 0.0
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            total += math.exp(log_rates[b, u, v] - top)
            out[b, e] = top + math.log(total)


@njit(cache=True, nogil=True)
def _entering_backward_kernel(
    first: int, stride: int, log_rates: Any, exists: Any, choices: Any, value: Any, upstream: Any, out: Any
) -> None:
    """The vector-Jacobian product of :func:`log_entering` into ``out [B, n, n]`` (zeroed by the caller)."""
    n = log_rates.shape[1]
    limit = choices.shape[1]
    members = np.empty((limit, n), np.bool_)
    for b in range(first, log_rates.shape[0], stride):
        _inside(choices[b], n, members)
        for e in range(limit):
            if choices[b, e, 0] < 0 or upstream[b, e] == 0.0:
                continue
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            out[b, u, v] += upstream[b, e] * math.exp(log_rates[b, u, v] - value[b, e])
