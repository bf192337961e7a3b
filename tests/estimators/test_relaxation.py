"""Relaxed gradients: exact for the relaxed objective, closer to the truth at lower temperatures, hard in evaluation."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from structgrad.estimators.relaxation import SST, Deterministic, ExponentialSchedule, Perturbed, clip_scores
from structgrad.estimators.utilities import Gumbel, NegExponential, make_utility
from structgrad.structures import Arborescence, BinaryTree, Matching, OneHot, Structure, Subset, Undirected
from structgrad.structures.base import UnsupportedError
from structgrad.structures.k_subset import KSubset
from structgrad.structures.spanning_tree import SpanningTree
from structgrad.testing import Case, Distribution, Problem, assert_mean, gradients, length_masks
from tests import cases
from tests.cases import problem

#: The cases that have a relaxation.
CASES: dict[str, Case] = {name: case for name, case in cases.CASES.items() if case.plain.relaxations}
PAIRS = [(name, relaxation) for name, case in CASES.items() for relaxation in case.plain.relaxations]
LINEAR = [name for name, case in CASES.items() if case.plain.is_linear]


def surrogate(estimator: torch.nn.Module, p: Problem, seed: int = 3) -> Tensor:
    """The surrogate ``[batch]`` with the noise of that seed."""
    torch.manual_seed(seed)
    value: Tensor = estimator(p.scores, p.decoder, mask=p.mask).surrogate
    return value


# --- stochastic softmax tricks: the gradient ---


@pytest.mark.parametrize(
    ("name", "relaxation", "utility"),
    [(*pair, "gumbel") for pair in PAIRS]
    + [("one_hot", "exp_family", u) for u in ("gaussian", "logistic", "neg_exponential")]
    + [("arborescence", "exp_family", "neg_exponential")],
)
def test_gradient_is_that_of_the_relaxed_objective(name: str, relaxation: str, utility: str) -> None:
    p = problem(name)
    estimator = SST(p.structure, relaxation, utility, temperature=0.7)  # type: ignore[arg-type]
    # Finite differences in scores and decoder parameters, the noise held fixed.
    assert torch.autograd.gradcheck(lambda *_: surrogate(estimator, p), p.variables, fast_mode=True)


@pytest.mark.parametrize(("name", "relaxation"), PAIRS)
def test_value_is_the_objective_at_the_relaxed_argmax(name: str, relaxation: str) -> None:
    p = problem(name)
    estimator = SST(p.structure, relaxation, temperature=0.7)
    torch.manual_seed(3)
    estimate = estimator(p.scores, p.decoder, mask=p.mask)
    torch.manual_seed(3)
    utilities = estimator.perturb(p.scores, p.mask, p.structure.relaxations[relaxation].draws)
    vertices = p.structure.relax(relaxation, utilities / 0.7, p.mask, 0.7)
    assert torch.equal(estimate.vertices, vertices)
    assert torch.equal(estimate.surrogate, p.decoder(vertices, torch.arange(2)))
    assert estimate.vertices.requires_grad
    assert estimate.metrics["decoder_calls"] == 1


#: Cases in which the enumerated distribution is that of perturb-and-MAP with these utilities.
TRUTHS: list[tuple[str, str, str, Distribution]] = [
    ("one_hot", "exp_family", "gumbel", "gibbs"),
    ("one_hot", "euclidean", "gumbel", "gibbs"),
    ("subset", "exp_family", "logistic", "gibbs"),
    ("undirected_edges", "exp_family", "logistic", "gibbs"),
    ("k_subset", "exp_family", "gumbel", "trace"),
    ("k_subset", "euclidean", "gumbel", "trace"),
    ("spanning_tree", "exp_family", "gumbel", "trace"),
    ("arborescence", "exp_family", "neg_exponential", "trace"),
    ("permutation", "neuralsort", "gumbel", "trace"),
]


@pytest.mark.parametrize(("name", "relaxation", "utility", "distribution"), TRUTHS)
def test_tends_to_the_truth_as_the_temperature_falls(
    name: str, relaxation: str, utility: str, distribution: Distribution
) -> None:
    p = problem(name)
    truth = p.gradient(p.expected(distribution))
    bias = []
    for temperature in (2.0, 0.1):
        torch.manual_seed(0)
        estimator = SST(p.structure, relaxation, utility, temperature)  # type: ignore[arg-type]
        error = gradients(estimator, p, 10, 3000).mean(0) - truth
        bias.append([error[which].norm() / truth[which].norm() for which in (p.is_score, ~p.is_score)])
    for warm, cold in zip(*bias, strict=True):
        assert cold < 0.1
        assert cold < warm / 2


@pytest.mark.parametrize("name", ["one_hot", "top_edges", "spanning_tree", "arborescence"])
def test_finite_differences_agree_with_the_exact_backward(name: str) -> None:
    p = problem(name)
    estimates = [
        p.gradient(surrogate(SST(p.structure, backward=backward, epsilon=1e-4), p).sum())
        for backward in ("exact", "finite_difference")
    ]
    torch.testing.assert_close(*estimates, rtol=1e-5, atol=1e-7)


def test_finite_differences_of_a_tiny_gradient() -> None:
    scores = torch.randn(3, 5, requires_grad=True)
    gradient = []
    for backward in ("exact", "finite_difference"):
        torch.manual_seed(2)
        estimator = SST(OneHot(), backward=backward)  # type: ignore[arg-type]
        loss = estimator(scores, lambda x, rows: 1e-8 * x[:, 0]).surrogate.sum()
        gradient += torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient[1], gradient[0], rtol=2e-2, atol=1e-11)
    loss = SST(OneHot(), backward="finite_difference")(scores, lambda x, rows: 0 * x[:, 0]).surrogate.sum()
    assert (torch.autograd.grad(loss, scores)[0] == 0).all()


@pytest.mark.parametrize("epsilon", [1e-4, 0.1, 1.0])
def test_finite_differences_along_the_gradient_are_the_papers(epsilon: float) -> None:
    """Equation 56, with the gradient as it is: a large epsilon bounds the derivative, a small one is exact."""
    structure, weights = KSubset(2), torch.linspace(-40, 40, 6, dtype=torch.float64)
    found, exact = [], []
    for into, options in (
        (found, {"backward": "finite_difference", "step": "gradient", "epsilon": epsilon}),
        (exact, {}),
    ):
        torch.manual_seed(0)
        scores = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
        estimator = SST(structure, **options)  # type: ignore[arg-type]
        loss = estimator(scores, lambda x, rows: x @ weights).surrogate.sum()
        into += torch.autograd.grad(loss, scores)
    torch.manual_seed(0)
    utilities = SST(structure).perturb(torch.zeros(3, 6, dtype=torch.float64), None)
    there, back = (structure.relax("exp_family", utilities + sign * epsilon * weights) for sign in (1, -1))
    torch.testing.assert_close(found[0], (there - back) / (2 * epsilon))
    assert found[0].abs().max() <= 1 / (2 * epsilon)
    assert torch.allclose(found[0], exact[0], rtol=1e-3, atol=1e-3) == (epsilon < 0.1)


# --- hard vertices ---


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_hard_fresh_and_without_clipping(name: str) -> None:
    p = problem(name)
    relaxation = next(iter(p.structure.relaxations))
    estimators = [SST(p.structure, relaxation, n_samples=3), Perturbed(p.structure)]
    if p.structure.constant_size:
        estimators.append(SST(p.structure, relaxation, clip_range=0.1))
    every = [p.vertices(b) for b in range(2)]
    for estimator in estimators:
        estimator.eval()
        torch.manual_seed(0)
        seen = []
        for _ in range(20):
            estimate = estimator(p.scores, p.decoder, mask=p.mask)
            assert not estimate.vertices.requires_grad
            assert estimate.rows.tolist() == [0, 1]
            for b in range(2):
                assert (every[b] == estimate.vertices[b]).flatten(1).all(1).any()
            seen.append(estimate.vertices)
        assert len(torch.stack(seen).unique(dim=0)) > 1


@pytest.mark.parametrize("evaluation", ["hard", "relaxed"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_chosen_vertices_say_whether_they_are_hard(evaluation: Any, context: Any) -> None:
    """By ``requires_grad``, also where torch records no gradients and an index loses it."""
    estimator = SST(KSubset(2), evaluation=evaluation).eval()
    with context():
        scores = torch.zeros(3, 4, requires_grad=True)
        estimate = estimator(scores, lambda vertices, rows: vertices[:, 0])
        chosen = estimate.most_probable_vertices()
    assert chosen.requires_grad == estimate.vertices.requires_grad == (evaluation == "relaxed")
    assert chosen.equal(estimate.vertices)  # one of each example


def test_evaluation_may_be_relaxed() -> None:
    """At the temperature that training has reached, without counting a step, and marked as no hard vertex."""
    schedule = ExponentialSchedule(minimum=0.01, rate=1.0, every=1)
    estimator = SST(OneHot(), utility="gibbs", temperature=schedule, kl="distribution", evaluation="relaxed")
    scores, weights = torch.randn(2000, 3, requires_grad=True), torch.tensor([1.0, 2.0, 4.0])

    def objective(vertices: Tensor, rows: Tensor) -> Tensor:
        assert vertices.requires_grad
        return vertices @ weights

    for _ in range(2):
        torch.manual_seed(1)
        trained = estimator.train()(scores, objective)
    estimator.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.manual_seed(1)
            estimate = estimator(scores, objective)
            assert int(schedule.step) == 2
            # Temperature exp(-2) after two steps, exp(-1) at the second: the same noise, sharper.
            expected = (trained.vertices.detach().double().log() * math.e).softmax(-1).float()
            torch.testing.assert_close(estimate.vertices, expected, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(estimate.kl, trained.kl.detach())
    for options, reason in (({"evaluation": "soft"}, "one of hard, relaxed"), ({"straight_through": True}, "is not")):
        with pytest.raises(ValueError, match=reason):
            SST(OneHot(), **{"evaluation": "relaxed"} | options)  # type: ignore[arg-type]


def test_clipping_leaves_evaluation_alone() -> None:
    p = problem("spanning_tree", scale=20.0)
    plain, clipped = SST(p.structure).eval(), SST(p.structure, clip_range=1.0).eval()
    torch.manual_seed(0)
    first = plain(p.scores, p.decoder, mask=p.mask)
    torch.manual_seed(0)
    assert torch.equal(first.vertices, clipped(p.scores, p.decoder, mask=p.mask).vertices)


@pytest.mark.parametrize(("name", "relaxation"), [(n, r) for n, r in PAIRS if r != "l2x"])
def test_straight_through_is_hard_forward_and_relaxed_backward(name: str, relaxation: str) -> None:
    p = problem(name)
    estimator = SST(p.structure, relaxation, straight_through=True)
    torch.manual_seed(3)
    estimate = estimator(p.scores, p.decoder, mask=p.mask)
    torch.manual_seed(3)
    utilities = estimator.perturb(p.scores, p.mask)
    hard = p.structure.argmax(utilities, p.mask)
    assert torch.equal(estimate.vertices, hard)
    assert estimate.vertices.requires_grad
    # Decoder: exactly the gradient at the hard vertex. Scores: its gradient for the vertex, through the relaxation.
    leaf = hard.clone().requires_grad_()
    loss = p.decoder(leaf, torch.arange(2)).sum()
    at_vertex, *decoder = torch.autograd.grad(loss, [leaf, *p.decoder.parameters()])
    relaxed = p.structure.relax(relaxation, utilities, p.mask)
    (scores,) = torch.autograd.grad(relaxed, p.scores, at_vertex)
    torch.testing.assert_close(
        p.gradient(estimate.surrogate.sum()), torch.cat([g.flatten() for g in (scores, *decoder)])
    )


# --- options ---


def test_clip_scores() -> None:
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[3.0, -20.0, 1.0, nan], [-50.0, -49.0, inf, -80.0], [nan, nan, nan, inf]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, True], [False] * 4])
    scores.requires_grad_()
    clipped = clip_scores(OneHot(), scores, mask, 15.0)
    assert clipped.tolist() == [[0, -15, -2, 0], [-1, 0, 0, -15], [0, 0, 0, 0]]
    (gradient,) = torch.autograd.grad(clipped.sum(), scores)
    # d/ds of (s_2 - s_0) and (s_0 - s_1): clipped scores are constants, missing ones are never looked at.
    assert gradient.tolist() == [[-1, 0, 1, 0], [1, -1, 0, 0], [0, 0, 0, 0]]


def test_clipping_reads_undirected_scores_above_the_diagonal_only() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [99.0, 0.0, -30.0], [99.0, 99.0, 99.0]])
    clipped = clip_scores(SpanningTree(), scores, None, 15.0)
    assert clipped.tolist() == [[0, -1, 0], [0, 0, -15], [0, 0, 0]]


@pytest.mark.parametrize("name", ["one_hot", "top_edges", "spanning_tree", "arborescence", "matching"])
def test_wide_clipping_changes_nothing(name: str) -> None:
    p = problem(name)
    assert len(p.vertices(0).flatten(1).sum(1).unique()) == 1
    relaxation = "exp_family" if "exp_family" in p.structure.relaxations else "sinkhorn"
    plain = p.gradient(surrogate(SST(p.structure, relaxation), p).sum())
    clipped = p.gradient(surrogate(SST(p.structure, relaxation, clip_range=50.0), p).sum())
    torch.testing.assert_close(clipped, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["subset", "correlated_k_subset", "directed_edges"])
def test_clipping_is_refused_where_it_changes_the_distribution(name: str) -> None:
    with pytest.raises(ValueError, match="clip_range would change the distribution"):
        SST(CASES[name].plain, clip_range=15.0)


def test_clipping_is_refused_for_neg_exponential() -> None:
    with pytest.raises(ValueError, match="clip_range would change the distribution"):
        SST(Arborescence(), utility="neg_exponential", clip_range=15.0)


def test_clipped_utilities_are_those_of_the_released_code() -> None:
    p = problem("spanning_tree", scale=20.0)
    estimator = SST(p.structure, temperature=4.0, clip_range=3.0, clip="utilities")
    torch.manual_seed(0)
    relaxed = estimator(p.scores, p.decoder, mask=p.mask).vertices
    torch.manual_seed(0)
    sharpened = estimator.perturb(p.scores, p.mask) / 4.0
    exists = p.structure.parts(sharpened, p.mask)
    top = sharpened.masked_fill(~exists, -math.inf).amax((1, 2), keepdim=True)
    clipped = torch.maximum(sharpened, top - 3.0)
    assert (clipped > sharpened)[exists].any()
    torch.testing.assert_close(relaxed, p.structure.marginals(clipped, p.mask))
    assert SST(Arborescence(), utility="neg_exponential", clip_range=15.0, clip="utilities").clip == "utilities"
    with pytest.raises(ValueError, match="clip_range would change the distribution"):
        SST(CASES["subset"].plain, clip_range=15.0, clip="utilities")
    with pytest.raises(ValueError, match="says what clip_range clips"):
        SST(p.structure, clip="utilities")


def test_samples_are_averaged() -> None:
    p = problem("spanning_tree")
    estimator = SST(p.structure, n_samples=3)
    torch.manual_seed(0)
    estimate = estimator(p.scores, p.decoder, mask=p.mask)
    assert estimate.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert estimate.metrics["decoder_calls"] == 3
    losses = p.decoder(estimate.vertices, estimate.rows)
    torch.testing.assert_close(estimate.surrogate, losses.reshape(2, 3).mean(1))
    torch.testing.assert_close(estimate.mean(losses), estimate.surrogate)
    assert len(estimate.vertices.unique(dim=0)) == 6
    # Half the samples, twice the variance: the samples are independent.
    variance = []
    for n in (1, 4):
        scores = p.scores.detach().repeat(300, 1, 1).requires_grad_()
        estimate = SST(p.structure, n_samples=n)(scores, p.decoder, mask=p.mask.repeat(300, 1, 1))
        (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
        variance.append(gradient.reshape(300, 2, 4, 4).var(0).sum().item())
    assert variance[0] / variance[1] == pytest.approx(4, rel=0.4)


@pytest.mark.parametrize("name", [n for n in CASES if n != "correlated_k_subset"])
@pytest.mark.parametrize("utility", ["gumbel", "gaussian", "logistic", "neg_exponential"])
def test_kl_counts_every_part_once(name: str, utility: str) -> None:
    p = problem(name)
    relaxation = next(iter(p.structure.relaxations))
    scores = torch.where(p.structure.parts(p.scores, p.mask), p.scores.detach(), math.nan).requires_grad_()
    kl = SST(p.structure, relaxation, utility)(scores, p.decoder, mask=p.mask).kl  # type: ignore[arg-type]
    for b in range(2):
        flat = p.structure.layout.flatten(scores[b])
        there = flat[~flat.isnan()]
        torch.testing.assert_close(kl[b], make_utility(utility).kl(there).sum())
    assert torch.autograd.grad(kl.sum(), scores)[0].isfinite().all()


def test_kl_of_correlated_subsets_is_that_of_the_unaries() -> None:
    p = problem("correlated_k_subset")
    estimate = SST(p.structure)(p.scores, p.decoder)
    torch.testing.assert_close(estimate.kl, Gumbel().kl(p.scores[:, :4]).sum(1))


def test_kl_of_the_distribution() -> None:
    p = problem("one_hot")
    kl = SST(p.structure, kl="distribution")(p.scores, p.decoder).kl
    logs = p.scores.log_softmax(-1)
    torch.testing.assert_close(kl, (logs.exp() * (logs + math.log(4))).sum(-1))
    with pytest.raises(UnsupportedError, match=r"kl=distribution\) needs"):
        SST(Matching(), "sinkhorn", kl="distribution")


def test_gibbs_utility() -> None:
    assert isinstance(SST(OneHot(), utility="gibbs").utility, Gumbel)
    assert type(SST(Subset(), utility="gibbs").utility).__name__ == "Logistic"
    with pytest.raises(UnsupportedError, match="no independent noise makes Arborescence a Gibbs sample"):
        SST(Arborescence(), utility="gibbs")


def test_schedule() -> None:
    schedule = ExponentialSchedule(start=1.0, minimum=0.5, rate=0.1, every=3)
    estimator = SST(OneHot(), temperature=schedule)
    scores = torch.zeros(1, 3, requires_grad=True)
    seen = []
    for _ in range(12):
        seen.append(estimator(scores, lambda x, rows: x[:, 0]).metrics["temperature"].item())
    expected = [max(0.5, math.exp(-0.1 * 3 * (step // 3))) for step in range(12)]
    assert seen == pytest.approx(expected)
    # Evaluation does not count as a step, and the step is part of the state.
    estimator.eval()(scores, lambda x, rows: x[:, 0])
    assert schedule.step == 12
    resumed = SST(OneHot(), temperature=ExponentialSchedule(minimum=0.5, rate=0.1, every=3))
    resumed.load_state_dict(estimator.state_dict())
    assert resumed.temperature.step == 12  # type: ignore[union-attr]


def test_temperature_is_that_of_the_relaxation() -> None:
    p = problem("one_hot")
    schedule = ExponentialSchedule(start=0.7, minimum=0.7)
    torch.testing.assert_close(
        surrogate(SST(p.structure, temperature=0.7), p), surrogate(SST(p.structure, temperature=schedule), p)
    )


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        SST(OneHot(), temperature=temperature)
    with pytest.raises(ValueError, match="schedule needs 0 < minimum <= start"):
        ExponentialSchedule(start=temperature, minimum=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": "sinkhorn"}, "needs relaxation 'sinkhorn', which OneHot lacks; it has exp_family"),
        ({"utility": "cauchy"}, "utility must be one of"),
        ({"n_samples": 0}, "n_samples"),
        ({"clip_range": 0.0}, "clip_range must be positive"),
        ({"clip": "theta", "clip_range": 15.0}, "clip must be one of"),
        ({"backward": "autograd"}, "backward must be one of"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"step": "scores"}, "step must be one of"),
        ({"step": "gradient"}, "step=gradient is that of backward=finite_difference"),
        ({"kl": "prior"}, "kl must be one of"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SST(OneHot(), **options)


def test_impossible_combinations() -> None:
    with pytest.raises(ValueError, match="needs a relaxation with a symmetric Jacobian, and 'l2x'"):
        SST(KSubset(2), "l2x", backward="finite_difference")
    with pytest.raises(ValueError, match="straight_through needs one utility a sample, and l2x takes 2"):
        SST(KSubset(2), "l2x", straight_through=True)
    with pytest.raises(UnsupportedError, match="BinaryTree lacks; it has none"):
        SST(BinaryTree())


@pytest.mark.parametrize(("name", "relaxation"), PAIRS)
def test_missing_scores_are_never_looked_at(name: str, relaxation: str) -> None:
    p = problem(name)
    exists = p.structure.parts(p.scores, p.mask)
    results = []
    for filler in (0.0, math.nan, math.inf):
        scores = torch.where(exists, p.scores.detach(), filler).requires_grad_()
        torch.manual_seed(1)
        clip = 15.0 if p.structure.constant_size else None
        estimate = SST(p.structure, relaxation, clip_range=clip)(scores, p.decoder, mask=p.mask)
        (gradient,) = torch.autograd.grad((estimate.surrogate + estimate.kl).sum(), scores)
        assert (gradient[~exists] == 0).all()
        results.append(gradient)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("name", "relaxation"), PAIRS)
def test_float32_extremes(name: str, relaxation: str) -> None:
    p = problem(name)
    scores = torch.where(torch.rand(p.scores.shape) < 0.5, -100.0, 100.0).requires_grad_()
    estimator = SST(p.structure, relaxation, utility="gaussian")
    estimate = estimator(scores, lambda x, rows: x.square().flatten(1).sum(1), mask=p.mask)
    assert estimate.vertices.dtype == torch.float32
    assert estimate.vertices.isfinite().all()
    (gradient,) = torch.autograd.grad((estimate.surrogate + estimate.kl).sum(), scores)
    assert gradient.isfinite().all()


def test_neg_exponential_takes_its_rate() -> None:
    estimator = SST(Arborescence(), utility=NegExponential("softplus"))
    scores = torch.randn(2, 4, 4)
    utilities = estimator.perturb(scores, None)
    assert (utilities < 0).all()


# --- deterministic relaxations ---


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("mapping", ["marginal", "sparsemap"])
def test_deterministic(name: str, mapping: str) -> None:
    p = problem(name)
    oracle = {"marginal": "marginals", "sparsemap": "project"}[mapping]
    if oracle not in p.structure.oracles:
        with pytest.raises(UnsupportedError, match=f"estimator {mapping} needs {oracle}"):
            Deterministic(p.structure, mapping)  # type: ignore[arg-type]
        return
    estimator = Deterministic(p.structure, mapping)  # type: ignore[arg-type]
    estimate = estimator(p.scores, p.decoder, mask=p.mask)
    torch.testing.assert_close(estimate.vertices, getattr(p.structure, oracle)(p.scores, p.mask))
    assert torch.autograd.gradcheck(lambda *_: surrogate(estimator, p), p.variables, fast_mode=True)
    hard = estimator.eval()(p.scores, p.decoder, mask=p.mask)
    assert torch.equal(hard.vertices, p.structure.argmax(p.scores, p.mask))
    assert not hard.vertices.requires_grad


def test_kl_of_structured_attention_is_enumerated() -> None:
    p = problem("spanning_tree")
    estimate = Deterministic(p.structure)(p.scores, p.decoder, mask=p.mask)
    for b in range(2):
        _, probabilities = p.probabilities(b, "gibbs")
        expected = (probabilities * (probabilities * len(probabilities)).log()).sum()
        torch.testing.assert_close(estimate.kl[b], expected)


class OneEdge(Structure):
    """A user's categories: one edge of a graph."""

    is_categorical: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layout = Undirected()

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        exists = self.layout.flatten(self.parts(utility, mask))
        best = OneHot().argmax(self.layout.flatten(utility), exists)
        return self.layout.unflatten(best, utility.shape[-2:])


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_entmax_of_categories_of_ones_own(alpha: float) -> None:
    scores, mask = torch.randn(2, 4, 4, requires_grad=True), torch.stack([torch.ones(4, 4).bool(), *length_masks(4, 3)])
    estimate = Deterministic(OneEdge(), "entmax", alpha=alpha)(scores, lambda x, rows: x[:, 0, 1], mask=mask)
    expected = OneHot().entmax(scores.triu(1)[1, :3, :3][[0, 0, 1], [1, 2, 2]], alpha)
    assert torch.equal(estimate.vertices[1], estimate.vertices[1].mT)
    torch.testing.assert_close(estimate.vertices[1][[0, 0, 1], [1, 2, 2]], expected)
    assert (torch.autograd.grad(estimate.surrogate.sum(), scores)[0].tril() == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0])
