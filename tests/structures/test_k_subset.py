"""KSubset: the contract, and its further relaxations against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structgrad.structures.k_subset import KSubset
from structgrad.testing import Case, StructureContract, length_masks, vector_masks


class TestKSubset(StructureContract):
    cases = [  # noqa: RUF012
        Case(KSubset(2), (5,), [*vector_masks(5, 4, 3, 2), torch.tensor([False, True, False, True, True])]),
        Case(KSubset(1), (1,)),
        Case(KSubset(1), (4,), vector_masks(4, 1)),
        Case(KSubset(3), (3,)),
        Case(KSubset(3, "undirected"), (4, 4), length_masks(4, 3)),
    ]


scores_of = StructureContract().scores


def clean(scores: Tensor) -> Tensor:
    """The scores without NaN, which gradcheck cannot perturb."""
    return scores.nan_to_num().requires_grad_()


class TestEntropyRelaxations:
    """The optimality conditions of both problems, their gradients, masks, extremes and their limit."""

    cases = [*TestKSubset.cases, Case(KSubset(2, "undirected"), (4, 4), length_masks(4, 3))]  # noqa: RUF012

    @pytest.mark.parametrize("name", ["categorical", "binary"])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0])
    def test_optimality(self, name: str, scale: float) -> None:
        for case in self.cases:
            structure = case.structure
            assert isinstance(structure, KSubset)
            utility = scores_of(case, scale)
            x = structure.layout.flatten(structure.relax(name, utility, case.mask))
            exists = structure.layout.flatten(structure.parts(utility, case.mask))
            u = structure.layout.flatten(utility)
            assert ((x >= 0) & (x <= 1)).all()
            assert (x[~exists] == 0).all()
            torch.testing.assert_close(x.sum(-1), torch.full_like(x[:, 0], structure.k), rtol=0, atol=1e-9)
            # Stationarity: the gradient of the objective is one number on the free parts, and no less on the capped.
            inside = exists & (x > 1e-9) & (x < 1 - 1e-9)
            gradient = u - (x.log() if name == "categorical" else x.logit())
            for row in range(len(x)):
                free = gradient[row][inside[row]]
                if len(free):
                    torch.testing.assert_close(free, free.mean().expand_as(free), rtol=0, atol=1e-5)
                    if name == "categorical":
                        capped = exists[row] & (x[row] >= 1 - 1e-9)
                        assert (u[row][capped] >= free.mean() - 1e-5).all()

    @pytest.mark.parametrize("name", ["categorical", "binary", "softsub", "l2x"])
    def test_gradients(self, name: str) -> None:
        for case in self.cases:
            structure = case.structure
            draws = structure.relaxations[name].draws
            utility = clean(torch.stack([scores_of(case) for _ in range(draws)]) if draws else scores_of(case))
            assert torch.autograd.gradcheck(
                lambda u, s=structure, m=case.mask, n=name: s.relax(n, u, m, 0.7), utility, atol=1e-5, rtol=1e-4
            )

    @pytest.mark.parametrize("name", ["categorical", "binary", "softsub"])
    def test_float32_extremes(self, name: str) -> None:
        for case in self.cases:
            structure = case.structure
            utility = scores_of(case, 100.0, torch.float32).clamp(-100, 100).requires_grad_()
            x = structure.relax(name, utility, case.mask, 0.5)
            exact = structure.relax(name, utility.detach().double(), case.mask, 0.5)
            torch.testing.assert_close(x.double(), exact, rtol=1e-3, atol=1e-4)
            (gradient,) = torch.autograd.grad((x * torch.randn_like(x)).sum(), utility)
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("name", ["categorical", "binary", "softsub", "euclidean", "exp_family"])
    def test_limit_is_the_argmax(self, name: str) -> None:
        structure, utility = KSubset(3), torch.randn(20, 8, dtype=torch.float64)
        sharp = structure.relax(name, utility / 1e-4, None, 1e-4)
        torch.testing.assert_close(sharp, structure.argmax(utility), rtol=0, atol=1e-3)


def test_a_temperature_an_example() -> None:
    """In relaxations that are no function of the quotient alone."""
    utility, temperature = torch.randn(3, 5), torch.tensor([0.5, 1.0, 2.0])
    together = KSubset(2).relax("softsub", utility, temperature=temperature)
    for row, alone in enumerate(temperature):
        torch.testing.assert_close(together[row], KSubset(2).relax("softsub", utility[row], temperature=float(alone)))


def test_softsub_is_the_published_recursion() -> None:
    """Xie and Ermon's loop, written with 1 - p, where that is accurate."""
    temperature = 0.7
    a = torch.randn(4, 6, dtype=torch.float64)
    expected, current = torch.zeros_like(a), a.clone()
    for _ in range(3):
        p = (current / temperature).softmax(-1)
        expected += p
        current = current + torch.log1p(-p)
    torch.testing.assert_close(KSubset(3).softsub(a / temperature, temperature=temperature), expected)


def test_l2x_is_a_maximum_of_softmaxes() -> None:
    utility = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(KSubset(3).relax("l2x", utility), utility.softmax(-1).amax(0))
    with pytest.raises(ValueError, match="l2x takes"):
        KSubset(3).l2x(utility[:2])


def test_marginal_gradients_do_not_depend_on_the_size_of_the_upstream() -> None:
    """Finite differences were off by 18 percent for large and small upstream gradients; float32, n = 350, k = 10."""
    structure = KSubset(10)
    scores = torch.randn(4, 350, requires_grad=True)
    upstream = torch.randn(4, 350)
    grads = []
    for scale in (1e-6, 1.0, 1e6):
        (gradient,) = torch.autograd.grad(structure.marginals(scores), scores, scale * upstream)
        grads.append(gradient / scale)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grads[2], grads[1], rtol=1e-4, atol=1e-7)
    wide = scores.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(structure.marginals(wide), wide, upstream.double())
    torch.testing.assert_close(grads[1].double(), exact, rtol=1e-4, atol=1e-7)


def test_marginals_at_size() -> None:
    """Sums of k with k up to 50 and scores of +-100, float32."""
    for k, n in ((1, 400), (10, 350), (50, 350), (50, 50)):
        for scale in (1.0, 100.0):
            mean = KSubset(k).marginals((scale * torch.randn(3, n)).clamp(-100, 100))
            torch.testing.assert_close(mean.sum(-1), torch.full((3,), float(k)), rtol=1e-5, atol=1e-4)
            assert ((mean >= 0) & (mean <= 1)).all()
