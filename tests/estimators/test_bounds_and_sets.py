"""DisARM, MuProp, sampling without replacement, importance-weighted bounds: unbiased for what they estimate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from structgrad.estimators import (
    RODEO,
    DisARM,
    Estimator,
    ImportanceWeighted,
    MuProp,
    Reinforce,
    WithoutReplacement,
    log_size,
)
from structgrad.estimators.without_replacement import log_prob_of_sets
from structgrad.structures import BinaryTree, KSubset, OneHot, Subset
from structgrad.structures.base import UnsupportedError
from structgrad.testing import Problem, assert_mean, assert_unbiased, gradients
from tests.cases import CASES as ALL
from tests.estimators.test_score_function import CASES, measured_variance, problem

BITS = [name for name, (structure, *_) in CASES.items() if structure.is_independent]
#: What MuProp takes.
GIBBS = [name for name, (structure, *_) in CASES.items() if structure.oracles >= {"sample", "log_prob", "marginals"}]

# --- DisARM -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n_pairs", [1, 3])
@pytest.mark.parametrize("name", BITS)
def test_disarm_is_unbiased(name: str, n_pairs: int) -> None:
    assert_unbiased(DisARM(CASES[name][0], n_pairs), problem(name), "gibbs")


def test_disarm_beats_leave_one_out_with_as_many_evaluations() -> None:
    """Its paper's claim; on this problem, with 20,000 estimates each, by a margin far above the error of 2 %."""
    case = problem("subset")
    loo = Reinforce(Subset(), baseline="loo", n_samples=2)
    assert measured_variance(DisARM(Subset()), case) < 0.9 * measured_variance(loo, case)


# --- RODEO ------------------------------------------------------------------------------------------------------------


def scrambled(n_samples: int) -> RODEO:
    """With a network that is neither zero nor trained."""
    estimator = RODEO(Subset(), n_samples, hidden_size=8).double()
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return estimator


@pytest.mark.gpu
@pytest.mark.parametrize("n_samples", [2, 3])
@pytest.mark.parametrize("name", BITS)
def test_rodeo_is_unbiased_for_any_network(name: str, n_samples: int) -> None:
    estimator = scrambled(n_samples)
    estimator.structure = CASES[name][0]
    assert_unbiased(estimator, problem(name), "gibbs")


def test_rodeo_starts_as_leave_one_out() -> None:
    case = problem("subset")
    torch.manual_seed(1)
    ours = RODEO(Subset())(case.scores, case.decoder, mask=case.mask)
    losses = ours.objective * 2
    x = ours.vertices.detach().reshape(2, 2, -1)
    each = case.decoder(ours.vertices.detach(), ours.rows).detach().reshape(2, 2)
    torch.testing.assert_close(each.sum(1), losses)
    score = torch.where(case.mask[:, None], x - case.scores.detach().sigmoid()[:, None], 0.0)
    signal = torch.stack([each[:, 0] - each[:, 1], each[:, 1] - each[:, 0]], 1)
    (found,) = torch.autograd.grad(ours.surrogate.sum(), case.scores)
    torch.testing.assert_close(found, (signal[..., None] * score).mean(1))


def test_rodeo_learns_to_have_less_variance() -> None:
    case = problem("subset")
    estimator = RODEO(Subset()).double()
    before = measured_variance(estimator.requires_grad_(True), case)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    scores, mask = case.scores.detach().repeat(64, 1).requires_grad_(), case.mask.repeat(64, 1)
    for _ in range(200):
        loss = estimator(scores, case.decoder, mask=mask).surrogate.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert measured_variance(estimator, case) < 0.9 * before


# --- MuProp -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", GIBBS)
def test_muprop_is_unbiased(name: str) -> None:
    assert_unbiased(MuProp(CASES[name][0]), problem(name), "gibbs")


@pytest.mark.parametrize("name", GIBBS)
def test_muprop_leaves_nothing_of_a_linear_objective_to_chance(name: str) -> None:
    case = problem(name)
    weights = torch.randn(case.structure.argmax(case.scores, case.mask).shape, dtype=torch.float64)
    out = MuProp(case.structure)(case.scores, lambda v, r: (v * weights[r]).flatten(1).sum(1), mask=case.mask)
    (found,) = torch.autograd.grad(out.surrogate.sum(), case.scores)
    mean = case.structure.marginals(case.scores, case.mask)
    (expected,) = torch.autograd.grad((mean * weights).sum(), case.scores)
    torch.testing.assert_close(found, expected)


# --- without replacement ----------------------------------------------------------------------------------------------


