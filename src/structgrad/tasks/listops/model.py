"""The networks of the ListOps experiment (Paulus et al. 2020, D.5.2): edge encoder, graph network, LSTM baseline."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad.algorithms.eager import values_can_be_read
from structgrad.tasks.listops.data import PAD, VOCABULARY
from structgrad.tasks.listops.gru import gru_step
from structgrad.tasks.listops.messages import Pairs, sum_messages
from structgrad.tasks.lstm import padded_outputs

#: Expressions evaluate to a digit.
CLASSES = 10
#: What becomes of a node's state and the sum of its messages: their sum, or a gated recurrent unit.
Update = Literal["sum", "gru"]
#: Which messages share a draw of dropout: none, or all of a graph in a step.
DropoutPer = Literal["pair", "graph"]


def _embedding(features: int, tokens: int) -> nn.Embedding:
    return nn.Embedding(tokens, features, padding_idx=PAD)


def _classifier(features: int, hidden: int) -> nn.Sequential:
    """Two hidden layers, as in the authors' code; the paper says one."""
    layers = nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    return nn.Sequential(*layers)


def _summary(outputs: Tensor, lengths: Tensor) -> Tensor:
    """The outputs ``[batch, hidden]`` at the last tokens."""
    return outputs[torch.arange(len(outputs), device=outputs.device), lengths - 1]


