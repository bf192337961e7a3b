"""Entmax, between softmax and sparsemax (Peters et al. 2019; Correia et al. 2019), by the package ``entmax``."""

from __future__ import annotations

import entmax as package
import torch
from torch import Tensor

from structgrad.algorithms.derivatives import implicit


def entmax(scores: Tensor, alpha: float | Tensor, exists: Tensor) -> Tensor:
    """``argmax_p <p, scores> + H_alpha(p)`` over the simplex of what exists: ``[*batch, K]``, differentiable twice.

    The package finds ``p = [(alpha - 1) scores - tau]_+ ^ (1 / (alpha - 1))``; its derivative has a square root, whose
    own derivative is infinite outside the support. Here tau is differentiated as the root of ``sum p = 1`` on the
    support.

    Args:
        scores: ``[*batch, K]``, finite, the lowest number where a category is missing.
        alpha: above 1 and not 2 (sparsemax has a closed form), a number or a tensor broadcastable to ``[*batch, 1]``,
            in which the result is differentiable too.
        exists: bool ``[*batch, K]``; at least one category an example.
    """
    wide = torch.where(exists, scores - scores.detach().amax(-1, keepdim=True), 0.0).double()
    power = torch.as_tensor(alpha, dtype=torch.float64, device=scores.device) - 1
    with torch.no_grad():
        known = wide.masked_fill(~exists, torch.finfo(torch.float64).min / 4)
        found = package.entmax15(known, dim=-1) if alpha == 1.5 else package.entmax_bisect(known, 1 + power, dim=-1)
        largest = found.amax(-1, keepdim=True)
        tau = torch.where(exists, power * wide, -torch.inf).amax(-1, keepdim=True) - largest**power
        inside = exists & (power * wide > tau)

    def base(tau: Tensor) -> Tensor:
        return torch.where(inside, power * wide - tau, 1.0)

    with torch.no_grad():
        slope = torch.where(inside, base(tau) ** (1 / power - 1), 0.0).sum(-1, keepdim=True) / power
    tau = implicit(
        tau,
        lambda tau: torch.where(inside, base(tau) ** (1 / power), 0.0).sum(-1, keepdim=True),
        lambda excess: excess / slope,
    )
    return torch.where(inside, base(tau) ** (1 / power), 0.0).to(scores.dtype)
