"""Dynamic programs over bit vectors with a count: k-subsets, budgets, and chains with neighbour correlations.

Bits are decided from left to right. The state before bit i is the count ``j`` of ones so far and, for chains, the last
bit ``c``. With ``V`` the log-sum of what can follow a state,

    V_i(j, c) = log(exp V_{i+1}(j, 0) + exp(s_i + c t_{i-1} + V_{i+1}(j + 1, 1))),

the odds of its two terms are the Gibbs distribution as a Markov chain, ``r_i(j, c) = P(x_i = 1 | j, c)``: one pass in
the log domain gives ``V`` and ``r``, and everything else - marginals, their derivative, samples - is arithmetic on
probabilities, which neither over- nor underflows. Time and memory are O(n k) an example (Swersky et al. 2012 and
Tarlow et al. 2012 for the counts; Mezuman et al. 2013 for the chain; Paulus et al. 2020, B.4, B.5).

On the CPU compiled kernels run in parallel over the batch, with the Jacobian of the marginals (a covariance, hence
symmetric) applied in the same O(n k); elsewhere, and under ``torch.func`` and ``torch.compile``, plain torch does the
same with a loop over bits. Both compute in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.threads import run

#: Log-weight of what is impossible in the torch version; finite, so that no gradient is inf - inf.
_NEVER = -1e30


@dataclass(frozen=True)
class Chain:
    """The distribution over bit vectors.

    Attributes:
        unary: ``[*batch, n]`` scores, finite.
        pair: ``[*batch, n - 1]`` scores of neighbouring ones, finite; None without correlations.
        exists: bool ``[*batch, n]``; a bit that does not exist is 0.
        low: fewest ones.
        high: most ones, at most n.
    """

    unary: Tensor
    pair: Tensor | None
    exists: Tensor
    low: int
    high: int

    @property
    def states(self) -> int:
        """Values of the last bit that the future depends on."""
        return 1 if self.pair is None else 2

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log Z`` ``[*batch]``, ``E[x_i]`` ``[*batch, n]`` and ``E[x_i x_{i+1}]`` ``[*batch, n - 1]`` (chains only,
        else empty); float64, differentiable.
        """
        batch, n = self.unary.shape[:-1], self.unary.shape[-1]
        if not values_can_be_read(self.unary):
            return _moments_in_torch(self)
        unary, pair, exists = self._flat()
        log_z, mean, both = _Moments.apply(unary, pair, exists, self.low, self.high, self.states)
        return log_z.reshape(batch), mean.reshape(*batch, n), both.reshape(*batch, both.shape[-1])

    def sample(self) -> Tensor:
        """Exact samples: float64 0/1 ``[*batch, n]``."""
        uniform = torch.rand_like(self.unary, dtype=torch.float64)
        if not values_can_be_read(self.unary):
            return _sample_in_torch(self, uniform)
        unary, pair, exists = self._flat()
        flat = uniform.reshape(unary.shape)
        _, ratio = _ratios(unary, pair, exists, self.low, self.high, self.states)
        bits = torch.zeros_like(flat)
        run(_sample_pass, flat.numel(), ratio, flat, bits)
        return bits.reshape(uniform.shape)

    def argmax(self) -> Tensor:
        """A vector of highest score: float64 0/1 ``[*batch, n]``."""
        if not values_can_be_read(self.unary):
            return _argmax_in_torch(self)
        unary, pair, exists = self._flat()
        bits = torch.zeros_like(unary)
        work = 2 * unary.numel() * (self.high + 1) * self.states
        run(_argmax_pass, work, unary, pair, exists, self.low, self.high, self.states, bits)
        return bits.reshape(self.unary.shape)

    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.unary.shape[-1]
        batch = self.unary.numel() // n if n else math.prod(self.unary.shape[:-1])
        pair = self.unary.new_empty(batch, 0) if self.pair is None else self.pair.reshape(batch, max(n - 1, 0))
        unary, pair = self.unary.reshape(batch, n).double().contiguous(), pair.double().contiguous()
        return unary, pair, self.exists.reshape(batch, n).contiguous()