def test_probability_of_sets_is_the_sum_over_orders() -> None:
    for scale in (0.5, 3.0, 30.0):
        p = (scale * torch.randn(5, dtype=torch.float64)).softmax(0)
        total = 0.0
        for chosen in itertools.combinations(range(5), 3):
            orders = 0.0
            for order in itertools.permutations(chosen):
                left, probability = torch.ones(5, dtype=torch.bool), 1.0
                for category in order:
                    probability *= float(p[category] / p[left].sum())
                    left[category] = False
                orders += probability
            inside = torch.tensor(chosen)
            outside = torch.ones(5, dtype=torch.bool)
            outside[inside] = False
            share = p[inside].log() - p[outside].sum().log()
            found = float(log_prob_of_sets(share, torch.ones(3, dtype=torch.bool)).exp())
            assert found == pytest.approx(orders, rel=1e-9)
            total += found
        assert total == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_without_replacement_is_unbiased(k: int, baseline: bool) -> None:
    """With a mask that leaves three of four categories in one example, so that k = 3 is the exact sum there."""
    assert_unbiased(WithoutReplacement(OneHot(), k, baseline), problem("one_hot"), "gibbs")


@pytest.mark.parametrize("k", [4, 9])
def test_all_categories_are_the_exact_sum(k: int) -> None:
    case = problem("one_hot")
    out = WithoutReplacement(OneHot(), k)(case.scores, case.decoder, mask=case.mask)
    truth = case.expected("gibbs")
    torch.testing.assert_close(out.objective.sum(), truth.detach())
    torch.testing.assert_close(case.gradient(out.surrogate.sum()), case.gradient(truth))


def test_without_replacement_beats_leave_one_out_with_as_many_evaluations() -> None:
    case = problem("one_hot")
    loo = Reinforce(OneHot(), baseline="loo", n_samples=2)
    assert measured_variance(WithoutReplacement(OneHot(), 2), case) < 0.9 * measured_variance(loo, case)


# --- importance-weighted bounds ---------------------------------------------------------------------------------------


def expected_bound(case: Problem, samples: int, prior: Tensor | None = None) -> Tensor:
    """Minus the sum over examples of E[B] over all tuples of samples, differentiable.

    Args:
        case: the problem.
        samples: an example.
        prior: scores ``[*parts]`` of the prior; None: the uniform one.
    """
    total = torch.zeros((), dtype=torch.float64)
    for example in range(len(case.scores)):
        vertices, q = case.probabilities(example, "gibbs")
        losses = case.decoder(vertices, torch.full((len(vertices),), example))
        known = torch.zeros_like(case.scores[0]) if prior is None else prior
        parts = case.structure.parts(known, case.mask[example])
        log_prior = (vertices * torch.where(parts, known, 0.0)).flatten(1).sum(1).log_softmax(0)
        log_w = -losses - q.log() + log_prior
        for chosen in itertools.product(range(len(q)), repeat=samples):
            index = torch.tensor(chosen)
            bound = log_w[index].logsumexp(0) - torch.tensor(float(samples)).double().log()
            total = total - q[index].prod() * bound
    return total


def bound_gradients(
    estimator: Estimator, case: Problem, count: int = 60, repeats: int = 200, prior: Tensor | None = None
) -> Tensor:
    """Like ``gradients``, for ``surrogate + kl``."""

    class WithKL(torch.nn.Module):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            out = estimator(*arguments, prior_scores=prior, **options)
            out.surrogate = out.surrogate + out.kl
            return out

    return gradients(WithKL(), case, count, repeats)  # type: ignore[arg-type]


@pytest.mark.parametrize("signal", ["bound", "leave_one_out"])
@pytest.mark.parametrize("name", ["one_hot", "subset", "k_subset", "spanning_tree"])
def test_importance_weighted_bound_is_unbiased(name: str, signal: Any) -> None:
    case = problem(name)
    samples = bound_gradients(ImportanceWeighted(case.structure, 2, signal), case)
    assert_mean(samples, case.gradient(expected_bound(case, 2)))


def test_importance_weighted_bound_with_a_prior() -> None:
    """Of scores, decoder and prior."""
    case = problem("one_hot")
    prior = torch.randn_like(case.scores[0]).requires_grad_()
    expected = expected_bound(case, 2, prior)
    (exact,) = torch.autograd.grad(expected, prior, retain_graph=True)
    samples = bound_gradients(ImportanceWeighted(case.structure, 2), case, prior=prior.detach())
    assert_mean(samples, case.gradient(expected))
    samples = []
    for _ in range(60):
        each, masks = (t.repeat(200, *[1] * prior.dim()) for t in (case.scores.detach(), case.mask))
        out = ImportanceWeighted(case.structure, 2)(each, case.decoder, mask=masks, prior_scores=prior)
        samples.append(torch.autograd.grad((out.surrogate + out.kl).sum() / 200, prior)[0].flatten())
    assert_mean(torch.stack(samples), exact.flatten())


