"""Exact sums equal the enumerated ones; sum-and-sample is unbiased and better than its sample."""

from __future__ import annotations

import math
from typing import Any

import entmax
import pytest
import torch

from structgrad.estimators import Marginalize, Reinforce, SumAndSample
from structgrad.estimators.marginalization import sparsemax
from structgrad.structures import (
    Arborescence,
    BinaryTree,
    BudgetSubset,
    CorrelatedKSubset,
    Matching,
    OneHot,
    Structure,
    Subset,
    UnsupportedError,
)
from structgrad.testing import Problem, assert_unbiased
from tests.estimators.test_score_function import CASES, measured_variance, problem

SPARSE: dict[str, tuple[Structure, tuple[int, ...]]] = {
    name: case[:2] for name, case in CASES.items() if case[0].is_linear
}


def unmasked(name: str, **options: Any) -> Problem:
    """The case of that name with every part."""
    structure, shape, _ = CASES[name]
    return Problem.make(structure, shape, **options)


# --- exact sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_dense_is_the_expected_objective(name: str, masked: bool) -> None:
    case = problem(name) if masked else unmasked(name)
    every = torch.cat([case.structure.enumerate(*case.scores.shape[1:]), *map(case.vertices, range(2))])
    if masked and len(every.unique(dim=0)) > len(case.structure.enumerate(*case.scores.shape[1:])):
        pytest.skip("its vertices under a mask are not a subset of all")
    out = Marginalize(case.structure)(case.scores, case.decoder, mask=case.mask if masked else None)
    truth = case.expected("gibbs")
    torch.testing.assert_close(out.objective.sum(), truth.detach())
    torch.testing.assert_close(case.gradient(out.surrogate.sum()), case.gradient(truth))
    counts = torch.tensor([len(case.vertices(example)) for example in range(2)])
    assert out.rows.bincount().tolist() == counts.tolist()
    assert out.metrics["decoder_calls"] == counts.sum() / 2
    if "log_partition" in case.structure.oracles:
        for example in range(2):
            _, p = case.probabilities(example, "gibbs")
            torch.testing.assert_close(out.kl[example], (p * (p * len(p)).log()).sum())
        assert out.kl.requires_grad


@pytest.mark.parametrize("distribution", ["softmax", "sparsemax"])
def test_a_vertex_whose_pair_is_masked_counts(distribution: Any) -> None:
    """Three items of which two are chosen: without the first pair the items 0 and 1 are still there, less its score."""
    structure, mask = CorrelatedKSubset(2), torch.tensor([True, True, True, False, True])
    scores = torch.tensor([[0.3, 0.2, -0.1, torch.nan, 0.4]], dtype=torch.float64)
    vertices = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.float64)
    values = vertices @ scores[0].nan_to_num()
    expected = values.softmax(0) if distribution == "softmax" else entmax.sparsemax(values[None], dim=-1)[0]
    out = Marginalize(structure, distribution)(scores, lambda x, rows: x.sum(1), mask=mask)
    assert torch.equal(out.vertices, vertices[expected > 0])
    torch.testing.assert_close(out.weights, expected[expected > 0])
    if distribution == "softmax":
        log_z = structure.log_partition(scores, mask)
        torch.testing.assert_close(out.weights.log(), values - log_z)
        torch.testing.assert_close(out.kl, torch.tensor(3.0).double().log() - structure.entropy(scores, mask))


