"""Binary trees over the spans of a sequence."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Layout


class Constituency(Derivations):
    """Binary constituency trees over n positions with a label on every span (Niculae et al. 2025,
    table 2.2).

    Parts are ``[n, n, C]``: ``[i, j, c]`` with i <= j is the span of the positions i to j, both
    included, with label c. A tree has 2n - 1 spans, which include single positions and the whole
    sequence. Each has one label; for C = 1 the tree is unlabelled. A position that no existing part
    covers is absent. Absent positions are the last ones: for L positions the mask is True at ``j <
    L``.

    ``argmax`` is the algorithm of Cocke, Kasami and Younger; ``marginals`` use inside-outside
    (Baker 1979). Every oracle is O(n^3 + n^2 C) an example.

    Args:
        labels: C, at least 1.

    Raises:
        TypeError: if labels is not a whole number.
        ValueError: if there is no label; from every oracle for scores of another shape, or (eager
            CPU code) if an example has no tree.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self, labels: int = 1) -> None:
        check_count("labels", labels)
        self.labels = labels
        self.layout = Layout("spans", ("n", "n", "C"))

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n positions."""
        return (n, n, self.labels)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; C must also be that of the structure."""
        self.layout.check(scores)
        if scores.shape[-1] != self.labels:
            raise ValueError(
                f"scores over spans with {self.labels} labels have shape [..., n, n, {self.labels}]; "
                f"got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Spans that do not end before they start."""
        n = scores.shape[-2]
        forward = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu()
        return super().parts(scores, mask) & forward[:, :, None]

    def read(self, vertex: Tensor) -> Tensor:
        """The spans (first position, last position, label): int64 ``[*batch, m, 3]``, -1 after the
        last one.

        Outer spans come before inner ones, and left ones before right ones.
        """
        return readings.labelled_spans(vertex.detach() > 0)

    def covered(self, vertex: Tensor) -> Tensor:
        return readings.covered_words(vertex)

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(shape[0], self.labels)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.any(-1).any(-2))

    def enumerate(self, *shape: int) -> Tensor:
        """All trees with all labels, ``Catalan(n - 1) C^(2n - 1)``: ``[V, n, n, C]``."""
        self.check_shape_listable(*shape)
        n = shape[0]
        if not n:
            return torch.zeros(1, *shape, dtype=torch.float64)
        found = []
        for spans in binary_trees(0, n - 1):
            start, stop = torch.tensor(spans).T
            for labels in itertools.product(range(self.labels), repeat=len(spans)):
                vertex = torch.zeros(shape, dtype=torch.float64)
                vertex[start, stop, torch.tensor(labels)] = 1
                found.append(vertex)
        return torch.stack(found)


def binary_trees(i: int, j: int) -> Iterator[list[tuple[int, int]]]:
    """The spans of every tree over the positions i to j."""
    if i == j:
        yield [(i, j)]
    for k in range(i, j):
        for left, right in itertools.product(binary_trees(i, k), binary_trees(k + 1, j)):
            yield [(i, j), *left, *right]


@functools.lru_cache(maxsize=64)
def _graph(n: int, labels: int) -> Hypergraph:
    """Built bottom up: two trees side by side, then a labelled span above them. Size: positions of
    an example.
    """
    builder, tree = Builder(), np.full((n, n), ZERO)
    for width in range(n):
        i = np.arange(n - width)[:, None]
        j, k = i + width, i + np.arange(width)
        below = builder.level(tree[i, k], tree[k + 1, j]) if width else np.full(n, ONE)
        tree[i[:, 0], j[:, 0]] = builder.level(below[:, None], ONE, (i * n + j) * labels + np.arange(labels))
    return builder.build(np.concatenate([[ONE], tree[0]] if n else [[ONE]]))
