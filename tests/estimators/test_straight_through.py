"""Straight-through estimators and vector quantisation equal their definitions; what is exact about them is exact."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from structgrad.estimators import (
    SST,
    AdaptiveIMLE,
    Estimator,
    GappedStraightThrough,
    GumbelRao,
    ReinMax,
    SizeMismatchError,
    StraightThrough,
    VectorQuantization,
)
from structgrad.structures import BinaryTree, KSubset, OneHot, Permutation, SpanningTree, Structure, Subset, Vector
from structgrad.structures.base import Noise, Trace, UnsupportedError
from structgrad.testing import Problem, gradients
from tests.estimators.test_score_function import CASES, measured_variance, problem

SMOOTH = [name for name, (s, *_) in CASES.items() if {"exp_family", "euclidean"} <= set(s.relaxations)]


def linear(weights: Tensor, batch: int) -> Any:
    """``<weights, x>`` for every vertex."""
    return lambda vertices, rows: (vertices * weights[rows % batch]).flatten(1).sum(1)


def gradient_of(estimator: Estimator, case: Problem, objective: Any) -> Tensor:
    """Of the surrogate for the scores."""
    out = estimator(case.scores, objective, mask=case.mask)
    (gradient,) = torch.autograd.grad(out.surrogate.sum(), case.scores)
    return gradient


@pytest.mark.parametrize("relaxation", ["exp_family", "euclidean"])
@pytest.mark.parametrize("name", SMOOTH)
def test_noise_free_gradient_is_the_relaxations(name: str, relaxation: str) -> None:
    case = problem(name)
    out = StraightThrough(case.structure, relaxation, temperature=0.7)(case.scores, case.decoder, mask=case.mask)
    hard = case.structure.argmax(case.scores, case.mask)
    torch.testing.assert_close(out.vertices.detach(), hard, rtol=0, atol=0)
    slope = torch.autograd.functional.jacobian(
        lambda v: case.decoder(v, torch.arange(2)).sum(), hard
    )  # of the objective at the hard vertex
    smooth = case.structure.relax(relaxation, case.scores / 0.7, case.mask, 0.7)
    (expected,) = torch.autograd.grad((slope * smooth).sum(), case.scores)
    (found,) = torch.autograd.grad(out.surrogate.sum(), case.scores)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UnsupportedError, match="no KL"):
        _ = out.kl


@pytest.mark.parametrize("name", SMOOTH)
def test_simple_is_exact_for_linear_objectives(name: str) -> None:
    case = problem(name)
    weights = torch.randn(case.structure.argmax(case.scores, case.mask).shape, dtype=torch.float64)
    found = gradient_of(StraightThrough(case.structure, forward="sample"), case, linear(weights, 2))
    mean = case.structure.marginals(case.scores, case.mask)
    (expected,) = torch.autograd.grad((mean * weights).sum(), case.scores)
    torch.testing.assert_close(found, expected)


class OnePerGroup(Structure):
    """A user's matroid: one part of each of two groups, by what ``OneHot`` does to each. Scores are ``[*batch, 4]``."""

    is_ordinal: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layout, self.one = Vector(), OneHot()

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check(utility, mask)
        return self.one.argmax(utility.unflatten(-1, (2, 2))).flatten(-2)

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.one.marginals(scores.unflatten(-1, (2, 2))).flatten(-2)

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        trace = self.one.trace(exponentials.unflatten(-1, (2, 2)))
        return Trace(trace.vertex.flatten(-2), trace.choices.flatten(-2))

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        each = Trace(trace.vertex.unflatten(-1, (2, 2)), trace.choices.unflatten(-1, (2, 1)))
        return self.one.conditional(each, log_rates.unflatten(-1, (2, 2))).flatten(-2)


