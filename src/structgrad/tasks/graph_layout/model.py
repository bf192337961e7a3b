"""Neural relational inference: an encoder from trajectories to edge scores, a decoder from edges to trajectories.

The architectures are the MLP encoder and decoder of Kipf et al. (2018), as Paulus et al. (2020, D.4.2) use them. Edges
are kept *receiver-major*: ``[..., n, n - 1]``, entry ``[j, o]`` is the edge from vertex ``(j + 1 + o) mod n`` to vertex
``j``, so that what a sender contributes is a sliding window over the vertices and what a receiver contributes is a
broadcast; no incidence matrix or gather is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.eager import values_can_be_read
from structgrad.tasks.graph_layout.rollout import rollout


def _launches_count(device: torch.device) -> bool:
    """Whether fewer, larger operators pay, whatever memory they take; on a CPU what counts is its cache."""
    return device.type != "cpu"


# --- edges ---------------------------------------------------------------------------------------------------------


def senders(n: int, device: torch.device | None = None) -> Tensor:
    """Which vertex sends along each edge: int64 ``[n, n - 1]``."""
    vertex = torch.arange(n, device=device)
    return (vertex[:, None] + 1 + vertex[: n - 1]) % n


def to_edges(matrix: Tensor) -> Tensor:
    """Entries ``[i, j]`` (edge i -> j) of ``[*batch, n, n]`` as edges ``[*batch, n, n - 1]``."""
    n = matrix.shape[-1]
    return matrix[..., senders(n, matrix.device), torch.arange(n, device=matrix.device)[:, None]]


def to_matrix(edges: Tensor) -> Tensor:
    """The inverse of :func:`to_edges`, with a zero diagonal."""
    n = edges.shape[-2]
    # Entry [i, j] is edge (i - j - 1) mod n of receiver j; the diagonal reads the padding.
    vertex = torch.arange(n, device=edges.device)
    offset = (vertex[:, None] - vertex - 1) % n
    return F.pad(edges, (0, 1))[..., vertex, offset]


def windows(per_sender: Tensor) -> Tensor:
    """What each edge's sender contributes: ``[*batch, n, features]`` -> ``[*batch, n, n - 1, features]``, overlapping
    windows.
    """
    twice = torch.cat((per_sender[..., 1:, :], per_sender[..., :-1, :]), -2)
    return twice.unfold(-2, per_sender.shape[-2] - 1, 1).transpose(-1, -2)


def sum_to_senders(per_edge: Tensor) -> Tensor:
    """The transpose of :func:`windows`: ``[*batch, n, n - 1, features]`` -> ``[*batch, n, features]``."""
    n = per_edge.shape[-3]
    if _launches_count(per_edge.device):
        # Rows of n - 1 at places 1, ... of 2 n + 1, read as rows of 2 n: receiver j's edge o comes to place j + o + 1,
        # which is its sender modulo n.
        skewed = F.pad(per_edge, (0, 0, 1, n + 1)).flatten(-3, -2)[..., : 2 * n * n, :]
        summed: Tensor = skewed.unflatten(-2, (n, 2, n)).sum((-4, -3))
        return summed
    twice = per_edge.new_zeros(*per_edge.shape[:-3], 2 * (n - 1), per_edge.shape[-1])
    for o in range(n - 1):
        twice[..., o : o + n, :].add_(per_edge[..., o, :])
    out = twice.new_empty(*per_edge.shape[:-2], per_edge.shape[-1])
    out[..., 0, :] = twice[..., n - 1, :]
    out[..., n - 1, :] = twice[..., n - 2, :]
    torch.add(twice[..., : n - 2, :], twice[..., n:, :], out=out[..., 1 : n - 1, :])
    return out


class _EdgeSum(torch.autograd.Function):
    """``sender[i] + receiver[j]`` for every edge."""

    @staticmethod
    def forward(ctx: Any, sender: Tensor, receiver: Tensor) -> Tensor:
        return windows(sender) + receiver.unsqueeze(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _SumToSenders.apply(grad), grad.sum(-2)


class _SumToSenders(torch.autograd.Function):
    """:func:`sum_to_senders`, which is written in place, with the transpose as its derivative."""

    @staticmethod
    def forward(ctx: Any, per_edge: Tensor) -> Tensor:
        return sum_to_senders(per_edge)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return windows(upstream[0])


# --- messages ------------------------------------------------------------------------------------------------------

#: Edges whose messages are computed at once on a CPU: what one product writes is still in the cache when the next step
#: reads it.
_CHUNK_EDGES = 1440


def _chunks(graphs: int, n: int) -> list[slice]:
    size = max(1, _CHUNK_EDGES // (n * (n - 1)))
    return [slice(first, min(first + size, graphs)) for first in range(0, graphs, size)]


class _SoftMessages(torch.autograd.Function):
    """Sum of weighted messages at each receiver, both edge types in one batched product.

    Written out because autograd would keep and stream every intermediate ``[2, edges, hidden]`` through memory: here
    only the messages themselves are kept, and all else happens chunk by chunk in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, sender: Tensor, receiver: Tensor, weight: Tensor, bias: Tensor, edges: Tensor, keep: bool
    ) -> Tensor:
        graphs, n, hidden = receiver.shape[1:]
        kept: list[Tensor] = []
        out = receiver.new_empty(graphs, n, hidden)
        for chunk in _chunks(graphs, n):
            first = _first_layer(sender[:, chunk], receiver[:, chunk])
            messages = torch.baddbmm(bias.unsqueeze(1), first, weight).relu_()
            size = out[chunk].shape[0] * n
            weighted = torch.bmm(
                _both_types(edges[chunk]).view(2 * size, 1, n - 1), messages.view(2 * size, n - 1, hidden)
            )
            torch.sum(weighted.view(2, -1, n, hidden), 0, out=out[chunk])
            if keep:
                kept.append(messages)
        ctx.save_for_backward(sender, receiver, weight, bias, edges, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sender, receiver, weight, bias, edges, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            return *gradients(_messages_in_torch, [sender, receiver, weight, bias, edges], [grad]), None
        graphs, n, hidden = grad.shape
        grad_sender, grad_receiver = torch.empty_like(receiver), torch.empty_like(receiver)
        grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(2, hidden)
        grad_edges = torch.empty_like(edges) if ctx.needs_input_grad[4] else None
        for chunk, messages in zip(_chunks(graphs, n), kept, strict=True):
            at_receiver = grad[chunk].reshape(1, -1, 1, hidden)
            shape = (2, at_receiver.shape[1], n - 1, hidden)
            if grad_edges is not None:
                difference = messages[1] - messages[0]
                torch.sum(
                    difference.view(shape[1:]).mul_(at_receiver[0]).view(-1, n, n - 1, hidden),
                    -1,
                    out=grad_edges[chunk],
                )
            grad_messages = (_both_types(edges[chunk]).view(*shape[:3], 1) * at_receiver).view(2, -1, hidden)
            _through_relu(grad_messages, messages)
            grad_bias += grad_messages.sum(1)
            first = _first_layer(sender[:, chunk], receiver[:, chunk])
            grad_weight.baddbmm_(first.mT, grad_messages)
            grad_first = _through_relu(torch.bmm(grad_messages, weight.mT), first).view(2, -1, n, n - 1, hidden)
            torch.sum(grad_first, 3, out=grad_receiver[:, chunk])
            grad_sender[:, chunk] = sum_to_senders(grad_first)
        return grad_sender, grad_receiver, grad_weight, grad_bias, grad_edges, None


def _messages_in_torch(sender: Tensor, receiver: Tensor, weight: Tensor, bias: Tensor, edges: Tensor) -> Tensor:
    """What :class:`_SoftMessages` computes, in operations that autograd knows."""
    first = (windows(sender) + receiver.unsqueeze(-2)).relu()
    messages = (first @ weight[:, None, None] + bias[:, None, None, None]).relu()
    return (_both_types(edges).unsqueeze(-1) * messages).sum((0, -2))


def _both_types(edges: Tensor) -> Tensor:
    """Weights of the types "no edge" and "edge": ``[2, *edges]``."""
    return torch.stack((1 - edges, edges))


def _first_layer(sender: Tensor, receiver: Tensor) -> Tensor:
    """``relu(sender + receiver)``: two ``[2, graphs, n, hidden]`` -> ``[2, graphs * n * (n - 1), hidden]``."""
    return torch.add(windows(sender), receiver.unsqueeze(-2)).relu_().view(2, -1, receiver.shape[-1])


def _through_relu(grad: Tensor, output: Tensor) -> Tensor:
    """``grad`` where ``output`` of a relu is positive, in place."""
    masked: Tensor = torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)
    return masked


