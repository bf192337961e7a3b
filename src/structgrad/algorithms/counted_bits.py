"""Dynamic programs over bit vectors with a count: k-subsets, budgets, and chains with neighbour
correlations.

Bits are decided from left to right. The state before bit i is the count ``j`` of ones so far and,
for chains, the last bit ``c``. Let ``V`` be the log-sum over all continuations of a state:

    V_i(j, c) = log(exp V_{i+1}(j, 0) + exp(s_i + c t_{i-1} + V_{i+1}(j + 1, 1))).

The odds of the two terms make the Gibbs distribution a Markov chain with ``r_i(j, c) = P(x_i = 1 |
j, c)``. One pass in the log domain gives ``V`` and ``r``. Marginals, their derivative and samples
are then arithmetic on probabilities, which neither overflows nor underflows.

Time and memory are O(n k) an example. Sources: Swersky et al. (2012) and Tarlow et al. (2012) for
the counts; Mezuman et al. (2013) for the chain; Paulus et al. (2020), B.4 and B.5.

On the CPU compiled kernels run in parallel over the batch. They apply the Jacobian of the marginals
(a covariance, hence symmetric) in the same O(n k). On a GPU one program an example does the same
with all counts at once. Elsewhere, and under ``torch.func``, plain torch multiplies the polynomials
of the bits in a tree: O(n k) work in O(log n) batched steps. All versions compute in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.noise import wide_exponentials
from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation, best, log_sum
from structgrad.algorithms.threads import run

#: The largest number of ones for one GPU program.
LARGEST = 2047
#: The kinds of result that the kernel computes.
_MEANS, _SAMPLE, _BEST = range(3)
_GPU_MEANS, _GPU_SAMPLE, _GPU_BEST = (gpu.constant(kind) for kind in (_MEANS, _SAMPLE, _BEST))


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
        """The number of values of the last bit that the future depends on."""
        return 1 if self.pair is None else 2

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log Z`` ``[*batch]``, ``E[x_i]`` ``[*batch, n]`` and ``E[x_i x_{i+1}]`` ``[*batch, n -
        1]``.

        The last one is empty except for chains. All are float64 and differentiable.
        """
        batch, n = self.unary.shape[:-1], self.unary.shape[-1]
        on_gpu = gpu.takes(self.unary, self.high, LARGEST)
        if not on_gpu and not values_can_be_read(self.unary):
            return _moments_in_torch(self)
        arguments = (*self._flat(), self.low, self.high, self.states)
        log_z, mean, both = _moments_operator(*arguments)[:3] if on_gpu else _Moments.apply(*arguments)
        return log_z.reshape(batch), mean.reshape(*batch, n), both.reshape(*batch, both.shape[-1])

    def entropy(self) -> Tensor | None:
        """In nats, float64 ``[*batch]``, differentiable; None where the moments are compiled."""
        if gpu.takes(self.unary, self.high, LARGEST) or values_can_be_read(self.unary):
            return None
        return _distribution_in_torch(self)[3]

    def sample(self, draws: int | None = None) -> Tensor:
        """Exact samples: float64 0/1 ``[*batch, n]``, or ``[draws, *batch, n]`` from the same tables."""
        on_gpu = gpu.takes(self.unary, self.high, LARGEST)
        if not on_gpu and not values_can_be_read(self.unary):
            return _sample_in_torch(self, draws)
        times = 1 if draws is None else draws
        shape = self.unary.shape if draws is None else (draws, *self.unary.shape)
        uniform = torch.rand(shape, dtype=torch.float64, device=self.unary.device)
        unary, pair, exists = self._flat()
        flat = uniform.reshape(times * len(unary), unary.shape[-1])
        if on_gpu:  # the program of each sample makes its own tables
            many = (t.repeat(times, 1) for t in (unary, pair, exists))
            drawn: Tensor = _bits_operator(*many, flat, self.low, self.high, self.states)
            return drawn.reshape(uniform.shape)
        _, ratio = _ratios(unary, pair, exists, self.low, self.high, self.states)
        bits = torch.zeros_like(flat)
        run(_sample_pass, flat.numel(), ratio, flat, bits)
        return bits.reshape(uniform.shape)

    def argmax(self) -> Tensor:
        """A vector of highest score: float64 0/1 ``[*batch, n]``."""
        on_gpu = gpu.takes(self.unary, self.high, LARGEST)
        if not on_gpu and not values_can_be_read(self.unary):
            return _argmax_in_torch(self)
        unary, pair, exists = self._flat()
        if on_gpu:
            found: Tensor = _bits_operator(unary, pair, exists, None, self.low, self.high, self.states)
            return found.reshape(self.unary.shape)
        bits = torch.zeros_like(unary)
        work = 2 * unary.numel() * (self.high + 1) * self.states
        run(_argmax_pass, work, unary, pair, exists, self.low, self.high, self.states, bits)
        return bits.reshape(self.unary.shape)

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors of highest score: bool ``[*batch, k, n]``, best first.

        The second result, bool ``[*batch, k]``, says which of them exist. Every state keeps a list
        of k, so this costs O(n k high). It is compiled on the CPU and plain torch elsewhere.
        """
        unary, pair, exists = self._flat()
        if self.pair is None:
            pair = unary.new_zeros(len(unary), max(unary.shape[1] - 1, 0))
        if values_can_be_read(unary):
            bits = torch.zeros(len(unary), k, unary.shape[1], dtype=torch.bool)
            real = torch.zeros(len(unary), k, dtype=torch.bool)
            work = 20 * k * unary.numel() * (self.high + 1)
            run(_top_k_pass, work, unary, pair, exists, self.low, self.high, k, bits, real)
        else:
            bits, real = _top_k_in_torch(unary.detach(), pair.detach(), exists, self.low, self.high, k)
        batch = self.unary.shape[:-1]
        return bits.reshape(*batch, k, -1 if bits.numel() else self.unary.shape[-1]), real.reshape(*batch, k)

    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.unary.shape[-1]
        batch = self.unary.numel() // n if n else math.prod(self.unary.shape[:-1])
        pair = self.unary.new_empty(batch, 0) if self.pair is None else self.pair.reshape(batch, max(n - 1, 0))
        unary, pair = self.unary.reshape(batch, n).double().contiguous(), pair.double().contiguous()
        return unary, pair, self.exists.reshape(batch, n).contiguous()


# --- plain torch ------------------------------------------------------------------------------------------------------
# Bits are combined two by two, then pieces of two bits, and so on: O(log n) batched steps. A piece
# is represented by log-weights [states, states, count + 1]. The first index is the last bit before
# the piece, the second its own last bit, and the third the number of its ones. These are
# polynomials; the product of two of them is that of the joined piece (Tarlow et al. 2012, section
# 3). A choice for the whole is split back down in the same tree.


def _bits(chain: Chain) -> Tensor:
    """Pieces of one bit each, padded to a power of two: ``[*batch, bits, states, states, 1 or 2]``."""
    n = chain.unary.shape[-1]
    missing = (1 << max(n - 1, 0).bit_length()) - n
    before = [torch.where(chain.exists, chain.unary.double(), IMPOSSIBLE)]
    if chain.pair is not None:
        before.append(before[0] + torch.nn.functional.pad(chain.pair.double(), (min(n, 1), 0)))
    one = torch.nn.functional.pad(torch.stack(before, -1), (0, 0, 0, missing), value=IMPOSSIBLE)
    zero, never = torch.zeros_like(one), torch.full_like(one, IMPOSSIBLE)
    last = [(zero, one)] if chain.pair is None else [(zero, never), (never, one)]
    return torch.stack([torch.stack(counts, -1) for counts in last], -2)[..., : chain.high + 1]


def _without_shared(chain: Chain) -> tuple[Chain, Tensor]:
    """The chain less the largest score of single bits, and that score ``[*batch, 1]``, without gradient.

    It is counted at the end, so that pieces lose no digit to a number that all scores share.
    """
    known = torch.where(chain.exists, chain.unary.detach().double(), -math.inf)
    shared = known.amax(-1, keepdim=True) if known.shape[-1] else known.new_zeros(*known.shape[:-1], 1)
    shared = torch.where(shared.isfinite(), shared, 0.0)
    return replace(chain, unary=chain.unary.double() - shared), shared


def _with_shared(levels: list[Tensor], shared: Tensor, low: int) -> list[Tensor]:
    """The pieces of :func:`_tree`, the whole with its share of what was left out beyond the fewest ones."""
    counts = torch.arange(levels[-1].shape[-1], device=shared.device) - low
    return [*levels[:-1], levels[-1] + shared[..., None, None, None] * counts]


def _splits(pieces: Tensor, high: int) -> Tensor:
    """Log-weights of all combinations of neighbouring pieces.

    The shape is ``[*batch, pieces / 2, states, states, counts, splits]``. A split is the last bit
    of the first piece and its number of ones, from the largest to 0.
    """
    most = pieces.shape[-1]
    counts = min(2 * (most - 1), high) + 1
    second = torch.nn.functional.pad(pieces[..., 1::2, :, :, :], (most - 1, counts - most), value=IMPOSSIBLE)
    second = second.unfold(-1, most, 1).movedim(-4, -2).unsqueeze(-5)
    return (pieces[..., 0::2, :, :, :].flip(-1)[..., None, None, :, :] + second).flatten(-2)


def _tree(chain: Chain, plus: Aggregation) -> list[Tensor]:
    """The pieces of every size, from single bits to the whole."""
    levels = [_bits(chain)]
    while levels[-1].shape[-4] > 1:
        levels.append(plus(_splits(levels[-1], chain.high), -1))
    return levels


def _moments_in_torch(chain: Chain) -> tuple[Tensor, Tensor, Tensor]:
    return _distribution_in_torch(chain)[:3]


def _distribution_in_torch(chain: Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The moments and the entropy. The entropy is that of the choices down the tree. No score is a
    factor of it, so that no digit is lost to large ones.
    """
    chain, shared = _without_shared(chain)
    # Not logaddexp: its second derivative is NaN where the two are 700 apart.
    levels = _tree(chain, log_sum)
    whole = _with_shared(levels, shared, chain.low)[-1][..., :1, :, chain.low :]
    log_z = whole.logsumexp((-1, -2, -3, -4))
    relative = whole - log_z[..., None, None, None, None]
    here = relative.exp()
    entropy = -(here * relative).sum((-1, -2, -3, -4))
    here = torch.nn.functional.pad(here, (chain.low, 0, 0, 0, 0, chain.states - 1))
    for pieces, pairs in zip(levels[-2::-1], levels[:0:-1], strict=True):
        most = pieces.shape[-1]
        beyond = (0, 2 * most - 1 - pairs.shape[-1])
        # By (bit before, last bit of the first piece, last bit, ones in the first piece, ones in the second).
        total = torch.nn.functional.pad(pairs, beyond, value=-IMPOSSIBLE).unfold(-1, most, 1).unsqueeze(-4)
        first, second = pieces[..., 0::2, :, :, :], pieces[..., 1::2, :, :, :]
        log_share = first[..., None, :, None] + second[..., None, :, :, None, :] - total
        joint = log_share.exp() * torch.nn.functional.pad(here, beyond).unfold(-1, most, 1).unsqueeze(-4)
        entropy = entropy - (joint * log_share).flatten(entropy.dim()).sum(-1)
        here = torch.stack([joint.sum((-1, -3)), joint.sum((-2, -5))], -4).flatten(-5, -4)
    n = chain.unary.shape[-1]
    ones = here[..., :n, :, -1, 1:].sum(-1)  # there is no count of 1 where high is 0
    return log_z + chain.low * shared.squeeze(-1), ones.sum(-1), ones[..., 1 if chain.states == 2 else n :, -1], entropy