def test_entmax_solves_its_problem(alpha: float) -> None:
    p = problem("one_hot")
    estimate = Deterministic(p.structure, "entmax", alpha=alpha)(p.scores, p.decoder, mask=p.mask)
    # Optimality: the gradient of <p, s> + H_alpha(p) is equal on the support and not larger elsewhere.
    for b in range(2):
        x = estimate.vertices[b].detach()
        assert x.sum().item() == pytest.approx(1)
        slope = x.log() + 1 if alpha == 1 else x.pow(alpha - 1) / (alpha - 1)
        gain = torch.where(p.mask[b], p.scores[b].detach() - slope, -math.inf)
        assert gain[x > 0].std(correction=0) < 1e-6
        assert gain.max() <= gain[x > 0].mean() + 1e-6
        assert (x[~p.mask[b]] == 0).all()


def test_learned_alpha() -> None:
    p = problem("one_hot")
    estimator = Deterministic(p.structure, "entmax", alpha=1.4, learn_alpha=True).double()
    assert estimator.current_alpha().item() == pytest.approx(1.4)
    assert estimator.logit is not None
    inputs = [estimator.logit, *p.variables]
    assert torch.autograd.gradcheck(lambda *_: surrogate(estimator, p), inputs, eps=1e-5, atol=1e-4, fast_mode=True)
    assert estimator(p.scores, p.decoder, mask=p.mask).metrics["alpha"].item() == pytest.approx(1.4)


