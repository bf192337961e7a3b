"""Surrogate gradients equal their own definitions; the vertices are hard and the decoder's gradient is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from structgrad.estimators.surrogate import AdaptiveIMLE, SumOfGamma, SurrogateGradient
from structgrad.estimators.utilities import Gumbel
from structgrad.structures import BinaryTree, KSubset, OneHot
from structgrad.structures.base import UnsupportedError
from structgrad.structures.correlated_k_subset import CorrelatedKSubset
from structgrad.testing import Problem
from tests.cases import CASES, problem

#: The cases whose vertices have one entry a score.
LINEAR = [name for name, case in CASES.items() if case.plain.is_linear]
OPTIONS: list[dict[str, Any]] = [
    {"method": "identity"},
    {"method": "identity", "utility": "logistic"},
    {"method": "spigot", "step": 4.0},
    {"method": "blackbox", "step": 20.0},
    {"method": "imle", "step": 50.0},
    {"method": "imle", "step": 20.0, "utility": SumOfGamma(2)},
]


def definition(p: Problem, options: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """Vertex and gradient for the scores, one example and one entry at a time."""
    torch.manual_seed(seed)
    noisy = p.structure.noisy_parts(p.scores)
    s = torch.where(p.structure.parts(p.scores, p.mask), p.scores, 0.0).detach()
    noise = options.get("utility", "gumbel" if options["method"] == "imle" else None)
    if noise == "gumbel":
        u = Gumbel().sample(s)
    elif noise == "logistic":
        e = torch.empty_like(s).exponential_()
        u = s - (e + (-(-e).expm1()).log())
    else:
        u = s if noise is None else noise.sample(s)
    u = torch.where(noisy, u, s)
    x = p.structure.argmax(u, p.mask)
    leaf = x.clone().requires_grad_()
    (entries,) = torch.autograd.grad(p.decoder(leaf, torch.arange(len(s))).sum(), leaf)
    # Of the parts: an undirected edge is shown in two entries.
    v = torch.zeros_like(s)
    for index in p.structure.parts(s, p.mask).nonzero().tolist():
        b, *part = index
        v[tuple(index)] = entries[tuple(index)]
        if p.structure.layout.name == "undirected":
            v[tuple(index)] += entries[(b, *reversed(part))]
    step = options.get("step")
    if options["method"] == "identity":
        gradient = v
    elif options["method"] == "spigot":
        gradient = x - p.structure.project(x - step * v, p.mask)
    else:
        gradient = (x - p.structure.argmax(u - step * v, p.mask)) / step
    return x, torch.where(p.structure.parts(s, p.mask), gradient, 0.0)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in list(o.values())[:2]))
def test_gradient_is_as_defined(name: str, options: dict[str, Any]) -> None:
    p = problem(name)
    if options["method"] == "spigot" and "project" not in p.structure.oracles:
        with pytest.raises(UnsupportedError, match="needs project"):
            SurrogateGradient(p.structure, **options)
        return
    seen = torch.zeros(())
    for seed in range(5):
        p = problem(name, scale=0.1, seed=seed)  # of scores so close that a step changes the vertex
        vertex, expected = definition(p, options, seed)
        torch.manual_seed(seed)
        estimate = SurrogateGradient(p.structure, **options)(p.scores, p.decoder, mask=p.mask)
        assert torch.equal(estimate.vertices, vertex)
        assert estimate.vertices.requires_grad
        gradient = p.gradient(estimate.surrogate.sum())
        torch.testing.assert_close(gradient[p.is_score], expected.flatten())
        # The decoder's gradient is that of the objective at the hard vertices.
        torch.testing.assert_close(
            gradient[~p.is_score], p.gradient(p.decoder(vertex, estimate.rows).sum())[~p.is_score]
        )
        torch.testing.assert_close(estimate.objective, p.decoder(vertex, estimate.rows).detach())
        seen = seen + expected.abs().sum()
    assert seen > 0


def test_gradients_are_for_descent() -> None:
    # Every surrogate raises the score of the category with the lower loss against that which was chosen.
    scores = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True)
    losses = torch.tensor([2.0, -1.0, 0.0])
    for options in ({}, {"method": "spigot", "step": 1.0}, {"method": "blackbox", "step": 1.0}):
        estimate = SurrogateGradient(OneHot(), **options)(scores, lambda x, rows: x @ losses)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
        assert gradient[0, 0] > gradient[0, 1]


def test_blackbox_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True)
    losses = torch.tensor([2.0, -1.0, 0.0])
    # s - 0.5 v = (0, 1, 0): the second category takes over.
    estimate = SurrogateGradient(OneHot(), "blackbox", step=0.5)(scores, lambda x, rows: x @ losses)
    (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
    assert gradient.tolist() == [[2.0, -2.0, 0.0]]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in list(o.values())[:2]))
def test_evaluation_is_hard_without_gradient(options: dict[str, Any]) -> None:
    p = problem("spanning_tree")
    estimate = SurrogateGradient(p.structure, **options).eval()(p.scores, p.decoder, mask=p.mask)
    assert not estimate.vertices.requires_grad
    assert ((estimate.vertices == 0) | (estimate.vertices == 1)).all()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in list(o.values())[:2]))
def test_missing_scores_are_never_looked_at(options: dict[str, Any]) -> None:
    p = problem("arborescence")
    exists = p.structure.parts(p.scores, p.mask)
    scores = torch.where(exists, p.scores.detach(), math.nan).requires_grad_()
    estimate = SurrogateGradient(p.structure, **options)(scores, p.decoder, mask=p.mask)
    (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~exists] == 0).all()


def test_samples_are_averaged() -> None:
    p = problem("k_subset")
    estimate = SurrogateGradient(p.structure, "imle", step=1.0, n_samples=4)(p.scores, p.decoder, mask=p.mask)
    assert estimate.rows.tolist() == [0] * 4 + [1] * 4
    assert estimate.metrics["decoder_calls"] == 4
    torch.testing.assert_close(estimate.surrogate, p.decoder(estimate.vertices, estimate.rows).reshape(2, 4).mean(1))


def test_correlations_are_not_perturbed() -> None:
    # All items equal and one pair preferred beyond any noise of the items: perturbed correlations would hide it.
    scores = torch.zeros(500, 5)
    scores[:, 3:] = torch.tensor([-1000.0, -1000.0])
    vertices = SurrogateGradient(CorrelatedKSubset(2), "imle", step=1.0)(scores, lambda x, rows: x.sum(1)).vertices
    assert (vertices[:, :3] == torch.tensor([1.0, 0.0, 1.0])).all()


def test_kl() -> None:
    p = problem("spanning_tree")
    parts = p.structure.parts(p.scores, p.mask)
    expected = torch.where(parts, Gumbel().kl(p.scores), 0.0).sum((1, 2))
    torch.testing.assert_close(
        SurrogateGradient(p.structure, "imle", step=1.0)(p.scores, p.decoder, mask=p.mask).kl, expected
    )
    for options in ({}, {"method": "imle", "step": 1.0, "utility": SumOfGamma(3)}):
        estimator = SurrogateGradient(p.structure, **options)  # type: ignore[arg-type]
        assert estimator.kl_over is None
        assert estimator(p.scores, p.decoder, mask=p.mask).divergence is None


def test_sums_of_gamma_are_gumbel() -> None:
    # The sum of k of them tends to scale * Gumbel with the number of terms (Niepert et al. 2021, Theorem 1).
    noise = SumOfGamma(k=3, terms=300, scale=2.0).sample(torch.zeros(5000, 3)).sum(1)
    assert stats.kstest(noise.numpy() / 2.0, stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "itself"}, "method must be one of"),
        ({"method": "blackbox"}, "every method needs a step except identity"),
        ({"step": 1.0}, "every method needs a step except identity"),
        ({"method": "spigot", "step": 0.0}, "step must be positive"),
        ({"n_samples": 2}, "n_samples must be at least 1, and 1 without noise"),
        ({"method": "imle", "step": 1.0, "utility": "cauchy"}, "utility must be one of"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurrogateGradient(OneHot(), **options)


def test_impossible_structures() -> None:
    with pytest.raises(UnsupportedError, match="needs vertices with one entry a score, which BinaryTree lacks"):
        SurrogateGradient(BinaryTree())
    with pytest.raises(ValueError, match="k must be at least 1"):
        SumOfGamma(0)
    with pytest.raises(TypeError, match="k must be a whole number"):
        SumOfGamma(2.5)  # type: ignore[arg-type]
    assert repr(SumOfGamma(3)) == "SumOfGamma(k=3, terms=10, scale=1.0)"


def test_a_whole_number_is_a_target() -> None:
    scores = torch.randn(2, 4, requires_grad=True)
    estimator = AdaptiveIMLE(KSubset(2), target=2)
    estimator(scores, lambda vertices, rows: vertices[:, 0]).surrogate.sum().backward()
    assert estimator.found.dtype == torch.float32
