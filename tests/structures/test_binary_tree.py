"""Binary trees against enumeration and the recursion in plain Python."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.structures import BinaryTree
from structgrad.testing import Case, vector_masks
from tests.structures.recursion import RecursionContract


class TestBinaryTree(RecursionContract):
    cases: ClassVar[list[Case]] = [
        Case(BinaryTree(), (4,), [*vector_masks(4, 3, 1), torch.tensor([False, True, True, True])]),
        Case(BinaryTree(), (1,)),
        Case(BinaryTree(), (2,)),
    ]

    def long_log_prob(self, vertex: Tensor, scores: Tensor, items: list[int]) -> float:
        def subtree(node: int) -> list[int]:
            return [node, *(i for child in vertex[node].nonzero().flatten().tolist() for i in subtree(child))]

        return float(sum(scores[i] - scores[subtree(i)].logsumexp(0) for i in items))

    def long_argmax(self, utility: Tensor, items: list[int]) -> Tensor:
        best = torch.zeros(len(utility), len(utility))

        def build(span: list[int]) -> int | None:
            if not span:
                return None
            root = max(span, key=lambda i: (utility[i].item(), -i))
            for side in ([i for i in span if i < root], [i for i in span if i > root]):
                child = build(side)
                if child is not None:
                    best[root, child] = 1
            return root

        build(items)
        return best

    def embed(self, small: Tensor, items: list[int], n: int) -> Tensor:
        full = small.new_zeros(len(small), n, n)
        grid = torch.tensor(items)
        full[:, grid[:, None], grid[None]] = small
        return full

    def test_choices_are_parents(self) -> None:
        trace = BinaryTree().trace(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([True, True, True, False]))
        assert trace.choices.tolist() == [1, 1, 1, -1]
        trace = BinaryTree().trace(torch.tensor([1.0, 1.0, 1.0]))
        assert trace.choices.tolist() == [0, 0, 1]

    def test_long_sequences(self) -> None:
        """Depth and pointer doubling at a size where a chain is deep: sorted weights make a path."""
        n = 70
        trace = BinaryTree().trace(torch.arange(1.0, n + 1))
        assert trace.choices.tolist() == [0, *range(n - 1)]
        scores = torch.randn(n, dtype=torch.float64)
        expected = (scores - scores.flip(0).logcumsumexp(0).flip(0)).sum()
        torch.testing.assert_close(BinaryTree().trace_log_prob(trace, scores), expected)