@pytest.mark.parametrize("name", ["one_hot", "k_subset", "spanning_tree", "permutation", "own_matroid"])
def test_gumbel_rao_has_the_mean_of_straight_through_sst_and_less_variance(name: str) -> None:
    """Two independent sets of 60 means of 200 estimates; each coordinate's difference within 4.5 standard errors
    (error probability below 7e-6 a coordinate; seeds are fixed). Variances are of 20,000 estimates each.
    """
    if name in CASES:
        case = problem(name)
    else:
        case = Problem.make(Permutation() if name == "permutation" else OnePerGroup(), (4,))
    relaxation = "neuralsort" if name == "permutation" else "exp_family"
    straight = SST(case.structure, relaxation, straight_through=True, temperature=0.3)
    conditional = GumbelRao(case.structure, 8, relaxation, temperature=0.3)
    plain, rao = gradients(straight, case), gradients(conditional, case)
    error = ((plain.var(0) + rao.var(0)) / len(plain)).sqrt()
    assert ((plain.mean(0) - rao.mean(0)).abs() <= 4.5 * error + 1e-9).all()
    assert measured_variance(conditional, case) < 0.9 * measured_variance(straight, case)


@pytest.mark.parametrize("relaxation", ["softsub", "exp_family"])
def test_temperatures_of_examples(relaxation: str) -> None:
    """Every example has its own, as in a batch of equal temperatures. There are as many utilities as examples, or
    more. (``softsub`` is no function of the quotient alone.)
    """
    case = Problem.make(KSubset(2), (5,), batch=3)
    temperatures = torch.tensor([0.2, 1.0, 3.0])
    makers = {
        "gumbel_rao": lambda t, n: GumbelRao(KSubset(2), n, relaxation, temperature=t),
        "sst": lambda t, n: SST(KSubset(2), relaxation, n_samples=n, temperature=t),
        "straight_through": lambda t, n: StraightThrough(KSubset(2), relaxation, temperature=t),
    }
    for name, make in makers.items():
        for n in (1, 3, 4):
            found = []
            for t in (temperatures, *temperatures):
                torch.manual_seed(0)
                found.append(gradient_of(make(t, n), case, case.decoder))
            for example in range(3):
                torch.testing.assert_close(found[0][example], found[1 + example][example], msg=f"{name} {n}")


def test_reinmax_is_exact_for_quadratic_objectives() -> None:
    """The mean over all categories of the gradient at each one, no sampling; straight-through softmax is not exact."""
    torch.manual_seed(0)
    scores = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    a = torch.randn(5, 5, dtype=torch.float64)

    def quadratic(x: Tensor) -> Tensor:
        return ((x @ a) * x).sum(-1) + x @ a[0]

    p = scores.softmax(-1)[0]
    categories = torch.eye(5, dtype=torch.float64)
    (truth,) = torch.autograd.grad((p * quadratic(categories)).sum(), scores, retain_graph=True)

    def mean_gradient(smooth: Any) -> Tensor:
        total = torch.zeros_like(scores)
        for category, weight in zip(categories, p.detach(), strict=True):
            x = category[None].clone().requires_grad_()
            (slope,) = torch.autograd.grad(quadratic(x).sum(), x)
            (gradient,) = torch.autograd.grad((slope * smooth(scores, category[None])).sum(), scores)
            total = total + weight * gradient
        return total

    torch.testing.assert_close(mean_gradient(ReinMax(OneHot()).smooth), truth)
    assert (mean_gradient(lambda s, _: s.softmax(-1)) - truth).abs().max() > 0.05


