"""Sums of messages over the edges of a graph, on a CPU.

An edge has one of two types, "no edge" and "edge", and each type has its own network. A training
step spends its time here. The library computes the matrix products. Everything between them is
compiled, so that the output of one product is read once more, from the cache, before the next
product. Only the results of the products with the second layers are kept for the backward pass,
which computes the rest again. If torch's precision of products is ``medium``, inputs and outputs of
products are bfloat16; sums and gradients of parameters are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.bfloat16 import as_array, narrow, products_in, widen
from structgrad.algorithms.compiled import FAST, njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.threads import run

#: The number of messages that are computed together, so that they fit into the caches.
_TOGETHER = 2880

Array = NDArray[Any]


class Graphs:
    """Edges of a batch of graphs, and the places of their messages.

    A chunk of graphs keeps the messages of a type together. In a hard graph an edge has the message
    of its own type only, which halves the arithmetic.

    Args:
        edges: weights of the type "edge" ``[graphs, n, n - 1]``, receiver-major (see ``model``).
            The weights of "no edge" are 1 minus these.
        hard: whether all weights are 0 or 1, and no gradient of them is wanted.
    """

    def __init__(self, edges: Tensor, hard: bool) -> None:
        self.edges = edges
        self.compiled = values_can_be_read(edges)
        if not self.compiled:
            return
        self.hard = hard
        graphs, each = len(edges), edges[0].numel() if len(edges) else 0
        size = max(1, _TOGETHER // max(1, each * (1 if self.hard else 2)))
        chunks = -(-graphs // size)
        index = torch.arange(size * each)
        within = edges.detach().reshape(graphs, each) != 0
        within = F.pad(within, (0, 0, 0, chunks * size - graphs)).view(chunks, -1)
        ones = within.cumsum(1)
        #: The place of an edge's message among those of its type in the chunk: int64
        #: ``[graphs, n, n - 1]``.
        self.place = torch.where(within, ones - 1, index - ones) if self.hard else index.expand(chunks, -1)
        self.place = self.place.reshape(-1, each)[:graphs].view(edges.shape)
        #: Of a chunk: its first graph, the first of the next, and the number of messages of each
        #: type.
        self.chunks: list[tuple[int, int, int, int]] = []
        for chunk in range(chunks):
            start, stop = chunk * size, min((chunk + 1) * size, graphs)
            every = (stop - start) * each
            of_edges = int(ones[chunk, -1]) if self.hard and each else every
            self.chunks.append((start, stop, every - of_edges if self.hard else every, of_edges))


def sum_messages(sender: Tensor, receiver: Tensor, weight: Tensor, bias: Tensor, graphs: Graphs) -> Tensor:
    """Sum of weighted messages at each receiver, ``sum_t sum_i w[t, i, j] relu(relu(s[t, i] + r[t,
    j]) W[t] + b[t])``.

    It is differentiable, twice, also in the edges of ``graphs``.

    Args:
        sender: the senders' inputs to the first layer of each type ``[2, graphs, n, hidden]``.
        receiver: the receivers' inputs to it, in the same shape.
        weight: weight of the second layer ``[2, hidden, hidden]``.
        bias: ``[2, hidden]``.
        graphs: the edges.

    Returns:
        ``[graphs, n, hidden]``.
    """
    if not graphs.compiled:
        return _in_torch(sender, receiver, weight, bias, graphs.edges)
    heard: Tensor = _Messages.apply(sender, receiver, weight, bias, graphs.edges, graphs, torch.is_grad_enabled())
    return heard


# --- plain torch ------------------------------------------------------------------------------------------------------


def _in_torch(sender: Tensor, receiver: Tensor, weight: Tensor, bias: Tensor, edges: Tensor) -> Tensor:
    """The same as :func:`sum_messages`, in operations that autograd knows."""
    n = receiver.shape[2]
    vertex = torch.arange(n, device=edges.device)
    senders = (vertex[:, None] + vertex[1:]) % n
    first = (sender[:, :, senders] + receiver.unsqueeze(3)).relu()
    messages = (first @ weight[:, None, None] + bias[:, None, None, None]).relu()
    return (torch.stack((1 - edges, edges)).unsqueeze(-1) * messages).sum((0, 3))


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sender: Tensor,
        receiver: Tensor,
        weight: Tensor,
        bias: Tensor,
        edges: Tensor,
        graphs: Graphs,
        keep: bool,
    ) -> Tensor:
        dtype, hidden = products_in(receiver), bias.shape[1]
        second = weight.to(dtype).mT.contiguous()  # the product with its transpose is faster
        most = max((a + b for _, _, a, b in graphs.chunks), default=0)
        first = receiver.new_empty(most, hidden, dtype=dtype)
        products = [first.new_empty(a + b if keep else 0, hidden) for _, _, a, b in graphs.chunks]
        again = None if keep else torch.empty_like(first)
        heard = receiver.new_empty(receiver.shape[1:])
        nodes = [as_array(t.contiguous()) for t in (sender, receiver)]
        places, sums = [as_array(t.contiguous()) for t in (edges, graphs.place)], [as_array(bias), as_array(heard)]
        for (start, stop, a, b), kept in zip(graphs.chunks, products, strict=True):
            x, y = first[: a + b], kept if again is None else again[: a + b]
            where = start, stop, a, graphs.hard, *places
            run(_first_layer, x.numel(), *where, *nodes, as_array(x))
            torch.mm(x[:a], second[0].mT, out=y[:a])
            torch.mm(x[a:], second[1].mT, out=y[a:])
            run(_sum, y.numel(), *where, *sums, as_array(y))
        ctx.save_for_backward(sender, receiver, weight, bias, edges, *products)
        ctx.graphs = graphs
        return heard

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sender, receiver, weight, bias, edges, *products = ctx.saved_tensors
        graphs: Graphs = ctx.graphs
        if twin_needed(grad):
            return *gradients(_in_torch, [sender, receiver, weight, bias, edges], [grad]), None, None
        hidden, most = bias.shape[1], max((len(y) for y in products), default=0)
        dtype = products[0].dtype if products else weight.dtype
        second = weight.to(dtype).mT
        first, d_products, d_first = (receiver.new_empty(most, hidden, dtype=dtype) for _ in range(3))
        d_sender, d_receiver = (
            sender.new_zeros(sender.shape) for _ in range(2)
        )  # contiguous, although the input need not be
        d_weight, d_bias = torch.zeros_like(weight), bias.new_zeros(torch.get_num_threads(), 2, hidden)
        d_edges = None if graphs.hard else edges.new_empty(edges.shape)
        nodes, d_nodes = (
            [as_array(t.contiguous()) for t in (sender, receiver)],
            [as_array(d_sender), as_array(d_receiver)],
        )
        places = [as_array(t.contiguous()) for t in (edges, graphs.place)]
        upstream = grad.contiguous()
        sums = [as_array(t) for t in (bias, upstream, upstream if d_edges is None else d_edges, d_bias)]
        for (start, stop, a, b), y in zip(graphs.chunks, products, strict=True):
            x, dy, dx = first[: a + b], d_products[: a + b], d_first[: a + b]
            where = start, stop, a, graphs.hard, *places
            run(_sum_backward, 2 * y.numel(), *where, *sums, as_array(y), as_array(dy))
            run(_first_layer, x.numel(), *where, *nodes, as_array(x))
            for kind, rows in enumerate((slice(0, a), slice(a, a + b))):
                torch.mm(dy[rows], second[kind], out=dx[rows])
                if dtype == weight.dtype:
                    d_weight[kind].addmm_(x[rows].mT, dy[rows])
                else:
                    d_weight[kind] += x[rows].mT @ dy[rows]
            run(_first_layer_backward, 2 * x.numel(), *where, *d_nodes, as_array(x), as_array(dx))
        return d_sender, d_receiver, d_weight, d_bias.sum(0), d_edges, None, None


# Below, as in torch, `0 if x <= 0 else x`: a NaN counts as positive, so it is visible in the
# result. Kernels take the graphs from `start` to those before `stop`; messages of type 1 lie
# `behind` places after type 0.
@njit(nogil=True, cache=True, fastmath=FAST)
def _first_layer(
    first: int,
    stride: int,
    start: int,
    stop: int,
    behind: int,
    hard: bool,
    edges: Array,
    place: Array,
    sender: Array,
    receiver: Array,
    result: Array,
) -> None:
    """``relu(sender[i] + receiver[j])``."""
    n, zero = edges.shape[1], sender.dtype.type(0)
    for g in range(start + first, stop, stride):
        for j in range(n):
            for o in range(n - 1):
                i = (j + 1 + o) % n
                for kind in range(2):
                    if hard and (edges[g, j, o] != 0) != (kind == 1):
                        continue
                    row = place[g, j, o] + kind * behind
                    for c in range(sender.shape[3]):
                        value = sender[kind, g, i, c] + receiver[kind, g, j, c]
                        result[row, c] = narrow(zero if value <= zero else value, result)


@njit(nogil=True, cache=True, fastmath=FAST)
def _first_layer_backward(
    first: int,
    stride: int,
    start: int,
    stop: int,
    behind: int,
    hard: bool,
    edges: Array,
    place: Array,
    d_sender: Array,
    d_receiver: Array,
    result: Array,
    upstream: Array,
) -> None:
    n, zero = edges.shape[1], d_sender.dtype.type(0)
    for g in range(start + first, stop, stride):
        for j in range(n):
            for o in range(n - 1):
                i = (j + 1 + o) % n
                for kind in range(2):
                    if hard and (edges[g, j, o] != 0) != (kind == 1):
                        continue
                    row = place[g, j, o] + kind * behind
                    for c in range(d_sender.shape[3]):
                        value = zero if widen(result[row, c]) <= zero else widen(upstream[row, c])
                        d_sender[kind, g, i, c] += value
                        d_receiver[kind, g, j, c] += value


@njit(nogil=True, cache=True, fastmath=FAST)
def _sum(
    first: int,
    stride: int,
    start: int,
    stop: int,
    behind: int,
    hard: bool,
    edges: Array,
    place: Array,
    bias: Array,
    heard: Array,
    products: Array,
) -> None:
    """Over all types and senders, ``weight relu(products + bias)``."""
    n, zero, one = edges.shape[1], bias.dtype.type(0), bias.dtype.type(1)
    for g in range(start + first, stop, stride):
        for j in range(n):
            total = heard[g, j]
            total[:] = zero
            for o in range(n - 1):
                edge = edges[g, j, o]
                for kind in range(2):
                    if hard and (edge != 0) != (kind == 1):
                        continue
                    weight = edge if kind == 1 else one - edge
                    row = place[g, j, o] + kind * behind
                    for c in range(bias.shape[1]):
                        value = widen(products[row, c]) + bias[kind, c]
                        total[c] += weight * (zero if value <= zero else value)


@njit(nogil=True, cache=True, fastmath=FAST)
def _sum_backward(
    first: int,
    stride: int,
    start: int,
    stop: int,
    behind: int,
    hard: bool,
    edges: Array,
    place: Array,
    bias: Array,
    upstream: Array,
    d_edges: Array,
    d_bias: Array,
    products: Array,
    d_products: Array,
) -> None:
    """``d_edges`` is written for soft graphs only."""
    n, zero, one = edges.shape[1], bias.dtype.type(0), bias.dtype.type(1)
    d_bias_here = d_bias[first]
    for g in range(start + first, stop, stride):
        for j in range(n):
            at_receiver = upstream[g, j]
            for o in range(n - 1):
                edge = edges[g, j, o]
                d_edge = zero
                for kind in range(2):
                    if hard and (edge != 0) != (kind == 1):
                        continue
                    weight = edge if kind == 1 else one - edge
                    row = place[g, j, o] + kind * behind
                    along = zero
                    for c in range(bias.shape[1]):
                        value = widen(products[row, c]) + bias[kind, c]
                        d_message = zero if value <= zero else at_receiver[c]
                        along += value * d_message
                        d_products[row, c] = narrow(weight * d_message, d_products)
                        d_bias_here[kind, c] += weight * d_message
                    d_edge += along if kind == 1 else -along
                if not hard:
                    d_edges[g, j, o] = d_edge
