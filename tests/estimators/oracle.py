"""What all tests of estimators share: tiny problems with an enumerated truth, and tests with a stated confidence."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from structgrad.diagnose import Distribution, Problem
from structgrad.estimators.base import Estimator

__all__ = ["Distribution", "Problem", "assert_mean", "assert_unbiased", "gradients"]


def gradients(estimator: Estimator, problem: Problem, count: int = 60, repeats: int = 200) -> Tensor:
    """``[count, D]`` independent gradient estimates (scores, then decoder), each a mean over ``repeats`` copies.

    ``repeats`` times their variance is the variance of one estimate.
    """
    return torch.stack(list(problem.estimates(estimator, count, repeats)))


def assert_mean(samples: Tensor, expected: Tensor, confidence: float = 0.999) -> None:
    """Every coordinate of the mean of ``samples`` ``[count, D]`` agrees with ``expected`` ``[D]``.

    Student's t in every coordinate, the error probability ``1 - confidence`` shared among them (Bonferroni): a right
    estimator fails with probability at most ``1 - confidence`` (and, seeds being fixed, always or never). Coordinates
    without any variance must agree to 1e-9.
    """
    count, size = samples.shape
    error = samples.std(0) / count**0.5
    bound = stats.t.ppf(1 - (1 - confidence) / size / 2, count - 1) * error + 1e-9
    off = (samples.mean(0) - expected).abs()
    worst = int((off / bound).argmax())
    assert (off <= bound).all(), (
        f"{int((off > bound).sum())} of {size} coordinates; worst {worst}: mean {samples.mean(0)[worst]:.5f} "
        f"expected {expected[worst]:.5f} bound {bound[worst]:.5f}"
    )


def assert_unbiased(
    estimator: Estimator,
    problem: Problem,
    distribution: Distribution,
    count: int = 60,
    repeats: int = 200,
    confidence: float = 0.999,
) -> Tensor:
    """Scores and decoder gradients agree with the enumerated ones; returns the samples ``[count, D]``."""
    samples = gradients(estimator, problem, count, repeats)
    assert_mean(samples, problem.gradient(problem.expected(distribution)), confidence)
    return samples