def _ratios(unary: Tensor, pair: Tensor, exists: Tensor, low: int, high: int, states: int) -> tuple[Tensor, Tensor]:
    """``V_0`` ``[B]`` and the ratios ``[B, n, high + 1, states]``."""
    log_z = unary.new_empty(len(unary))
    ratio = unary.new_zeros(*unary.shape, high + 1, states)
    run(_backward_pass, 20 * ratio.numel(), unary, pair, exists, low, high, states, log_z, ratio)
    return log_z, ratio


class _Moments(torch.autograd.Function):
    """Log-partition and marginals by the compiled kernels."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, unary: Tensor, pair: Tensor, exists: Tensor, low: int, high: int, states: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_z, ratio = _ratios(unary, pair, exists, low, high, states)
        mean, both = torch.zeros_like(unary), torch.zeros_like(pair)
        run(_forward_pass, 4 * ratio.numel(), ratio, mean, both)
        ctx.save_for_backward(unary, pair, exists, mean, both, ratio)
        ctx.counts = (low, high, states)
        ctx.set_materialize_grads(False)
        return log_z, mean, both

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        unary, pair, exists, mean, both, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():
            low, high, states = ctx.counts

            def twin(unary: Tensor, pair: Tensor) -> tuple[Tensor, ...]:
                return _moments_in_torch(Chain(unary, pair if states == 2 else None, exists, low, high))

            return *gradients(twin, [unary, pair], upstream), None, None, None, None
        d_log_z, d_mean, d_both = upstream
        unary, pair = torch.zeros_like(mean), torch.zeros_like(both)
        if d_mean is not None or d_both is not None:
            d_mean = torch.zeros_like(mean) if d_mean is None else d_mean.contiguous()
            d_both = torch.zeros_like(both) if d_both is None else d_both.contiguous()
            run(_covariance_pass, 10 * ratio.numel(), ratio, d_mean, d_both, unary, pair)
        if d_log_z is not None:
            unary, pair = unary + d_log_z[:, None] * mean, pair + d_log_z[:, None] * both
        return unary, pair, None, None, None, None


# --- kernels ----------------------------------------------------------------------------------------------------------
# Each does the examples first, first + stride, ... and writes to its last arguments, which start as zeros. Arrays:
# unary [B, n], pair [B, n - 1] (or [B, 0] with one state), exists [B, n], ratio [B, n, high + 1, states].


@numba.njit(nogil=True, cache=True)
def _backward_pass(first, stride, unary, pair, exists, low, high, states, log_z, ratio):  # type: ignore[no-untyped-def]
    """Right to left: ``V_0`` ``[B]`` and the ratios."""
    batch, n = unary.shape
    for b in range(first, batch, stride):
        value = np.full((high + 2, states), -np.inf)
        value[low : high + 1] = 0.0
        for i in range(n - 1, -1, -1):
            if not exists[b, i]:
                if states == 2:
                    value[:, 1] = value[:, 0]
                continue
            # In place: row j is read by rows j and j - 1 only.
            for j in range(high + 1):
                zero = value[j, 0]
                after = unary[b, i] + value[j + 1, states - 1]
                for c in range(states):
                    one = after
                    if c == 1 and i > 0:
                        one += pair[b, i - 1]
                    if one == -np.inf:
                        value[j, c] = zero
                    elif zero == -np.inf:
                        value[j, c] = one
                        ratio[b, i, j, c] = 1.0
                    elif one > zero:
                        odds = np.exp(zero - one)
                        value[j, c] = one + np.log1p(odds)
                        ratio[b, i, j, c] = 1.0 / (1.0 + odds)
                    else:
                        odds = np.exp(one - zero)
                        value[j, c] = zero + np.log1p(odds)
                        ratio[b, i, j, c] = odds / (1.0 + odds)
        log_z[b] = value[0, 0]


def _left_to_right(with_tangent: bool) -> Any:
    """One example, left to right: ``E[x_i]`` and ``E[x_i x_{i+1}]`` from the ratios ``[n, high + 1, states]`` or, with
    tangent, how they move as the ratios move by ``slope``. Compiled once for each.
    """

    @numba.njit(nogil=True, cache=True)
    def walk(ratio, slope, mean, both):  # type: ignore[no-untyped-def]
        n, rows, states = ratio.shape
        # Probabilities of the states, and how they move.
        here = np.zeros((rows + 1, states))
        moved = np.zeros((rows + 1, states))
        here[0, 0] = 1.0
        for i in range(n):
            total = 0.0
            repeated = 0.0
            for j in range(min(i, rows - 1), -1, -1):
                taken = 0.0
                left = 0.0
                d_taken = 0.0
                d_left = 0.0
                for c in range(states):
                    counted = here[j, c] * ratio[i, j, c]
                    taken += counted
                    left += here[j, c] - counted
                    if with_tangent:
                        counted = moved[j, c] * ratio[i, j, c] + here[j, c] * slope[i, j, c]
                        d_taken += counted
                        d_left += moved[j, c] - counted
                    total += counted
                    if c == 1:
                        repeated += counted
                if states == 2:
                    here[j, 1] = 0.0
                    here[j + 1, 1] = taken
                    if with_tangent:
                        moved[j, 1] = 0.0
                        moved[j + 1, 1] = d_taken
                else:
                    here[j + 1, 0] += taken
                    if with_tangent:
                        moved[j + 1, 0] += d_taken
                here[j, 0] = left
                if with_tangent:
                    moved[j, 0] = d_left
            mean[i] = total
            if states == 2 and i > 0:
                both[i - 1] = repeated

    return walk


_means, _means_tangent = _left_to_right(False), _left_to_right(True)


@numba.njit(nogil=True, cache=True)
def _forward_pass(first, stride, ratio, mean, both):  # type: ignore[no-untyped-def]
    """``E[x_i]`` and ``E[x_i x_{i+1}]``."""
    for b in range(first, len(ratio), stride):
        _means(ratio[b], ratio[b], mean[b], both[b])


@numba.njit(nogil=True, cache=True)
def _covariance_pass(first, stride, ratio, d_mean, d_both, unary, pair):  # type: ignore[no-untyped-def]
    """The covariance of (bits, pairs) times a vector: the derivative of the marginals in that direction."""
    batch, n, rows, states = ratio.shape
    for b in range(first, batch, stride):
        # Right to left: the derivative of V, which is what is expected to come, and from it that of the ratios.
        slope = np.zeros((n, rows, states))
        value = np.zeros((rows + 1, states))
        for i in range(n - 1, -1, -1):
            for j in range(rows):
                zero = value[j, 0]
                after = d_mean[b, i] + value[j + 1, states - 1]
                for c in range(states):
                    one = after
                    if c == 1 and i > 0:
                        one += d_both[b, i - 1]
                    r = ratio[b, i, j, c]
                    slope[i, j, c] = r * (1.0 - r) * (one - zero)
                    value[j, c] = (1.0 - r) * zero + r * one
        _means_tangent(ratio[b], slope, unary[b], pair[b])


@numba.njit(nogil=True, cache=True)
def _sample_pass(first, stride, ratio, uniform, bits):  # type: ignore[no-untyped-def]
    """Walk the Markov chain."""
    batch, n, _, states = ratio.shape
    for b in range(first, batch, stride):
        j = 0
        c = 0
        for i in range(n):
            one = uniform[b, i] < ratio[b, i, j, c]
            if one:
                bits[b, i] = 1.0
                j += 1
            c = 1 if one and states == 2 else 0


@numba.njit(nogil=True, cache=True)
def _argmax_pass(first, stride, unary, pair, exists, low, high, states, bits):  # type: ignore[no-untyped-def]
    """The same recursion with max in place of log-sum-exp."""
    batch, n = unary.shape
    for b in range(first, batch, stride):
        take = np.zeros((n, high + 1, states), dtype=np.bool_)
        value = np.full((high + 2, states), -np.inf)
        value[low : high + 1] = 0.0
        for i in range(n - 1, -1, -1):
            for j in range(high + 1):
                zero = value[j, 0]
                after = unary[b, i] + value[j + 1, states - 1] if exists[b, i] else -np.inf
                for c in range(states):
                    one = after
                    if c == 1 and i > 0:
                        one += pair[b, i - 1]
                    take[i, j, c] = one > zero
                    value[j, c] = max(one, zero)
        j = 0
        c = 0
        for i in range(n):
            one_here = take[i, j, c]
            if one_here:
                bits[b, i] = 1.0
                j += 1
            c = 1 if one_here and states == 2 else 0


# --- the same in torch ------------------------------------------------------------------------------------------------


def _options(chain: Chain, value: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Log-weights of bit i being 0 and 1 before every state: ``[*batch, high + 1, states]`` each."""
    one = torch.nn.functional.pad(value[..., 1:, -1:], (0, 0, 0, 1), value=_NEVER)
    one = one + chain.unary[..., i, None, None].double()
    if chain.pair is not None:
        gain = chain.pair[..., max(i - 1, 0), None].double() if i else torch.zeros_like(chain.unary[..., :1]).double()
        one = one + torch.stack([torch.zeros_like(gain), gain], -1)
    one = torch.where(chain.exists[..., i, None, None], one, _NEVER)
    return value[..., :1].expand_as(one), one


