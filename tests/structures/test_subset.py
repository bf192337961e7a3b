"""Subset: the contract in all layouts, and what public code got wrong."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from structgrad.structures.subset import Subset
from structgrad.testing import Case, StructureContract, length_masks, vector_masks


class TestSubset(StructureContract):
    cases = [  # noqa: RUF012
        Case(Subset(), (4,), [*vector_masks(4, 2, 1, 0), torch.tensor([False, True, False, True])]),
        Case(Subset(), (1,)),
        Case(Subset("matrix"), (2, 2), [torch.tensor([[True, False], [True, True]])]),
        Case(Subset("directed"), (3, 3), length_masks(3, 2, 1)),
        Case(Subset("undirected"), (4, 4), length_masks(4, 3, 2, 1)),
    ]


def test_categorical_relaxation_is_capped_at_one() -> None:
    utility = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    mask = torch.tensor([True, True, True, False])
    expected = torch.tensor([-1.0, 0.0, 0.0, 0.0]).exp() * mask
    torch.testing.assert_close(Subset().relax("categorical", utility, mask), expected)


@pytest.mark.parametrize("score", [-3.0, 0.0, 2.0])
def test_conditional_utilities_mix_to_the_logistic(score: float) -> None:
    """Kolmogorov-Smirnov at a level of 1e-4, fixed seed; the bit is given back, and the gradient is the flow's."""
    scores = torch.full((20_000, 1), score, dtype=torch.float64, requires_grad=True)
    structure = Subset()
    vertex = structure.sample(scores)
    utility = structure.conditional_utility(vertex, scores)
    assert torch.equal(structure.argmax(utility), vertex)
    assert stats.kstest(utility.detach()[:, 0].numpy(), stats.logistic(loc=score).cdf).pvalue > 1e-4
    # Reparameterised: at a fixed quantile F(u | x; s) of the truncated distribution, du/ds = -(dF/ds) / (dF/du).
    (slope,) = torch.autograd.grad(utility.sum(), scores)
    a, m = (2 * vertex - 1) * score, utility.detach().abs()
    expected = 1 - (-a).sigmoid() / (m - a).sigmoid()
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


def test_conditional_utilities_survive_extremes_and_layouts() -> None:
    scores = torch.tensor([[-100.0, 100.0, 0.0]], requires_grad=True)
    for bits in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]):
        vertex = torch.tensor([bits])
        utility = Subset().conditional_utility(vertex, scores)
        assert torch.equal((utility > 0).float(), vertex)
        (gradient,) = torch.autograd.grad(utility.sum(), scores)
        assert gradient.isfinite().all()
    structure = Subset("undirected")
    square = torch.randn(4, 4)
    vertex = structure.sample(square)
    utility = structure.conditional_utility(vertex, square)
    assert torch.equal((utility > 0).float(), vertex)
    assert torch.equal(utility, utility.mT)
