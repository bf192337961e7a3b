"""Orderings against enumeration and against the definitions of their relaxations."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from structgrad.structures import Permutation
from structgrad.testing import Case, vector_masks
from tests.structures.recursion import RecursionContract


class TestPermutation(RecursionContract):
    cases: ClassVar[list[Case]] = [
        Case(Permutation(), (4,), [*vector_masks(4, 3, 1), torch.tensor([False, True, False, True])]),
        Case(Permutation(), (1,)),
        Case(Permutation(), (2,)),
    ]

    def long_log_prob(self, vertex: Tensor, scores: Tensor, items: list[int]) -> float:
        total, left = 0.0, list(items)
        for row in vertex[: len(items)]:
            chosen = int(row.argmax())
            total += float(scores[chosen] - scores[left].logsumexp(0))
            left.remove(chosen)
        return total

    def long_argmax(self, utility: Tensor, items: list[int]) -> Tensor:
        best = torch.zeros(len(utility), len(utility))
        for place, item in enumerate(sorted(items, key=lambda i: (-utility[i].item(), i))):
            best[place, item] = 1
        return best

    def embed(self, small: Tensor, items: list[int], n: int) -> Tensor:
        full = small.new_zeros(len(small), n, n)
        full[:, : len(items), items] = small
        return full

    @pytest.mark.parametrize("relaxation", ["neuralsort", "softsort"])
    def test_relaxations(self, relaxation: str) -> None:
        """Row-stochastic over what exists, the argmax at low temperature, differentiable, stable at +-100."""
        for case in self.cases:
            scores = self.scores(case)
            relaxed = case.structure.relax(relaxation, scores, case.mask)
            rows = torch.arange(case.shape[0]) < case.mask.sum(-1, keepdim=True)
            torch.testing.assert_close(relaxed.sum(-1), rows.double())
            assert (relaxed.transpose(-1, -2)[~case.mask] == 0).all()
            sharp = case.structure.relax(relaxation, scores / 1e-4, case.mask)
            torch.testing.assert_close(sharp, case.structure.argmax(scores, case.mask))
            clean = torch.nan_to_num(scores).requires_grad_()
            assert torch.autograd.gradcheck(lambda s, c=case: c.structure.relax(relaxation, s, c.mask), clean)
            large = self.scores(case, 100.0, torch.float32).requires_grad_()
            out = case.structure.relax(relaxation, large, case.mask)
            (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), large)
            assert out.isfinite().all()
            assert gradient.isfinite().all()
            assert (gradient[~case.mask] == 0).all()

    def test_neuralsort_by_its_definition(self) -> None:
        scores = torch.randn(5, dtype=torch.float64)
        distance = (scores[:, None] - scores[None]).abs().sum(1)
        for place in range(1, 6):
            expected = ((6 - 2 * place) * scores - distance).softmax(0)
            torch.testing.assert_close(Permutation().neuralsort(scores)[place - 1], expected)
