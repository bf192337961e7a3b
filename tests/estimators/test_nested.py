"""Two latent variables, one inside the objective of the other, against enumeration over both."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structgrad.estimators import Deterministic, Estimate, Estimator, Marginalize, Reinforce
from structgrad.structures import OneHot
from structgrad.testing import assert_mean


class Pair:
    """z of three categories, then y of two, whose scores depend on z; a table of losses."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.first = torch.randn(3, dtype=torch.float64, requires_grad=True)
        self.second = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        self.table = 3 * torch.randn(3, 2, dtype=torch.float64)

    def exact(self) -> Tensor:
        """The gradient of the expected loss, summed over both: flat."""
        p = self.first.softmax(0)[:, None] * self.second.softmax(1)
        return self.gradient((p * self.table).sum())

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [self.first, self.second])])

    def estimate(self, outer: Estimator, inner: Estimator, hand_on: Callable[[Estimate], Tensor], batch: int) -> Tensor:
        """One estimate, the mean over copies of the example."""

        def objective(z: Tensor, rows: Tensor) -> Tensor:
            def within(y: Tensor, inner_rows: Tensor) -> Tensor:
                return ((z[inner_rows] @ self.table) * y).sum(1)

            return hand_on(inner(z @ self.second, within))

        return self.gradient(outer(self.first.expand(batch, 3), objective).surrogate.mean())


SCORE = {"outer": lambda: Reinforce(OneHot()), "inner": lambda: Reinforce(OneHot(), n_samples=2, baseline="loo")}


@pytest.mark.parametrize("exact_inner", [False, True])
@pytest.mark.parametrize("exact_outer", [False, True])
def test_loss_is_unbiased(exact_outer: bool, exact_inner: bool) -> None:
    """60 means of 400 estimates; assert_mean states the confidence, seeds are fixed."""
    pair = Pair()
    outer = Marginalize(OneHot()) if exact_outer else SCORE["outer"]()
    inner = Marginalize(OneHot()) if exact_inner else SCORE["inner"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = torch.stack([pair.estimate(outer, inner, lambda e: e.loss, 400) for _ in range(60)])
    assert_mean(samples, pair.exact())


def test_a_surrogate_in_the_place_of_a_loss_is_biased_and_warned_of() -> None:
    pair = Pair()
    outer, inner = SCORE["outer"](), SCORE["inner"]()
    with pytest.warns(UserWarning, match=r"return Estimate\.loss"):
        first = pair.estimate(outer, inner, lambda e: e.surrogate, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = [first, *(pair.estimate(outer, inner, lambda e: e.surrogate, 400) for _ in range(59))]
    with pytest.raises(AssertionError, match="worst"):
        assert_mean(torch.stack(samples), pair.exact())


def test_what_is_right_is_not_warned_of() -> None:
    """A surrogate whose value is the objective, and one that is looked at only."""
    pair = Pair()
    seen = []

    def monitored(estimate: Estimate) -> Tensor:
        seen.append(estimate.surrogate.detach())
        return estimate.loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.estimate(Reinforce(OneHot()), Deterministic(OneHot()), lambda e: e.surrogate, 4)
        pair.estimate(Marginalize(OneHot()), SCORE["inner"](), monitored, 4)
    assert seen


def test_loss_has_the_value_of_the_objective() -> None:
    scores = torch.randn(5, 3, requires_grad=True)
    torch.manual_seed(0)
    estimate = Reinforce(OneHot(), n_samples=3)(scores, lambda x, rows: x[:, 0] + rows)
    torch.testing.assert_close(estimate.loss.detach(), estimate.objective)
    ours, expected = (
        torch.autograd.grad(v.sum(), scores, retain_graph=True)[0] for v in (estimate.loss, estimate.surrogate)
    )
    assert torch.equal(ours, expected)