def test_gapped_scores_lead_by_the_gap() -> None:
    scores = torch.tensor([[0.0, 3.0, 2.5, -4.0]], dtype=torch.float64, requires_grad=True)
    hard = torch.eye(4, dtype=torch.float64)[:1]
    smooth = GappedStraightThrough(OneHot(), temperature=0.5, gap=1.0).smooth(scores, hard)
    moved = torch.tensor([[3.0, 2.0, 2.0, -4.0]], dtype=torch.float64)
    torch.testing.assert_close(smooth, (moved / 0.5).softmax(-1))
    slope = torch.randn(1, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad((slope * smooth).sum(), scores)
    p = smooth.detach()
    torch.testing.assert_close(found, p * (slope - (p * slope).sum(-1, keepdim=True)) / 0.5)


@pytest.mark.parametrize("make", [ReinMax, GappedStraightThrough, lambda s: StraightThrough(s, forward="sample")])
def test_samples_are_those_of_softmax(make: Any) -> None:
    """20,000 samples; every frequency within 4.5 standard errors (error probability below 3e-5; seeds are fixed)."""
    scores = torch.tensor([0.3, -1.0, 1.2]).double()
    out = make(OneHot())(scores.expand(20_000, 3), lambda v, r: v.sum(1))
    p = scores.softmax(0)
    assert ((out.vertices.detach().mean(0) - p).abs() <= 4.5 * (p * (1 - p) / 20_000).sqrt()).all()
    torch.testing.assert_close(out.kl[0], (p * (p * 3).log()).sum())


@pytest.mark.parametrize(
    ("structure", "shape", "estimator"),
    [
        (OneHot(), (6,), ReinMax),
        (OneHot(), (6,), GappedStraightThrough),
        (OneHot(), (6,), GumbelRao),
        (KSubset(2), (6,), GumbelRao),
        (SpanningTree(), (5, 5), GumbelRao),
        (KSubset(2), (6,), lambda s: StraightThrough(s, forward="sample")),
        (Subset(), (6,), StraightThrough),
        (SpanningTree(), (5, 5), AdaptiveIMLE),
    ],
)
def test_large_scores_and_missing_parts_in_float32(
    structure: Structure, shape: tuple[int, ...], estimator: Any
) -> None:
    present = torch.arange(shape[0]) < shape[0] - 1
    mask = present if len(shape) == 1 else present[:, None] & present
    scores = 100 * torch.randn(4, *shape)
    scores = torch.where(structure.parts(scores, mask), scores, torch.nan).requires_grad_()
    weights = torch.randn(4, *shape)
    out = estimator(structure)(scores, linear(weights, 4), mask=mask)
    (gradient,) = torch.autograd.grad(out.surrogate.sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~structure.parts(scores.detach(), mask)] == 0).all()
    assert out.objective.isfinite().all()


def test_adaptive_imle_is_a_central_difference_at_the_adapted_step() -> None:
    case = problem("k_subset")
    estimator = AdaptiveIMLE(case.structure, rate=0.25, decay=0.0)
    estimator.alpha.fill_(0.5)
    torch.manual_seed(5)
    found = gradient_of(estimator, case, case.decoder)
    torch.manual_seed(5)
    exists = case.structure.parts(case.scores, case.mask)
    utility = estimator.utility.sample(torch.where(exists, case.scores.detach(), 0.0))
    vertex = case.structure.argmax(utility, case.mask)
    slope = torch.autograd.functional.jacobian(lambda v: case.decoder(v, torch.arange(2)).sum(), vertex)
    slope = torch.where(exists, slope, 0.0)
    utility = torch.where(exists, utility, 0.0)
    step = 0.5 * utility.norm(dim=1, keepdim=True) / slope.norm(dim=1, keepdim=True)
    there, back = (case.structure.argmax(utility + sign * step * slope, case.mask) for sign in (1, -1))
    torch.testing.assert_close(found, (there - back) / (2 * step))
    entries = (found != 0).sum(1).double().mean()
    assert estimator.found == entries
    assert estimator.alpha == 0.5 + 0.25 * torch.sign(1 - entries)


def test_adaptive_imle_finds_a_step_that_finds_a_gradient() -> None:
    case = problem("k_subset")
    estimator = AdaptiveIMLE(case.structure, rate=0.02)
    assert (gradient_of(estimator, case, case.decoder) == 0).all()
    entries = [(gradient_of(estimator, case, case.decoder) != 0).sum(1).double().mean() for _ in range(400)]
    assert 0.5 < torch.stack(entries[200:]).mean() < 1.5
    assert set(estimator.state_dict()) >= {"alpha", "found"}


