"""What structures over 0/1 vectors share: capped-simplex projection, sparse decompositions, Plackett-Luce noise.

Everything here works on flat parts, ``[*batch, n]``, with a bool tensor ``exists`` of the same shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structgrad.structures.base import SparseDistribution, values_can_be_read


def refuse(bad: Tensor, what: str) -> None:
    """Raise ``ValueError`` naming the first example for which ``bad`` ``[*batch]`` holds, where looking is free."""
    if values_can_be_read(bad) and bool(bad.any()):
        raise ValueError(f"example {bad.nonzero()[0].tolist()} {what}")


def exponentials_like(tensor: Tensor) -> Tensor:
    """Standard exponential noise, without gradient."""
    return torch.empty_like(tensor, requires_grad=False).exponential_()


# --- projection -------------------------------------------------------------------------------------------------------


def project_capped_simplex(scores: Tensor, exists: Tensor, total: int) -> Tensor:
    """``argmin_x ||x - scores||^2`` over ``0 <= x <= 1, sum x = total``: ``[*batch, n]``, exact and differentiable.

    The solution is ``clip(scores - tau, 0, 1)``. The function of tau whose root is wanted is piecewise linear with
    breakpoints at ``scores`` and ``scores - 1``: sorting finds the piece, on which tau is a mean. O(n log n).

    Args:
        scores: ``[*batch, n]``, finite everywhere.
        exists: ``[*batch, n]``; at least ``total`` parts exist in every example.
        total: the sum.
    """
    with torch.no_grad():
        wide = scores.double()
        floor = torch.where(exists, wide, math.inf).amin(-1, keepdim=True) - 1
        ordered = torch.where(exists, wide, -math.inf).sort(dim=-1, descending=True).values
        prefix = torch.nn.functional.pad(torch.where(ordered.isfinite(), ordered, 0.0).cumsum(-1), (1, 0))
        points = torch.cat([torch.where(exists, wide, floor), torch.where(exists, wide - 1, floor)], -1)
        ascending = ordered.flip(-1).contiguous()
        above = ordered.shape[-1] - torch.searchsorted(ascending, points, right=True)
        capped = ordered.shape[-1] - torch.searchsorted(ascending, points + 1, right=True)
        mass = capped + prefix.gather(-1, above) - prefix.gather(-1, capped) - (above - capped) * points
        start = torch.where(mass >= total, points, floor).amax(-1, keepdim=True)
        ones = exists & (wide - 1 > start)
        inside = exists & (wide > start) & ~ones
        start = start.to(scores.dtype)
        count = inside.sum(-1, keepdim=True).clamp(min=1)
    # Scores relative to the breakpoint lie in (0, 1] inside the piece, so nothing cancels at +-100.
    relative = torch.where(inside, scores - start, 0.0)
    tau = (relative.sum(-1, keepdim=True) + ones.sum(-1, keepdim=True) - total) / count
    return torch.where(inside, (relative - tau).clamp(0, 1), ones.to(scores.dtype))


# --- sparse decompositions --------------------------------------------------------------------------------------------


def nested_decomposition(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A point of the unit cube as a mixture of its upper level sets ``{i : point_i >= threshold}``.

    At most n + 1 vertices, each contained in the next; their number is the least possible for a chain, and the
    weights are differences of sorted entries.

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


def systematic_decomposition(point: Tensor, total: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A point of the unit cube as the mixture that systematic sampling draws from.

    With ``C`` the cumulative sums of the point and u uniform on [0, 1), part i is chosen if an integer shifted by u
    lies in ``[C_{i-1}, C_i)``. Every vertex has floor(sum) or ceil(sum) parts, and there are at most n + 1.

    Args:
        point: ``[B, n]`` in [0, 1].
        total: the integer that the point sums to, up to rounding; every vertex then has exactly that many parts.

    Returns:
        vertices ``[N, n]``, rows ``[N]``, weights ``[N]`` (positive, differentiable).
    """
    fixed = (point.detach() >= 1).double()
    inside = (point.detach() > 0) & (fixed == 0)
    cumulative = torch.where(inside, point.double(), 0.0).cumsum(-1)
    if total is not None:
        # What rounding may not break: the last sum is the total, and no step is longer than 1.
        rest = total - fixed.sum(-1, keepdim=True)
        left = inside.sum(-1, keepdim=True) - inside.cumsum(-1)
        cumulative = torch.minimum(torch.maximum(cumulative, rest - left), rest)
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