@pytest.mark.parametrize("distribution", ["softmax", "sparsemax", "sparsemap"])
def test_autocast_is_for_the_objective(distribution: Any) -> None:
    """Weights and kl keep their digits; the objective computes as its caller does."""
    scores, weight = torch.randn(4, 5), torch.randn(5, 3)
    estimator, seen = Marginalize(Subset(), distribution), []

    def objective(vertices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        product = vertices @ weight
        seen.append(product.dtype)
        return product.float().square().sum(1)

    exact = estimator(scores, objective)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = estimator(scores, objective)
    assert seen == [torch.float32, torch.bfloat16]
    assert torch.equal(rounded.weights, exact.weights)
    assert torch.equal(rounded.kl, exact.kl)


@pytest.mark.parametrize("scale", [0.3, 2.0, 100.0])
def test_sparsemax_evaluates_its_support_only(scale: float) -> None:
    case = problem("one_hot", scale=scale)
    out = Marginalize(OneHot(), "sparsemax")(case.scores, case.decoder, mask=case.mask)
    p = entmax.sparsemax(case.scores.masked_fill(~case.mask, -1e9), dim=-1)
    assert out.rows.numel() == (p > 0).sum()
    assert out.metrics["decoder_calls"] == (p > 0).sum() / 2
    every = torch.stack([case.decoder(torch.eye(4, dtype=torch.float64), torch.full((4,), b)) for b in range(2)])
    truth = (p * every).sum()
    torch.testing.assert_close(out.objective.sum(), truth.detach())
    torch.testing.assert_close(case.gradient(out.surrogate.sum()), case.gradient(truth))
    log_p = torch.where(p > 0, p, 1).log()
    torch.testing.assert_close(out.kl, (p * log_p).sum(1) + case.mask.sum(1).log())


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("name", [n for n in SPARSE if "top_k" in CASES[n][0].oracles])
def test_topk_sparsemax(name: str, k: int) -> None:
    """Sparsemax over the k best vertices, and over all of them where its support is smaller (Correia et al., 4.1)."""
    case = problem(name, scale=0.4)
    out = Marginalize(case.structure, "topk_sparsemax", k=k)(case.scores, case.decoder, mask=case.mask)
    total = torch.zeros((), dtype=torch.float64)
    certified = 0
    for example in range(2):
        vertices = case.vertices(example)
        parts = case.structure.parts(case.scores[example], case.mask[example])
        values = (vertices * torch.where(parts, case.scores[example], 0.0)).flatten(1).sum(1)
        best = values.topk(min(k, len(values)))
        p = entmax.sparsemax(best.values, dim=0)
        chosen = vertices[best.indices]
        total = total + p @ case.decoder(chosen, torch.full((len(chosen),), example))
        assert (out.rows == example).sum() == (p > 0).sum()
        if (p > 0).sum() < k:
            certified += 1
            torch.testing.assert_close(
                p.sort().values, entmax.sparsemax(values, dim=0).topk(len(p)).values.sort().values
            )
    torch.testing.assert_close(out.objective.sum(), total.detach())
    torch.testing.assert_close(case.gradient(out.surrogate.sum()), case.gradient(total))
    assert out.metrics["certified"] == certified / 2
    assert out.metrics["decoder_calls"] == out.rows.numel() / 2


@pytest.mark.parametrize("name", [n for n in SPARSE if "sparsemap" in CASES[n][0].oracles])
def test_sparsemap(name: str) -> None:
    """Its mean is the projection, its gradient that of its own value, by finite differences."""
    case = problem(name, scale=0.5)
    estimator = Marginalize(case.structure, "sparsemap")
    out = estimator(case.scores, case.decoder, mask=case.mask)
    torch.testing.assert_close(
        out.mean(out.vertices), case.structure.project(case.scores, case.mask).detach(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(out.mean(torch.ones_like(out.weights)), torch.ones(2, dtype=torch.float64))
    assert out.metrics["decoder_calls"] == out.rows.numel() / 2
    assert torch.autograd.gradcheck(
        lambda s: estimator(s, case.decoder, mask=case.mask).surrogate, case.scores, eps=1e-6, atol=1e-5
    )
    losses = case.decoder(out.vertices, out.rows)
    parameters = list(case.decoder.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.surrogate.sum(), parameters),
        torch.autograd.grad((losses * out.weights).sum(), parameters),
    )


def test_evaluation_keeps_the_sum() -> None:
    case = problem("one_hot")
    estimator = Marginalize(OneHot(), "sparsemax").eval()
    with torch.no_grad():
        out = estimator(case.scores, case.decoder, mask=case.mask)
    training = estimator.train()(case.scores, case.decoder, mask=case.mask)
    torch.testing.assert_close(out.objective, training.objective)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_sparsemax_function(size: int) -> None:
    for scale in (0.0, 1.0, 100.0):
        scores = (scale * torch.randn(50, size, dtype=torch.float64)).requires_grad_()
        torch.testing.assert_close(sparsemax(scores), entmax.sparsemax(scores, dim=-1))
        upstream = torch.randn(50, size, dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad((sparsemax(scores) * upstream).sum(), scores),
            torch.autograd.grad((entmax.sparsemax(scores, dim=-1) * upstream).sum(), scores),
        )
    infinite = torch.tensor([[3.0, -torch.inf, 2.5]], requires_grad=True)
    weights = sparsemax(infinite)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.0, 0.25]]))
    (gradient,) = torch.autograd.grad(weights[0, 0], infinite)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.0, -0.5]]))


