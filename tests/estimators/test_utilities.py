"""Random utilities: samples, densities and KL divergences against numerical integration."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from structgrad.estimators.utilities import Gaussian, Gumbel, Logistic, NegExponential, Utility, make_utility

UTILITIES = {
    "gumbel": Gumbel(),
    "gaussian": Gaussian(),
    "logistic": Logistic(),
    "exp": NegExponential(),
    "softplus": NegExponential("softplus"),
    "inverse_softplus": NegExponential("inverse_softplus"),
}
each = pytest.mark.parametrize("utility", UTILITIES.values(), ids=UTILITIES.keys())


def frozen(utility: Utility, score: float) -> stats.rv_continuous:
    """The distribution by scipy; for negative exponentials that of ``-U``."""
    if isinstance(utility, NegExponential):
        softplus = math.log1p(math.exp(score))
        rate = {"exp": math.exp(score), "softplus": softplus, "inverse_softplus": 1 / softplus}[utility.rate]
        return stats.expon(scale=1 / rate)
    return {Gumbel: stats.gumbel_r, Gaussian: stats.norm, Logistic: stats.logistic}[type(utility)](loc=score)


@each
@pytest.mark.parametrize("score", [-2.0, 0.0, 1.5])
def test_samples_have_their_distribution(utility: Utility, score: float) -> None:
    sample = utility.sample(torch.tensor(score), draws=20_000)
    assert sample.shape == (20_000,)
    sign = -1 if isinstance(utility, NegExponential) else 1
    # Kolmogorov-Smirnov at 99.9 % confidence; the seed is fixed.
    assert stats.kstest(sign * sample.numpy(), frozen(utility, score).cdf).pvalue > 1e-3


@each
@pytest.mark.parametrize("score", [-2.0, 0.0, 1.5])
def test_log_prob(utility: Utility, score: float) -> None:
    sign = -1 if isinstance(utility, NegExponential) else 1
    points = torch.linspace(-6, 6, 25, dtype=torch.float64)
    if isinstance(utility, NegExponential):
        points = points[points < 0]
    density = utility.log_prob(points, torch.tensor(score, dtype=torch.float64))
    expected = torch.from_numpy(frozen(utility, score).logpdf(sign * points.numpy()))
    torch.testing.assert_close(density, expected)


def test_positive_utilities_are_impossible_for_neg_exponential() -> None:
    scores = torch.tensor([0.5, 0.5], requires_grad=True)
    density = NegExponential().log_prob(torch.tensor([1.0, 0.0]), scores)
    assert density[0] == -math.inf
    assert density[1] == 0.5
    density[1].backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 1.0]


@each
@pytest.mark.parametrize("score", [-4.0, -0.49, -1e-3, 0.0, 0.3, 0.51, 3.0, 8.0])
def test_kl_against_integration(utility: Utility, score: float) -> None:
    ours, prior = frozen(utility, score), frozen(utility, 0.0)
    low, high = ours.ppf(1e-13), ours.ppf(1 - 1e-13)
    expected, _ = integrate.quad(
        lambda u: ours.pdf(u) * (ours.logpdf(u) - prior.logpdf(u)), low, high, limit=500, epsabs=1e-11
    )
    value = utility.kl(torch.tensor(score, dtype=torch.float64)).item()
    assert value == pytest.approx(expected, abs=1e-7, rel=1e-6)


@each
@pytest.mark.parametrize(("score", "other"), [(-2.0, 1.5), (0.3, -0.4), (3.0, 8.0)])
def test_kl_from_another_score_against_integration(utility: Utility, score: float, other: float) -> None:
    ours, prior = frozen(utility, score), frozen(utility, other)
    low, high = ours.ppf(1e-13), ours.ppf(1 - 1e-13)
    expected, _ = integrate.quad(
        lambda u: ours.pdf(u) * (ours.logpdf(u) - prior.logpdf(u)), low, high, limit=500, epsabs=1e-11
    )
    both = torch.tensor([[score, other]], dtype=torch.float64, requires_grad=True)
    value = utility.kl_from(both[:, 0], both[:, 1])
    assert value.item() == pytest.approx(expected, abs=1e-7, rel=1e-6)
    assert torch.autograd.gradcheck(lambda pair: utility.kl_from(*pair.unbind(1)), both)


@each
def test_kl_and_log_prob_are_differentiated_right(utility: Utility) -> None:
    # Both sides of the switch of the logistic series at 0.5, of softplus at -10, and zero itself.
    scores = torch.tensor([-12.0, -0.6, -0.4, 0.0, 0.1, 0.45, 0.55, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(utility.kl, scores)
    fixed = -torch.rand(8, dtype=torch.float64).requires_grad_() - 0.1
    assert torch.autograd.gradcheck(utility.log_prob, (fixed, scores))


@each
def test_samples_are_reparameterised(utility: Utility) -> None:
    scores = torch.tensor([-2.0, -1e-3, 0.0, 1.0], dtype=torch.float64, requires_grad=True)

    def sample(s: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return utility.sample(s)

    assert torch.autograd.gradcheck(sample, scores)


@each
def test_float32_extremes(utility: Utility) -> None:
    scores = torch.tensor([-100.0, -50.0, 0.0, 50.0, 100.0]).repeat(2000, 1).requires_grad_()
    sample = utility.sample(scores)
    assert sample.dtype == torch.float32
    assert sample.isfinite().all()
    (gradient,) = torch.autograd.grad(sample.sum(), scores)
    assert gradient.isfinite().all()
    inner = torch.tensor([-50.0, 0.0, 50.0, 100.0], requires_grad=True)
    kl = utility.kl(inner)
    torch.testing.assert_close(kl.double(), utility.kl(inner.detach().double()), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(kl.sum(), inner)[0].isfinite().all()


def test_float32_noise_has_the_whole_tail() -> None:
    # Ties among the largest, or a tail cut short, would show that the noise was drawn in float32.
    noise = Gumbel().sample(torch.zeros(4_000_000))
    share = (noise > 12).float().mean().item()
    assert share == pytest.approx(math.exp(-12), rel=0.5)
    assert noise.unique().numel() > 3_000_000


def test_softplus_rate_is_exact_for_very_low_scores() -> None:
    scores = torch.tensor([-700.0, -100.0, -20.0, -10.001, -9.999, 0.0, 30.0], dtype=torch.float64)
    expected = [math.log(math.log1p(math.exp(s))) for s in scores.tolist()]
    torch.testing.assert_close(
        NegExponential("softplus").log_rate(scores), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_draws_are_independent_and_expanded_scores_do_not_share_noise() -> None:
    for utility in UTILITIES.values():
        sample = utility.sample(torch.zeros(3).expand(2, 3), draws=4)
        assert sample.shape == (4, 2, 3)
        assert sample.unique().numel() == 24


def test_make_utility() -> None:
    given = NegExponential("softplus")
    assert make_utility(given) is given
    assert isinstance(make_utility("logistic"), Logistic)
    with pytest.raises(ValueError, match="utility must be one of gumbel, gaussian, logistic, neg_exponential; got 'x'"):
        make_utility("x")
    with pytest.raises(ValueError, match="rate must be one of exp, softplus"):
        NegExponential("linear")  # type: ignore[arg-type]