def as_sparse(found: tuple[Tensor, Tensor, Tensor], shape: torch.Size) -> SparseDistribution:
    """Vertices over flat vector parts as a :class:`SparseDistribution` of part shape ``shape``."""
    vertices, rows, weights = found
    return SparseDistribution(vertices.reshape(-1, *shape), rows, weights)


# --- Plackett-Luce ----------------------------------------------------------------------------------------------------


def plackett_luce_log_prob(choices: Tensor, log_rates: Tensor, exists: Tensor) -> Tensor:
    """``log P`` that the smallest of exponentials come in this order (Struminsky et al. 2021, eq. of section 2.1).

    Args:
        choices: int64 ``[*batch, k]``, distinct existing parts.
        log_rates: ``[*batch, n]``, finite everywhere.
        exists: ``[*batch, n]``.

    Returns:
        ``[*batch]``, differentiable in ``log_rates``.
    """
    chosen, normalisers = _plackett_luce(choices, log_rates, exists)
    return (chosen - normalisers).sum(-1)


def _plackett_luce(choices: Tensor, log_rates: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Log-rates of the choices and of everything still there before each: both ``[*batch, k]``."""
    chosen = log_rates.gather(-1, choices)
    others = exists.scatter(-1, choices, False)
    rest = torch.where(others, log_rates, -math.inf)
    # What is never chosen, plus what is chosen now or later. Not by logcumsumexp: the derivative of its derivative, which
    # RELAX needs to train its critic, is NaN.
    later = torch.ones(chosen.shape[-1:] * 2, dtype=torch.bool, device=chosen.device).triu()
    suffix = torch.where(later, chosen[..., None, :], -math.inf).logsumexp(-1, keepdim=True)
    tail = torch.cat([suffix, _never(rest, chosen)], -1)
    return chosen, tail.logsumexp(-1)


def _never(rest: Tensor, chosen: Tensor) -> Tensor:
    """``logsumexp`` of the parts never chosen, beside every choice: ``[*batch, k, 1]``."""
    present = (rest > -math.inf).any(-1, keepdim=True)
    total = torch.where(present, torch.where(present, rest, 0.0).logsumexp(-1, keepdim=True), -math.inf)
    return total[..., None].expand(*chosen.shape, 1)


def plackett_luce_conditional(choices: Tensor, log_rates: Tensor, exists: Tensor) -> Tensor:
    """Exponentials given the order of the smallest (Struminsky et al. 2021, Algorithm 6): ``[*batch, n]``.

    The gaps between consecutive minima are independent exponentials with the rate of everything still there; what is
    not chosen continues memorylessly after the last choice. Reparameterised in ``log_rates``; 1 where nothing exists.
    Rates beyond the range of the dtype (``exp(88)`` in float32) underflow to the smallest numbers there are.
    """
    _, normalisers = _plackett_luce(choices, log_rates, exists)
    gaps = exponentials_like(normalisers) * (-normalisers).exp()
    times = gaps.cumsum(-1)
    after = times[..., -1:] + exponentials_like(log_rates) * (-log_rates).exp()
    # Where the sum rounds to the last choice's own time, the next number up keeps the order.
    least = torch.nextafter(times.detach(), torch.full_like(times, math.inf))[..., -1:]
    after = after + (torch.maximum(after, least) - after).detach()
    return torch.where(exists, after.scatter(-1, choices, times), 1.0)
