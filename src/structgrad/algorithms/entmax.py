"""Entmax: softmax (alpha 1), sparsemax (alpha 2) and all in between and beyond (Peters et al. 2019;
Correia et al. 2019).

Let ``a = alpha - 1``, and let ``d_i`` be the distance of score i from the largest score. The
solution is

    p_i = [t^a - a d_i]_+ ^ (1 / a),       exp(-d_i) t at a = 0,

where t, the largest probability, makes the sum 1. Nothing cancels when we solve for t. The
literature solves for the threshold of the scores instead, which loses all digits of the differences
for alpha above 4.

If alpha is very large, the sum may jump between neighbouring floating-point numbers t because some
p_i jumps. Then the right solution is the mixture of both sides whose sum is 1, since that p_i is
the remainder of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structgrad.algorithms.derivatives import implicit

#: Bisections of ``log t``, which lies in ``[-log K, 0]``: the number of float64's digits, and some
#: for the exponent.
_STEPS = 60
#: Below this value a series is more precise than differences.
_SMALL = 1e-5
#: A bound for a derivative that would overflow. With alpha > 2 a probability is almost a step
#: function of its score.
_STEEP = 1e290


def entmax(scores: Tensor, alpha: float | Tensor, exists: Tensor) -> Tensor:
    """``argmax_p <p, scores> + H_alpha(p)`` over the simplex of what exists: ``[*batch, K]``,
    differentiable twice.

    Args:
        scores: ``[*batch, K]``, finite; any number where a category is missing.
        alpha: at least 1, a number or a tensor broadcastable to ``[*batch, 1]``. The result is
            differentiable in it too.
        exists: bool ``[*batch, K]``; at least one category an example, else all are 0.

    Returns:
        the probabilities in the dtype of the scores; computed in float64.
    """
    power = torch.as_tensor(alpha, dtype=torch.float64, device=scores.device) - 1
    # Relative to the largest score. Its own derivative cancels, since the result does not change if
    # all scores move.
    filled = torch.where(exists, scores.double(), -torch.inf).detach()
    top = filled.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    distance = torch.where(exists, top - torch.where(exists, scores.double(), 0.0), 0.0)
    with torch.no_grad():
        point = _solve(distance, power, exists)
        support = point > 0
        safe = torch.where(support, point, 1.0)
        slope = torch.where(support, ((1 - power) * safe.log()).exp().clamp_max(_STEEP), 0.0)
        weight = slope / slope.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1.0)
        steepest = weight.argmax(-1, keepdim=True)

    def marginal(p: Tensor) -> Tensor:
        """The quantity ``(p^a - 1) / a + d``, which is equal for all p_i > 0 at the solution."""
        log_p = torch.where(support, p, 1.0).log()
        u = power * log_p
        near = u.abs() < _SMALL
        ratio = torch.where(near, 1 + u / 2 + u.square() / 6, torch.expm1(u) / torch.where(near, 1.0, u))
        return torch.where(support, log_p * ratio + distance, 0.0)

    def step(excess: Tensor) -> Tensor:
        # Relative to the largest slope: elsewhere it would be lost in that one's rounding.
        excess = torch.where(support, excess - excess.gather(-1, steepest), 0.0)
        return slope * ((weight * excess).sum(-1, keepdim=True) - excess)

    return implicit(point, marginal, step).to(scores.dtype)


def _solve(distance: Tensor, power: Tensor, exists: Tensor) -> Tensor:
    """The probabilities, without a graph: bisect ``log t``, then mix both ends so that the sum is
    1.
    """

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