def test_one_sample_is_the_elbo() -> None:
    case = problem("k_subset")
    samples = bound_gradients(ImportanceWeighted(case.structure, 1, "bound"), case)
    elbo = case.expected("gibbs")
    for example in range(2):
        _, q = case.probabilities(example, "gibbs")
        elbo = elbo + (q * (q * len(q)).log()).sum()
    assert_mean(samples, case.gradient(elbo))


def test_vimco_has_less_variance_than_the_plain_score_function() -> None:
    case = problem("k_subset")
    plain, vimco = (
        bound_gradients(ImportanceWeighted(case.structure, 3, signal), case)[:, case.is_score].var(0).sum()
        for signal in ("bound", "leave_one_out")
    )
    assert vimco < 0.8 * plain


def test_importance_weighted_reports_elbo_and_bound() -> None:
    case = problem("one_hot")
    torch.manual_seed(0)
    out = ImportanceWeighted(OneHot(), 200)(case.scores, case.decoder, mask=case.mask)
    every = torch.stack([case.decoder(torch.eye(4).double(), torch.full((4,), b)) for b in range(2)]).detach()
    evidence = (torch.where(case.mask, -every, -torch.inf).logsumexp(1) - case.mask.sum(1).log()).mean()
    assert out.metrics["bound"] == pytest.approx(float(evidence), abs=0.05)
    assert -(out.objective + out.kl).mean() < out.metrics["bound"]
    with pytest.raises(ValueError, match="weight 1; this loss weighs it by"):
        ImportanceWeighted(OneHot())(case.scores, case.decoder, mask=case.mask, kl_weight=0.5)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("subset", DisARM(Subset(), 2)),
        ("subset", RODEO(Subset(), 3)),
        ("one_hot", WithoutReplacement(OneHot(), 3)),
        ("one_hot", MuProp(OneHot())),
        ("k_subset", MuProp(KSubset(2))),
        ("k_subset", ImportanceWeighted(KSubset(2), 3)),
        ("one_hot", ImportanceWeighted(OneHot(), 3, "bound")),
    ],
)
def test_large_scores_and_missing_parts_in_float32(name: str, estimator: Estimator) -> None:
    structure, shape, mask = CASES[name]
    scores = torch.where(mask.expand(2, *shape), 100 * torch.randn(2, *shape), torch.nan).requires_grad_()
    weights = torch.randn(2, *shape)
    out = estimator(scores, lambda v, r: (v * weights[r]).flatten(1).sum(1), mask=mask)
    (gradient,) = torch.autograd.grad((out.surrogate + out.kl).sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~structure.parts(scores.detach(), mask)] == 0).all()


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="independent bits"):
        DisARM(KSubset(2))
    with pytest.raises(UnsupportedError, match="needs one category out of all"):
        WithoutReplacement(Subset())
    with pytest.raises(UnsupportedError, match="BinaryTree lacks"):
        ImportanceWeighted(BinaryTree())
    with pytest.raises(UnsupportedError, match="BinaryTree lacks"):
        MuProp(BinaryTree())
    with pytest.raises(ValueError, match="at least 2"):
        ImportanceWeighted(OneHot(), 1)
    with pytest.raises(ValueError, match="at least 2"):
        WithoutReplacement(OneHot(), 1)
    with pytest.raises(UnsupportedError, match="independent bits"):
        RODEO(OneHot())
    with pytest.raises(ValueError, match="n_samples must be at least 2"):
        RODEO(Subset(), 1)
    with pytest.raises(ValueError, match="n_pairs"):
        DisARM(Subset(), 0)


# --- the size of the set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
@pytest.mark.parametrize("name", [n for n, case in ALL.items() if "log_partition" in case.structure.oracles])
def test_the_size_of_a_set(name: str, batch: tuple[int, ...]) -> None:
    """It is summed once for all examples without a mask, and for each example with one."""
    structure, shape = ALL[name].structure, ALL[name].shape
    size = log_size(structure, torch.randn(*batch, *shape), None)
    each = log_size(structure, torch.randn(*batch, *shape), torch.ones(shape, dtype=torch.bool))
    assert size.shape == batch
    torch.testing.assert_close(size, each)
