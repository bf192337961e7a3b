"""Cross-entropy of pixels under a categorical distribution of 256 grey levels, without 784 x 256
logits in memory.

The decoder of Correia et al. (2020, section 5.3) gives every pixel a vector of 5 features. One
linear map, shared by all pixels, makes 256 logits from it. Nearly all arithmetic of a training step
is in these logits. A plain computation moves them between memory and processor a dozen times. Here
features are made for a few vertices at a time. Each pixel's logits stay in the first-level cache,
where the derivatives of its loss are computed at once. On a GPU each program keeps the logits of a
few pixels in registers. All features are in memory, which is a fiftieth of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import gradients as vector_jacobian
from structgrad.algorithms.derivatives import twin_needed
from structgrad.algorithms.elementary import exp
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.threads import run

#: The number of vertices whose features are in memory at once: 128 x 784 x 5 float32 are 2 MB.
CHUNK = 128
#: The largest number of grey levels for one GPU program, which holds those of a few pixels.
LARGEST = 1024
#: The number of logits that one GPU program holds at once.
_HELD = 2048
#: The number of programs of the backward pass. Each sums over its pixels the gradient of the
#: levels' map.
_SUMS = 1024

Floats = NDArray[np.float32]

#: The compiler's freedom in sums; it must not assume that numbers are finite.
_FAST = {"contract", "reassoc", "nsz", "arcp"}

#: A sum of exponentials below this had no term that overflowed.
_LARGE = np.float32(1e30)


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, offsets: Tensor, *, targets: Tensor, rows: Tensor
) -> Tensor:
    """``-log p(targets[rows])``, summed over pixels, of logits ``features @ classes.T + offsets``.

    The features of a pixel are ``rank`` entries of ``hidden @ weight.T + bias``. It is
    differentiable in all arguments except targets and rows. A second derivative is in plain torch
    and has all logits in memory.

    Beyond the arguments and their gradients, memory holds the features of :data:`CHUNK` vertices.
    If a gradient is needed, it also holds ``rank`` numbers a vertex and pixel, and ``rank + 1``
    numbers a vertex and level. On a GPU it holds the features of all vertices and one number a
    vertex and pixel.

    Args:
        hidden: ``[N, units]``, one row a vertex.
        weight: ``[pixels * rank, units]``.
        bias: ``[pixels * rank]``.
        classes: ``[levels, rank]``.
        offsets: ``[levels]``.
        targets: uint8 ``[batch, pixels]``.
        rows: int64 ``[N]``: the example of each vertex.

    Returns:
        ``[N]``, in nats.
    """
    if gpu.takes(hidden, len(classes), LARGEST):
        features = torch.addmm(bias, hidden, weight.T).reshape(len(hidden), targets.shape[1], classes.shape[1])
        of_pixels: Tensor = _operator(features, classes, offsets, targets, rows)
        return of_pixels.sum(1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, bias, classes, offsets)):
        losses: Tensor = _CrossEntropy.apply(hidden, weight, bias, classes, offsets, targets, rows)
        return losses
    portions = _portions(hidden, weight, bias, classes, targets, rows)
    return torch.cat([_losses(features, classes, offsets, of_pixels) for features, of_pixels in portions])


# --- plain torch ------------------------------------------------------------------------------------------------------


def _portions(
    hidden: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, targets: Tensor, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``[n, pixels, rank]`` and grey levels ``[n, pixels]`` of a few vertices at a time."""
    for some, of in zip(hidden.split(CHUNK), rows.split(CHUNK), strict=True):
        features = torch.addmm(bias, some, weight.T)
        yield features.reshape(len(some), targets.shape[1], classes.shape[1]), targets[of]


def _in_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor
) -> Tensor:
    """The losses of ``targets`` ``[N, pixels]``, all logits at once."""
    features = torch.addmm(bias, hidden, weight.T).reshape(*targets.shape, classes.shape[1])
    return _of_features(features, classes, offsets, targets)


