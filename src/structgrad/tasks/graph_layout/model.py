"""Neural relational inference: an encoder from trajectories to edge scores, a decoder from edges to
trajectories.

The architectures are the MLP encoder and decoder of Kipf et al. (2018), as Paulus et al. (2020,
D.4.2) use them. Edges are kept *receiver-major*, as ``[..., n, n - 1]``. The entry ``[j, o]`` is
the edge from vertex ``(j + 1 + o) mod n`` to vertex ``j``. So the senders' terms are a sliding
window over the vertices, and the receivers' terms a broadcast. No incidence matrix or gather is
needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad.algorithms.bfloat16 import linear
from structgrad.tasks.graph_layout.messages import Graphs, sum_messages
from structgrad.tasks.graph_layout.rollout import rollout


def _launches_count(device: torch.device) -> bool:
    """Whether fewer, larger operators pay although they take memory. On a CPU the cache matters
    more.
    """
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
    """The sender's term of each edge: ``[*batch, n, features]`` ->
    ``[*batch, n, n - 1, features]``.

    The windows overlap.
    """
    twice = torch.cat((per_sender[..., 1:, :], per_sender[..., :-1, :]), -2)
    return twice.unfold(-2, per_sender.shape[-2] - 1, 1).transpose(-1, -2)


def sum_to_senders(per_edge: Tensor) -> Tensor:
    """The transpose of :func:`windows`: ``[*batch, n, n - 1, features]`` -> ``[*batch, n, features]``."""
    n = per_edge.shape[-3]
    if _launches_count(per_edge.device):
        # The rows of n - 1 lie at places 1, ... of 2 n + 1 and are read as rows of 2 n. So edge o
        # of receiver j comes to place j + o + 1, which is its sender modulo n.
        skewed = F.pad(per_edge, (0, 0, 1, n + 1)).flatten(-3, -2)[..., : 2 * n * n, :]
        summed: Tensor = skewed.unflatten(-2, (n, 2, n)).sum((-4, -3))
        return summed
    twice = per_edge.new_zeros(*per_edge.shape[:-3], 2 * (n - 1), per_edge.shape[-1])
    for o in range(n - 1):
        twice[..., o : o + n, :].add_(per_edge[..., o, :])
    out = twice.new_empty(*per_edge.shape[:-2], per_edge.shape[-1])
    out[..., 0, :] = twice[..., n - 1, :]
    out[..., n - 1, :] = twice[..., n - 2, :]
    out[..., 1 : n - 1, :] = twice[..., : n - 2, :] + twice[..., n:, :]
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
    """:func:`sum_to_senders`, which writes in place, with its transpose as the derivative."""

    @staticmethod
    def forward(ctx: Any, per_edge: Tensor) -> Tensor:
        return sum_to_senders(per_edge)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return windows(upstream[0])


# --- networks ------------------------------------------------------------------------------------------------------


class _Linear(nn.Linear):
    """A layer between hidden units, in the precision of products."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Block(nn.Module):
    """The second half of NRI's MLP: elu, linear, elu, batch norm over all rows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = _Linear(hidden, hidden)
        self.norm = nn.BatchNorm1d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` -> ``[..., hidden]``; ``x`` is overwritten."""
        # The overwritten tensor is no view: autograd would copy its base.
        rows = F.elu_(x).flatten(0, -2)
        out: Tensor = self.norm(F.elu_(self.linear(rows)))
        return out.view(x.shape)


class Encoder(nn.Module):
    """NRI's MLP encoder without dropout: vertex, edge, vertex, edge with a skip connection (Kipf et
    al. 2018).

    The first layer of an edge network is linear in the two ends, so it is computed per vertex and
    added per edge.

    Args:
        features: number of features of a vertex in all steps together.
        hidden: number of hidden units.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.vertex1, self.block1 = nn.Linear(features, hidden), _Block(hidden)
        self.edge1, self.block2 = nn.Linear(2 * hidden, hidden), _Block(hidden)
        self.vertex2, self.block3 = _Linear(hidden, hidden), _Block(hidden)
        self.edge2, self.block4 = nn.Linear(3 * hidden, hidden), _Block(hidden)
        self.out = nn.Linear(hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.constant_(module.bias, 0.1)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Score every directed edge.

        Args:
            positions: ``[batch, steps, n, features]``.

        Returns:
            scores ``[batch, n, n]`` with a zero diagonal (``[i, j]`` is i -> j), and the mean of
            the last edge features ``[batch, hidden]``.
        """
        n = positions.shape[2]
        by_vertex = (len(positions), n, -1)
        x = self.block1(self.vertex1(positions.transpose(1, 2).flatten(2).flatten(0, 1))).view(by_vertex)
        from_sender, from_receiver = self.edge1.weight.chunk(2, 1)
        edges = self.block2(_EdgeSum.apply(linear(x, from_sender), linear(x, from_receiver, self.edge1.bias)))
        x = self.block3(self.vertex2((edges.sum(2) / n).flatten(0, 1))).view(by_vertex)
        from_sender, from_receiver, skip = self.edge2.weight.chunk(3, 1)
        ends = _EdgeSum.apply(linear(x, from_sender), linear(x, from_receiver, self.edge2.bias))
        features = self.block4(ends + linear(edges, skip))
        return to_matrix(self.out(features).squeeze(-1)), features.mean((1, 2))


