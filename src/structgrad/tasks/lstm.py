"""An LSTM over sequences of a few different tokens, on a CPU without padding.

The tokens' products with the input weights are computed once for each token of the vocabulary, not
at every place. The library computes the products with the states. Everything between them is
compiled. Sequences are packed, so nothing is computed beyond their ends.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from structgrad.algorithms.compiled import FAST, njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.elementary import sigmoid, tanh
from structgrad.algorithms.threads import run

Array = NDArray[Any]


def lstm_over(lstm: nn.LSTM, embedding: nn.Embedding, tokens: PackedSequence) -> PackedSequence:
    """The outputs of ``lstm`` for embedded tokens: ``lstm(embedding(tokens))[0]``, from state 0.

    It is differentiable, twice, in all parameters. A second derivative is in plain torch.

    Args:
        lstm: of one layer in one direction, with biases.
        embedding: the tokens' embeddings.
        tokens: int64 token numbers.

    Returns:
        the outputs, packed in the same way.

    Raises:
        IndexError: for a token without an embedding.
    """
    to_gates, recurrent, of_input, of_state = lstm.parameters()
    # Through the module's own lookup, which gives its padding no gradient.
    vocabulary = torch.arange(embedding.num_embeddings, device=tokens.data.device)
    by_token = F.linear(embedding(vocabulary), to_gates, of_input + of_state)
    narrow = by_token.dtype == recurrent.dtype == torch.float32
    if narrow and values_can_be_read(by_token, recurrent, tokens.data):
        low, high = (int(token) for token in tokens.data.aminmax())
        if low < 0 or high >= embedding.num_embeddings:  # compiled code does not look
            raise IndexError(f"tokens are numbers from 0 to {embedding.num_embeddings - 1}; got {low} to {high}")
        states: Tensor = _Lstm.apply(by_token, recurrent, tokens.data, tokens.batch_sizes, torch.is_grad_enabled())
    else:
        states = _in_torch(by_token, recurrent, tokens.data, tokens.batch_sizes)
    return PackedSequence(states, tokens.batch_sizes, tokens.sorted_indices, tokens.unsorted_indices)


def padded_outputs(lstm: nn.LSTM, embedding: nn.Embedding, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The same for padded sequences.

    Args:
        lstm: with ``batch_first``.
        embedding: the tokens' embeddings.
        tokens: int64 ``[batch, n]``.
        lengths: int64 ``[batch]``.

    Returns:
        ``[batch, n, hidden]``, arbitrary beyond the ends.
    """
    if not tokens.numel() or not values_can_be_read(tokens, lengths):  # packing would wait for the device
        return lstm(embedding(tokens))[0]  # type: ignore[no-any-return]
    packed = pack_padded_sequence(tokens, lengths.clamp_min(1), batch_first=True, enforce_sorted=False)
    outputs = lstm_over(lstm, embedding, packed)
    # Places first in memory, as from `lstm`: dropout draws its mask in that order.
    return pad_packed_sequence(outputs, total_length=tokens.shape[1])[0].transpose(0, 1)


# --- plain torch ------------------------------------------------------------------------------------------------------