class EdgeEncoder(nn.Module):
    """Scores every edge by two left-to-right LSTMs: ``scores[i, j] = <head_i, modifier_j>``.

    A single-layer LSTM has no place between layers for dropout, so it is applied to the LSTMs'
    outputs.

    Args:
        hidden: size of embedding and LSTMs.
        dropout: dropout probability.
        tokens: number of token ids.
    """

    def __init__(self, hidden: int, dropout: float, tokens: int = len(VOCABULARY)) -> None:
        super().__init__()
        self.embedding = _embedding(hidden, tokens)
        self.head = nn.LSTM(hidden, hidden, batch_first=True)
        self.modifier = nn.LSTM(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode padded expressions.

        Args:
            tokens: int64 ``[batch, n]``. Padding comes last, so that it influences no token before
                it.

        Returns:
            scores ``[batch, n, n]`` (``[i, j]`` for i -> j; arbitrary at padding), and a summary
            ``[batch, hidden]``: the modifier LSTM's output at the last token.
        """
        lengths = (tokens != PAD).sum(1)
        head = padded_outputs(self.head, self.embedding, tokens, lengths)
        modifier = padded_outputs(self.modifier, self.embedding, tokens, lengths)
        return self.dropout(head) @ self.dropout(modifier).transpose(1, 2), _summary(modifier, lengths)


def _merge_equal_senders(tokens: Tensor, exist: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct tokens of every graph as its senders; the weights of equal tokens are added.

    Args:
        tokens: int64 ``[N, n]``.
        exist: bool ``[N, n]``.
        adjacency: ``[N, n, n]``.

    Returns:
        distinct tokens int64 ``[S]``, graph by graph; the graph of each ``[S]``; and the adjacency
        ``[N, n, m]`` of the receivers and of the at most m tokens of a graph.
    """
    seen = torch.zeros(len(tokens), len(VOCABULARY), dtype=torch.bool)
    seen[exist.nonzero()[:, 0], tokens[exist]] = True
    graph, different = seen.nonzero().T
    place = (seen.cumsum(1) - 1).gather(1, tokens).masked_fill(~exist, -1)
    merge = place[..., None] == torch.arange(int(seen.sum(1).max()))
    weights = adjacency.masked_fill(~exist[:, None], 0)  # entries that are no edge are not read
    return different, graph, weights @ merge.to(adjacency)


class Edges(NamedTuple):
    """Hard edges of a batch of graphs as a list.

    Attributes:
        graph: int64 ``[E]``, ascending.
        receiver: int64 ``[E]``: the operator end, where the message arrives.
        sender: int64 ``[E]``: the operand end.
    """

    graph: Tensor
    receiver: Tensor
    sender: Tensor


class GraphNetwork(nn.Module):
    """Passes messages over a latent graph and classifies the first token.

    The message network is that of NRI's decoder (two layers over both ends of an edge) without the
    last layers after aggregation. The sum of a node's messages is added to its state, or a gated
    recurrent unit takes both.

    An edge i -> j runs from operator to operand. The first token needs the values of its operands
    to know the answer. So the message of the edge is weighted by ``x[i, j]`` and goes from j to i.
    A vertex shows undirected edges in both directions, so messages go both ways.

    The first layer acts on a pair of nodes through a sum of one term from each, so it is computed
    per node. With ``dropout_per="graph"`` dropout acts on nodes as well, because
    ``m relu(a + b) = relu(m a + m b)`` for ``m >= 0``.

    Args:
        hidden: size of every layer.
        steps: number of steps of message passing.
        dropout: dropout probability of the hidden units of the message network.
        tokens: number of token ids.
        update: ``"sum"`` or ``"gru"``.
        dropout_per: each ``"pair"`` of nodes has a draw of its own, or all pairs of a ``"graph"``
            share one.
        test_dropout: messages keep their dropout in evaluation.
    """

    def __init__(
        self,
        hidden: int,
        steps: int,
        dropout: float,
        tokens: int = len(VOCABULARY),
        update: Update = "sum",
        dropout_per: DropoutPer = "pair",
        test_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.dropout, self.dropout_per, self.test_dropout = dropout, dropout_per, test_dropout
        self.embedding = _embedding(hidden, tokens)
        self.receive = nn.Linear(hidden, hidden)
        self.send = nn.Linear(hidden, hidden, bias=False)
        for parameter in (*self.receive.parameters(), *self.send.parameters()):  # one layer of 2 hidden inputs
            nn.init.uniform_(parameter, -1 / math.sqrt(2 * hidden), 1 / math.sqrt(2 * hidden))
        self.message = nn.Linear(hidden, hidden)
        self.update = nn.GRUCell(hidden, hidden) if update == "gru" else None
        self.classify = _classifier(hidden, hidden)

    def forward(self, tokens: Tensor, graphs: Tensor | Edges) -> Tensor:
        """Class logits from the first token's state.

        Args:
            tokens: int64 ``[N, n]``.
            graphs: relaxed adjacency ``[N, n, n]``, or the edges of hard graphs. The first takes
                memory for n^2 messages a graph, the second for one message an edge.

        Returns:
            ``[N, 10]``.
        """
        if isinstance(graphs, Edges) or not values_can_be_read(tokens):
            return self._padded(tokens, graphs)
        # On other devices, reading lengths would wait for the device.
        return self._packed(tokens, graphs)

    def _padded(self, tokens: Tensor, graphs: Tensor | Edges) -> Tensor:
        state = self.embedding(tokens)
        for _ in range(self.steps):
            keep = self._keep(torch.ones_like(state[:, :1]))
            at_receiver, at_sender = keep * self.receive(state), keep * self.send(state)
            if isinstance(graphs, Edges):
                heard = self._sparse(at_receiver, at_sender, graphs)
            else:
                heard = self._dense(at_receiver, at_sender, graphs)
            state = self._updated(state.flatten(0, 1), heard.flatten(0, 1)).view_as(state)
        logits: Tensor = self.classify(state[:, 0])
        return logits

    def _packed(self, tokens: Tensor, adjacency: Tensor) -> Tensor:
        """The nodes of all graphs, one graph after another.

        The cost of a step is the number of pairs of nodes. Unequal lengths would leave many of the
        padded pairs empty.
        """
        exist = tokens != PAD
        exist[:, 0] = True  # the token that is classified
        lengths = exist.sum(1)
        first = F.pad(lengths.cumsum(0), (1, 0))[:-1]
        graph = torch.arange(len(tokens)).repeat_interleave(lengths)
        state = self.embedding(tokens[exist])
        for step in range(self.steps):
            keep = self._keep(state.new_ones(len(tokens), state.shape[1]))
            hearing, receivers, keep_receivers = state, lengths, keep[graph]
            if step == self.steps - 1:  # only the messages to the first tokens matter
                hearing, receivers, keep_receivers = F.embedding(first, state), torch.ones_like(lengths), keep
            sending, senders, keep_senders, edges = state, lengths, keep[graph], adjacency
            if step == 0 and not self._pair_dropout():  # equal tokens of a graph still send the same
                spoken, of, edges = _merge_equal_senders(tokens, exist, adjacency)
                sending, senders, keep_senders = self.embedding(spoken), of.bincount(minlength=len(tokens)), keep[of]
            at_receiver, at_sender = keep_receivers * self.receive(hearing), keep_senders * self.send(sending)
            pairs = Pairs(receivers, senders)
            message = self.message.weight, self.message.bias
            heard = sum_messages(at_receiver, at_sender, *message, edges, pairs, self._pair_dropout())
            state = self._updated(hearing, heard)
        logits: Tensor = self.classify(state)
        return logits

    def _dropout(self) -> float:
        """The current probability."""
        return self.dropout if self.training or self.test_dropout else 0.0

    def _pair_dropout(self) -> float:
        """That of the units of each pair by itself."""
        return self._dropout() if self.dropout_per == "pair" else 0.0

    def _keep(self, ones: Tensor) -> Tensor:
        """What the units of all pairs of a graph are multiplied by."""
        return ones if self.dropout_per == "pair" else F.dropout(ones, self._dropout())

    def _updated(self, state: Tensor, heard: Tensor) -> Tensor:
        return state + heard if self.update is None else gru_step(self.update, heard, state)

    def _dense(self, at_receiver: Tensor, at_sender: Tensor, adjacency: Tensor) -> Tensor:
        """Sum of messages ``[N, n, hidden]`` over all pairs, weighted by ``adjacency`` ``[N, n, n]``."""
        pairs = F.relu(at_receiver[:, :, None] + at_sender[:, None], inplace=True)
        pairs = F.dropout(pairs, self._pair_dropout())
        messages = F.relu(self.message(pairs), inplace=True)
        return (adjacency[:, :, None] @ messages).squeeze(2)

    def _sparse(self, at_receiver: Tensor, at_sender: Tensor, edges: Edges) -> Tensor:
        """Sum of messages ``[N, n, hidden]`` over ``edges``."""
        n = at_receiver.shape[1]
        receiver = edges.graph * n + edges.receiver
        # An embedding lookup: its gradient is deterministic and fast, that of indexing is not.
        pairs = F.relu(
            F.embedding(receiver, at_receiver.flatten(0, 1))
            + F.embedding(edges.graph * n + edges.sender, at_sender.flatten(0, 1))
        )
        pairs = F.dropout(pairs, self._pair_dropout())
        messages = F.relu(self.message(pairs))
        heard = torch.zeros_like(at_receiver).flatten(0, 1).index_add(0, receiver, messages)
        return heard.view_as(at_receiver)


class LSTMClassifier(nn.Module):
    """The baseline without a latent graph: an LSTM's last output, a linear layer and a classifier.

    The paper gives it dropout. In the authors' code that acts between layers, and there is one.

    Args:
        hidden: size of every layer.
        tokens: number of token ids.
    """

    def __init__(self, hidden: int, tokens: int = len(VOCABULARY)) -> None:
        super().__init__()
        self.embedding = _embedding(hidden, tokens)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, hidden)
        self.classify = _classifier(hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class logits ``[batch, 10]`` of ``tokens`` ``[batch, n]``, padding last."""
        lengths = (tokens != PAD).sum(1)
        outputs = padded_outputs(self.lstm, self.embedding, tokens, lengths)
        logits: Tensor = self.classify(self.linear(_summary(outputs, lengths)))
        return logits
