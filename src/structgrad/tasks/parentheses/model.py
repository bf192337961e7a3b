"""The networks of the parentheses experiment: the language model over trees and the encoder of sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from structgrad.algorithms.eager import values_can_be_read
from structgrad.tasks.lstm import lstm_over, padded_outputs
from structgrad.tasks.parentheses.data import NO_CHILD, PAD, vocabulary_size


class TreeDecoder(nn.Module):
    """A language model that generates a binary tree breadth first, a token or "no child" at every
    place.

    This is the non-monotonic model of Welleck et al. (2019) without conditioning. An LSTM reads the
    tokens at the previous places, in level order. A linear layer, ReLU and the embedding matrix
    make the scores of the next token. The first place, the root, is always a token.

    Args:
        types: number of types of brackets.
        embedding: size of token embeddings.
        hidden: number of units of the single-layer LSTM.
    """

    def __init__(self, types: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary_size(types)
        # The last entry is read before the root.
        self.embedding = nn.Embedding(self.vocabulary + 1, embedding)
        self.lstm = nn.LSTM(embedding, hidden)
        self.project = nn.Linear(hidden, embedding)
        self.bias = nn.Parameter(torch.zeros(self.vocabulary))

    def forward(self, places: Tensor, lengths: Tensor) -> Tensor:
        """Negative log-likelihood of trees with their tokens, teacher forced.

        Args:
            places: int64 ``[N, p]``, N > 0 (see
                :func:`~structgrad.tasks.parentheses.trees.level_order`).
            lengths: int64 ``[N]``, number of tokens; the tree has ``2 length + 1`` places.

        Returns:
            ``[N]``, in nats.
        """
        if values_can_be_read(lengths):
            return self._packed(places, lengths)
        return self._padded(places, lengths)  # on other devices, reading lengths would wait for the device

    def _packed(self, places: Tensor, lengths: Tensor) -> Tensor:
        trees, most = places.shape
        every = torch.arange(places.numel()).view_as(places)
        existing = pack_padded_sequence(every, 2 * lengths + 1, batch_first=True, enforce_sorted=False)
        previous = F.pad(places[:, :-1], (1, 0), value=self.vocabulary).take(existing.data)
        states = lstm_over(self.lstm, self.embedding, PackedSequence(previous, *existing[1:])).data
        scores = self._scores(states)
        losses = F.cross_entropy(scores, places.take(existing.data), reduction="none")
        tree = existing.data // most
        # All roots come first.
        summands, of_trees = torch.cat([losses, self._no_root(scores[:trees])]), torch.cat([tree, tree[:trees]])
        return losses.new_zeros(trees).index_add(0, of_trees, summands)

    def _padded(self, places: Tensor, lengths: Tensor) -> Tensor:
        targets = places.T
        previous = F.pad(targets[:-1], (0, 0, 1, 0), value=self.vocabulary)
        states, _ = self.lstm(self.embedding(previous))
        counted = torch.arange(len(targets), device=places.device)[:, None] <= 2 * lengths
        scores = self._scores(states)
        losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return torch.where(counted, losses, 0.0).sum(0) + self._no_root(scores[0])

    def _no_root(self, scores: Tensor) -> Tensor:
        """What is added to a tree's loss because its root cannot be "no child"."""
        return -F.softplus(scores[:, NO_CHILD] - scores[:, NO_CHILD + 1 :].logsumexp(1))

    def _scores(self, states: Tensor) -> Tensor:
        return F.linear(F.relu(self.project(states)), self.embedding.weight[: self.vocabulary], self.bias)

    @torch.no_grad()
    def generate(self, samples: int, places: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample trees, all at once; complete ones leave the batch.

        Args:
            samples: number of trees.
            places: number of places at which a tree is cut off.
            generator: source of randomness, on the device of the parameters.

        Returns:
            int64 ``[samples, places]`` in level order, 0 beyond the end; and bool ``[samples]``:
            which are complete.
        """
        device, hidden = self.bias.device, self.lstm.hidden_size
        # A token adds the same to the gates at every place.
        to_gates, recurrent, *biases = self.lstm.parameters()
        inputs = F.linear(self.embedding.weight, to_gates, biases[0] + biases[1])
        out = torch.full((samples, places), NO_CHILD, dtype=torch.int64, device=device)
        rows = torch.arange(samples, device=device)
        token = torch.full((samples,), self.vocabulary, dtype=torch.int64, device=device)
        state, cell = (inputs.new_zeros(samples, hidden) for _ in range(2))
        missing = torch.ones(samples, dtype=torch.int64, device=device)  # places that the tree still needs
        for place in range(places):
            # In place, because thousands of sequences take much memory.
            gates = F.embedding(token, inputs).addmm_(state, recurrent.T)
            enter, keep, change, leave = gates.chunk(4, 1)
            cell = cell.mul_(keep.sigmoid_()).addcmul_(enter.sigmoid_(), change.tanh_())
            state = cell.tanh().mul_(leave.sigmoid_())
            scores = self._scores(state)
            if place == 0:
                scores[:, NO_CHILD] = -torch.inf
            # The first of exponential clocks with the tokens' rates.
            noise = torch.empty_like(scores).exponential_(generator=generator)
            token = (scores.softmax(1) / noise).argmax(1)
            out[rows, place] = token
            missing = missing + torch.where(token == NO_CHILD, -1, 1)
            going = missing.nonzero().squeeze(1)
            if len(going) < len(rows):
                rows, token, state, cell, missing = (t[going] for t in (rows, token, state, cell, missing))
            if not len(rows):
                break
        complete = torch.ones(samples, dtype=torch.bool, device=device)
        complete[rows] = False
        return out, complete


class TokenEncoder(nn.Module):
    """Scores every token of a sequence by two LSTMs, one in each direction.

    Args:
        types: number of types of brackets.
        embedding: size of token embeddings.
        hidden: size of the context; each direction has half of it.

    Raises:
        ValueError: for an odd ``hidden``.
    """

    def __init__(self, types: int, embedding: int, hidden: int) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"the encoder's two directions share task.hidden, which must be even; got {hidden}")
        self.embedding = nn.Embedding(vocabulary_size(types), embedding, padding_idx=PAD)
        self.forwards = nn.LSTM(embedding, hidden // 2, batch_first=True)
        self.backwards = nn.LSTM(embedding, hidden // 2, batch_first=True)
        self.score = nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode padded sequences.

        Args:
            tokens: int64 ``[batch, n]``. Padding comes last and has no influence.

        Returns:
            scores ``[batch, n]``, arbitrary at padding; and a summary ``[batch, hidden]``, the last
            output of each LSTM.
        """
        n, lengths = tokens.shape[1], (tokens != PAD).sum(1, keepdim=True)
        position = torch.arange(n, device=tokens.device)
        # Reverse every sequence within its length; the reversal is its own inverse.
        mirrored = torch.where(position < lengths, lengths - 1 - position, position)
        ahead = padded_outputs(self.forwards, self.embedding, tokens, lengths[:, 0])
        back = padded_outputs(self.backwards, self.embedding, tokens.gather(1, mirrored), lengths[:, 0])
        last = (lengths - 1).clamp_min(0)[..., None].expand(-1, 1, ahead.shape[2])
        summary = torch.cat([ahead.gather(1, last), back.gather(1, last)], 2).squeeze(1)
        states = torch.cat([ahead, back.gather(1, mirrored[..., None].expand(back.shape))], 2)
        return self.score(states).squeeze(2), summary
