"""One small network for every single number, without its hidden units in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.algorithms.compiled import FAST, njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.elementary import sigmoid
from structgrad.algorithms.threads import run

Array = NDArray[Any]

#: The number of values whose hidden units plain torch has in memory at once on a CPU: 256 x 512
#: float32 are 512 kB.
_CHUNK = 256


def network_of_numbers(x: Tensor, inward: Tensor, outward: Tensor) -> Tensor:
    """``sum_k outward_k sigmoid(inward_k x)`` for every number x: ``[N]``.

    It is differentiable, twice; a second derivative has all hidden units in memory.

    Args:
        x: ``[N]``.
        inward: ``[hidden]``.
        outward: ``[hidden]``.
    """
    values: Tensor = _Network.apply(x, inward, outward)
    return values


# --- plain torch ------------------------------------------------------------------------------------------------------


def _in_torch(x: Tensor, inward: Tensor, outward: Tensor) -> Tensor:
    return torch.cat([torch.outer(part, inward).sigmoid_() @ outward for part in x.split(_chunk(x))])


def _backward_in_torch(x: Tensor, inward: Tensor, outward: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_inward, d_outward = torch.empty_like(x), torch.zeros_like(inward), torch.zeros_like(outward)
    for start in range(0, len(x), _chunk(x)):
        part = slice(start, start + _chunk(x))
        hidden = torch.outer(x[part], inward).sigmoid_()
        gradient = upstream[part]
        d_outward += gradient @ hidden
        # d sigmoid = sigmoid (1 - sigmoid)
        slope = hidden.addcmul_(hidden, hidden, value=-1)
        d_x[part] = (slope @ (inward * outward)) * gradient
        d_inward += (gradient * x[part]) @ slope
    return d_x, d_inward * outward, d_outward


def _chunk(x: Tensor) -> int:
    """The number of values at a time. Other devices than the CPU take all at once."""
    return _CHUNK if x.device.type == "cpu" else max(1, len(x))


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inward: Tensor, outward: Tensor) -> Tensor:
        ctx.save_for_backward(x, inward, outward)
        if not _compiled(x, inward, outward):
            return _in_torch(x, inward, outward)
        values = torch.empty_like(x)
        run(_values, 10 * len(x) * len(inward), *(t.contiguous() for t in (x, inward, outward)), values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inward, outward = ctx.saved_tensors
        if twin_needed(gradient):
            return tuple(gradients(_in_torch, [x, inward, outward], [gradient]))
        if not _compiled(x, inward, outward, gradient):
            return _backward_in_torch(x, inward, outward, gradient)
        d_x = torch.empty_like(x)
        d_inward, d_outward = x.new_zeros(2, torch.get_num_threads(), len(inward))
        kernel_tensors = *(t.contiguous() for t in (x, inward, inward * outward, gradient)), d_x, d_inward, d_outward
        run(_backward, 20 * len(x) * len(inward), *kernel_tensors)
        return d_x, d_inward.sum(0) * outward, d_outward.sum(0)


def _compiled(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors) and values_can_be_read(*tensors)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _values(first: int, stride: int, x: Array, inward: Array, outward: Array, values: Array) -> None:
    for i in range(first, len(x), stride):
        own, total = x[i], np.float32(0)
        for k in range(len(inward)):
            total += outward[k] * sigmoid(own * inward[k])
        values[i] = total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _backward(
    first: int,
    stride: int,
    x: Array,
    inward: Array,
    both: Array,
    gradient: Array,
    d_x: Array,
    d_inward: Array,
    d_outward: Array,
) -> None:
    """``both`` is the product of inward and outward weights; ``d_inward`` lacks the outward ones."""
    d_inward_here, d_outward_here = d_inward[first], d_outward[first]
    for i in range(first, len(x), stride):
        own, upstream, total = x[i], gradient[i], np.float32(0)
        along = upstream * own
        for k in range(len(inward)):
            hidden = sigmoid(own * inward[k])
            slope = hidden - hidden * hidden
            total += slope * both[k]
            d_outward_here[k] += upstream * hidden
            d_inward_here[k] += along * slope
        d_x[i] = total * upstream