class Route:
    """Edges of hard graphs sorted by type, chunk by chunk, so that each edge meets only its own message network.

    Args:
        edges: ``[graphs, n, n - 1]``, 0 or 1.
    """

    def __init__(self, edges: Tensor) -> None:
        graphs, n, degree = edges.shape
        sends = senders(n, edges.device)
        vertex, offset = torch.arange(n, device=edges.device)[:, None], torch.arange(degree, device=edges.device)
        by_sender = (vertex - 1 - offset) % n * degree + offset  # where the edges of a sender lie
        self.chunks = [_RoutedChunk(chunk, edges[chunk], sends, by_sender) for chunk in _chunks(graphs, n)]


class _RoutedChunk:
    """One chunk of a :class:`Route`; rows of "both" are type-major: ``[2, graphs, n]`` flattened."""

    def __init__(self, where: slice, edges: Tensor, sends: Tensor, by_sender: Tensor) -> None:
        graphs, n, degree = edges.shape
        self.where = where
        kind = edges.long()
        order = kind.flatten().argsort(stable=True)
        self.without = order.numel() - int(kind.sum())  # the first so many have type 0
        base = n * torch.arange(graphs, device=edges.device)[:, None, None] + kind * (graphs * n)
        vertex = torch.arange(n, device=edges.device)[:, None].expand_as(sends)
        self.sender = (base + sends).flatten()[order]
        self.receiver = (base + vertex).flatten()[order]
        self.target = order // degree
        self.position = torch.empty_like(order)
        self.position[order] = torch.arange(order.numel(), device=order.device)
        self.by_sender = self.position.view(graphs, n * degree)[:, by_sender.flatten()].flatten()
        both = _both_types(edges).movedim(0, -2)  # [graphs, n, 2, n - 1]
        self.types = both.reshape(graphs * n, 2, degree)
        sent = edges.flatten(1)[:, by_sender.flatten()].view(graphs, n, degree)
        self.sent_types = _both_types(sent).movedim(0, -2).reshape(graphs * n, 2, degree)

    def first_layer(self, sender: Tensor, receiver: Tensor) -> Tensor:
        """``relu(sender + receiver)`` of each edge's own type, sorted: ``[edges, hidden]``."""
        hidden = receiver.shape[-1]
        first = sender[:, self.where].reshape(-1, hidden).index_select(0, self.sender)
        first += receiver[:, self.where].reshape(-1, hidden).index_select(0, self.receiver)
        return first.relu_()

    def by_type(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted edges split into those of type 0 and 1, views."""
        return edges[: self.without], edges[self.without :]


class _HardMessages(torch.autograd.Function):
    """What :class:`_SoftMessages` computes for 0/1 edges without gradient, at half the arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, sender: Tensor, receiver: Tensor, weight: Tensor, bias: Tensor, route: Route, keep: bool
    ) -> Tensor:
        graphs, n, hidden = receiver.shape[1:]
        kept: list[Tensor] = []
        out = receiver.new_empty(graphs, n, hidden)
        for chunk in route.chunks:
            first = chunk.first_layer(sender, receiver)
            messages = torch.empty_like(first)
            for kind, (x, y) in enumerate(zip(chunk.by_type(first), chunk.by_type(messages), strict=True)):
                torch.addmm(bias[kind], x, weight[kind], out=y)
            messages.relu_()
            sorted_back = messages.index_select(0, chunk.position)
            torch.sum(sorted_back.view(-1, n, n - 1, hidden), 2, out=out[chunk.where])
            if keep:
                kept.append(messages)
        ctx.save_for_backward(sender, receiver, weight, bias, *kept)
        ctx.route = route
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sender, receiver, weight, bias, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            edges = torch.cat([chunk.types[:, 1] for chunk in ctx.route.chunks]).view(*grad.shape[:2], -1)
            found = gradients(_messages_in_torch, [sender, receiver, weight, bias, edges], [grad])
            return *found, None
        n, hidden = grad.shape[1:]
        grad_sender, grad_receiver = torch.empty_like(receiver), torch.empty_like(receiver)
        grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(2, hidden)
        for chunk, messages in zip(ctx.route.chunks, kept, strict=True):
            grad_messages = grad[chunk.where].reshape(-1, hidden).index_select(0, chunk.target)
            _through_relu(grad_messages, messages)
            first = chunk.first_layer(sender, receiver)
            grad_first = torch.empty_like(first)
            parts = zip(*(chunk.by_type(t) for t in (first, grad_messages, grad_first)), strict=True)
            for kind, (x, gy, gx) in enumerate(parts):
                grad_bias[kind] += gy.sum(0)
                grad_weight[kind].addmm_(x.mT, gy)
                torch.mm(gy, weight[kind].mT, out=gx)
            _through_relu(grad_first, first)
            for into, position, types in (
                (grad_receiver, chunk.position, chunk.types),
                (grad_sender, chunk.by_sender, chunk.sent_types),
            ):
                per_vertex = torch.bmm(types, grad_first.index_select(0, position).view(-1, n - 1, hidden))
                into[:, chunk.where] = per_vertex.view(-1, n, 2, hidden).movedim(2, 0)
        return grad_sender, grad_receiver, grad_weight, grad_bias, None, None


