"""Random utilities: the noise whose argmax is a random vertex (Paulus et al. 2020, section 3)."""

from __future__ import annotations

import abc
import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.private import standard_gamma
from structgrad.common.ranges import check_choice, check_count, check_range
from structgrad.common.text import options

UtilityName = Literal["gumbel", "gaussian", "logistic", "neg_exponential"]
Rate = Literal["exp", "softplus", "inverse_softplus"]


class Utility(abc.ABC):
    """A family of independent random utilities, one for every score.

    Scores of missing parts must have been replaced by something finite. The structure decides which
    entries are parts.
    """

    #: Whether ``U = scores + noise``, so that adding a constant to all scores adds it to all utilities.
    is_location_family: ClassVar[bool]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({options(self)})"

    def sample(self, scores: Tensor, draws: int | None = None) -> Tensor:
        """A reparameterised sample, differentiable in the scores.

        Args:
            scores: any shape.
            draws: number of independent samples, along a new first dimension; None for one sample
                without it.

        Returns:
            ``[*scores]`` or ``[draws, *scores]``, finite.
        """
        return self._sample(scores if draws is None else scores.expand(draws, *scores.shape))

    @abc.abstractmethod
    def _sample(self, scores: Tensor) -> Tensor:
        """One sample for each score."""

    @abc.abstractmethod
    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        """Log-density of each utility, differentiable in both arguments: the broadcast shape."""

    @abc.abstractmethod
    def kl(self, scores: Tensor) -> Tensor:
        """KL divergence of each utility from its prior, which has score 0: ``[*scores]``."""

    def kl_from(self, scores: Tensor, prior_scores: Tensor) -> Tensor:
        """KL divergence of each utility from one with another score: ``[*scores]``, differentiable
        in both.

        Args:
            scores: any shape.
            prior_scores: scores of the same shape.

        Raises:
            NotImplementedError: for a family without location that does not define it.
        """
        if not self.is_location_family:
            raise NotImplementedError(f"{type(self).__name__} has no KL divergence from another score than 0")
        return self.kl(scores - prior_scores)


class Gumbel(Utility):
    """``U = score + Gumbel``: the vertex of ``OneHot`` is then a sample of ``softmax(scores)``."""

    is_location_family = True

    def _sample(self, scores: Tensor) -> Tensor:
        return scores - wide_exponentials(scores).log().to(scores)

    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Utility`."""
        z = utility - scores
        return -z - torch.exp(-z)

    def kl(self, scores: Tensor) -> Tensor:
        """``score + exp(-score) - 1``."""
        return scores + torch.expm1(-scores)


class Gaussian(Utility):
    """``U ~ N(score, 1)``."""

    is_location_family = True

    def _sample(self, scores: Tensor) -> Tensor:
        return scores + torch.randn_like(scores)

    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Utility`."""
        return -(utility - scores).square() / 2 - math.log(2 * math.pi) / 2

    def kl(self, scores: Tensor) -> Tensor:
        """``score^2 / 2``."""
        return scores.square() / 2


class Logistic(Utility):
    """``U ~ Logistic(score)``: the vertex of ``Subset`` has independent parts of probability
    ``sigmoid(score)``.
    """

    is_location_family = True

    def _sample(self, scores: Tensor) -> Tensor:
        # With u = exp(-e) uniform, logit(u) = -e - log(1 - exp(-e)).
        e = wide_exponentials(scores)
        return scores - (e + torch.log(-torch.expm1(-e))).to(scores)

    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Utility`."""
        z = utility - scores
        return -z - 2 * F.softplus(-z)

    def kl(self, scores: Tensor) -> Tensor:
        """``score coth(score / 2) - 2``.

        The density is f(z) = exp(-z) / (1 + exp(-z))^2 and its entropy 2. So KL = -2 + s + 2 E
        softplus(-s - Z). Its derivative, 1 - 2 E sigmoid(-s - Z), integrates in closed form.
        """
        # Near zero the closed form is a difference of nearly equal numbers. There we use its power
        # series, 2 B_2k s^2k / (2k)!.
        near = scores.abs() < 0.5
        small = torch.where(near, scores, 0.0).square()
        series = small * (1 / 6 - small * (1 / 360 - small * (1 / 15120 - small * (1 / 604800 - small / 23950080))))
        far = torch.where(near, 1.0, scores)
        return torch.where(near, series, far / torch.tanh(far / 2) - 2)


