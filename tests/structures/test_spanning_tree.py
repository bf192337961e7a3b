"""SpanningTree: the contract, networkx as a second opinion, and the failures seen in public code."""

from __future__ import annotations

import itertools
from typing import ClassVar

import networkx as nx
import pytest
import torch

from structgrad.structures import SpanningTree
from structgrad.testing import Case, length_masks
from tests.structures._trees import TreeContract, sparse_masks, weight


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


STRUCTURE = SpanningTree()


class TestSpanningTree(TreeContract):
    structure = STRUCTURE
    cases: ClassVar[list[Case]] = [
        Case(SpanningTree(), (4, 4), length_masks(4, 3, 2, 1, 0) + sparse_masks(STRUCTURE, 4)),
        Case(SpanningTree(), (5, 5), length_masks(5, 3) + sparse_masks(STRUCTURE, 5)),
        Case(SpanningTree(), (1, 1)),
        Case(SpanningTree(), (2, 2), length_masks(2, 1)),
    ]

    def check_totals(self, mean: torch.Tensor) -> None:
        torch.testing.assert_close(mean.triu(1).sum((1, 2)), torch.full((20,), 29.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_argmax_is_optimal_says_networkx(n: int, scale: float) -> None:
    scores = torch.randn(25, n, n) * scale
    scores[10:15] = scores[10:15].round()  # ties
    found = STRUCTURE.argmax(scores)
    for s, x in zip(scores, found, strict=True):
        graph = nx.Graph()
        graph.add_weighted_edges_from((i, j, s[i, j].item()) for i in range(n) for j in range(i + 1, n))
        best = nx.maximum_spanning_tree(graph)
        expected = sum(d["weight"] for *_, d in best.edges(data=True))
        torch.testing.assert_close(weight(STRUCTURE, x, s).item(), expected, rtol=1e-9, atol=1e-6)
        assert nx.is_tree(nx.Graph([(int(i), int(j)) for i, j in x.nonzero()]))


def test_top_k_is_what_networkx_lists() -> None:
    n, k = 8, 12
    scores = torch.randn(2, n, n, dtype=torch.float64)
    _, values = STRUCTURE.top_k(scores, k)
    for s, found in zip(scores, values, strict=True):
        graph = nx.Graph()
        graph.add_weighted_edges_from((i, j, s[i, j].item()) for i in range(n) for j in range(i + 1, n))
        trees = itertools.islice(nx.SpanningTreeIterator(graph, minimum=False), k)
        expected = [sum(d["weight"] for *_, d in tree.edges(data=True)) for tree in trees]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_marginals_at_n_400_are_probabilities() -> None:
    mean = STRUCTURE.marginals(5 * torch.randn(1, 400, 400))
    assert ((mean >= 0) & (mean <= 1)).all()
    torch.testing.assert_close(mean.sum() / 2, torch.tensor(399.0))


def test_disconnected_example_is_named() -> None:
    mask = torch.ones(2, 3, 4, 4, dtype=torch.bool)
    mask[1, 2, :2, 2:] = False
    scores = torch.randn(2, 3, 4, 4)
    for oracle in ("argmax", "log_partition", "marginals", "sample", "entropy", "trace"):
        with pytest.raises(ValueError, match=r"example \(1, 2\) has no spanning tree"):
            getattr(STRUCTURE, oracle)(scores.abs(), mask)
