"""Negative log-likelihood of black and white pixels. On a CPU it takes one pass over the logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.compiled import FAST, njit
from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.elementary import exp
from structgrad.algorithms.threads import run

Array = NDArray[Any]
#: The number of factors between 1 and 2 whose product is surely a float32.
_FACTORS = 100


def negative_log_likelihood(logits: Tensor, images: Tensor, rows: Tensor) -> Tensor:
    """``-log p(images[rows])`` of independent Bernoulli pixels, summed: ``[N]``, in nats.

    It is differentiable twice; a second derivative is in plain torch, and so is all of it for images
    that need a gradient.

    Args:
        logits: ``[N, pixels]``.
        images: 0 or 1, ``[batch, pixels]``, in the same dtype.
        rows: int64 ``[N]``: the image of each row of logits.

    Raises:
        ValueError, IndexError: for shapes that do not fit, or a row that is no image.
    """
    if logits.shape != (len(rows), images.shape[-1]):
        raise ValueError(f"{list(logits.shape)} logits for {len(rows)} rows of {images.shape[-1]} pixels")
    compiled = logits.dtype == torch.float32 and values_can_be_read(logits, images, rows)
    if compiled and not images.requires_grad:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images):  # compiled code does not look
            raise IndexError(
                f"rows are numbers from 0 to {len(images) - 1}; got {int(rows.min())} to {int(rows.max())}"
            )
        losses: Tensor = _Bernoulli.apply(logits, images, rows, torch.is_grad_enabled())
        return losses
    return _in_torch(logits, images, rows)


# --- plain torch ------------------------------------------------------------------------------------------------------


def _in_torch(logits: Tensor, images: Tensor, rows: Tensor) -> Tensor:
    # -log p of a Bernoulli pixel is softplus(logit) - x logit.
    return torch.addcmul(F.softplus(logits), images[rows], logits, value=-1).sum(-1)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _Bernoulli(torch.autograd.Function):
    """The losses. Their derivatives are computed with them, and weighted later."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, images: Tensor, rows: Tensor, keep: bool) -> Tensor:
        losses = logits.new_empty(len(logits))
        errors = torch.empty_like(logits) if keep else logits.new_empty(0, 0)
        run(_losses, 10 * logits.numel(), *(t.contiguous() for t in (logits, images, rows)), losses, errors)
        ctx.save_for_backward(logits, images, rows, errors)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, images, rows, errors = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted
            return *gradients(partial(_in_torch, images=images, rows=rows), [logits], [grad]), None, None, None
        return errors * grad[:, None], None, None, None


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _losses(first: int, stride: int, logits: Array, images: Array, rows: Array, losses: Array, errors: Array) -> None:
    """Losses, and with room for them the derivatives, ``sigmoid(logit) - x``.

    Sums of ``log(1 + exp(-|logit|))`` are logarithms of products, which take one logarithm for many pixels.
    """
    one, zero = np.float32(1), np.float32(0)
    pixels = logits.shape[1]
    shares = np.empty(_FACTORS, np.float32)
    for i in range(first, len(logits), stride):
        total = 0.0
        for begin in range(0, pixels, _FACTORS):
            logit, image = logits[i, begin : begin + _FACTORS], images[rows[i], begin : begin + _FACTORS]
            product, linear = one, zero
            for j in range(len(logit)):
                small = exp(-abs(logit[j]))
                shares[j] = small
                product *= one + small
                linear += (logit[j] if logit[j] > zero else zero) - image[j] * logit[j]
            total += linear + np.log(product)
            if len(errors):
                error = errors[i, begin : begin + _FACTORS]
                for j in range(len(logit)):
                    large = one / (one + shares[j])
                    share = large if logit[j] > zero else shares[j] * large
                    error[j] = share - image[j] if logit[j] == logit[j] else logit[j]
        losses[i] = total
