"""Entmax, between softmax and sparsemax and beyond (Peters et al. 2019; Correia et al. 2019).

With ``a = alpha - 1`` and ``d_i`` the distance of score i from the largest one, the solution is

    p_i = [t^a - a d_i]_+ ^ (1 / a),       exp(-d_i) t at a = 0,

where t, the largest probability, makes the sum 1. In t nothing cancels: the threshold of the scores themselves, which
the literature solves for, leaves nothing of the differences for alpha above 4. Where alpha is so large that the sum
jumps from one floating-point number t to the next, some p_i does; the mean of both sides with the sum 1 is right then,
since that p_i is what the others leave.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structgrad.algorithms.derivatives import implicit

#: Bisections of ``log t``, which lies in ``[-log K, 0]``: as many as float64 has digits, and some for its size.
_STEPS = 60
#: Below this a series is more precise than differences.
_SMALL = 1e-5
#: Of a derivative that would overflow: of a probability that alpha > 2 makes as good as a step of its score.
_STEEP = 1e290


def entmax(scores: Tensor, alpha: float | Tensor, exists: Tensor) -> Tensor:
    """``argmax_p <p, scores> + H_alpha(p)`` over the simplex of what exists: ``[*batch, K]``, differentiable twice.

    Args:
        scores: ``[*batch, K]``, finite, any number where a category is missing.
        alpha: at least 1, a number or a tensor broadcastable to ``[*batch, 1]``, in which the result is differentiable
            too.
        exists: bool ``[*batch, K]``; at least one category an example, else all are 0.

    Returns:
        in the dtype of the scores; computed in float64.
    """
    power = torch.as_tensor(alpha, dtype=torch.float64, device=scores.device) - 1
    # Relative to the largest, whose own derivative cancels: the result does not change as all scores move.
    known = torch.where(exists, scores.double(), -torch.inf).detach()
    top = known.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    distance = torch.where(exists, top - torch.where(exists, scores.double(), 0.0), 0.0)
    with torch.no_grad():
        point = _solve(distance, power, exists)
        inside = point > 0
        safe = torch.where(inside, point, 1.0)
        slope = torch.where(inside, ((1 - power) * safe.log()).exp().clamp_max(_STEEP), 0.0)
        weight = slope / slope.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1.0)
        steepest = weight.argmax(-1, keepdim=True)

    def marginal(p: Tensor) -> Tensor:
        """What is equal for all p_i > 0 at the solution: ``(p^a - 1) / a + d``."""
        log_p = torch.where(inside, p, 1.0).log()
        u = power * log_p
        near = u.abs() < _SMALL
        ratio = torch.where(near, 1 + u / 2 + u.square() / 6, torch.expm1(u) / torch.where(near, 1.0, u))
        return torch.where(inside, log_p * ratio + distance, 0.0)

    def step(excess: Tensor) -> Tensor:
        # Relative to where the slope is largest: elsewhere it would be lost in the rounding of that one.
        excess = torch.where(inside, excess - excess.gather(-1, steepest), 0.0)
        return slope * ((weight * excess).sum(-1, keepdim=True) - excess)

    return implicit(point, marginal, step).to(scores.dtype)


def _solve(distance: Tensor, power: Tensor, exists: Tensor) -> Tensor:
    """The probabilities, without a graph: bisection of ``log t``, then the mean of both ends with the sum 1."""

    def at(log_t: Tensor) -> Tensor:
        scaled = distance * (-power * log_t).exp()  # d / t^a
        z = power * scaled
        near = z < _SMALL
        series = -scaled * (1 + z / 2 + z.square() / 3)
        log_q = torch.where(near, series, torch.log1p(-torch.where(near, 0.0, z).clamp_max(1.0)) / power)
        return torch.where(exists, (log_t + torch.where(distance > 0, log_q, 0.0)).exp(), 0.0)

    low = torch.full_like(distance[..., :1], -math.log(max(distance.shape[-1], 1)))
    high = torch.zeros_like(low)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = at(middle).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    below, above = at(low), at(high)
    least, most = below.sum(-1, keepdim=True), above.sum(-1, keepdim=True)
    share = torch.where(most > least, (1 - least) / (most - least), 1.0).clamp(0, 1)
    return torch.lerp(below, above, share)