@pytest.mark.parametrize("distribution", ["softmax", "sparsemax", "topk_sparsemax", "sparsemap"])
def test_large_scores_and_missing_parts_in_float32(distribution: Any) -> None:
    structure, shape, mask = CASES["one_hot"]
    scores = (200 * torch.rand(2, *shape) - 100).masked_fill(~mask, torch.nan).requires_grad_()
    k = 3 if distribution == "topk_sparsemax" else None
    out = Marginalize(structure, distribution, k)(scores, lambda v, r: (v @ torch.arange(4.0)).sin() + r, mask=mask)
    assert out.surrogate.isfinite().all()
    (gradient,) = torch.autograd.grad((out.surrogate + out.kl).sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


# --- sum and sample ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "name", [n for n in SPARSE if CASES[n][0].oracles >= {"top_k", "sample", "log_prob", "entropy"}]
)
def test_sum_and_sample_is_unbiased(name: str, k: int) -> None:
    assert_unbiased(SumAndSample(CASES[name][0], k), problem(name), "gibbs", count=100, repeats=100)


@pytest.mark.gpu
@pytest.mark.parametrize("tries", [1, 2])
def test_sum_and_sample_is_unbiased_for_any_number_of_tries(tries: int) -> None:
    """Scores for which most samples are among the k best, so that the tries often fail."""
    case = problem("subset", scale=2.0)
    assert_unbiased(SumAndSample(case.structure, 2, tries=tries), case, "gibbs", count=100, repeats=100)


@pytest.mark.parametrize("name", ["one_hot", "subset"])
def test_sum_and_sample_has_less_variance(name: str) -> None:
    """Than REINFORCE with the same baseline."""
    case = problem(name)
    variances = []
    for estimator in (
        Reinforce(case.structure, baseline="ema"),
        SumAndSample(case.structure, 1),
        SumAndSample(case.structure, 2),
    ):
        for _ in range(3):
            measured_variance(estimator, case, 1000)
        variances.append(measured_variance(estimator, case, 4000))
    assert variances[0] > variances[1] > variances[2]


@pytest.mark.parametrize("name", ["one_hot", "subset"])
def test_sum_and_sample_over_everything_is_exact(name: str) -> None:
    case = problem(name)
    out = SumAndSample(case.structure, k=20)(case.scores, case.decoder, mask=case.mask)
    torch.testing.assert_close(case.gradient(out.surrogate.sum()), case.gradient(case.expected("gibbs")))
    torch.testing.assert_close(out.objective.sum(), case.expected("gibbs").detach())