def test_impossible_deterministic_options() -> None:
    with pytest.raises(UnsupportedError, match=r"estimator entmax needs one category out of all .*; got Subset"):
        Deterministic(Subset(), "entmax")
    with pytest.raises(ValueError, match="alpha belongs to mapping=entmax"):
        Deterministic(OneHot(), "marginal", alpha=1.5)
    with pytest.raises(ValueError, match="alpha must be at least 1"):
        Deterministic(OneHot(), "entmax", alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha must be within \(1, 2\)"):
        Deterministic(OneHot(), "entmax", alpha=2.0, learn_alpha=True)
    with pytest.raises(ValueError, match="mapping must be one of"):
        Deterministic(OneHot(), "softmax")  # type: ignore[arg-type]


# --- perturbed argmaxes ---


def test_jacobian_of_the_perturbed_argmax_is_unbiased() -> None:
    # With Gumbel noise of scale sigma the mean argmax of OneHot is softmax(s / sigma), whose Jacobian is known.
    scores = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((scores / 0.7).softmax(0) @ weights, scores)
    estimator = Perturbed(OneHot(), "gumbel", sigma=0.7, n_samples=200)
    copies = scores.detach().repeat(400, 1).requires_grad_()
    estimate = estimator(copies, lambda x, rows: x @ weights)
    assert_mean(*torch.autograd.grad(estimate.surrogate.sum(), copies), expected)


@pytest.mark.parametrize("utility", ["gaussian", "logistic"])
def test_perturbed_argmax_of_a_bit(utility: str) -> None:
    # One bit: P(s + sigma Z > 0) = F(s / sigma), so the derivative is the density over sigma.
    scores = torch.full((400, 1), 0.8, dtype=torch.float64, requires_grad=True)
    estimator = Perturbed(Subset(), utility, sigma=1.7, n_samples=100)  # type: ignore[arg-type]
    estimate = estimator(scores, lambda x, rows: x[:, 0])
    density = make_utility(utility).log_prob(scores[0].detach() / 1.7, torch.zeros(())).exp() / 1.7
    assert_mean(*torch.autograd.grad(estimate.surrogate.sum(), scores), density)


@pytest.mark.parametrize("name", cases.CASES)
def test_perturbed_goes_wherever_there_is_an_argmax(name: str) -> None:
    p = problem(name)
    structure = p.structure
    estimate = Perturbed(structure, n_samples=7)(p.scores, p.decoder, mask=p.mask)
    gradient = p.gradient(estimate.surrogate.sum())
    assert gradient[p.is_score][~structure.parts(p.scores, p.mask).flatten()].abs().sum() == 0
    assert gradient[p.is_score].abs().sum() > 0
    torch.testing.assert_close(estimate.vertices * 7, (estimate.vertices * 7).round())


def test_impossible_perturbed_options() -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        Perturbed(OneHot(), sigma=0)
    with pytest.raises(ValueError, match="scores plus noise; got NegExponential"):
        Perturbed(OneHot(), "neg_exponential")
    with pytest.raises(ValueError, match="n_samples"):
        Perturbed(OneHot(), n_samples=0)
