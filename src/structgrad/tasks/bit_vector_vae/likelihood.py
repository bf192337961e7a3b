"""Cross-entropy of pixels under a categorical distribution of 256 grey levels, without the 784 x 256 logits in memory.

The decoder of Correia et al. (2020, section 5.3) gives every pixel a vector of 5 features, from which one linear
map, shared by all pixels, makes 256 logits. Nearly all arithmetic of a training step is in these logits, and computed
plainly they travel to memory and back a dozen times. Here features are made for a few vertices at a time and each
pixel's logits live and die in the first-level cache; the backward pass computes them again.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.algorithms.derivatives import gradients as vector_jacobian
from structgrad.algorithms.threads import run

#: Vertices whose features are in memory at once: 128 x 784 x 5 float32 are 2 MB.
CHUNK = 128
#: Divides the number of grey levels.
_LANES = 16

Floats = NDArray[np.float32]


class _CrossEntropy(torch.autograd.Function):
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
        pixels = targets.shape[1]
        losses = hidden.new_empty(len(hidden))
        log_sums = hidden.new_empty(len(hidden), pixels)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            features = torch.addmm(bias, hidden[part], weight.T).reshape(-1, pixels, classes.shape[1])
            losses[part], log_sums[part] = _forward(features, classes, offsets, targets[rows[part]])
        ctx.save_for_backward(hidden, weight, bias, classes, offsets, targets, rows, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, classes, offsets, targets, rows, log_sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            inputs = [hidden, weight, bias, classes, offsets, targets[rows]]
            return *vector_jacobian(_in_torch, inputs, gradients), None
        pixels = targets.shape[1]
        # Vertices without a part in the loss (baselines) cost nothing where looking is free.
        everything = torch.arange(len(hidden), device=hidden.device)
        counted = gradients[0].nonzero()[:, 0] if hidden.device.type == "cpu" else everything
        d_hidden, d_weight, d_bias, d_classes, d_offsets = (
            torch.zeros_like(t) for t in (hidden, weight, bias, classes, offsets)
        )
        for part in counted.split(CHUNK):
            inputs = hidden[part]
            features = torch.addmm(bias, inputs, weight.T).reshape(-1, pixels, classes.shape[1])
            d_features, d_class, d_offset = _backward(
                features, classes, offsets, targets[rows[part]], log_sums[part], gradients[0][part]
            )
            d_features = d_features.flatten(1)
            d_hidden[part] = d_features @ weight
            d_weight.addmm_(d_features.T, inputs)
            d_bias += d_features.sum(0)
            d_classes += d_class
            d_offsets += d_offset
        return d_hidden, d_weight, d_bias, d_classes, d_offsets, None, None


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, offsets: Tensor, *, targets: Tensor, rows: Tensor
) -> Tensor:
    """``-log p(targets[rows])``, summed over pixels, of logits ``features @ classes.T + offsets``.

    The features of a pixel are ``rank`` entries of ``hidden @ weight.T + bias``. Memory beyond the arguments and their
    gradients is one number a vertex and pixel, and the features of :data:`CHUNK` vertices. Differentiable in all but
    targets and rows; a second derivative is in plain torch and has all logits in memory.

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
    losses: Tensor = _CrossEntropy.apply(hidden, weight, bias, classes, offsets, targets, rows)
    return losses


def _in_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor
) -> Tensor:
    """The losses of ``targets`` ``[N, pixels]``, all logits at once."""
    features = torch.addmm(bias, hidden, weight.T).reshape(*targets.shape, classes.shape[1])
    return _of_features(features, classes, offsets, targets)[0]