class Decoder(nn.Module):
    """NRI's MLP decoder with two edge types: messages from all vertices to all others, by the type
    of their edge.

    Args:
        hidden: number of hidden units.
        features: number of features of a vertex at a step, 2 for a position in the plane.
    """

    def __init__(self, hidden: int, features: int = 2) -> None:
        super().__init__()
        self.hidden, self.features = hidden, features
        self.message1 = nn.Linear(2 * features, 2 * hidden)  # features of sender and receiver -> both types
        bound = hidden**-0.5
        self.message2 = nn.Parameter(torch.empty(2, hidden, hidden).uniform_(-bound, bound))
        self.message2_bias = nn.Parameter(torch.empty(2, hidden).uniform_(-bound, bound))
        self.update = nn.Sequential(
            _Linear(features + hidden, hidden),
            nn.ReLU(),
            _Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, features),
        )

    def forward(self, positions: Tensor, vertices: Tensor, every: int) -> Tensor:
        """Predict every frame except the first.

        Args:
            positions: ``[N, steps, n, features]``, the true trajectory.
            vertices: ``[N, n, n]``, the graph. Entry ``[i, j]`` is the weight of the edge i -> j;
                the weight of "no edge" is 1 minus it. Without ``requires_grad`` its entries off the
                diagonal are 0 or 1.
            every: the rollout restarts from the true positions after this many steps (teacher
                forcing).

        Returns:
            ``[N, steps - 1, n, features]``.
        """
        predictions = positions.shape[1] - 1
        every = min(every, predictions)
        state = positions[:, :-1:every]  # [N, starts, n, features]
        edges, hard = to_edges(vertices).unsqueeze(1), not vertices.requires_grad
        if _launches_count(positions.device):
            everywhere = edges.expand(-1, state.shape[1], -1, -1).flatten(0, 1)
            states = rollout(state.flatten(0, 1), everywhere, self.parameters_of_steps(), every)
            return states.view(len(positions), -1, *state.shape[2:])[:, :predictions]
        last = predictions - every * (state.shape[1] - 1)  # length of the rollout from the last start
        rolled: list[Tensor] = []
        graphs = Graphs(edges.expand(-1, state.shape[1], -1, -1).flatten(0, 1), hard)
        for step in range(every):
            if step == last:
                state = state[:, :-1]
                graphs = Graphs(edges.expand(-1, state.shape[1], -1, -1).flatten(0, 1), hard)
            state = self._step(state, graphs)
            rolled.append(state if step < last else F.pad(state, (0, 0, 0, 0, 0, 1)))
        return torch.stack(rolled, 2).flatten(1, 2)[:, :predictions]

    def parameters_of_steps(self) -> list[Tensor]:
        """All parameters, in the order of :func:`~structgrad.tasks.graph_layout.rollout.rollout`."""
        first = self.message1.weight, self.message1.bias
        return [*first, self.message2, self.message2_bias, *self.update.parameters()]

    def _step(self, state: Tensor, graphs: Graphs) -> Tensor:
        """One step from ``[N, starts, n, features]``."""
        x = state.flatten(0, 1)
        both = self.message1.weight.view(2, self.hidden, 2, self.features)  # type, unit, end, feature
        ends = both.permute(2, 0, 3, 1).reshape(4, self.features, self.hidden)
        bias = torch.stack((torch.zeros_like(self.message1.bias), self.message1.bias)).view(4, 1, self.hidden)
        inputs = torch.baddbmm(bias, x.flatten(0, 1).expand(4, -1, -1), ends)
        sender, receiver = inputs.view(2, 2, *x.shape[:2], self.hidden).unbind()
        received = sum_messages(sender, receiver, self.message2, self.message2_bias, graphs)
        change: Tensor = self.update(torch.cat((x, received), -1))
        return state + change.view_as(state)