def _end(chain: Chain) -> Tensor:
    """``V_n``: ``[*batch, high + 1, states]``."""
    count = torch.arange(chain.high + 1, device=chain.unary.device)
    end = torch.where(count >= chain.low, 0.0, _NEVER).double()[:, None]
    # Through the scores, so that it is batched where they are (vmap).
    like = torch.zeros_like(chain.unary[..., :1], dtype=torch.float64).detach().sum(-1)[..., None, None]
    return (end + like).expand(*like.shape[:-2], chain.high + 1, chain.states)


def _ratios_in_torch(chain: Chain) -> tuple[Tensor, list[Tensor]]:
    """``V_0`` ``[*batch]`` and the ratios, ``[*batch, high + 1, states]`` for every bit."""
    value, ratios = _end(chain), []
    for i in reversed(range(chain.unary.shape[-1])):
        zero, one = _options(chain, value, i)
        # Not logaddexp: its second derivative is NaN where the two are 700 apart.
        value = torch.stack([zero, one]).logsumexp(0)
        ratios.append((one - zero).sigmoid())
    return value[..., 0, 0], ratios[::-1]


def _moments_in_torch(chain: Chain) -> tuple[Tensor, Tensor, Tensor]:
    log_z, ratios = _ratios_in_torch(chain)
    start = torch.zeros_like(_end(chain))
    here = torch.cat([torch.ones_like(start[..., :1, :1]), start[..., :1, 1:]], -1)
    here = torch.cat([here, start[..., 1:, :]], -2)
    mean, both = [], []
    for ratio in ratios:
        one = here * ratio
        mean.append(one.sum((-2, -1)))
        both.append(one[..., -1].sum(-1))
        taken = torch.nn.functional.pad(one.sum(-1)[..., :-1], (1, 0))
        left = (here - one).sum(-1)
        here = torch.stack([left, taken], -1) if chain.states == 2 else (left + taken)[..., None]
    empty = chain.unary.new_zeros(*chain.unary.shape[:-1], 0, dtype=torch.float64)
    pairs = torch.stack(both[1:], -1) if chain.states == 2 and len(both) > 1 else empty
    return log_z, torch.stack(mean, -1) if mean else empty, pairs


