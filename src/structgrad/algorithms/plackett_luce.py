"""Plackett-Luce: the order in which independent exponentials are smallest.

Everything here works on flat parts, ``[*batch, n]``, with a bool tensor ``exists`` of the same shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plackett_luce_terms(choices: Tensor, log_rates: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """What the probability of an order of the smallest exponentials consists of (Struminsky et al. 2021, 2.1).

    Args:
        choices: int64 ``[*batch, k]``, distinct existing parts.
        log_rates: ``[*batch, n]``, finite everywhere.
        exists: ``[*batch, n]``.

    Returns:
        log-rates of the choices, and logarithms of the total rate of all that was there before each: ``[*batch, k]``
        each. The log-probability of the order is the sum of their differences.
    """
    chosen = log_rates.gather(-1, choices)
    rest = log_rates.masked_fill(~exists.scatter(-1, choices, False), -math.inf)
    # Summed from the end: what is never chosen, then the choices backwards. No rate is subtracted.
    has_rest = (rest > -math.inf).any(-1, keepdim=True)
    never = torch.where(has_rest, rest, 0.0).logsumexp(-1, keepdim=True).masked_fill(~has_rest, -math.inf)
    backwards = torch.cat([never, chosen.flip(-1)], -1)
    return chosen, backwards.logcumsumexp(-1)[..., 1:].flip(-1)


def plackett_luce_conditional(
    choices: Tensor, log_rates: Tensor, exists: Tensor, steps: Tensor, parts: Tensor
) -> Tensor:
    """Exponentials given the order of the smallest (Struminsky et al. 2021, Algorithm 6): ``[*batch, n]``.

    The gaps between consecutive minima are independent exponentials with the rate of everything still there; what is
    not chosen continues memorylessly after the last choice. Reparameterised in ``log_rates``; 1 where nothing exists.
    ``steps`` ``[*batch, k]`` and ``parts`` ``[*batch, n]`` are the standard exponentials that it is made of.
    """
    _, totals = plackett_luce_terms(choices, log_rates, exists)
    times = (steps * (-totals).exp()).cumsum(-1)
    after = times[..., -1:] + parts * (-log_rates).exp()
    # Where a sum rounds to the last choice's own time, the next number up keeps the order.
    least = torch.nextafter(times[..., -1:].detach(), torch.full_like(times[..., -1:], math.inf))
    after = after + (torch.maximum(after, least) - after).detach()
    return torch.where(exists, after.scatter(-1, choices, times), 1.0)
