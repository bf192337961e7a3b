"""Baselines are classes: a user's own learns, evaluates a vertex of its own, and leaves the mean gradient alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from structgrad.estimators import Baseline, Outcome, Reinforce, SizeMismatchError
from structgrad.estimators.baselines import BatchMean, LearntBaseline, MovingAverage, RunningMean, make_baseline
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


def test_options_out_of_range_are_refused_for_every_baseline() -> None:
    for name in ("loo", "none", "ema"):
        with pytest.raises(ValueError, match="decay"):
            make_baseline(name, decay=1.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="hidden_size"):
            make_baseline(name, hidden_size=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_do_not_move_a_mean(bad: float) -> None:
    running, clean = RunningMean(0.9, with_deviation=True), RunningMean(0.9, with_deviation=True)
    for values in (torch.tensor([bad, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, bad]), torch.tensor([5.0])):
        running.update(values)
        if values.isfinite().all():
            clean.update(values)
    assert running.mean == clean.mean
    assert running.deviation == clean.deviation
    clean.update(torch.tensor([1e30, -1e30]))  # of finite values; its variance is beyond float32, and not 0
    assert clean.deviation == torch.inf


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


def test_shapes_that_would_mix_examples_are_refused() -> None:
    """``[batch]`` beside ``[batch, K]`` is one number a sample, and with K = 1 every example with every other."""

    class Constant(Baseline):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shape = shape

        def predict(self, outcome: Outcome) -> Tensor:
            return torch.ones(self.shape)

    def run(baseline: Baseline, context: Tensor | None = None, n_samples: int = 1) -> None:
        estimate = Reinforce(OneHot(), baseline=baseline, n_samples=n_samples)(
            torch.randn(3, 4), lambda v, r: v.sum(1), context=context
        )
        assert estimate.surrogate.shape == (3,)

    for shape in ((), (1, 1), (3, 1), (1, 2), (3, 2)):
        run(Constant(*shape), n_samples=2)
    for wrong in ((3,), (1,), (2, 1), (3, 3), (3, 1, 1)):
        with pytest.raises(ValueError, match=r"a scalar, or \[3 or 1, 2 or 1\] for 3 examples with 2 samples; got"):
            run(Constant(*wrong), n_samples=2)
    with pytest.raises(ValueError, match="got \\[3\\]"):
        run(Constant(3))
    run(LearntBaseline(2), torch.randn(3, 2))
    for context in (torch.randn(2), torch.randn(1, 2), torch.randn(5, 2), torch.randn(3, 3, 2), torch.randn(3, 1, 2)):
        with pytest.raises(ValueError, match=r"context has shape \[batch, features\], and the batch 3; got"):
            run(LearntBaseline(2), context)
    with pytest.raises(SizeMismatchError, match="context_size 2; the context has 4 features"):
        run(LearntBaseline(2), torch.randn(3, 4))


def test_the_first_variance_is_around_the_mean() -> None:
    """Losses near 200 with deviation 1: around 0 it would be 200 at first, and take hundreds of steps to forget."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="keeps no variance"):
        _ = RunningMean(0.99).deviation
    running = RunningMean(0.99, with_deviation=True)
    for _ in range(3):
        running.update(200 + torch.randn(1000))
        assert abs(float(running.mean) - 200) < 0.2
        assert abs(float(running.deviation) - 1) < 0.1
