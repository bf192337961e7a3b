"""OneHot: the contract, and entmax as a second opinion."""

from __future__ import annotations

import entmax
import pytest
import torch

from structgrad.structures.one_hot import OneHot
from structgrad.testing import Case, StructureContract, vector_masks


class TestOneHot(StructureContract):
    cases = [  # noqa: RUF012
        Case(OneHot(), (5,), [*vector_masks(5, 3, 2, 1), torch.tensor([False, True, False, True, True])]),
        Case(OneHot(), (1,)),
        Case(OneHot(), (2,), vector_masks(2, 1)),
    ]


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_sparsemax_agrees_with_the_package(scale: float) -> None:
    scores = (scale * torch.randn(50, 256)).requires_grad_()
    upstream = torch.randn(50, 256)
    ours, theirs = OneHot().project(scores), entmax.sparsemax(scores, dim=-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 if scale > 1 else 2e-6)
    ours_grad, theirs_grad = (torch.autograd.grad(x, scores, upstream)[0] for x in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-5)


def test_entmax_between_softmax_and_sparsemax() -> None:
    one_hot, scores = OneHot(), torch.randn(4, 6, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False])
    torch.testing.assert_close(one_hot.entmax(scores, 1, mask), one_hot.marginals(scores, mask))
    torch.testing.assert_close(one_hot.entmax(scores, 2, mask), one_hot.project(scores, mask))
    torch.testing.assert_close(one_hot.entmax(scores, 1.5, mask)[:, mask], entmax.entmax15(scores[:, mask], dim=-1))
    assert (one_hot.entmax(scores, 1.3, mask)[:, ~mask] == 0).all()
    learnt = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    point = one_hot.entmax(scores, learnt, mask)
    torch.testing.assert_close(point, one_hot.entmax(scores, 1.7, mask), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(point[:, 0].sum(), learnt)
    step = 1e-4
    ends = [one_hot.entmax(scores, 1.7 + sign * step, mask)[:, 0].sum() for sign in (1, -1)]
    torch.testing.assert_close(gradient, (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-4)
