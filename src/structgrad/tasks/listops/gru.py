"""The step of a gated recurrent unit. On a CPU, everything between its matrix products is compiled."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad.algorithms.compiled import FAST, njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.elementary import sigmoid, tanh
from structgrad.algorithms.threads import run

Array = NDArray[Any]


def gru_step(cell: nn.GRUCell, inputs: Tensor, state: Tensor) -> Tensor:
    """``cell(inputs, state)``, differentiable twice; a second derivative is in plain torch.

    Args:
        cell: with biases.
        inputs: ``[N, features]``.
        state: ``[N, hidden]``.

    Returns:
        the next state ``[N, hidden]``.
    """
    fit = inputs.dtype == state.dtype == torch.float32 and inputs.shape[:-1] == state.shape[:1]
    if not (fit and values_can_be_read(inputs, state, *cell.parameters())):
        return cell(inputs, state)  # type: ignore[no-any-return]
    by_input = F.linear(inputs, cell.weight_ih, cell.bias_ih)
    by_state = F.linear(state, cell.weight_hh, cell.bias_hh)
    following: Tensor = _Gates.apply(by_input, by_state, state)
    return following


# --- plain torch ------------------------------------------------------------------------------------------------------


def _in_torch(by_input: Tensor, by_state: Tensor, state: Tensor) -> Tensor:
    """The next state, from both products of the gates, in operations that autograd knows."""
    (reset, keep, change), (to_reset, to_keep, to_change) = by_input.chunk(3, 1), by_state.chunk(3, 1)
    keep = (keep + to_keep).sigmoid()
    change = (change + (reset + to_reset).sigmoid() * to_change).tanh()
    return change + keep * (state - change)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by_input: Tensor, by_state: Tensor, state: Tensor) -> Tensor:
        following, gates = torch.empty_like(state), torch.empty_like(by_input)
        run(_forward, 20 * gates.numel(), *(t.contiguous() for t in (by_input, by_state, state)), gates, following)
        ctx.save_for_backward(by_input, by_state, state, gates)
        return following

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gates = ctx.saved_tensors
        if twin_needed(grad):
            return tuple(gradients(_in_torch, inputs, [grad]))
        _, by_state, state = inputs
        d_input, d_from_state, d_state = torch.empty_like(gates), torch.empty_like(gates), torch.empty_like(grad)
        kernel_tensors = *(t.contiguous() for t in (by_state, state, grad)), gates, d_input, d_from_state, d_state
        run(_backward, 10 * gates.numel(), *kernel_tensors)
        return d_input, d_from_state, d_state


@njit(nogil=True, cache=True)
def _thirds(row: Array) -> tuple[Array, Array, Array]:
    """The parts of the gates. Loops over their places, which begin at 0, are vectorised."""
    width = len(row) // 3
    return row[:width], row[width : 2 * width], row[2 * width :]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _forward(
    first: int, stride: int, by_input: Array, by_state: Array, state: Array, gates: Array, following: Array
) -> None:
    """``gates`` receives reset, keep and change."""
    for i in range(first, len(state), stride):
        reset, keep, change = _thirds(gates[i])
        of_input, of_state = by_input[i], by_state[i]
        for c in range(2 * len(reset)):
            gates[i, c] = sigmoid(of_input[c] + of_state[c])
        _, _, to_change = _thirds(of_input)
        _, _, from_state = _thirds(of_state)
        for c in range(len(change)):
            change[c] = tanh(to_change[c] + reset[c] * from_state[c])
        for c in range(len(change)):
            following[i, c] = change[c] + keep[c] * (state[i, c] - change[c])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _backward(
    first: int,
    stride: int,
    by_state: Array,
    state: Array,
    upstream: Array,
    gates: Array,
    d_input: Array,
    d_from_state: Array,
    d_state: Array,
) -> None:
    for i in range(first, len(state), stride):
        reset, keep, change = _thirds(gates[i])
        d_reset, d_keep, d_change = _thirds(d_input[i])
        _, _, from_state = _thirds(by_state[i])
        _, _, d_from_change = _thirds(d_from_state[i])
        for c in range(len(keep)):
            d_keep[c] = upstream[i, c] * (state[i, c] - change[c]) * (keep[c] - keep[c] * keep[c])
        for c in range(len(keep)):
            d_state[i, c] = upstream[i, c] * keep[c]
        for c in range(len(keep)):
            along = upstream[i, c] - upstream[i, c] * keep[c]
            d_change[c] = along - along * change[c] * change[c]
        for c in range(len(keep)):
            d_reset[c] = d_change[c] * from_state[c] * (reset[c] - reset[c] * reset[c])
        for c in range(len(keep)):
            d_from_change[c] = d_change[c] * reset[c]
        for c in range(2 * len(keep)):
            d_from_state[i, c] = d_input[i, c]
