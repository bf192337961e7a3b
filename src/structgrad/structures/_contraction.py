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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structgrad._threads import run
from structgrad.structures import _tree_kernels as kernels

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
        run(kernels.arborescence, operations, costs, exists, root, sign, vertex, choices, reached)
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
    run(kernels.inside, 2 * out.numel(), choices, out)
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
        run(kernels.entering, 20 * log_rates.numel(), log_rates, exists, choices, out)
        ctx.save_for_backward(log_rates, exists, choices, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        log_rates, exists, choices, value = ctx.saved_tensors
        out = torch.zeros_like(log_rates)
        arguments = (log_rates, exists, choices, value, upstream.contiguous(), out)
        run(kernels.entering_backward, 20 * log_rates.numel(), *arguments)
        return out, None, None


_compiled_log_entering = torch.compiler.disable(_LogEntering.apply)


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
