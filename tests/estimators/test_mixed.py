"""Hard Concrete and HardKuma: probabilities, divergences and penalties against quadrature and samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from structgrad.diagnose import Problem
from structgrad.estimators import Estimator, HardConcrete, HardKuma
from structgrad.estimators.mixed import StretchAndRectify
from structgrad.structures import KSubset, Subset, UnsupportedError

KINDS: dict[str, StretchAndRectify] = {
    "hard_concrete": HardConcrete(Subset()),
    "hard_concrete narrow": HardConcrete(Subset(), temperature=0.3, low=-0.01, high=1.02),
    "hard_kuma": HardKuma(Subset()),
    "hard_kuma bent": HardKuma(Subset(), concentration=0.4),
}
each = pytest.mark.parametrize("name", KINDS)


def reference(estimator: StretchAndRectify, score: float) -> tuple[Callable[[float], float], ...]:
    """Density of S, distribution function and what that lacks to 1, written anew."""
    if isinstance(estimator, HardConcrete):
        t = estimator.temperature
        logistic = stats.logistic(loc=score)
        return (
            lambda s: t / (s * (1 - s)) * float(logistic.pdf(t * math.log(s / (1 - s)))),
            lambda s: float(logistic.cdf(t * math.log(s / (1 - s)))),
            lambda s: float(logistic.sf(t * math.log(s / (1 - s)))),
        )
    assert isinstance(estimator, HardKuma)
    shift = math.log(math.expm1(estimator.concentration))
    a, b = math.log1p(math.exp(score + shift)), math.log1p(math.exp(shift - score))
    return (
        lambda s: a * b * s ** (a - 1) * (1 - s**a) ** (b - 1),
        lambda s: -math.expm1(b * math.log1p(-(s**a))),
        lambda s: (1 - s**a) ** b,
    )


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@each
@pytest.mark.parametrize("score", [-5.0, -0.7, 0.0, 1.3, 6.0])
def test_probabilities_of_both_ends(name: str, score: float) -> None:
    estimator = KINDS[name]
    _, cdf, sf = reference(estimator, score)
    low, high = ((v - estimator.low) / (estimator.high - estimator.low) for v in (0.0, 1.0))
    found = torch.cat(estimator.log_ends(one(score))).exp().flatten().tolist()
    assert found == pytest.approx([cdf(low), sf(low), sf(high), cdf(high)], rel=1e-9, abs=1e-14)


@each
@pytest.mark.parametrize(
    ("score", "prior"), [(-4.0, 0.0), (0.0, 0.0), (0.3, None), (2.5, -1.0), (7.0, 1.0), (-5.0, 3.0)]
)
def test_divergence_against_quadrature(name: str, score: float, prior: float | None) -> None:
    """Both ends and the density between; 0 from itself."""
    estimator = KINDS[name]
    (pdf, cdf, sf), (pdf0, cdf0, sf0) = reference(estimator, score), reference(estimator, prior or 0.0)
    low, high = ((v - estimator.low) / (estimator.high - estimator.low) for v in (0.0, 1.0))
    expected, _ = integrate.quad(lambda s: pdf(s) * math.log(pdf(s) / pdf0(s)), low, high, limit=200, epsabs=1e-12)
    expected += cdf(low) * math.log(cdf(low) / cdf0(low)) + sf(high) * math.log(sf(high) / sf0(high))
    scores = one(score).requires_grad_()
    priors = None if prior is None else one(prior).requires_grad_()
    kl = estimator.divergence(scores, None, priors).value
    assert kl.item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
    if priors is not None:
        assert torch.autograd.gradcheck(lambda s, p: estimator.divergence(s, None, p).value, (scores, priors))


@each
def test_samples_have_their_distribution(name: str) -> None:
    """S by Kolmogorov and Smirnov at 99.9 %; shares of both ends, and of hard vertices, within 4 standard errors."""
    estimator = KINDS[name]
    torch.manual_seed(0)
    for score in (-1.0, 0.4):
        unit = estimator.sample_unit(torch.full((20_000,), score))
        cdf = reference(estimator, score)[1]
        inside = unit[:4000].clamp(1e-12, 1 - 1e-12).tolist()
        assert stats.kstest(np.array([cdf(s) for s in inside]), "uniform").pvalue > 1e-3
        z = estimator.rectify(unit)
        zero, _, top, _ = (t.exp().item() for t in estimator.log_ends(one(score)))
        for share, p in (((z == 0).double().mean(), zero), ((z == 1).double().mean(), top)):
            assert abs(share.item() - p) <= 4 * math.sqrt(p * (1 - p) / 20_000)
        scores = torch.full((20_000, 1), score)
        hard = estimator.eval()(scores, lambda v, rows: v[:, 0]).vertices
        estimator.train()
        p = 1 - cdf(0.5)
        assert abs(hard.mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 20_000)


@each
def test_the_expected_number_and_its_changes(name: str) -> None:
    """By enumeration of which parts are 0, with a mask; gradients by finite differences."""
    estimator = KINDS[name]
    torch.manual_seed(1)
    scores = torch.randn(2, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    present = estimator.log_ends(scores)[1].exp().detach()
    which = Subset().enumerate(4)
    for b in range(2):
        kept = which[(which[:, ~mask[b]] == 0).all(1)]
        p = torch.where(mask[b], torch.where(kept > 0, present[b], 1 - present[b]), 1.0).prod(1)
        length = int(mask[b].sum())
        changes = (kept[:, 1:length] != kept[:, : length - 1]).double().sum(1)
        torch.testing.assert_close(estimator.expected_l0(scores, mask)[b], p @ kept.sum(1))
        torch.testing.assert_close(estimator.expected_transitions(scores, mask)[b], p @ changes)
    for function in (estimator.expected_l0, estimator.expected_transitions):
        assert torch.autograd.gradcheck(lambda s: function(s, mask), scores)  # noqa: B023


@each
def test_the_gradient_is_that_of_the_mixed_objective(name: str) -> None:
    """Of ``E[(z - 0.3)^2]``, by quadrature, within 4 standard errors of 40,000 samples."""
    estimator = KINDS[name]
    torch.manual_seed(2)
    low, high = ((v - estimator.low) / (estimator.high - estimator.low) for v in (0.0, 1.0))

    def expected(score: float) -> float:
        pdf, cdf, sf = reference(estimator, score)
        inside, _ = integrate.quad(
            lambda s: pdf(s) * (estimator.low + (estimator.high - estimator.low) * s - 0.3) ** 2,
            low,
            high,
            epsabs=1e-12,
        )
        return inside + cdf(low) * 0.3**2 + sf(high) * 0.7**2

    scores = torch.full((40_000, 1), 0.6, requires_grad=True)
    estimate = estimator(scores, lambda z, rows: (z[:, 0] - 0.3).square())
    (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
    exact = (expected(0.601) - expected(0.599)) / 0.002
    assert abs(gradient.mean().item() - exact) <= 4 * gradient.std().item() / 200


@each
@pytest.mark.parametrize("scale", [1.0, 100.0, 500.0])
def test_extreme_scores_in_float32(name: str, scale: float) -> None:
    """Values and gradients are finite, probabilities sum to one, and the divergence is that of float64."""
    estimator = KINDS[name]
    scores = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]]) * scale
    scores.requires_grad_()
    zero, above, top, below = (t.exp() for t in estimator.log_ends(scores))
    for pair in ((zero, above), (top, below)):
        torch.testing.assert_close(sum(pair), torch.ones_like(zero))
    estimate = estimator(scores, lambda z, rows: z.sum(1), prior_scores=-scores.detach())
    total = estimate.surrogate + estimate.kl + estimator.expected_l0(scores) + estimator.expected_transitions(scores)
    (gradient,) = torch.autograd.grad(total.sum(), scores)
    assert total.isfinite().all()
    assert gradient.isfinite().all()
    assert ((estimate.vertices >= 0) & (estimate.vertices <= 1)).all()
    exact = estimator.divergence(scores.detach().double(), None, -scores.detach().double()).value
    torch.testing.assert_close(estimate.kl.double(), exact, rtol=1e-6, atol=1e-6)
    if scale >= 100:
        ends = estimate.vertices[0, [0, -1]]
        assert ends.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", [HardConcrete, HardKuma])
def test_penalties_are_in_the_surrogate(kind: type[HardConcrete] | type[HardKuma]) -> None:
    torch.manual_seed(3)
    scores = torch.randn(3, 5, requires_grad=True)

    def gradient(estimator: Estimator) -> Tensor:
        torch.manual_seed(0)
        estimate = estimator(scores, lambda z, rows: z.sum(1))
        return torch.autograd.grad(estimate.surrogate.sum(), scores)[0]

    plain = kind(Subset())
    both = kind(Subset(), l0_weight=0.3, transition_weight=0.2)
    penalty = (0.3 * plain.expected_l0(scores) + 0.2 * plain.expected_transitions(scores)).sum()
    torch.testing.assert_close(gradient(both) - gradient(plain), torch.autograd.grad(penalty, scores)[0])


@pytest.mark.parametrize("kind", [HardConcrete, HardKuma])
def test_the_multiplier_follows_the_excess(kind: type[HardConcrete] | type[HardKuma]) -> None:
    """Up above the budget, down below it, from where a state left off; its penalty is on the number of parts."""
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for score in (2.0, -2.0):
        estimator = kind(Subset(), l0_weight=0.5, budget=2.0)
        weight, average = 0.5, 0.0
        scores = torch.full((2, 5), score, requires_grad=True)
        count = estimator.expected_l0(scores, mask)
        excess = float(((count.detach() - 2) / torch.tensor([5.0, 3.0])).mean())
        for _ in range(5):
            average = 0.99 * average + 0.01 * excess
            weight *= math.exp(0.01 * average)
            restored = kind(Subset(), l0_weight=0.5, budget=2.0)
            restored.load_state_dict(estimator.state_dict())
            estimator = restored
            estimate = estimator(scores, lambda z, rows: 0 * z.sum(1), mask=mask)
        assert estimate.metrics["l0_weight"].item() == pytest.approx(weight, rel=1e-6)
        assert (weight > 0.5) == (score > 0)
        (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
        torch.testing.assert_close(gradient, torch.autograd.grad(weight * count.sum(), scores)[0])


def test_edges_of_a_graph_are_shown_twice() -> None:
    problem = Problem.make(Subset("undirected"), (4, 4))
    estimate = HardConcrete(Subset("undirected"))(problem.scores, lambda z, rows: z.flatten(1).sum(1))
    torch.testing.assert_close(estimate.vertices, estimate.vertices.mT)
    assert estimate.kl.shape == (2,)


def test_what_is_refused() -> None:
    for kind in (HardConcrete, HardKuma):
        with pytest.raises(UnsupportedError, match="independent parts"):
            kind(KSubset(2))
        with pytest.raises(UnsupportedError, match="parts in a row"):
            kind(Subset("undirected"), transition_weight=0.1)
        with pytest.raises(ValueError, match="low must be below 0 and high above 1"):
            kind(Subset(), low=0.0)
        with pytest.raises(ValueError, match="where the multiplier starts"):
            kind(Subset(), budget=2.0)
        with pytest.raises(ValueError, match=r"scores beyond \+-600"):
            kind(Subset())(torch.full((1, 2), 1e4), lambda z, rows: z.sum(1))
    with pytest.raises(ValueError, match="temperature must be within"):
        HardConcrete(Subset(), temperature=1.5)
    with pytest.raises(ValueError, match="concentration"):
        HardKuma(Subset(), concentration=0.0)
