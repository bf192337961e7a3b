"""Baselines are classes: a user's own learns, evaluates a vertex of its own, and leaves the mean gradient alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from structgrad.estimators import Baseline, Outcome, Reinforce
from structgrad.estimators.baselines import BatchMean, LearntBaseline, MovingAverage, make_baseline
from structgrad.structures import KSubset, OneHot, Structure, UnsupportedError
from structgrad.testing import assert_unbiased
from tests.estimators.test_score_function import problem


class Median(Baseline):
    """A user's own: the median of past objectives plus a learnt share of the objective at the worst vertex."""

    needs = ("argmax",)
    has_rival = True

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(()))
        self.register_buffer("median", torch.zeros(()))

    def rival(self, structure: Structure, scores: Tensor, mask: Tensor | None, sample: Callable[[], Tensor]) -> Tensor:
        return structure.argmax(-scores, mask)

    def predict(self, outcome: Outcome) -> Tensor:
        return self.median + self.share * outcome.rival

    def update(self, outcome: Outcome, prediction: Tensor) -> Tensor:
        self.median = outcome.losses.median().to(self.median)
        return (outcome.losses - prediction).square().mean(1)


@pytest.mark.parametrize("name", ["one_hot", "spanning_tree"])
def test_a_baseline_of_ones_own_is_unbiased(name: str) -> None:
    p = problem(name)
    estimator = Reinforce(p.structure, baseline=Median(), n_samples=2).double()
    estimate = estimator(p.scores, p.decoder, mask=p.mask)
    assert estimate.metrics["decoder_calls"] == 3
    assert estimate.weights.tolist() == [0.5, 0.5, 0.0] * 2
    estimate.surrogate.mean().backward()
    assert estimator.baseline.share.grad.abs() > 0
    assert estimator.baseline.median != 0
    assert set(dict(estimator.named_parameters())) == {"baseline.share"}
    assert "baseline.median" in estimator.state_dict()
    with torch.no_grad():
        estimator.baseline.share.fill_(0.5)
    assert_unbiased(estimator, p, "gibbs")


def test_an_object_and_its_name_are_the_same() -> None:
    p = problem("one_hot")
    gradients = []
    for baseline in ("ema", MovingAverage(0.5)):
        estimator = Reinforce(p.structure, baseline=baseline, decay=0.5).double()
        torch.manual_seed(0)
        for _ in range(2):
            estimate = estimator(p.scores, p.decoder, mask=p.mask)
        gradients.append(p.gradient(estimate.surrogate.sum()))
    assert torch.equal(*gradients)
    assert Reinforce(OneHot(), baseline=BatchMean()).mixes_examples
    assert not Reinforce(OneHot()).mixes_examples


def test_what_a_baseline_needs_is_asked_for() -> None:
    class Demanding(Median):
        needs = ("conditional_utility",)

    with pytest.raises(UnsupportedError, match="needs conditional_utility, which OneHot lacks"):
        Reinforce(OneHot(), baseline=Demanding())
    with pytest.raises(ValueError, match="baseline nvil needs context_size"):
        Reinforce(OneHot(), baseline=Median(), context_size=3)
    with pytest.raises(ValueError, match="hidden_size must be at least 1"):
        make_baseline("nvil", context_size=3, hidden_size=0)

    class Silent(MovingAverage):
        has_rival = True

    with pytest.raises(NotImplementedError, match="Silent has a rival, but does not say which"):
        Reinforce(KSubset(1), baseline=Silent())(torch.zeros(2, 3), lambda x, rows: x.sum(1))


def test_a_learnt_baseline_of_wide_contexts() -> None:
    """Scores and context in float64, the network in float32."""
    p = problem("one_hot")
    estimator = Reinforce(p.structure, baseline=LearntBaseline(8))
    estimate = estimator(p.scores, p.decoder, mask=p.mask, context=p.context)
    assert estimate.surrogate.dtype == torch.float64
    estimate.surrogate.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in estimator.parameters())
