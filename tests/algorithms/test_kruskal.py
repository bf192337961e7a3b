"""Minimum spanning trees: the torch version and the compiled one."""

from __future__ import annotations

import torch

from structgrad.algorithms import kruskal
from structgrad.structures import SpanningTree
from tests.structures._trees import cases_for_both_paths, weight

STRUCTURE = SpanningTree()


def test_plain_torch_agrees_with_the_compiled_code() -> None:
    for rounded in (False, True):
        scores, exists = cases_for_both_paths(STRUCTURE)
        scores = scores.round() if rounded else scores
        vertex, choices, reached = kruskal.minimum_spanning_tree(scores, exists)
        plain, plain_choices, plain_reached = kruskal.torch_minimum_spanning_tree(scores, exists)
        assert torch.equal(reached, plain_reached)
        found, other = (weight(STRUCTURE, v, scores.nan_to_num()) for v in (vertex, plain))
        torch.testing.assert_close(other, found)
        if not rounded:
            assert torch.equal(vertex, plain)
            assert torch.equal(choices, plain_choices)
        assert torch.equal(kruskal.joined_at(choices, 7), kruskal.torch_joined_at(choices, 7))
    broken = exists.clone()
    broken[0, :3, 3:] = False
    for function in (kruskal.minimum_spanning_tree, kruskal.torch_minimum_spanning_tree):
        assert function(scores, broken)[2].tolist() == [False] + [True] * (len(scores) - 1)