def _follow(chain: Chain, levels: list[Tensor], choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The bits ``[*batch, n]`` that follow if ``choose`` picks one of the alternatives ``[...,
    splits]`` of each piece.
    """
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


def _sample_in_torch(chain: Chain, draws: int | None = None) -> Tensor:
    chain, shared = _without_shared(chain)
    levels = _with_shared(_tree(chain, log_sum), shared, chain.low)
    if draws is not None:
        levels = [level.expand(draws, *level.shape) for level in levels]
    return _follow(chain, levels, lambda a: (a - wide_exponentials(a).log()).argmax(-1))


def _top_k_in_torch(unary: Tensor, pair: Tensor, exists: Tensor, low: int, high: int, k: int) -> tuple[Tensor, Tensor]:
    """Like :func:`_top_k_pass`, for all examples and counts at once."""
    batch, n = unary.shape
    value = unary.new_full((batch, high + 1, 2, k), -torch.inf)
    value[:, 0, 0, 0] = 0
    gains = torch.where(exists, unary, -torch.inf)
    origins = []
    for i in range(n):
        gain = gains[:, i].reshape(batch, 1, 1, 1)
        more = pair[:, i - 1].reshape(batch, 1, 1) if i else 0.0
        one = torch.cat([value.new_full((batch, 1, 2, k), -torch.inf), value[:, :-1] + gain], 1)
        one = torch.stack([one[:, :, 0], one[:, :, 1] + more], 2)
        value, origin = torch.stack([value.flatten(2), one.flatten(2)], 2).topk(k, dim=-1)
        origins.append(origin)
    value, place = value[:, low:].flatten(1).topk(k, dim=1)
    count, last, rank = low + place // (2 * k), place // k % 2, place % k
    rows = torch.arange(batch, device=unary.device)[:, None]
    bits = torch.zeros(batch, k, n, dtype=torch.bool, device=unary.device)
    for i in reversed(range(n)):
        source = origins[i][rows, count, last, rank]
        bits[:, :, i] = last == 1
        count, last, rank = (count - last).clamp_min(0), source // k, source % k
    real = value > -torch.inf
    return bits & real[..., None], real


def _argmax_in_torch(chain: Chain) -> Tensor:
    chain, shared = _without_shared(chain)
    return _follow(
        chain, _with_shared(_tree(chain, best), shared, chain.low), lambda alternatives: alternatives.argmax(-1)
    )


# --- CPU kernels ------------------------------------------------------------------------------------------------------
# Each kernel does the examples first, first + stride, ... and writes to its last arguments, which
# start as zeros. Arrays: unary [B, n], pair [B, n - 1] (or [B, 0] with one state), exists [B, n],
# ratio [B, n, high + 1, states].


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
        if twin_needed(*upstream):
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


@njit(nogil=True, cache=True)
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
    """One example, left to right: ``E[x_i]`` and ``E[x_i x_{i+1}]`` from the ratios.

    The ratios are ``[n, high + 1, states]``. With tangent, it returns how these means move if the
    ratios move by ``slope``. It is compiled once for each case.
    """

    @njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _forward_pass(first, stride, ratio, mean, both):  # type: ignore[no-untyped-def]
    """``E[x_i]`` and ``E[x_i x_{i+1}]``."""
    for b in range(first, len(ratio), stride):
        _means(ratio[b], ratio[b], mean[b], both[b])


@njit(nogil=True, cache=True)
def _covariance_pass(first, stride, ratio, d_mean, d_both, unary, pair):  # type: ignore[no-untyped-def]
    """The covariance of (bits, pairs) times a vector: the derivative of the marginals in that direction."""
    batch, n, rows, states = ratio.shape
    for b in range(first, batch, stride):
        # Right to left: the derivative of V, which is the expected direction of the continuation,
        # and from it that of the ratios.
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


@njit(nogil=True, cache=True)
def _sample_pass(first, stride, ratio, uniform, bits):  # type: ignore[no-untyped-def]
    """Walk the Markov chain. Row i of the samples is of example i modulo B."""
    batch, n, _, states = ratio.shape
    for b in range(first, batch, stride):
        for row in range(b, len(uniform), batch):
            j = 0
            c = 0
            for i in range(n):
                one = uniform[row, i] < ratio[b, i, j, c]
                if one:
                    bits[row, i] = 1.0
                    j += 1
                c = 1 if one and states == 2 else 0


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _merge(here, gain_here, there, gain_there, value, origin):  # type: ignore[no-untyped-def]
    """The k best of two lists of k, both in descending order, and their origins."""
    k = len(value)
    i = 0
    j = 0
    for r in range(k):
        if here[i] + gain_here >= there[j] + gain_there:
            value[r], origin[r] = here[i] + gain_here, i
            i += 1
        else:
            value[r], origin[r] = there[j] + gain_there, k + j
            j += 1


@njit(nogil=True, cache=True)
def _top_k_pass(first, stride, unary, pair, exists, low, high, k, bits, real):  # type: ignore[no-untyped-def]
    """Find the k best prefixes of every count and last bit from left to right, then follow their
    origins back.
    """
    batch, n = unary.shape
    origin = np.zeros((n, high + 1, 2, k), dtype=np.int32)
    value, after = np.empty((high + 1, 2, k)), np.full((high + 1, 2, k), -np.inf)
    for b in range(first, batch, stride):
        value[:] = -np.inf
        value[0, 0, 0] = 0.0
        for i in range(n):
            gain = unary[b, i] if exists[b, i] else -np.inf
            more = pair[b, i - 1] if i > 0 else 0.0
            after[0, 1] = -np.inf
            for j in range(min(i + 1, high) + 1):
                _merge(value[j, 0], 0.0, value[j, 1], 0.0, after[j, 0], origin[i, j, 0])
                if j > 0:
                    _merge(value[j - 1, 0], gain, value[j - 1, 1], gain + more, after[j, 1], origin[i, j, 1])
            value, after = after, value
            after[:] = -np.inf
        for rank in range(k):
            best = -np.inf
            count, last, place = -1, 0, 0
            for j in range(low, high + 1):
                for c in range(2):
                    for r in range(k):
                        if value[j, c, r] > best:
                            best = value[j, c, r]
                            count, last, place = j, c, r
            if count < 0:
                break
            value[count, last, place] = -np.inf
            real[b, rank] = True
            for i in range(n - 1, -1, -1):
                source = origin[i, count, last, place]
                if last == 1:
                    bits[b, rank, i] = True
                    count -= 1
                last, place = source // k, source % k


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example, one lane a count.


@gpu.jit
def _next(x, beyond, COUNTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x[j + 1]``; ``beyond`` for the last."""
    count = tl.arange(0, COUNTS)
    return tl.where(count + 1 < COUNTS, tl.gather(x, tl.minimum(count + 1, COUNTS - 1), 0), beyond)


@gpu.jit
def _previous(x, COUNTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x[j - 1]``; 0 for the first."""
    count = tl.arange(0, COUNTS)
    return tl.where(count > 0, tl.gather(x, tl.maximum(count - 1, 0), 0), 0.0)


@gpu.jit
def _choose(zero, one, uniform, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value of a choice between 0 and 1, and how often it is 1."""
    top = tl.maximum(zero, one)
    if KIND == _GPU_BEST:
        often = tl.where(one > zero, 1.0, 0.0).to(tl.float64)
    else:
        odds = tl.exp(tl.where(top == -float("inf"), -float("inf"), -tl.abs(zero - one)))
        often = tl.where(one > zero, 1.0, odds) / (1.0 + odds)
        top += tl.log(1.0 + odds)
        if KIND == _GPU_SAMPLE:
            often = tl.where(uniform < often, 1.0, 0.0).to(tl.float64)
    return top, often


@gpu.jit
def _gpu_chain(  # type: ignore[no-untyped-def]
    unary_ptr,
    pair_ptr,
    exists_ptr,
    uniform_ptr,
    log_z_ptr,
    ratio_ptr,
    mean_ptr,
    both_ptr,
    n,
    low,
    high,
    KIND: tl.constexpr,
    STATES: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Values and ratios from right to left, then means from left to right (or bits, if each ratio
    is 0 or 1).
    """
    b = tl.program_id(0).to(tl.int64)
    count = tl.arange(0, COUNTS)
    within = count <= high
    ratios_ptr = ratio_ptr + b * n * (high + 1) * STATES + count * STATES
    # After a bit of 0 and, for chains, after a bit of 1.
    zero = tl.where(within & (count >= low), 0.0, -float("inf")).to(tl.float64)
    last = zero
    for step in range(n):
        i = n - 1 - step
        exists = tl.load(exists_ptr + b * n + i) != 0
        draw = tl.load(uniform_ptr + b * n + i) if KIND == _GPU_SAMPLE else 0.0
        one = tl.where(
            within & exists, tl.load(unary_ptr + b * n + i) + _next(last, -float("inf"), COUNTS), -float("inf")
        )
        value, often = _choose(zero, one, draw, KIND)
        tl.store(ratios_ptr + i * (high + 1) * STATES, often, mask=within)
        if STATES == 2:
            gain = tl.load(pair_ptr + b * (n - 1) + i - 1, mask=i > 0, other=0.0)
            last, often = _choose(zero, one + gain, draw, KIND)
            tl.store(ratios_ptr + i * (high + 1) * STATES + 1, often, mask=within)
        else:
            last = value
        zero = value
    if KIND == _GPU_MEANS:
        tl.store(log_z_ptr + b, tl.sum(tl.where(count == 0, zero, 0.0), 0))
    tl.debug_barrier()
    here = tl.where(count == 0, 1.0, 0.0).to(tl.float64)
    repeat = tl.zeros([COUNTS], tl.float64)
    for i in range(n):
        taken = here * tl.load(ratios_ptr + i * (high + 1) * STATES, mask=within, other=0.0)
        here -= taken
        if STATES == 2:
            again = repeat * tl.load(ratios_ptr + i * (high + 1) * STATES + 1, mask=within, other=0.0)
            here += repeat - again
            taken += again
            repeat = _previous(taken, COUNTS)
            if KIND == _GPU_MEANS:
                tl.store(both_ptr + b * (n - 1) + i - 1, tl.sum(again, 0), mask=i > 0)
        else:
            here += _previous(taken, COUNTS)
        tl.store(mean_ptr + b * n + i, tl.sum(taken, 0))


@gpu.jit
def _gpu_chain_covariance(  # type: ignore[no-untyped-def]
    ratio_ptr,
    d_mean_ptr,
    d_both_ptr,
    slope_ptr,
    unary_ptr,
    pair_ptr,
    n,
    high,
    STATES: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """The same as the compiled pass with this name."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.arange(0, COUNTS)
    within = count <= high
    place = b * n * (high + 1) * STATES + count * STATES
    zero = tl.zeros([COUNTS], tl.float64)
    last = zero
    for step in range(n):
        i = n - 1 - step
        here = place + i * (high + 1) * STATES
        one = tl.load(d_mean_ptr + b * n + i) + _next(last, 0.0, COUNTS)
        r = tl.load(ratio_ptr + here, mask=within, other=0.0)
        value = zero + r * (one - zero)
        tl.store(slope_ptr + here, r * (1.0 - r) * (one - zero), mask=within)
        if STATES == 2:
            r = tl.load(ratio_ptr + here + 1, mask=within, other=0.0)
            one += tl.load(d_both_ptr + b * (n - 1) + i - 1, mask=i > 0, other=0.0)
            last = zero + r * (one - zero)
            tl.store(slope_ptr + here + 1, r * (1.0 - r) * (one - zero), mask=within)
        else:
            last = value
        zero = value
    tl.debug_barrier()
    # Probabilities of the states, and how they move.
    p, moved = tl.where(count == 0, 1.0, 0.0).to(tl.float64), tl.zeros([COUNTS], tl.float64)
    p_repeat, moved_repeat = tl.zeros([COUNTS], tl.float64), tl.zeros([COUNTS], tl.float64)
    for i in range(n):
        here = place + i * (high + 1) * STATES
        r, by = tl.load(ratio_ptr + here, mask=within, other=0.0), tl.load(slope_ptr + here, mask=within, other=0.0)
        taken, d_taken = p * r, moved * r + p * by
        p, moved = p - taken, moved - d_taken
        if STATES == 2:
            r, by = (
                tl.load(ratio_ptr + here + 1, mask=within, other=0.0),
                tl.load(slope_ptr + here + 1, mask=within, other=0.0),
            )
            again, d_again = p_repeat * r, moved_repeat * r + p_repeat * by
            p, moved = p + p_repeat - again, moved + moved_repeat - d_again
            taken, d_taken = taken + again, d_taken + d_again
            p_repeat, moved_repeat = _previous(taken, COUNTS), _previous(d_taken, COUNTS)
            tl.store(pair_ptr + b * (n - 1) + i - 1, tl.sum(d_again, 0), mask=i > 0)
        else:
            p, moved = p + _previous(taken, COUNTS), moved + _previous(d_taken, COUNTS)
        tl.store(unary_ptr + b * n + i, tl.sum(d_taken, 0))


def _launch(kernel: Any, example: Tensor, *arguments: Tensor | int, high: int, **constants: int) -> None:
    counts = gpu.block(high + 1)
    warps = min(max(counts // 32, 1), 8)
    gpu.launch(kernel, len(example), example, *arguments, warps=warps, **constants, COUNTS=counts)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::counted_bits_moments", mutates_args=())
def _moments_operator(
    unary: Tensor, pair: Tensor, exists: Tensor, low: int, high: int, states: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like :class:`_Moments`, with the ratios ``[B, n, high + 1, states]``."""
    log_z, mean, both, ratio = _moments_fake(unary, pair, exists, low, high, states)
    tensors = (pair, exists, mean, log_z, ratio, mean, both)
    _launch(_gpu_chain, unary, *tensors, unary.shape[1], low, high, high=high, KIND=_MEANS, STATES=states)
    return log_z, mean, both, ratio


@_moments_operator.register_fake
def _moments_fake(
    unary: Tensor, pair: Tensor, exists: Tensor, low: int, high: int, states: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratio = unary.new_empty(*unary.shape, high + 1, states)
    return unary.new_empty(len(unary)), unary.new_empty(unary.shape), pair.new_empty(pair.shape), ratio


@torch.library.custom_op("structgrad::counted_bits", mutates_args=())
def _bits_operator(
    unary: Tensor, pair: Tensor, exists: Tensor, uniform: Tensor | None, low: int, high: int, states: int
) -> Tensor:
    """The sample made of ``uniform``, as in the compiled pass; without ``uniform`` a vector of
    highest score.
    """
    bits, ratio = torch.empty_like(unary), unary.new_empty(*unary.shape, high + 1, states)
    kind = _BEST if uniform is None else _SAMPLE
    tensors = (pair, exists, bits if uniform is None else uniform, bits, ratio, bits, bits)
    _launch(_gpu_chain, unary, *tensors, unary.shape[1], low, high, high=high, KIND=kind, STATES=states)
    return bits


@_bits_operator.register_fake
def _bits_fake(unary: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(unary)


@torch.library.custom_op("structgrad::counted_bits_covariance", mutates_args=())
def _covariance_operator(
    unary: Tensor,
    pair: Tensor,
    exists: Tensor,
    ratio: Tensor,
    d_mean: Tensor,
    d_both: Tensor,
    low: int,
    high: int,
    states: int,
) -> tuple[Tensor, Tensor]:
    """The covariance of (bits, pairs) times ``(d_mean, d_both)``."""
    by_unary, by_pair = _covariance_fake(unary, pair)
    tensors = (d_mean, d_both, torch.empty_like(ratio), by_unary, by_pair)
    _launch(_gpu_chain_covariance, ratio, *tensors, unary.shape[1], high, high=high, STATES=states)
    return by_unary, by_pair


@_covariance_operator.register_fake
def _covariance_fake(unary: Tensor, pair: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(unary), torch.empty_like(pair)


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    unary, pair, exists, *ctx.counts = inputs
    _, mean, both, ratio = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unary, pair, exists, mean, both, ratio)


def _differentiate_moments(
    ctx: Any, d_log_z: Tensor | None, d_mean: Tensor | None, d_both: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    unary, pair, exists, mean, both, ratio = ctx.saved_tensors
    by_unary, by_pair = None, None
    if d_mean is not None or d_both is not None:
        d_mean = torch.zeros_like(mean) if d_mean is None else d_mean
        d_both = torch.zeros_like(both) if d_both is None else d_both
        by_unary, by_pair = _covariance_operator(unary, pair, exists, ratio, d_mean, d_both, *ctx.counts)
    if d_log_z is not None:
        more, more_pair = d_log_z[:, None] * mean, d_log_z[:, None] * both
        by_unary, by_pair = (
            more if by_unary is None else by_unary + more,
            more_pair if by_pair is None else by_pair + more_pair,
        )
    return by_unary, by_pair, None, None, None, None


def _save_covariance(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    unary, pair, exists, _, d_mean, d_both, *ctx.counts = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unary, pair, exists, d_mean, d_both)


def _differentiate_covariance(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    unary, pair, exists, d_mean, d_both = ctx.saved_tensors
    low, high, states = ctx.counts

    def twin(unary: Tensor, pair: Tensor, d_mean: Tensor, d_both: Tensor) -> tuple[Tensor, ...]:
        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in (unary, pair)]
        chain = Chain(inputs[0], inputs[1] if states == 2 else None, exists, low, high)
        moments = _moments_in_torch(chain)[1:]
        return torch.autograd.grad(moments, inputs, (d_mean, d_both), create_graph=True, materialize_grads=True)

    with torch.enable_grad():
        by_unary, by_pair, by_mean, by_both = gradients(twin, [unary, pair, d_mean, d_both], upstream)
    return by_unary, by_pair, None, None, by_mean, by_both, None, None, None


_moments_operator.register_autograd(_differentiate_moments, setup_context=_save_moments)
_covariance_operator.register_autograd(_differentiate_covariance, setup_context=_save_covariance)
