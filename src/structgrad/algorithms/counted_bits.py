"""Dynamic programs over bit vectors with a count: k-subsets, budgets, and chains with neighbour correlations.

Bits are decided from left to right. The state before bit i is the count ``j`` of ones so far and, for chains, the last
bit ``c``. With ``V`` the log-sum of what can follow a state,

    V_i(j, c) = log(exp V_{i+1}(j, 0) + exp(s_i + c t_{i-1} + V_{i+1}(j + 1, 1))),

the odds of its two terms are the Gibbs distribution as a Markov chain, ``r_i(j, c) = P(x_i = 1 | j, c)``: one pass in
the log domain gives ``V`` and ``r``, and everything else - marginals, their derivative, samples - is arithmetic on
probabilities, which neither over- nor underflows. Time and memory are O(n k) an example (Swersky et al. 2012 and
Tarlow et al. 2012 for the counts; Mezuman et al. 2013 for the chain; Paulus et al. 2020, B.4, B.5).

On the CPU compiled kernels run in parallel over the batch, with the Jacobian of the marginals (a covariance, hence
symmetric) applied in the same O(n k); elsewhere, and under ``torch.func`` and ``torch.compile``, plain torch multiplies
the bits' polynomials in a tree, O(n k) in O(log n) batched steps. Both compute in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.noise import wide_exponentials
from structgrad.algorithms.semirings import Aggregation, best, log_sum
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
        if not values_can_be_read(self.unary):
            return _sample_in_torch(self)
        uniform = torch.rand_like(self.unary, dtype=torch.float64)
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
# Bits are combined two by two, then pieces of two bits, and so on: O(log n) batched steps. A piece is known by the
# log-weights [states, states, count + 1] of what its bits can do: of the last bit before it (the first index), its own
# last bit (the second) and the number of its ones, polynomials whose product is that of the pieces (Tarlow et al. 2012,
# section 3). A distribution over what the whole does is split back down in the same tree.


def _bits(chain: Chain) -> Tensor:
    """Pieces of one bit each, missing ones up to a power of two: ``[*batch, bits, states, states, 1 or 2]``."""
    n = chain.unary.shape[-1]
    missing = (1 << max(n - 1, 0).bit_length()) - n
    before = [torch.where(chain.exists, chain.unary.double(), _NEVER)]
    if chain.pair is not None:
        before.append(before[0] + torch.nn.functional.pad(chain.pair.double(), (min(n, 1), 0)))
    one = torch.nn.functional.pad(torch.stack(before, -1), (0, 0, 0, missing), value=_NEVER)
    zero, never = torch.zeros_like(one), torch.full_like(one, _NEVER)
    last = [(zero, one)] if chain.pair is None else [(zero, never), (never, one)]
    return torch.stack([torch.stack(counts, -1) for counts in last], -2)[..., : chain.high + 1]


def _splits(pieces: Tensor, high: int) -> Tensor:
    """Log-weights of all that two neighbouring pieces can do: ``[*batch, pieces / 2, states, states, counts, splits]``.

    A split is the last bit of the first piece and, from the largest to 0, its number of ones.
    """
    most = pieces.shape[-1]
    counts = min(2 * (most - 1), high) + 1
    second = torch.nn.functional.pad(pieces[..., 1::2, :, :, :], (most - 1, counts - most), value=_NEVER)
    second = second.unfold(-1, most, 1).movedim(-4, -2).unsqueeze(-5)
    return (pieces[..., 0::2, :, :, :].flip(-1)[..., None, None, :, :] + second).flatten(-2)


def _tree(chain: Chain, plus: Aggregation) -> list[Tensor]:
    """The pieces of every size, from single bits to the whole."""
    levels = [_bits(chain)]
    while levels[-1].shape[-4] > 1:
        levels.append(plus(_splits(levels[-1], chain.high), -1))
    return levels


def _moments_in_torch(chain: Chain) -> tuple[Tensor, Tensor, Tensor]:
    # Not logaddexp: its second derivative is NaN where the two are 700 apart.
    levels = _tree(chain, log_sum)
    whole = levels[-1][..., :1, :, chain.low :]
    log_z = whole.logsumexp((-1, -2, -3, -4))
    here = (whole - log_z[..., None, None, None, None]).exp()
    here = torch.nn.functional.pad(here, (chain.low, 0, 0, 0, 0, chain.states - 1))
    for pieces, pairs in zip(levels[-2::-1], levels[:0:-1], strict=True):
        most = pieces.shape[-1]
        beyond = (0, 2 * most - 1 - pairs.shape[-1])
        # By (bit before, last bit of the first piece, last bit, ones in the first piece, ones in the second).
        total = torch.nn.functional.pad(pairs, beyond, value=-_NEVER).unfold(-1, most, 1).unsqueeze(-4)
        first, second = pieces[..., 0::2, :, :, :], pieces[..., 1::2, :, :, :]
        share = (first[..., None, :, None] + second[..., None, :, :, None, :] - total).exp()
        joint = share * torch.nn.functional.pad(here, beyond).unfold(-1, most, 1).unsqueeze(-4)
        here = torch.stack([joint.sum((-1, -3)), joint.sum((-2, -5))], -4).flatten(-5, -4)
    n = chain.unary.shape[-1]
    ones = here[..., :n, :, -1, 1:].sum(-1)  # there is no count of 1 where high is 0
    return log_z, ones.sum(-1), ones[..., 1 if chain.states == 2 else n :, -1]


def _follow(chain: Chain, levels: list[Tensor], choose: Callable[[Tensor], Tensor]) -> Tensor:
    """What the bits do, ``[*batch, n]``, by one choice ``[...]`` among alternatives ``[..., splits]`` a piece."""
    states = chain.states
    whole = levels[-1][..., 0, :, chain.low :]
    chosen, counts = choose(whole.flatten(-2)), whole.shape[-1]
    # Bit before, last bit and count in one number.
    piece = chosen // counts * (counts + chain.low) + chosen % counts + chain.low
    for pieces in levels[-2::-1]:
        most, splits = pieces.shape[-1], _splits(pieces, chain.high)
        counts = splits.shape[-2]
        flat = splits.flatten(-4, -2)
        index = piece[..., None, None].expand(*piece.shape, 1, flat.shape[-1])
        split = choose(flat.gather(-2, index).squeeze(-2))
        between, ones = split // most, most - 1 - split % most
        before, last, count = piece // (states * counts), piece // counts % states, piece % counts
        first = (before * states + between) * most + ones
        second = (between * states + last) * most + count - ones
        piece = torch.stack([first, second], -1).flatten(-2)
    return (piece[..., : chain.unary.shape[-1]] % levels[0].shape[-1]).double()


def _sample_in_torch(chain: Chain) -> Tensor:
    return _follow(chain, _tree(chain, log_sum), lambda a: (a - wide_exponentials(a).log()).argmax(-1))


def _argmax_in_torch(chain: Chain) -> Tensor:
    return _follow(chain, _tree(chain, best), lambda alternatives: alternatives.argmax(-1))