def _in_torch(by_token: Tensor, recurrent: Tensor, tokens: Tensor, batch_sizes: Tensor) -> Tensor:
    """The packed outputs, in operations that autograd knows."""
    state = cell = by_token.new_zeros(int(batch_sizes[0]), recurrent.shape[1])
    states = []
    for here in tokens.split(batch_sizes.tolist()):
        gates = F.embedding(here, by_token) + F.linear(state[: len(here)], recurrent)
        enter, keep, change, leave = gates.chunk(4, 1)
        cell = keep.sigmoid() * cell[: len(here)] + enter.sigmoid() * change.tanh()
        state = leave.sigmoid() * cell.tanh()
        states.append(state)
    return torch.cat(states)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, by_token: Tensor, recurrent: Tensor, tokens: Tensor, batch_sizes: Tensor, keep: bool
    ) -> Tensor:
        sizes, width = batch_sizes.tolist(), recurrent.shape[1]
        # Without a backward pass, a step replaces the one before.
        gates, cells = (by_token.new_empty(len(tokens) if keep else sizes[0], k * width) for k in (4, 1))
        states = by_token.new_empty(len(tokens), width)
        kernel_tensors = _arrays(tokens, by_token, gates, cells, states)
        start = before = 0
        for size in sizes:
            own, past = (start, before) if keep else (0, 0)
            if start:
                torch.mm(states[before : before + size], recurrent.T, out=gates[own : own + size])
            run(_step, 20 * size * width, size, start, own, past, start == 0, *kernel_tensors)
            start, before = start + size, start
        ctx.save_for_backward(by_token, recurrent, tokens, batch_sizes, gates, cells, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_token, recurrent, tokens, batch_sizes, gates, cells, states = ctx.saved_tensors
        if twin_needed(grad):
            twin = partial(_in_torch, tokens=tokens, batch_sizes=batch_sizes)
            return *gradients(twin, [by_token, recurrent], [grad]), None, None, None
        sizes, width = batch_sizes.tolist(), recurrent.shape[1]
        d_gates = torch.empty_like(gates)
        # What reaches a step's states and cells from the next step; nothing where a sequence ends.
        d_states, d_cells = cells.new_zeros(2, sizes[0], width)
        d_by_token = by_token.new_zeros(torch.get_num_threads(), *by_token.shape)
        kernel_tensors = _arrays(tokens, gates, cells, grad, d_states, d_cells, d_gates, d_by_token)
        start = len(tokens)
        for size, size_before in zip(sizes[::-1], [*sizes[-2::-1], 0], strict=True):
            start -= size
            past = start - size_before
            run(_step_backward, 30 * size * width, size, start, past, start == 0, *kernel_tensors)
            if start:
                torch.mm(d_gates[start : start + size], recurrent, out=d_states[:size])
        later = torch.arange(sizes[0], len(tokens))
        before = later - batch_sizes[:-1].repeat_interleave(batch_sizes[1:])
        d_recurrent = d_gates[sizes[0] :].T @ states.index_select(0, before)
        return d_by_token.sum(0), d_recurrent, None, None, None


def _arrays(*tensors: Tensor) -> list[Array]:
    return [t.detach().contiguous().numpy() for t in tensors]


@njit(nogil=True, cache=True)
def _quarters(row: Array) -> tuple[Array, Array, Array, Array]:
    """The gates. Loops over their places, which begin at 0, are vectorised; those over a part of the row are not."""
    width = len(row) // 4
    return row[:width], row[width : 2 * width], row[2 * width : 3 * width], row[3 * width :]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _step(
    first: int,
    stride: int,
    size: int,
    start: int,
    own: int,
    past: int,
    is_first: bool,
    tokens: Array,
    by_token: Array,
    gates: Array,
    cells: Array,
    states: Array,
) -> None:
    """Gates from the products with the states before, then cells and states, of ``size`` sequences.

    The step's tokens and states begin at row ``start``, its gates and cells at ``own``, the cells
    before at ``past``.
    """
    width = cells.shape[1]
    for i in range(first, size, stride):
        gate, added = gates[own + i], by_token[tokens[start + i]]
        if is_first:
            gate[:] = 0
        for c in range(2 * width):
            gate[c] = sigmoid(gate[c] + added[c])
        enter, keep, change, leave = _quarters(gate)
        _, _, to_change, to_leave = _quarters(added)
        for c in range(width):
            change[c] = tanh(change[c] + to_change[c])
        for c in range(width):
            leave[c] = sigmoid(leave[c] + to_leave[c])
        cell, state = cells[own + i], states[start + i]
        if is_first:
            cell[:] = 0
        before = cell if is_first else cells[past + i]
        for c in range(width):
            cell[c] = keep[c] * before[c] + enter[c] * change[c]
        for c in range(width):
            state[c] = leave[c] * tanh(cell[c])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _step_backward(
    first: int,
    stride: int,
    size: int,
    start: int,
    past: int,
    is_first: bool,
    tokens: Array,
    gates: Array,
    cells: Array,
    upstream: Array,
    d_states: Array,
    d_cells: Array,
    d_gates: Array,
    d_by_token: Array,
) -> None:
    """``d_cells`` and ``d_states`` are those from the next step; the first becomes that for the step before."""
    width = cells.shape[1]
    for i in range(first, size, stride):
        gate, d_gate = gates[start + i], d_gates[start + i]
        (enter, keep, change, leave), (d_enter, d_keep, d_change, d_leave) = _quarters(gate), _quarters(d_gate)
        cell, d_cell, d_state, added = cells[start + i], d_cells[i], d_states[i], upstream[start + i]
        for c in range(width):
            d_state[c] += added[c]
        for c in range(width):
            out = tanh(cell[c])
            d_leave[c] = d_state[c] * out * (leave[c] - leave[c] * leave[c])
            along = d_state[c] * leave[c]
            d_cell[c] += along - along * out * out
        for c in range(width):
            d_enter[c] = d_cell[c] * change[c] * (enter[c] - enter[c] * enter[c])
        for c in range(width):
            along = d_cell[c] * enter[c]
            d_change[c] = along - along * change[c] * change[c]
        if is_first:
            d_keep[:] = 0
        else:
            before = cells[past + i]
            for c in range(width):
                d_keep[c] = d_cell[c] * before[c] * (keep[c] - keep[c] * keep[c])
        for c in range(width):
            d_cell[c] *= keep[c]
        d_added = d_by_token[first, tokens[start + i]]
        for c in range(4 * width):
            d_added[c] += d_gate[c]