def _of_features(features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(features, classes, offsets)
    return (logits.logsumexp(-1) - logits.gather(-1, targets.long()[..., None])[..., 0]).sum(1)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    """The losses. Their derivatives are computed with them, which halves the arithmetic, and
    weighted later.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        classes: Tensor,
        offsets: Tensor,
        targets: Tensor,
        rows: Tensor,
    ) -> Tensor:
        parts = [
            _derivatives(features, classes, offsets, of_pixels)
            for features, of_pixels in _portions(hidden, weight, bias, classes, targets, rows)
        ]
        losses, d_features, d_maps = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, classes, offsets, targets, rows, d_features, d_maps)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, classes, offsets, targets, rows, d_features, d_maps = ctx.saved_tensors
        if twin_needed(*gradients):
            inputs = [hidden, weight, bias, classes, offsets, targets[rows]]
            return *vector_jacobian(_in_torch, inputs, gradients), None
        # Vertices that do not affect the loss (baselines) cost nothing if reading values is free.
        everything = torch.arange(len(hidden), device=hidden.device)
        counted = gradients[0].nonzero()[:, 0] if hidden.device.type == "cpu" else everything
        weights = gradients[0][counted]
        d_outer = d_features[counted].flatten(1) * weights[:, None]
        d_map = (weights @ d_maps[counted].flatten(1)).reshape(d_maps.shape[1:])
        d_hidden = torch.zeros_like(hidden).index_copy(0, counted, d_outer @ weight)
        return d_hidden, d_outer.T @ hidden[counted], d_outer.sum(0), d_map[:-1].T, d_map[-1], None, None


def _losses(features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    """The losses ``[n]`` of vertices, without derivatives."""
    if not _compiled(features):
        return _of_features(features, classes, offsets, targets)
    losses = torch.empty(len(targets))
    arguments = (features, classes.T.contiguous(), offsets, targets, losses)
    run(_losses_kernel, targets.numel() * len(classes), *arguments)
    return losses


def _derivatives(features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses ``[n]`` and their derivatives in each vertex's features and in the map of the
    levels.

    The latter is ``[n, rank + 1, levels]``: transposed classes, then offsets.
    """
    if _compiled(features):
        losses, d_features = torch.empty(len(targets)), torch.empty_like(features)
        d_maps = torch.zeros(len(targets), classes.shape[1] + 1, classes.shape[0])
        arguments = (features, classes.T.contiguous(), offsets, targets, losses, d_features, d_maps)
        run(_derivatives_kernel, targets.numel() * len(classes), *arguments)
        return losses, d_features, d_maps
    logits = torch.nn.functional.linear(features, classes, offsets)
    log_shares = logits.log_softmax(-1)
    own = targets.long()[..., None]
    error = log_shares.exp().scatter_add_(-1, own, -torch.ones_like(logits[..., :1]))
    d_maps = torch.cat([features, torch.ones_like(features[..., :1])], -1).mT @ error
    return -log_shares.gather(-1, own)[..., 0].sum(1), error @ classes, d_maps


def _compiled(features: Tensor) -> bool:
    """Whether the compiled kernels accept these features: the decoder's rank on the CPU, in
    float32.
    """
    return features.device.type == "cpu" and features.dtype == torch.float32 and features.shape[-1] == 5


@njit(inline="always")
def _added(
    start: np.float32,
    f0: np.float32,
    f1: np.float32,
    f2: np.float32,
    f3: np.float32,
    f4: np.float32,
    classes: Floats,
    c: int,
) -> np.float32:
    """``start`` plus the product of a pixel's features with level ``c``: its logit, if ``start`` is
    the offset.
    """
    result: np.float32 = (
        start + f0 * classes[0, c] + f1 * classes[1, c] + f2 * classes[2, c] + f3 * classes[3, c] + f4 * classes[4, c]
    )
    return result


@njit(inline="always")
def _pixel(
    features: Floats, classes: Floats, offsets: Floats, target: int, shares: Floats | None
) -> tuple[float, np.float32]:
    """The loss of a pixel. Its levels' probabilities times a factor go to ``shares``; the factor is
    returned.

    Exponentials are relative to the target's logit. An observed level is rarely so improbable that
    others overflow. So the largest logit need not be found first.
    """
    f0, f1, f2, f3, f4 = features
    own = _added(offsets[target], f0, f1, f2, f3, f4, classes, target)
    shift = own
    total = np.float32(0.0)
    for again in range(2):
        total = np.float32(0.0)
        for c in range(len(offsets)):
            share = exp(_added(offsets[c] - shift, f0, f1, f2, f3, f4, classes, c))
            if shares is not None:
                shares[c] = share
            total += share
        if again or total < _LARGE:
            break
        for c in range(len(offsets)):
            logit = _added(offsets[c], f0, f1, f2, f3, f4, classes, c)
            shift = logit if logit > shift else shift
    loss = (shift - own) + np.log(total)
    return loss, total if loss == loss else np.float32(np.nan)


@njit(nogil=True, fastmath=_FAST, cache=True)
def _losses_kernel(
    first: int,
    stride: int,
    features: Floats,
    classes: Floats,
    offsets: Floats,
    targets: NDArray[np.uint8],
    losses: Floats,
) -> None:
    n, pixels, _ = features.shape
    for i in range(first, n, stride):
        loss = 0.0
        for j in range(pixels):
            loss += _pixel(features[i, j], classes, offsets, targets[i, j], None)[0]
        losses[i] = loss


@njit(nogil=True, fastmath=_FAST, cache=True)
def _derivatives_kernel(
    first: int,
    stride: int,
    features: Floats,
    classes: Floats,
    offsets: Floats,
    targets: NDArray[np.uint8],
    losses: Floats,
    d_features: Floats,
    d_maps: Floats,
) -> None:
    """Works on two pixels at a time, so that the sums of the map's gradient are read and written
    half as often.
    """
    n, pixels, rank = features.shape
    levels = len(offsets)
    f_shares, g_shares = np.zeros(levels, np.float32), np.zeros(levels, np.float32)
    for i in range(first, n, stride):
        d_map = d_maps[i]
        total_loss = 0.0
        for j in range(0, pixels, 2):
            # The last of an odd number is its own partner and counts 0 there.
            pair = min(j + 1, pixels - 1)
            f0, f1, f2, f3, f4 = features[i, j]
            g0, g1, g2, g3, g4 = features[i, pair]
            loss, total = _pixel(features[i, j], classes, offsets, targets[i, j], f_shares)
            f_scale, g_scale = np.float32(1.0) / total, np.float32(0.0)
            total_loss += loss
            if pair > j:
                loss, total = _pixel(features[i, pair], classes, offsets, targets[i, pair], g_shares)
                g_scale = np.float32(1.0) / total
                total_loss += loss
            a0 = a1 = a2 = a3 = a4 = np.float32(0.0)
            b0 = b1 = b2 = b3 = b4 = np.float32(0.0)
            for c in range(levels):
                p, q = f_shares[c] * f_scale, g_shares[c] * g_scale
                a0 += p * classes[0, c]
                a1 += p * classes[1, c]
                a2 += p * classes[2, c]
                a3 += p * classes[3, c]
                a4 += p * classes[4, c]
                b0 += q * classes[0, c]
                b1 += q * classes[1, c]
                b2 += q * classes[2, c]
                b3 += q * classes[3, c]
                b4 += q * classes[4, c]
                d_map[0, c] += p * f0 + q * g0
                d_map[1, c] += p * f1 + q * g1
                d_map[2, c] += p * f2 + q * g2
                d_map[3, c] += p * f3 + q * g3
                d_map[4, c] += p * f4 + q * g4
                d_map[5, c] += p + q
            if pair > j:
                d_features[i, pair] = (b0, b1, b2, b3, b4)
            d_features[i, j] = (a0, a1, a2, a3, a4)
            for k in range(j, pair + 1):
                t = targets[i, k]
                for r in range(rank):
                    d_features[i, k, r] -= classes[r, t]
                    d_map[r, t] -= features[i, k, r]
                d_map[rank, t] -= np.float32(1.0)
        losses[i] = total_loss


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program a few pixels, all their logits in registers.


@gpu.jit
def _gpu_logits(features_ptr, classes_ptr, offsets_ptr, at, within, levels, RANK: tl.constexpr, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logits of the pixels ``at``: ``[pixels, LEVELS]``; -inf beyond the levels."""
    level = tl.arange(0, LEVELS)
    is_level = level < levels
    offset = tl.load(offsets_ptr + level, mask=is_level, other=-float("inf"))
    logits = tl.where(within, 0.0, 0.0).to(offset.dtype)[:, None] + offset[None, :]
    for r in tl.static_range(RANK):
        feature = tl.load(features_ptr + at * RANK + r, mask=within, other=0.0)
        weight = tl.load(classes_ptr + level * RANK + r, mask=is_level, other=0.0)
        logits += feature[:, None] * weight[None, :]
    return logits


@gpu.jit
def _gpu_targets(targets_ptr, rows_ptr, at, within, pixels):  # type: ignore[no-untyped-def]
    row = tl.load(rows_ptr + at // pixels, mask=within, other=0)
    return tl.load(targets_ptr + row * pixels + at % pixels, mask=within, other=0).to(tl.int32)


@gpu.jit
def _gpu_forward(  # type: ignore[no-untyped-def]
    features_ptr,
    classes_ptr,
    offsets_ptr,
    targets_ptr,
    rows_ptr,
    losses_ptr,
    size,
    pixels,
    levels,
    RANK: tl.constexpr,
    LEVELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    at = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS).to(tl.int64)
    within = at < size
    logits = _gpu_logits(features_ptr, classes_ptr, offsets_ptr, at, within, levels, RANK, LEVELS)
    top = tl.max(logits, 1)
    log_sum = tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
    target = _gpu_targets(targets_ptr, rows_ptr, at, within, pixels)
    hit = tl.arange(0, LEVELS)[None, :] == target[:, None]
    tl.store(losses_ptr + at, (top - tl.sum(tl.where(hit, logits, 0.0), 1)) + log_sum, mask=within)


@gpu.jit
def _gpu_backward(  # type: ignore[no-untyped-def]
    features_ptr,
    classes_ptr,
    offsets_ptr,
    targets_ptr,
    rows_ptr,
    gradient_ptr,
    d_features_ptr,
    d_map_ptr,
    size,
    pixels,
    levels,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    LEVELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    level, term = tl.arange(0, LEVELS), tl.arange(0, TERMS)
    is_level = level < levels
    total = tl.zeros([TERMS, LEVELS], features_ptr.dtype.element_ty)
    for tile in range(tl.program_id(0), tl.cdiv(size, PIXELS), tl.num_programs(0)):
        at = tile * PIXELS + tl.arange(0, PIXELS).to(tl.int64)
        within = at < size
        logits = _gpu_logits(features_ptr, classes_ptr, offsets_ptr, at, within, levels, RANK, LEVELS)
        target = _gpu_targets(targets_ptr, rows_ptr, at, within, pixels)
        hit = level[None, :] == target[:, None]
        # Normalised by their own sum. A stored logarithm of the sum is rounded as coarsely as the
        # logits are large. With it, a probability near 1 would have an error larger than all others
        # together.
        share = tl.exp(logits - tl.max(logits, 1)[:, None])
        share /= tl.sum(share, 1)[:, None]
        error = tl.where(hit, share - 1.0, share)
        # Exactly 0 for pixels that do not exist, also if a logit is not finite.
        weight = tl.load(gradient_ptr + at, mask=within, other=0.0)
        error = tl.where(within[:, None], error * weight[:, None], 0.0)
        total += tl.where((term == RANK)[:, None], tl.sum(error, 0)[None, :], 0.0)
        for r in tl.static_range(RANK):
            feature = tl.load(features_ptr + at * RANK + r, mask=within, other=0.0)
            column = tl.load(classes_ptr + level * RANK + r, mask=is_level, other=0.0)
            tl.store(d_features_ptr + at * RANK + r, tl.sum(error * column[None, :], 1), mask=within)
            total += tl.where((term == r)[:, None], tl.sum(error * feature[:, None], 0)[None, :], 0.0)
    place = (tl.program_id(0) * (RANK + 1) + term)[:, None] * levels + level[None, :]
    tl.store(d_map_ptr + place, total, mask=(term <= RANK)[:, None] & is_level[None, :])


# --- operators --------------------------------------------------------------------------------------------------------


def _sizes(features: Tensor, classes: Tensor) -> tuple[int, int, dict[str, int]]:
    """The number of pixels of all vertices, their portions, and constants of the kernels."""
    size, (levels, rank) = features.shape[0] * features.shape[1], classes.shape
    block = gpu.block(levels)
    pixels = _HELD // block
    return size, -(-size // pixels), {"RANK": rank, "LEVELS": block, "PIXELS": pixels}


@torch.library.custom_op("structgrad::pixel_cross_entropy", mutates_args=())
def _operator(features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Losses of pixels: ``[N, pixels]``."""
    losses: Tensor = _operator_fake(features, classes, offsets, targets, rows)
    size, tiles, constants = _sizes(features, classes)
    sizes = (size, features.shape[1], len(classes))
    tensors = (features, classes, offsets, targets, rows, losses)
    gpu.launch(_gpu_forward, tiles, *tensors, *sizes, warps=4, **constants)
    return losses


@_operator.register_fake
def _operator_fake(features: Tensor, *_: Tensor) -> Tensor:
    return features.new_empty(features.shape[:2])


@torch.library.custom_op("structgrad::pixel_cross_entropy_backward", mutates_args=())
def _backward_operator(
    features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor, rows: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the features, and of the transposed classes and the offsets, ``[rank + 1, levels]``."""
    d_features, d_map = _backward_fake(features, classes)
    size, tiles, constants = _sizes(features, classes)
    programs = min(tiles, _SUMS)
    sums = d_map.new_empty(programs, *d_map.shape)
    sizes = (size, features.shape[1], len(classes))
    tensors = (features, classes, offsets, targets, rows, gradient, d_features, sums)
    gpu.launch(_gpu_backward, programs, *tensors, *sizes, warps=4, TERMS=gpu.block(len(d_map)), **constants)
    return d_features, sums.sum(0)


@_backward_operator.register_fake
def _backward_fake(features: Tensor, classes: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), features.new_empty(classes.shape[1] + 1, len(classes))


def _twin(
    features: Tensor, classes: Tensor, offsets: Tensor, of_pixels: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    """The same as the backward pass, in plain torch."""
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in (features, classes, offsets)]
    logits = torch.nn.functional.linear(*inputs)
    losses = logits.logsumexp(-1) - logits.gather(-1, of_pixels.long()[..., None])[..., 0]
    return torch.autograd.grad(losses, inputs, gradient, create_graph=True)


def _differentiate(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return None, None, None, None, None
    d_features, d_map = _backward_operator(*ctx.saved_tensors, upstream)
    return d_features, d_map[:-1].T, d_map[-1], None, None


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: object) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate_again(ctx: Any, along: Tensor | None, along_map: Tensor | None) -> tuple[Tensor | None, ...]:
    features, classes, offsets, targets, rows, gradient = ctx.saved_tensors
    upstream = [along, *((None, None) if along_map is None else (along_map[:-1].T, along_map[-1]))]
    inputs = [features, classes, offsets, targets[rows], gradient]
    with torch.enable_grad():
        d_features, d_classes, d_offsets, _, d_gradient = vector_jacobian(_twin, inputs, upstream)
    return d_features, d_classes, d_offsets, None, None, d_gradient


_operator.register_autograd(_differentiate, setup_context=_save_inputs)
_backward_operator.register_autograd(_differentiate_again, setup_context=_save_inputs)