def _of_features(features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(features, classes, offsets)
    log_sums = logits.logsumexp(-1)
    return (log_sums - logits.gather(-1, targets.long()[..., None])[..., 0]).sum(1), log_sums


def _forward(features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``[n]`` and logarithms of the pixels' normalising constants ``[n, pixels]``."""
    if _compiled(features):
        log_sums = torch.empty(targets.shape)
        losses = torch.empty(len(targets))
        arguments = (features, classes.T.contiguous(), offsets, targets, losses, log_sums)
        run(_forward_kernel, targets.numel() * len(classes), *arguments)
        return losses, log_sums
    return _of_features(features, classes, offsets, targets)


def _backward(
    features: Tensor, classes: Tensor, offsets: Tensor, targets: Tensor, log_sums: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the features, the classes and the offsets."""
    if _compiled(features):
        d_features = torch.empty_like(features)
        partial = torch.zeros(torch.get_num_threads(), classes.shape[1] + 1, classes.shape[0])
        arguments = (features, classes.T.contiguous(), offsets, targets, log_sums, gradient, d_features, partial)
        run(_backward_kernel, targets.numel() * len(classes), *arguments)
        d_map = partial.sum(0)
        return d_features, d_map[:-1].T, d_map[-1]
    logits = torch.nn.functional.linear(features, classes, offsets)
    error = (logits - log_sums[..., None]).exp()
    error.scatter_add_(-1, targets.long()[..., None], -torch.ones_like(error[..., :1]))
    error = (error * gradient[:, None, None]).flatten(0, 1)
    return (error @ classes).reshape(features.shape), error.T @ features.flatten(0, 1), error.sum(0)


def _compiled(features: Tensor) -> bool:
    """Whether the compiled kernels serve these features: the decoder's rank on the CPU, in float32."""
    return features.device.type == "cpu" and features.dtype == torch.float32 and features.shape[-1] == 5


@numba.njit(inline="always", fastmath=True)  # type: ignore[untyped-decorator]
def _exp(x: np.float32) -> np.float32:
    """``exp(x)`` for x <= 0 to float32 accuracy, written so that it is vectorised; 0 below -87.

    ``2^k exp(r)`` with ``|r| <= ln(2) / 2`` and the Taylor polynomial of degree 7, whose remainder is below 6e-9.
    """
    x = max(x, np.float32(-87.0))
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - k * np.float32(0.693145752)) - k * np.float32(1.42860677e-6)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    result: np.float32 = p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return result


@numba.njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True)  # type: ignore[untyped-decorator]
def _forward_kernel(
    first: int,
    stride: int,
    features: Floats,
    classes: Floats,
    offsets: Floats,
    targets: NDArray[np.uint8],
    losses: Floats,
    log_sums: Floats,
) -> None:
    n, pixels, _ = features.shape
    levels = len(offsets)
    logits = np.empty(levels, np.float32)
    tops = np.empty(_LANES, np.float32)
    for i in range(first, n, stride):
        loss = 0.0
        for j in range(pixels):
            f0, f1, f2, f3, f4 = features[i, j]
            for c in range(levels):
                logits[c] = (
                    offsets[c]
                    + f0 * classes[0, c]
                    + f1 * classes[1, c]
                    + f2 * classes[2, c]
                    + f3 * classes[3, c]
                    + f4 * classes[4, c]
                )
            # One maximum a lane of a vector register: a single one would be taken element by element.
            tops[:] = -np.inf
            for start in range(0, levels, _LANES):
                for lane in range(_LANES):
                    value = logits[start + lane]
                    tops[lane] = value if value > tops[lane] else tops[lane]
            top = tops.max()
            total = np.float32(0.0)
            for c in range(levels):
                total += _exp(logits[c] - top)
            log_sum = top + np.log(total)
            log_sums[i, j] = log_sum
            loss += log_sum - logits[targets[i, j]]
        losses[i] = loss


@numba.njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True)  # type: ignore[untyped-decorator]
def _backward_kernel(
    first: int,
    stride: int,
    features: Floats,
    classes: Floats,
    offsets: Floats,
    targets: NDArray[np.uint8],
    log_sums: Floats,
    gradient: Floats,
    d_features: Floats,
    partial: Floats,
) -> None:
    n, pixels, _ = features.shape
    levels = len(offsets)
    d_map = partial[first]
    for i in range(first, n, stride):
        g = gradient[i]
        for j in range(pixels):
            f0, f1, f2, f3, f4 = features[i, j]
            log_sum = log_sums[i, j]
            a0 = a1 = a2 = a3 = a4 = np.float32(0.0)
            for c in range(levels):
                value = (
                    offsets[c]
                    + f0 * classes[0, c]
                    + f1 * classes[1, c]
                    + f2 * classes[2, c]
                    + f3 * classes[3, c]
                    + f4 * classes[4, c]
                )
                p = g * _exp(min(value - log_sum, np.float32(0.0)))
                a0 += p * classes[0, c]
                a1 += p * classes[1, c]
                a2 += p * classes[2, c]
                a3 += p * classes[3, c]
                a4 += p * classes[4, c]
                d_map[0, c] += p * f0
                d_map[1, c] += p * f1
                d_map[2, c] += p * f2
                d_map[3, c] += p * f3
                d_map[4, c] += p * f4
                d_map[5, c] += p
            t = targets[i, j]
            d_features[i, j, 0] = a0 - g * classes[0, t]
            d_features[i, j, 1] = a1 - g * classes[1, t]
            d_features[i, j, 2] = a2 - g * classes[2, t]
            d_features[i, j, 3] = a3 - g * classes[3, t]
            d_features[i, j, 4] = a4 - g * classes[4, t]
            d_map[0, t] -= g * f0
            d_map[1, t] -= g * f1
            d_map[2, t] -= g * f2
            d_map[3, t] -= g * f3
            d_map[4, t] -= g * f4
            d_map[5, t] -= g
