"""OneHot: the contract, and entmax as a second opinion."""

from __future__ import annotations

from typing import Any

import entmax
import mpmath
import pytest
import torch

from structgrad import losses
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


@pytest.mark.parametrize("alpha", [1.0001, 1.3, 1.5, 2.5, 4.0, 8.0, 20.0, 50.0])
def test_entmax_is_exact(alpha: float) -> None:
    """Against 200 digits: float64 has too few for the threshold of large alphas."""
    scores = 0.1 * torch.randn(6, 7, dtype=torch.float64)
    points = OneHot().entmax(scores, alpha)
    with mpmath.workdps(200):
        power = mpmath.mpf(alpha) - 1
        for s, p in zip(scores.tolist(), points.tolist(), strict=True):
            expected = exact_entmax([mpmath.mpf(x) for x in s], power)
            assert [float(e) for e in expected] == pytest.approx(p, abs=1e-9)


def exact_entmax(scores: list[Any], power: Any) -> list[Any]:
    """By bisection of the threshold."""
    scaled = [power * s for s in scores]
    low, high = max(scaled) - 1, max(scaled)
    for _ in range(600):
        middle = (low + high) / 2
        total = sum(max(s - middle, mpmath.mpf(0)) ** (1 / power) for s in scaled)
        low, high = (middle, high) if total >= 1 else (low, middle)
    return [max(s - low, mpmath.mpf(0)) ** (1 / power) for s in scaled]


@pytest.mark.parametrize("alpha", [4.0, 20.0, 50.0])
def test_entmax_of_large_alphas_has_finite_gradients_and_losses(alpha: float) -> None:
    scores = (0.1 * torch.randn(50, 7)).requires_grad_()
    point = OneHot().entmax(scores, alpha)
    torch.testing.assert_close(point.sum(-1), torch.ones(50))
    (gradient,) = torch.autograd.grad((point * torch.randn(50, 7)).sum(), scores)
    assert gradient.isfinite().all()
    loss = losses.entmax_loss(scores, torch.arange(50) % 7, alpha=alpha)
    assert loss.isfinite().all()
    assert (loss >= 0).all()


def test_entmax_with_an_alpha_for_each_example() -> None:
    scores = torch.randn(5, 6, dtype=torch.float64)
    alpha = torch.tensor([1.0, 1.2, 1.5, 2.0, 3.0], dtype=torch.float64)
    point = OneHot().entmax(scores, alpha[:, None])
    for s, a, p in zip(scores, alpha.tolist(), point, strict=True):
        torch.testing.assert_close(p, OneHot().entmax(s, a), rtol=1e-9, atol=1e-12)
    weights = torch.randn(5, 6, dtype=torch.float64)
    learnt = alpha[:, None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((OneHot().entmax(scores, learnt) * weights).sum(), learnt)
    upper, lower = (OneHot().entmax(scores, alpha[:, None].clamp_min(1 + 1e-5) + e) for e in (1e-5, -1e-5))
    torch.testing.assert_close(gradient[:, 0], ((upper - lower) * weights).sum(-1) / 2e-5, rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradcheck(lambda s: OneHot().entmax(s, alpha[:, None]), scores.requires_grad_())


@pytest.mark.parametrize("alpha", [0.9, -1.0, torch.tensor([[1.5], [0.5]]), float("nan"), float("inf")])
def test_entmax_below_softmax_is_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be at least 1"):
        OneHot().entmax(torch.zeros(2, 3), alpha)


def test_density_of_a_relaxed_sample() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    temperature = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    point, expected = torch.zeros(3, 4, dtype=torch.float64), []
    for b, t in enumerate(temperature):  # theirs are of one temperature
        theirs = torch.distributions.RelaxedOneHotCategorical(t, logits=scores[b, mask])
        point[b, mask] = theirs.rsample()
        expected.append(theirs.log_prob(point[b, mask]))
    torch.testing.assert_close(OneHot().relaxed_log_density(point, scores, temperature, mask), torch.stack(expected))
    one = OneHot().relaxed_log_density(point[0], scores[0], 0.3, mask)
    torch.testing.assert_close(one, expected[0])
    assert torch.autograd.gradcheck(
        lambda s: OneHot().relaxed_log_density(point, s, temperature, mask), scores.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_vertices_of_any_type_are_checked(dtype: torch.dtype) -> None:
    scores, vertex = torch.randn(2, 3), torch.eye(3, dtype=dtype)[:2]
    OneHot().check_vertex(vertex, scores)
    with pytest.raises(ValueError, match=r"example \[1\] is no vertex"):
        OneHot().check_vertex(torch.stack([vertex[0], vertex[0] + vertex[1]]), scores)