# --- networks ------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """The second half of NRI's MLP: elu, linear, elu, batch norm over all rows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        self.norm = nn.BatchNorm1d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` -> ``[..., hidden]``; ``x`` is overwritten."""
        # What is overwritten is no view: autograd would copy its base.
        rows = F.elu_(x).flatten(0, -2)
        out: Tensor = self.norm(F.elu_(self.linear(rows)))
        return out.view(x.shape)


class Encoder(nn.Module):
    """NRI's MLP encoder without dropout: vertex, edge, vertex, edge with a skip connection (Kipf et al. 2018).

    The first layer of an edge network is linear in the two ends, so it is computed per vertex and added per edge.

    Args:
        features: numbers that describe a vertex, ``steps * 2``.
        hidden: units.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.vertex1, self.block1 = nn.Linear(features, hidden), _Block(hidden)
        self.edge1, self.block2 = nn.Linear(2 * hidden, hidden), _Block(hidden)
        self.vertex2, self.block3 = nn.Linear(hidden, hidden), _Block(hidden)
        self.edge2, self.block4 = nn.Linear(3 * hidden, hidden), _Block(hidden)
        self.out = nn.Linear(hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.constant_(module.bias, 0.1)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Score every directed edge.

        Args:
            positions: ``[batch, steps, n, 2]``.

        Returns:
            scores ``[batch, n, n]`` with a zero diagonal (``[i, j]`` is i -> j), and the mean of the last edge
            features ``[batch, hidden]``.
        """
        n = positions.shape[2]
        by_vertex = (len(positions), n, -1)
        x = self.block1(self.vertex1(positions.transpose(1, 2).flatten(2).flatten(0, 1))).view(by_vertex)
        from_sender, from_receiver = self.edge1.weight.chunk(2, 1)
        edges = self.block2(_EdgeSum.apply(F.linear(x, from_sender), F.linear(x, from_receiver, self.edge1.bias)))
        x = self.block3(self.vertex2((edges.sum(2) / n).flatten(0, 1))).view(by_vertex)
        from_sender, from_receiver, skip = self.edge2.weight.chunk(3, 1)
        ends = _EdgeSum.apply(F.linear(x, from_sender), F.linear(x, from_receiver, self.edge2.bias))
        features = self.block4(ends + F.linear(edges, skip))
        return to_matrix(self.out(features).squeeze(-1)), features.mean((1, 2))