def test_sum_and_sample_reports() -> None:
    case = problem("one_hot")
    estimator = SumAndSample(OneHot(), 2)
    out = estimator(case.scores, case.decoder, mask=case.mask)
    assert out.metrics["decoder_calls"] == 3
    torch.testing.assert_close(out.mean(torch.ones(6, dtype=torch.float64)), torch.ones(2, dtype=torch.float64))
    assert estimator.running.weight > 0
    assert "running.total" in estimator.state_dict()
    out = estimator.eval()(case.scores, case.decoder, mask=case.mask)
    assert out.rows.tolist() == [0, 1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="distribution must be one of"):
        Marginalize(OneHot(), "hardmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="topk_sparsemax needs k"):
        Marginalize(OneHot(), "topk_sparsemax")
    with pytest.raises(ValueError, match="topk_sparsemax needs k"):
        Marginalize(OneHot(), "sparsemax", k=3)
    with pytest.raises(ValueError, match="at least 1"):
        Marginalize(OneHot(), "topk_sparsemax", k=0)
    with pytest.raises(ValueError, match="at least 1"):
        SumAndSample(OneHot(), k=0)
    with pytest.raises(UnsupportedError, match="top_k"):
        Marginalize(BinaryTree(), "topk_sparsemax", k=2)
    with pytest.raises(UnsupportedError, match="one entry a score"):
        Marginalize(BinaryTree())
    with pytest.raises(UnsupportedError, match="sum_and_sample"):
        SumAndSample(Matching())


def test_vertices_that_all_use_missing_parts_are_refused() -> None:
    """The trees of a smaller graph are not among the trees of the full one."""
    case = problem("arborescence")
    with pytest.raises(ValueError, match="example 1"):
        Marginalize(Arborescence())(case.scores, case.decoder, mask=case.mask)


def test_gradient_reaches_the_scores_through_the_kl() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    out = Marginalize(OneHot())(scores + torch.tensor([1.0, 0.0, 0.0]), lambda v, r: torch.zeros(len(v)))
    (gradient,) = torch.autograd.grad(out.kl.sum(), scores)
    assert gradient[0, 0] > 0


@pytest.mark.parametrize("decomposition", ["structure", "active_set"])
@pytest.mark.parametrize("centred", [False, True])
def test_sparsemap_centred_or_not_has_the_mean_it_says(centred: bool, decomposition: Any) -> None:
    """mean = clip(s) or clip((s + 1) / 2), whichever distribution has it; exact for encoder and decoder."""
    structure = Subset()
    scores = torch.tensor([[0.3, -0.4, 2.0, 0.7], [-3.0, 0.1, 0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    estimator = Marginalize(structure, "sparsemap", centred=centred, decomposition=decomposition)
    weights = torch.randn(4, dtype=torch.float64)
    out = estimator(scores, lambda vertices, rows: vertices @ weights)
    mean = ((scores + 1) / 2 if centred else scores).clamp(0, 1)
    torch.testing.assert_close(out.mean(out.vertices), mean.detach())
    (found,) = torch.autograd.grad(out.surrogate.sum(), scores)
    (expected,) = torch.autograd.grad((mean @ weights).sum(), scores)
    torch.testing.assert_close(found, expected)


def test_decompositions_differ_in_entropy_but_not_in_mean() -> None:
    scores = 0.5 + 0.2 * torch.randn(8, 16, dtype=torch.float64)
    nested, active = (
        Marginalize(Subset(), "sparsemap", decomposition=d)(scores, lambda v, r: v.sum(1))  # type: ignore[arg-type]
        for d in ("structure", "active_set")
    )
    torch.testing.assert_close(nested.mean(nested.vertices), active.mean(active.vertices))
    assert (nested.kl < active.kl).all()


def test_active_set_may_begin_with_a_random_vertex() -> None:
    """The same mean; another distribution wherever the mean has several; two corners of the cube at its centre."""
    torch.manual_seed(0)
    scores = 0.5 + 0.2 * torch.randn(8, 16, dtype=torch.float64)
    estimator = Marginalize(Subset(), "sparsemap", decomposition="active_set", start="random").eval()
    found = [estimator(scores, lambda vertices, rows: vertices.sum(1)) for _ in range(2)]
    for estimate in found:
        torch.testing.assert_close(estimate.mean(estimate.vertices), scores.clamp(0, 1))
    assert not torch.equal(found[0].kl, found[1].kl)
    centre = torch.full((200, 3), 0.5)
    estimate = estimator(centre, lambda vertices, rows: vertices.sum(1))
    pairs = estimate.vertices.reshape(200, 2, 3)
    assert (pairs.sum(1) == 1).all()
    # Each of the 4 pairs of corners with probability 1/4: a chi-square of 3 degrees below its 99.9 % quantile.
    counts = (pairs[:, 0] @ torch.tensor([1.0, 2.0, 4.0])).long().bincount(minlength=8)
    assert float(((counts[:4] + counts[4:].flip(0) - 50.0) ** 2 / 50).sum()) < 16.27
    budget = Marginalize(BudgetSubset(2), "sparsemap", decomposition="active_set", start="random")
    out = budget(scores, lambda vertices, rows: vertices.sum(1))
    assert (out.vertices.sum(1) <= 2).all()
    torch.testing.assert_close(out.mean(out.vertices), BudgetSubset(2).project(scores))
    with pytest.raises(ValueError, match="works only with decomposition active_set"):
        Marginalize(Subset(), "sparsemap", start="random")
    with pytest.raises(ValueError, match="one of argmax, random"):
        Marginalize(Subset(), "sparsemap", decomposition="active_set", start="zero")  # type: ignore[arg-type]


def test_options_of_sparsemap_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="work only with distribution sparsemap"):
        Marginalize(OneHot(), "sparsemax", centred=True)
    with pytest.raises(ValueError, match="decomposition must be one of"):
        Marginalize(OneHot(), "sparsemap", decomposition="nested")  # type: ignore[arg-type]


def test_weights_of_sum_and_sample_agree_with_its_objective() -> None:
    """They sum to one where the rest can be drawn (``OneHot``), elsewhere in the mean, within 5 standard errors."""
    for name in ("one_hot", "k_subset"):
        case = problem(name)
        estimator = SumAndSample(case.structure, k=1, tries=2).double()
        scores, mask = (t.repeat_interleave(2000, 0) for t in (case.scores, case.mask))
        estimate = estimator(scores, lambda v, r: case.decoder(v, r // 2000), mask=mask)  # noqa: B023
        losses = case.decoder(estimate.vertices, estimate.rows // 2000).detach()
        torch.testing.assert_close(estimate.mean(losses), estimate.objective)
        total = estimate.mean(torch.ones_like(losses))
        assert name != "one_hot" or (total - 1).abs().max() < 1e-9
        assert abs(float(total.mean()) - 1) <= 5 * float(total.std()) / len(total) ** 0.5 + 1e-9


def test_sum_and_sample_without_a_vertex_of_the_rest() -> None:
    """Its objective is unbiased where the tries find none outside the sum. With a bit of score log 16,
    (16/17)^16 = 0.38 of the estimates have none. Within 5 standard errors.
    """
    torch.manual_seed(0)
    scores = torch.full((20_000, 1), math.log(16.0))
    estimate = SumAndSample(Subset(), 1)(scores, lambda v, r: 1000 * (1 - v[:, 0]))
    found = estimate.weights.reshape(-1, 2)[:, 1] > 0
    assert abs(float(found.double().mean()) - (1 - (16 / 17) ** 16)) < 0.02
    error = float(estimate.objective.std()) / 20_000**0.5
    assert abs(float(estimate.objective.mean()) - 1000 / 17) < 5 * error
    torch.testing.assert_close(estimate.loss.detach(), estimate.objective)


def test_lists_that_do_not_fit_are_refused_before_they_are_made() -> None:
    for distribution in ("softmax", "sparsemax"):
        with pytest.raises(ValueError, match=r"Subset has 1,125,899,906,842,624 vertices .* too many to be listed"):
            Marginalize(Subset(), distribution)(torch.zeros(2, 50), lambda x, rows: x.sum(1))  # type: ignore[arg-type]
