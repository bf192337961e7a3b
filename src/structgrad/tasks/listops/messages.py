"""Sums of messages over all pairs of nodes, on a CPU:
``sum_j x[i, j] relu(W relu(r_i + s_j) + b)``.

A training step spends its time here. The library computes the matrix products. Everything between
them is compiled, so that the output of one product is read once more, from the cache, before the
next product. Graphs lie one after another without padding. Only the results of the products with
``W`` are kept for the backward pass, which computes the rest again. If torch's precision of
products is ``medium``, inputs and outputs of products are bfloat16; sums and gradients of
parameters are float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.bfloat16 import as_array, narrow, products_in, widen
from structgrad.algorithms.compiled import FAST, njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.threads import run

#: The number of pairs of nodes whose messages are computed together, so that they fit into the
#: caches.
_PAIRS = 4_000
#: Features are padded with zeros to a multiple of this, to fill whole vector registers.
_LANES = 32

Array = NDArray[Any]


class Drawn(NamedTuple):
    """The draw of a dropout: which units are 0 is a hash of the key and the unit's place.

    So the backward pass finds the same units again, and nobody keeps them.

    Attributes:
        key: below ``2^32``, another for each call.
        limit: the probability, in ``2^-32``.
    """

    key: int
    limit: int


_NONE = Drawn(0, 0)


class Pairs:
    """The pairs of receivers and senders of the same graph.

    Args:
        receivers: int64 ``[N]``, the number in each graph; a CPU tensor, like the next.
        senders: int64 ``[N]``.
    """

    def __init__(self, receivers: Tensor, senders: Tensor) -> None:
        self.receivers, self.senders = receivers, senders
        #: The first receiver, sender and pair of every graph, and the end of the last: int64
        #: ``[3, N + 1]``.
        self.begin = F.pad(torch.stack((receivers, senders, receivers * senders)).cumsum(1), (1, 0))
        graphs = (self.begin[2, 1:] // _PAIRS).unique_consecutive(return_counts=True)[1]
        bounds = F.pad(graphs.cumsum(0), (1, 0))
        pairs = self.begin[2, bounds]
        self.largest_chunk = int(pairs.diff().max()) if len(graphs) else 0
        #: Of a chunk: its first graph, the first graph of the next, its first pair, the first pair
        #: of the next.
        self.chunks: list[tuple[int, int, int, int]] = list(
            zip(*(t.tolist() for t in (bounds[:-1], bounds[1:], pairs[:-1], pairs[1:])), strict=True)
        )


def sum_messages(
    receivers: Tensor,
    senders: Tensor,
    weight: Tensor,
    bias: Tensor,
    adjacency: Tensor,
    pairs: Pairs,
    dropout: float = 0.0,
) -> Tensor:
    """Sum of weighted messages at each receiver, over all senders of its graph.

    It is differentiable, twice, in all tensors. A second derivative is in plain torch, padded.

    Args:
        receivers: the receivers' inputs to the first layer, ``[R, d]``, one graph after another.
        senders: the senders' inputs to it, ``[S, d]``.
        weight: weight of the second layer ``[d, d]``.
        bias: ``[d]``.
        adjacency: weights of the messages ``[N, n, n]``: ``[g, i, j]`` for the i-th receiver and
            the j-th sender of a graph; the rest is never read.
        pairs: the sizes of the graphs.
        dropout: the probability that a unit of the first layer is 0, for each pair by itself; the
            other units are ``1 / (1 - dropout)`` times as large.

    Returns:
        ``[R, d]``.
    """
    drawn = None
    if dropout:
        drawn = Drawn(int(torch.randint(2**32, ())), int(dropout * 2**32))
        # m relu(a + b) = relu(m a + m b) for m >= 0: the kernels need not scale.
        receivers, senders = receivers / (1 - dropout), senders / (1 - dropout)
    heard: Tensor = _Messages.apply(receivers, senders, weight, bias, adjacency, pairs, drawn, torch.is_grad_enabled())
    return heard


# --- plain torch ------------------------------------------------------------------------------------------------------


def _in_torch(
    receivers: Tensor,
    senders: Tensor,
    weight: Tensor,
    bias: Tensor,
    adjacency: Tensor,
    pairs: Pairs,
    drawn: Drawn | None = None,
) -> Tensor:
    """The same as :func:`sum_messages`, in operations that autograd knows."""

    def by_graph(nodes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        exist = torch.arange(int(counts.max())) < counts[:, None]
        return nodes.new_zeros(*exist.shape, nodes.shape[1]).index_put((exist,), nodes), exist

    into, hears = by_graph(receivers, pairs.receivers)
    out_of, sends = by_graph(senders, pairs.senders)
    first = F.relu(into[:, :, None] + out_of[:, None])
    exist = hears[:, :, None] & sends[:, None]
    if drawn is not None:
        first = first * torch.ones_like(first).index_put((exist,), _kept(len(weight), pairs, drawn).to(first))
    messages = F.relu(F.linear(first, weight, bias))
    edges = adjacency[:, : hears.shape[1], : sends.shape[1]].masked_fill(~exist, 0)
    return (edges[:, :, None] @ messages).squeeze(2)[hears]


def _kept(units: int, pairs: Pairs, drawn: Drawn) -> Tensor:
    """1 for the units of all pairs that are not dropped: ``[pairs, units]``."""
    width = units + -units % _LANES
    ones = torch.ones(1, width)
    # Graphs of one receiver, which is 1, and as many senders, which are 0, as there are pairs.
    kept = torch.empty(int(pairs.begin[2, -1]), width)
    begin = torch.tensor([[0, 1], [0, len(kept)], [0, len(kept)]])
    run(_first_layer, kept.numel(), 0, 1, *_arrays(ones, torch.zeros_like(kept), begin, kept), *drawn)
    return kept[:, :units]


# --- CPU kernels ------------------------------------------------------------------------------------------------------


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        receivers: Tensor,
        senders: Tensor,
        weight: Tensor,
        bias: Tensor,
        adjacency: Tensor,
        pairs: Pairs,
        drawn: Drawn | None,
        keep: bool,
    ) -> Tensor:
        padded = _padded(receivers, senders, weight, bias, adjacency)
        into, out_of, second, offset, edges = padded
        width = second.shape[0]
        first = second.new_empty(pairs.largest_chunk, width)
        products = second.new_empty(pairs.chunks[-1][3] if keep and pairs.chunks else pairs.largest_chunk, width)
        heard = torch.empty_like(into)
        nodes, sums = _arrays(into, out_of, pairs.begin, first), _arrays(offset, edges, pairs.begin, heard, products)
        for start, stop, begin, end in pairs.chunks:
            count, kept = end - begin, begin if keep else 0
            run(_first_layer, count * width, start, stop, *nodes, *(drawn or _NONE))
            torch.mm(first[:count], second, out=products[kept : kept + count])
            run(_sum, count * width, start, stop, kept, *sums)
        ctx.save_for_backward(receivers, senders, weight, bias, adjacency, products)
        ctx.padded, ctx.pairs, ctx.drawn = padded, pairs, drawn
        return heard[:, : len(bias)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, products = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        if twin_needed(grad):
            return *gradients(partial(_in_torch, pairs=pairs, drawn=ctx.drawn), inputs, [grad]), None, None, None
        into, out_of, second, offset, edges = ctx.padded
        width, hidden = second.shape[0], grad.shape[1]
        upstream = F.pad(grad, (0, width - hidden))
        first, d_products, d_first = second.new_empty(3, pairs.largest_chunk, width)
        d_into, d_out_of = torch.zeros_like(into), torch.zeros_like(out_of)
        d_second = into.new_zeros(second.shape)
        d_offset = offset.new_zeros(torch.get_num_threads(), width)
        d_edges = torch.zeros_like(edges)
        nodes, d_nodes = (
            _arrays(into, out_of, pairs.begin, first),
            _arrays(d_into, d_out_of, pairs.begin, first, d_first),
        )
        sums = _arrays(offset, edges, upstream, pairs.begin, d_edges, products, d_products, d_offset)
        for start, stop, begin, end in pairs.chunks:
            count = end - begin
            x, dx, dy = first[:count], d_first[:count], d_products[:count]
            run(_sum_backward, 2 * count * width, start, stop, begin, *sums)
            torch.mm(dy, second.T, out=dx)
            run(_first_layer, count * width, start, stop, *nodes, *(ctx.drawn or _NONE))
            if x.dtype == d_second.dtype:
                d_second.addmm_(x.T, dy)
            else:
                d_second += x.T @ dy
            run(_first_layer_backward, 2 * count * width, start, stop, *d_nodes)
        return (
            d_into[:, :hidden],
            d_out_of[:, :hidden],
            d_second[:hidden, :hidden].T,
            d_offset.sum(0)[:hidden],
            d_edges,
            None,
            None,
            None,
        )


def _padded(receivers: Tensor, senders: Tensor, weight: Tensor, bias: Tensor, adjacency: Tensor) -> list[Tensor]:
    """The arguments of :func:`sum_messages` in the form of the kernels; the weight in the type of products."""
    more = -len(bias) % _LANES
    return [
        F.pad(receivers, (0, more)),
        F.pad(senders, (0, more)),
        F.pad(weight.T, (0, more, 0, more)).to(products_in(receivers)),
        F.pad(bias, (0, more)),
        adjacency.contiguous(),
    ]


def _arrays(*tensors: Tensor) -> list[Array]:
    return [as_array(t) for t in tensors]


# Below, as in torch, `0 if x <= 0 else x`: a NaN counts as positive, so it is visible in the
# result. Kernels take `begin` of `Pairs`, and the pairs from those of graph `start` to those before
# graph `stop`. Those of `products` begin at row `kept`, those of other tensors at 0.
@njit(nogil=True, cache=True)
def _hash(place: int, key: int) -> np.uint32:
    """32 bits that look random: a multiplicative hash of the place, exclusive or the key."""
    x = np.uint32(place) ^ np.uint32(key)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(nogil=True, cache=True, fastmath=FAST)
def _first_layer(
    first: int,
    stride: int,
    start: int,
    stop: int,
    into: Array,
    out_of: Array,
    begin: Array,
    result: Array,
    key: int,
    limit: int,
) -> None:
    """``relu(into[i] + out_of[j])``, and 0 for the units that are dropped."""
    zero = into.dtype.type(0)
    width = into.shape[1]
    for g in range(start + first, stop, stride):
        pair = begin[2, g] - begin[2, start]
        for i in range(begin[0, g], begin[0, g + 1]):
            for j in range(begin[1, g], begin[1, g + 1]):
                if limit == 0:
                    for c in range(width):
                        value = into[i, c] + out_of[j, c]
                        result[pair, c] = narrow(zero if value <= zero else value, result)
                else:
                    place = (begin[2, start] + pair) * width
                    for c in range(width):
                        value = into[i, c] + out_of[j, c]
                        gone = value <= zero or _hash(place + c, key) < np.uint32(limit)
                        result[pair, c] = narrow(zero if gone else value, result)
                pair += 1


@njit(nogil=True, cache=True, fastmath=FAST)
def _first_layer_backward(
    first: int,
    stride: int,
    start: int,
    stop: int,
    d_into: Array,
    d_out_of: Array,
    begin: Array,
    result: Array,
    upstream: Array,
) -> None:
    zero = d_into.dtype.type(0)
    for g in range(start + first, stop, stride):
        pair = begin[2, g] - begin[2, start]
        for i in range(begin[0, g], begin[0, g + 1]):
            for j in range(begin[1, g], begin[1, g + 1]):
                for c in range(result.shape[1]):
                    value = zero if widen(result[pair, c]) <= zero else widen(upstream[pair, c])
                    d_into[i, c] += value
                    d_out_of[j, c] += value
                pair += 1


@njit(nogil=True, cache=True, fastmath=FAST)
def _sum(
    first: int,
    stride: int,
    start: int,
    stop: int,
    kept: int,
    offset: Array,
    edges: Array,
    begin: Array,
    heard: Array,
    products: Array,
) -> None:
    """``sum_j edges[i, j] relu(products[i, j] + offset)``."""
    zero = offset.dtype.type(0)
    for g in range(start + first, stop, stride):
        pair = kept + begin[2, g] - begin[2, start]
        for i in range(begin[0, g + 1] - begin[0, g]):
            total = heard[begin[0, g] + i]
            total[:] = zero
            for j in range(begin[1, g + 1] - begin[1, g]):
                edge = edges[g, i, j]
                for c in range(products.shape[1]):
                    value = widen(products[pair, c]) + offset[c]
                    total[c] += edge * (zero if value <= zero else value)
                pair += 1


@njit(nogil=True, cache=True, fastmath=FAST)
def _sum_backward(
    first: int,
    stride: int,
    start: int,
    stop: int,
    kept: int,
    offset: Array,
    edges: Array,
    upstream: Array,
    begin: Array,
    d_edges: Array,
    products: Array,
    d_products: Array,
    d_offset: Array,
) -> None:
    zero = offset.dtype.type(0)
    d_offset_here = d_offset[first]
    for g in range(start + first, stop, stride):
        pair = begin[2, g] - begin[2, start]
        for i in range(begin[0, g + 1] - begin[0, g]):
            at_receiver = upstream[begin[0, g] + i]
            for j in range(begin[1, g + 1] - begin[1, g]):
                edge = edges[g, i, j]
                d_edge = zero
                for c in range(products.shape[1]):
                    value = widen(products[kept + pair, c]) + offset[c]
                    d_message = zero if value <= zero else at_receiver[c]
                    d_edge += value * d_message
                    d_products[pair, c] = narrow(edge * d_message, d_products)
                    d_offset_here[c] += edge * d_message
                d_edges[g, i, j] = d_edge
                pair += 1