# --- vector quantisation ----------------------------------------------------------------------------------------------


def test_vector_quantization() -> None:
    estimator = VectorQuantization(OneHot(), words=4, size=3, commitment=0.5).double()
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 3, dtype=torch.float64)
    out = estimator(z, linear(weights, 5))
    distances = (z.detach()[:, None] - estimator.codebook.detach()).square().sum(-1)
    words = estimator.codebook.detach()[distances.argmin(1)]
    torch.testing.assert_close(out.vertices.detach(), words)
    torch.testing.assert_close(out.objective, (words * weights).sum(1))
    to_z, to_words = torch.autograd.grad(out.surrogate.sum(), [z, estimator.codebook])
    torch.testing.assert_close(to_z, weights + 0.5 * 2 * (z.detach() - words))
    expected = torch.zeros_like(to_words).index_add(0, distances.argmin(1), 2 * (words - z.detach()))
    torch.testing.assert_close(to_words, expected)
    torch.testing.assert_close(estimator.eval()(z, linear(weights, 5)).vertices, words)
    with pytest.raises(SizeMismatchError, match=r"words of size 3; got vectors \[5, 2\]"):
        estimator(z[:, :2], linear(weights, 5))


def test_vector_quantization_of_fewer_entries() -> None:
    estimator = VectorQuantization(OneHot(), words=6, size=3)
    z = torch.tensor([[0.3, -0.2, torch.nan]], requires_grad=True)
    out = estimator(z, linear(torch.ones(1, 3), 1), mask=torch.tensor([True, True, False]))
    nearest = (estimator.codebook[:, :2] - z[:, :2]).square().sum(1).argmin()
    torch.testing.assert_close(out.vertices[0, :2].detach(), estimator.codebook[nearest, :2].detach())
    assert out.vertices[0, 2] == 0
    out.surrogate.sum().backward()
    assert z.grad[0, 2] == 0
    assert estimator.codebook.grad[nearest, 2] == 0


def test_vector_quantization_learns_the_words_of_its_data() -> None:
    centres = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -3.0]])
    estimator = VectorQuantization(OneHot(), words=3, size=2)
    with torch.no_grad():
        estimator.codebook.copy_(centres + 0.5 * torch.randn(3, 2))
    optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1)
    for _ in range(200):
        z = centres[torch.randint(3, (32,))] + 0.1 * torch.randn(32, 2)
        loss = estimator(z.requires_grad_(), lambda v, r: (v * 0).sum(1)).surrogate.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.cdist(centres, estimator.codebook.detach()).amin(1).max() < 0.1


def test_refusals() -> None:
    for make in (ReinMax, GappedStraightThrough, lambda s: VectorQuantization(s, 2, 2)):
        with pytest.raises(UnsupportedError, match=r"needs one category out of all \(OneHot\); got KSubset"):
            make(KSubset(2))
    with pytest.raises(UnsupportedError, match="one entry a score"):
        StraightThrough(BinaryTree())
    with pytest.raises(UnsupportedError, match="lacks; it has exp_family, euclidean"):
        StraightThrough(SpanningTree(), "sinkhorn")
    with pytest.raises(UnsupportedError, match="as for a matroid, which Subset lacks"):
        GumbelRao(Subset())
    with pytest.raises(ValueError, match="forward must be one of"):
        StraightThrough(OneHot(), forward="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gap"):
        GappedStraightThrough(OneHot(), gap=-1)
    with pytest.raises(ValueError, match="decay within"):
        AdaptiveIMLE(OneHot(), decay=1.0)
    with pytest.raises(ValueError, match="words of size 2"):
        VectorQuantization(OneHot(), 3, 2)(torch.zeros(2, 3), lambda v, r: v.sum(1))