class Decoder(nn.Module):
    """NRI's MLP decoder with two edge types: messages from all vertices to all others, by the type of their edge.

    Args:
        hidden: units.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.message1 = nn.Linear(4, 2 * hidden)  # (x, y) of sender and receiver -> both types
        bound = hidden**-0.5
        self.message2 = nn.Parameter(torch.empty(2, hidden, hidden).uniform_(-bound, bound))
        self.message2_bias = nn.Parameter(torch.empty(2, hidden).uniform_(-bound, bound))
        self.update = nn.Sequential(
            nn.Linear(2 + hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
        )

    def forward(self, positions: Tensor, vertices: Tensor, every: int) -> Tensor:
        """Predict every frame but the first.

        Args:
            positions: ``[N, steps, n, 2]``, the true trajectory.
            vertices: ``[N, n, n]``, the graph: entry ``[i, j]`` is the weight of the edge i -> j, 1 minus it that of
                no such edge. Without ``requires_grad`` its entries off the diagonal are 0 or 1.
            every: the rollout starts from the true positions again after so many steps (teacher forcing).

        Returns:
            ``[N, steps - 1, n, 2]``.
        """
        predictions = positions.shape[1] - 1
        every = min(every, predictions)
        state = positions[:, :-1:every]  # [N, starts, n, 2]
        edges = to_edges(vertices).unsqueeze(1)
        if _launches_count(positions.device):
            everywhere = edges.expand(-1, state.shape[1], -1, -1).flatten(0, 1)
            states = rollout(state.flatten(0, 1), everywhere, self.parameters_of_steps(), every)
            return states.view(len(positions), -1, *state.shape[2:])[:, :predictions]
        last = predictions - every * (state.shape[1] - 1)  # length of the rollout from the last start
        rolled: list[Tensor] = []
        graph = self._graph(edges.expand(-1, state.shape[1], -1, -1))
        for step in range(every):
            if step == last:
                state = state[:, :-1]
                graph = self._graph(edges.expand(-1, state.shape[1], -1, -1))
            state = self._step(state, graph)
            rolled.append(state if step < last else F.pad(state, (0, 0, 0, 0, 0, 1)))
        return torch.stack(rolled, 2).flatten(1, 2)[:, :predictions]

    def parameters_of_steps(self) -> list[Tensor]:
        """All parameters, in the order of :func:`~structgrad.tasks.graph_layout.rollout.rollout`."""
        first = self.message1.weight, self.message1.bias
        return [*first, self.message2, self.message2_bias, *self.update.parameters()]

    def _graph(self, edges: Tensor) -> Tensor | Route:
        edges = edges.flatten(0, 1)
        # A compiler cannot know how many edges there are.
        sparse = not edges.requires_grad and values_can_be_read(edges)
        return Route(edges) if sparse else edges

    def _step(self, state: Tensor, graph: Tensor | Route) -> Tensor:
        """One step from ``[N, starts, n, 2]``."""
        x = state.flatten(0, 1)
        both = self.message1.weight.view(2, self.hidden, 2, 2)  # type, unit, end, coordinate
        per_vertex = torch.einsum("gvc,tuec->etgvu", x, both)
        receiver = per_vertex[1] + self.message1.bias.view(2, 1, 1, self.hidden)
        messages = _HardMessages if isinstance(graph, Route) else _SoftMessages
        received = messages.apply(
            per_vertex[0], receiver, self.message2, self.message2_bias, graph, torch.is_grad_enabled()
        )
        change: Tensor = self.update(torch.cat((x, received), -1))
        return state + change.view_as(state)
