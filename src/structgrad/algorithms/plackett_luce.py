"""Plackett-Luce: the order of the smallest exponentials, and the total rate that is left before
each choice.

The order of independent exponentials is a sequence of choices without replacement (Luce 1959;
Plackett 1975). Given the order, new exponentials are sums of the waiting times (Struminsky et al.
2021, Algorithm 6). Plain torch sums the totals of k choices from the end, in O(n + k); the GPU
kernel sums each anew, in O(n k).

Everything here works on flat parts, ``[*batch, n]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.gpu import tl

#: The largest number of parts for one GPU program.
LARGEST = 16384


def plackett_luce_terms(choices: Tensor, log_rates: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of the probability of an order of the smallest exponentials (Struminsky et al.
    2021, 2.1).

    Args:
        choices: int64 ``[*batch, k]``, distinct existing parts.
        log_rates: ``[*batch, n]``, finite everywhere.
        exists: ``[*batch, n]``.

    Returns:
        log-rates of the choices, and logs of the total rate of all parts left before each choice,
        ``[*batch, k]`` each. The log-probability of the order is the sum of their differences.
    """
    chosen = log_rates.gather(-1, choices)
    if takes_operator(log_rates):
        step = torch.arange(choices.shape[-1], device=choices.device)
        until = torch.where(exists, len(step), -1).scatter(-1, choices, step.expand(choices.shape))
        return chosen, log_totals(until, log_rates, len(step))
    rest = log_rates.masked_fill(~exists.scatter(-1, choices, False), -math.inf)
    # Summed from the end: the parts that are never chosen, then the choices backwards. No rate is
    # subtracted.
    has_rest = (rest > -math.inf).any(-1, keepdim=True)
    never = torch.where(has_rest, rest, 0.0).logsumexp(-1, keepdim=True).masked_fill(~has_rest, -math.inf)
    backwards = torch.cat([never, chosen.flip(-1)], -1)
    return chosen, backwards.logcumsumexp(-1)[..., 1:].flip(-1)


def plackett_luce_conditional(
    choices: Tensor, log_rates: Tensor, exists: Tensor, steps: Tensor, parts: Tensor
) -> Tensor:
    """Exponentials given the order of the smallest (Struminsky et al. 2021, Algorithm 6):
    ``[*batch, n]``.

    The gaps between consecutive minima are independent exponentials. Their rate is the total rate
    of the parts that are left. Parts that are not chosen continue after the last choice, because
    exponentials have no memory. The result is reparameterised in ``log_rates``, and 1 where no part
    exists. It is a function of the standard exponentials ``steps`` ``[*batch, k]`` and ``parts``
    ``[*batch, n]``.
    """
    _, totals = plackett_luce_terms(choices, log_rates, exists)
    times = (steps * (-totals).exp()).cumsum(-1)
    after = times[..., -1:] + parts * (-log_rates).exp()
    # Where a sum rounds to the last choice's own time, the next number up keeps the order.
    least = torch.nextafter(times[..., -1:].detach(), torch.full_like(times[..., -1:], math.inf))
    after = after + (torch.maximum(after, least) - after).detach()
    return torch.where(exists, after.scatter(-1, choices, times), 1.0)


def takes_operator(log_rates: Tensor) -> bool:
    """Whether :func:`log_totals` accepts these rates: on a GPU, up to :data:`LARGEST` parts."""
    return gpu.takes(log_rates, log_rates.shape[-1], LARGEST)


def log_totals(until: Tensor, log_rates: Tensor, steps: int) -> Tensor:
    """Logs of the total rate that is left at every step, in one launch; differentiable twice.

    Args:
        until: int64 ``[*batch, n]``, the last step at which a part is left; -1 if it never is.
        log_rates: ``[*batch, n]``, finite.
        steps: the number of steps.

    Returns:
        ``[*batch, steps]``; 0 where nothing is left.
    """
    batch, n = log_rates.shape[:-1], log_rates.shape[-1]
    size = batch.numel()
    totals: Tensor = _totals_operator(until.reshape(size, n), log_rates.reshape(size, n), steps)
    return totals.reshape(*batch, steps)


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example.