def _walk(chain: Chain, chosen: list[Tensor]) -> Tensor:
    """Follow decisions ``[*batch, high + 1, states]`` (bool, one tensor a bit) from the start: ``[*batch, n]``."""
    bits: list[Tensor] = []
    count = torch.zeros_like(chain.unary[..., :1], dtype=torch.int64).sum(-1)
    last = count
    for decision in chosen:
        index = count * chain.states + last
        bit = decision.flatten(-2).gather(-1, index[..., None])[..., 0].long()
        bits.append(bit)
        count = count + bit
        last = bit if chain.states == 2 else torch.zeros_like(bit)
    return torch.stack(bits, -1).double() if bits else torch.zeros_like(chain.unary, dtype=torch.float64)


def _sample_in_torch(chain: Chain, uniform: Tensor) -> Tensor:
    _, ratios = _ratios_in_torch(chain)
    return _walk(chain, [uniform[..., i, None, None] < r for i, r in enumerate(ratios)])


def _argmax_in_torch(chain: Chain) -> Tensor:
    value, chosen = _end(chain), []
    for i in reversed(range(chain.unary.shape[-1])):
        zero, one = _options(chain, value, i)
        chosen.append(one > zero)
        value = torch.maximum(zero, one)
    return _walk(chain, chosen[::-1])