class NegExponential(Utility):
    """``-U ~ Exp(rate)``: utilities are negative, a high rate is a small cost.

    With U = -E and ``rate=exp`` its vertex is that of the structure's trace (Struminsky et al.
    2021, section 2).

    Utilities reach the inverse of the rate, ``exp(-score)`` at low scores for the first two rates.
    Float32 cannot hold it for scores below -88. Utilities saturate at the dtype's largest number to
    the power of 3/4 (7e28 in float32), where they have no gradient.

    Args:
        rate: ``exp(score)``, or ``softplus(score)`` as in Paulus et al. 2020, D.5.2. In their code
            it is ``inverse_softplus``, ``1 / softplus(score)``: a high score is a high cost there.

    Raises:
        ValueError: for another rate.
    """

    is_location_family = False

    def __init__(self, rate: Rate = "exp") -> None:
        check_choice("rate", rate, get_args(Rate))
        self.rate = rate

    def log_rate(self, scores: Tensor) -> Tensor:
        """``log rate``, elementwise."""
        if self.rate == "exp":
            return scores
        return self._log_softplus(scores) if self.rate == "softplus" else -self._log_softplus(scores)

    @staticmethod
    def _log_softplus(scores: Tensor) -> Tensor:
        # softplus(s) = log1p(exp(s)) underflows for very negative s, where its logarithm is s + log(1 - exp(s)/2 +
        # exp(2s)/3 - ...).
        low = scores < -10
        x = torch.where(low, scores, -10.0).exp()
        return torch.where(low, scores + torch.log1p(x * (x / 3 - 0.5)), F.softplus(scores.clamp_min(-10.0)).log())

    def _sample(self, scores: Tensor) -> Tensor:
        cost = (wide_exponentials(scores).log() - self.log_rate(scores)).exp()
        return -cost.clamp_max(torch.finfo(scores.dtype).max ** 0.75).to(scores)

    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Utility`; -inf where the utility is positive."""
        log_rate = self.log_rate(scores)
        # rate * u is computed as one exponential, so that no factor overflows or underflows.
        product = torch.exp(log_rate + torch.log(-torch.where(utility < 0, utility, -1.0)))
        density = log_rate - torch.where(utility < 0, product, 0.0)
        return torch.where(utility <= 0, density, -math.inf)

    def kl(self, scores: Tensor) -> Tensor:
        """``r + exp(-r) - 1`` where r is the log-ratio of the rates."""
        return self.kl_from(scores, scores.new_zeros(()))

    def kl_from(self, scores: Tensor, prior_scores: Tensor) -> Tensor:
        """The same for the rates of any two scores."""
        r = self.log_rate(scores) - self.log_rate(prior_scores)
        return r + torch.expm1(-r)


class SumOfGamma:
    """Noise for I-MLE over k-subsets: the sum of k independent ones is approximately Gumbel
    (Niepert et al. 2021).

    ``scale / k * (sum_{i=1..terms} Gamma(1/k, k/i) - log terms)``, where Gamma takes shape and
    scale.

    Args:
        k: number of parts of a vertex.
        terms: number of terms of the series.
        scale: temperature of the perturb-and-MAP distribution.

    Raises:
        TypeError: if ``k`` or ``terms`` is not a whole number.
        ValueError: unless all are positive.
    """

    def __init__(self, k: int, terms: int = 10, scale: float = 1.0) -> None:
        check_count("k", k)
        check_count("terms", terms)
        check_range("scale", scale, above=0, below=math.inf)
        self.k, self.terms, self.scale = k, terms, scale

    def __repr__(self) -> str:
        return f"SumOfGamma({options(self)})"

    def sample(self, scores: Tensor) -> Tensor:
        """``scores`` plus noise, the shape of the scores."""
        index = torch.arange(1, self.terms + 1, device=scores.device, dtype=scores.dtype)
        shape = scores.new_full((), 1 / self.k).expand(*scores.shape, self.terms)
        gammas = standard_gamma(shape) * (self.k / index)
        return scores + (gammas.sum(-1) - math.log(self.terms)) * (self.scale / self.k)


_UTILITIES: dict[str, type[Utility]] = {
    "gumbel": Gumbel,
    "gaussian": Gaussian,
    "logistic": Logistic,
    "neg_exponential": NegExponential,
}


def make_utility(utility: str | Utility) -> Utility:
    """The utility with this name and default options; an object is returned as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(utility, Utility):
        return utility
    check_choice("utility", utility, _UTILITIES)
    return _UTILITIES[utility]()
