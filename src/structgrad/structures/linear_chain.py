"""Sequences of labels with scores for pairs of neighbours."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.hypergraph import Hypergraph
from structgrad.algorithms.scan import chain_total
from structgrad.algorithms.semirings import Aggregation
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Layout
from structgrad.structures.semi_markov import segment_graph


class LinearChain(Derivations):
    """Sequences of n labels out of C: tagging (Lafferty et al. 2001; Niculae et al. 2025, section
    2.3.3).

    Parts are the transitions ``[n - 1, C, C]``: ``[i, c, d]`` says that position i has label c and
    position i + 1 has label d. A position that touches no existing part is absent. For L positions
    the mask is True at ``i < L - 1``; an example of one position has no part. The method
    :meth:`transitions` makes scores from those of labels and of pairs of labels. The method
    :meth:`read` gives the labels of a vertex.

    ``argmax`` is the algorithm of Viterbi (1967), and ``marginals`` use forward-backward (Baum
    1972). ``sample`` uses forward filtering and backward sampling (Frühwirth-Schnatter 1994). Every
    oracle is O(n C^2) an example.

    Args:
        labels: C, at least 1.

    Raises:
        TypeError: if labels is not a whole number.
        ValueError: if there is no label; from every oracle for scores of another shape, or (eager
            CPU code) if an example has no sequence.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self, labels: int) -> None:
        check_count("labels", labels)
        self.labels = labels
        self.layout = Layout("transitions", ("n - 1", "C", "C"))

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n positions."""
        return (max(n - 1, 0), self.labels, self.labels)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; C must also be that of the structure."""
        self.layout.check(scores)
        if scores.shape[-1] != self.labels:
            shape = f"[..., n - 1, {self.labels}, {self.labels}]"
            raise ValueError(
                f"scores over transitions of {self.labels} labels have shape {shape}; got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def transitions(self, labels: Tensor, pairs: Tensor) -> Tensor:
        """Scores of transitions that add up to the scores of labels and of neighbouring pairs.

        Args:
            labels: ``[*batch, n, C]``, n at least 2.
            pairs: broadcastable to ``[*batch, n - 1, C, C]``, e.g. ``[C, C]``.

        Returns:
            ``[*batch, n - 1, C, C]``. A transition has the score of the label to which it leads.
            The first one also has the score of the label from which it comes.

        Raises:
            ValueError: for n below 2. A shorter sequence in a batch is a matter of ``lengths``.
        """
        if labels.shape[-2] < 2:
            raise ValueError(f"transitions need two positions or more; got labels {list(labels.shape)}")
        first = torch.nn.functional.pad(labels[..., :1, :], (0, 0, 0, labels.shape[-2] - 2))
        return first[..., :, None] + labels[..., 1:, None, :] + pairs

    def read(self, vertex: Tensor) -> Tensor:
        """The label of every position: int64 ``[*batch, n]``, -1 for absent positions.

        A sequence of one position has no part that says its label, so its reading is -1.
        """
        on = vertex.detach() > 0
        to = torch.where(on.any((-2, -1)), on.any(-2).int().argmax(-1), -1)
        start = torch.where(on.any((-2, -1)), on.any(-1).int().argmax(-1), -1)[..., :1]
        return torch.cat([start if on.shape[-3] else start.new_full((*on.shape[:-3], 1), -1), to], -1)

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return self.shape(reading.shape[-1])

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        readings.in_range(reading, self.labels, "labels")
        readings.without_gaps(reading, "labels")
        return readings.transitions(reading[..., :-1], reading[..., 1:], shape)

    def covered(self, vertex: Tensor) -> Tensor:
        return vertex.flatten(-2).any(-1)[..., None, None]

    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        return chain_total(scores, self._size(exists), plus)  # in fewer steps than the graph has levels

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return segment_graph(shape[0], 1, self.labels)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.flatten(-2).any(-1))

    def enumerate(self, *shape: int) -> Tensor:
        """All ``C^n`` sequences (one, if n < 2): ``[V, n - 1, C, C]``."""
        self.check_shape_listable(*shape)
        steps = shape[0]
        every = torch.tensor(list(itertools.product(range(self.labels), repeat=steps + 1)))
        one_hot = torch.nn.functional.one_hot(every, self.labels).double()
        vertices = one_hot[:, :-1, :, None] * one_hot[:, 1:, None, :]
        return vertices if steps else vertices[:1]