@gpu.jit
def _gpu_totals(until_ptr, log_rates_ptr, totals_ptr, n, steps, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)
    last = tl.load(until_ptr + b * n + part, mask=part < n, other=-1).to(tl.int32)
    rate = tl.load(log_rates_ptr + b * n + part, mask=part < n, other=0.0).to(tl.float64)
    for step in range(steps):
        left = last >= step
        top = tl.max(tl.where(left, rate, -float("inf")), 0)
        top = tl.where(top > -float("inf"), top, 0.0)
        total = tl.sum(tl.where(left, tl.exp(rate - top), 0.0), 0)
        tl.store(totals_ptr + b * steps + step, tl.where(total > 0.0, top + tl.log(total), 0.0))


@gpu.jit
def _gpu_totals_backward(until_ptr, log_rates_ptr, totals_ptr, upstream_ptr, slope_ptr, n, steps, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)
    last = tl.load(until_ptr + b * n + part, mask=part < n, other=-1).to(tl.int32)
    rate = tl.load(log_rates_ptr + b * n + part, mask=part < n, other=0.0).to(tl.float64)
    found = tl.zeros([SIZE], tl.float64)
    for step in range(steps):
        share = tl.exp(rate - tl.load(totals_ptr + b * steps + step).to(tl.float64))
        found += tl.where(last >= step, share * tl.load(upstream_ptr + b * steps + step).to(tl.float64), 0.0)
    tl.store(slope_ptr + b * n + part, found, mask=part < n)


def _launch(kernel: Any, until: Tensor, *tensors: Tensor, steps: int) -> None:
    size = gpu.block(until.shape[1])
    warps = min(max(size // 256, 1), 32)
    gpu.launch(kernel, len(until), until, *tensors, until.shape[1], steps, warps=warps, SIZE=size)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::plackett_luce_totals", mutates_args=())
def _totals_operator(until: Tensor, log_rates: Tensor, steps: int) -> Tensor:
    totals: Tensor = _totals_fake(until, log_rates, steps)
    _launch(_gpu_totals, until, log_rates, totals, steps=steps)
    return totals


@_totals_operator.register_fake
def _totals_fake(until: Tensor, log_rates: Tensor, steps: int) -> Tensor:
    return log_rates.new_empty(len(log_rates), steps)


@torch.library.custom_op("structgrad::plackett_luce_totals_backward", mutates_args=())
def _slope_operator(until: Tensor, log_rates: Tensor, totals: Tensor, upstream: Tensor) -> Tensor:
    slope: Tensor = _slope_fake(until, log_rates)
    _launch(_gpu_totals_backward, until, log_rates, totals, upstream, slope, steps=totals.shape[1])
    return slope


@_slope_operator.register_fake
def _slope_fake(until: Tensor, log_rates: Tensor, *_: Tensor) -> Tensor:
    return log_rates.new_empty(log_rates.shape)


def _save_totals(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)


def _totals_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return None, _slope_operator(*ctx.saved_tensors, upstream), None


def _save_slope(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    until, log_rates, _, upstream = inputs
    ctx.save_for_backward(until, log_rates, upstream)


def _slope_backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
    until, log_rates, upstream = ctx.saved_tensors
    step = torch.arange(upstream.shape[-1], device=until.device)[:, None]

    def twin(rates: Tensor, upstream: Tensor) -> Tensor:
        rates = rates if rates.requires_grad else rates.detach().requires_grad_()
        left = until[:, None] >= step
        any_left = left.any(-1)
        totals = torch.where(left | ~any_left[..., None], rates[:, None], -torch.inf).logsumexp(-1)
        return torch.autograd.grad(torch.where(any_left, totals, 0.0), rates, upstream, create_graph=True)[0]

    with torch.enable_grad():
        by_rates, by_upstream = gradients(twin, [log_rates, upstream], [along])
    return None, by_rates, None, by_upstream


_totals_operator.register_autograd(_totals_backward, setup_context=_save_totals)
_slope_operator.register_autograd(_slope_backward, setup_context=_save_slope)
