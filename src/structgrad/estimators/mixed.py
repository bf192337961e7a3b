"""Mixed random variables: parts that are exactly 0 or 1 with positive probability, and between otherwise."""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.eager import refuse
from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.ranges import check_positive, check_range
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    Objective,
    Over,
    PerturbAndMap,
    UnsupportedError,
    pathwise,
)
from structgrad.estimators.utilities import Logistic, NegExponential, Utility
from structgrad.structures.base import Structure

#: Largest score; float64 cannot hold the probabilities of larger ones.
_REACH = 600.0
#: Nodes of the quadrature of the divergence between 0 and 1; its integrand is analytic there.
_NODES = 32


class StretchAndRectify(Estimator, abc.ABC):
    r"""The objective at mixed variables ``z = min(1, max(0, l + (r - l) S))``, one for each part.

    S lies in (0, 1) and is reparameterised in the score of its part. With ``l < 0 < 1 < r`` the ends
    have positive probability. The gradient flows through z, so it is 0 at the ends. It is exact for
    the objective of these z, and biased for the objective at hard vertices. In evaluation a vertex
    is hard: a part is in it if ``S > 1/2``.

    ``kl`` is over parts. It is the sum of the exact divergences of the mixed variables from those of
    the prior scores (Farinhas et al. 2022, section 4). It bounds the divergence of the vertices. For
    one part it is
    :math:`\sum_{v \in \{0, 1\}} P(v) \log \frac{P(v)}{Q(v)} + \int_0^1 p \log \frac p q`. The integral
    is a Gauss-Legendre sum over the logit of S.

    **Sparsity.** The surrogate also has the gradient of two penalties. They are sums of exact
    probabilities. ``l0_weight`` weighs the expected number of parts that are not 0.
    ``transition_weight`` weighs the expected number of pairs of neighbours with exactly one 0.

    With ``budget`` the first weight is a Lagrange multiplier of the constraint that the expected
    number is ``budget`` (Bastings et al. 2019, section 3.2). It starts at ``l0_weight``. Every
    training step multiplies it by ``exp(0.01 m)``, as in the released code, but keeps it within
    [1e-12, ``most_weight``]. Here m is a moving average with decay 0.99 of the excess over the
    budget, as a fraction of the parts that exist.

    Args:
        structure: ``Subset``, whose parts are independent.
        low: l, below 0.
        high: r, above 1.
        l0_weight: see above.
        budget: expected number of parts of an example that are not 0; None leaves the weight fixed.
        most_weight: the largest multiplier; for ``budget``.
        transition_weight: see above; parts must be a vector.

    Raises:
        UnsupportedError: for another structure, or transitions of parts that are no vector.
        ValueError: for options out of range; from a call, for scores beyond +-600.
    """

    needs_differentiable_objective: ClassVar[bool] = True
    kl_over: Over | None = "parts"
    multiplier: Tensor
    excess: Tensor

    def __init__(
        self,
        structure: Structure,
        low: float,
        high: float,
        l0_weight: float,
        budget: float | None,
        most_weight: float,
        transition_weight: float,
        by: str,
    ) -> None:
        super().__init__(structure)
        if not structure.is_independent:
            raise UnsupportedError(f"estimator {by} needs independent parts (Subset); got {structure.name}")
        if transition_weight and structure.layout.name != "vector":
            raise UnsupportedError(f"estimator {by} (transition_weight) needs parts in a row; got {structure!r}")
        if not (-math.inf < low < 0 and 1 < high < math.inf):
            raise ValueError(f"low must be below 0 and high above 1; got {low} and {high}")
        check_range("l0_weight", l0_weight, least=0)
        check_range("transition_weight", transition_weight, least=0)
        check_positive("most_weight", most_weight)
        if budget is not None:
            check_positive("budget", budget)
            if not 0 < l0_weight <= most_weight:
                raise ValueError(
                    "with a budget l0_weight is where the multiplier starts, "
                    f"within (0, {most_weight}]; got {l0_weight}"
                )
        self.low, self.high, self.budget, self.most_weight = low, high, budget, most_weight
        self.l0_weight, self.transition_weight = l0_weight, transition_weight
        if budget is not None:
            self.register_buffer("multiplier", torch.tensor(float(l0_weight)))
            self.register_buffer("excess", torch.zeros(()))

    # --- a family of variables in (0, 1) ----------------------------------------------------------------------------

    @abc.abstractmethod
    def sample_unit(self, scores: Tensor) -> Tensor:
        """A reparameterised sample of S: float64 ``[*scores]``, differentiable, in [0, 1]."""

    @abc.abstractmethod
    def log_tails(self, logit: float, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``log P(S <= s)`` and ``log P(S > s)`` at ``s = sigmoid(logit)``: float64 ``[*scores]`` each."""

    @abc.abstractmethod
    def log_density(self, logits: Tensor, scores: Tensor) -> Tensor:
        """The log-density of ``logit S``: ``[nodes, *scores]`` at ``logits`` ``[nodes, 1, ...]``, of float64 scores."""

    # --- exact probabilities ----------------------------------------------------------------------------------------

    def log_ends(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``log P(z = 0)``, ``log P(z > 0)``, ``log P(z = 1)`` and ``log P(z < 1)``: float64 ``[*scores]``."""
        wide = scores.double()
        zero, above = self.log_tails(self._logit(0.0), wide)
        below, one = self.log_tails(self._logit(1.0), wide)
        return zero, above, one, below

    def expected_l0(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Expected number of parts that are not 0: ``[batch]``, differentiable (Louizos et al. 2018, equation 12)."""
        exists, wide = self._wide(scores, mask)
        present = torch.where(exists, self.log_ends(wide)[1].exp(), 0.0)
        return present.flatten(-self.structure.layout.ndim).sum(-1).to(scores.dtype)

    def expected_transitions(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Expected number of pairs of neighbours with exactly one 0, for a vector of parts: ``[batch]``,
        differentiable (Bastings et al. 2019, section 3.2).
        """
        exists, wide = self._wide(scores, mask)
        zero, above, _, _ = self.log_ends(wide)
        both = exists[..., 1:] & exists[..., :-1]
        change = (zero[..., 1:] + above[..., :-1]).exp() + (above[..., 1:] + zero[..., :-1]).exp()
        return torch.where(both, change, 0.0).sum(-1).to(scores.dtype)

    def _logit(self, value: float) -> float:
        """The logit of the S that is stretched to this value."""
        return math.log((value - self.low) / (self.high - value))

    def _wide(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whether parts exist, and scores in float64, 0 for missing parts."""
        exists = self.structure.parts(scores, mask)
        wide = torch.where(exists, scores, 0.0).double()
        beyond = (wide.abs() > _REACH).flatten(-self.structure.layout.ndim).any(-1)
        refuse(
            beyond, f"has scores beyond +-{_REACH:g}, whose probabilities float64 cannot hold; scale or clip the scores"
        )
        return exists, wide

    def divergence(self, scores: Tensor, mask: Tensor | None, prior_scores: Tensor | None = None) -> Divergence:
        """The divergence of the mixed variables from those of the prior scores, by default 0: ``[batch]``."""
        exists, wide = self._wide(scores, mask)
        prior = torch.zeros_like(wide) if prior_scores is None else self._wide(prior_scores, mask)[1]
        zero, _, one, _ = self.log_ends(wide)
        prior_zero, _, prior_one, _ = self.log_ends(prior)
        total = zero.exp() * (zero - prior_zero) + one.exp() * (one - prior_one)
        first, last = self._logit(0.0), self._logit(1.0)
        rule = np.polynomial.legendre.leggauss(_NODES)
        nodes, weights = (torch.tensor(a, device=wide.device).reshape(-1, *[1] * wide.dim()) for a in rule)
        logits = (first + last) / 2 + (last - first) / 2 * nodes
        log_p, log_q = self.log_density(logits, wide), self.log_density(logits, prior)
        total = total + (last - first) / 2 * (weights * log_p.exp() * (log_p - log_q)).sum(0)
        each = torch.where(exists, total, 0.0).flatten(-self.structure.layout.ndim).sum(-1)
        return Divergence(each.to(scores.dtype), "parts")

    # --- the estimate -----------------------------------------------------------------------------------------------

    def rectify(self, unit: Tensor) -> Tensor:
        """``min(1, max(0, l + (r - l) S))``."""
        return (self.low + (self.high - self.low) * unit).clamp(0.0, 1.0)

    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        """See :class:`~structgrad.estimators.base.Estimator`."""
        divergence = self.divergence(scores, mask, prior_scores)
        exists, wide = self._wide(scores, mask)
        if not self.training:
            with torch.no_grad():
                hard = self.structure.argmax((self.sample_unit(wide) - 0.5).to(scores.dtype), mask)
            return pathwise(objective, hard, 1, divergence)
        mixed = torch.where(exists, self.rectify(self.sample_unit(wide)), 0.0).to(scores.dtype)
        count = self.expected_l0(scores, mask)
        metrics = {"expected_l0": count.detach().mean()} if len(scores) else {}
        out = pathwise(objective, self.structure.layout.mirror(mixed), 1, divergence, metrics)
        if self.budget is not None:
            excess = count - self.budget
            parts = exists.flatten(1).sum(1).clamp_min(1)
            out.surrogate = out.surrogate + self._follow(excess.detach() / parts).to(excess) * excess
            out.metrics["l0_weight"] = self.multiplier
        elif self.l0_weight:
            out.surrogate = out.surrogate + self.l0_weight * count
        if self.transition_weight:
            out.surrogate = out.surrogate + self.transition_weight * self.expected_transitions(scores, mask)
        return out

    @torch.no_grad()
    def _follow(self, excess: Tensor) -> Tensor:
        """The multiplier after this step's excess ``[batch]``."""
        if len(excess):
            self.excess = self.excess.lerp(excess.mean().to(self.excess), 0.01)
            self.multiplier = (self.multiplier * (0.01 * self.excess).exp()).clamp(1e-12, self.most_weight)
        return self.multiplier


class HardConcrete(StretchAndRectify):
    r"""Hard Concrete variables: ``S = sigmoid((s + logistic noise) / temperature)`` (Louizos,
    Welling and Kingma 2018, section 2.2).

    The hard vertex of evaluation is a sample of the Gibbs distribution. See :class:`StretchAndRectify`.

    Args:
        structure: see there.
        temperature: temperature of the Concrete variable, at most 1; the paper's is 2/3.
        low: see there.
        high: see there.
        l0_weight: see there.
        budget: see there.
        most_weight: see there.
        transition_weight: see there.

    Raises:
        UnsupportedError: see there.
        ValueError: see there.
    """

    def __init__(
        self,
        structure: Structure,
        temperature: float = 2 / 3,
        low: float = -0.1,
        high: float = 1.1,
        l0_weight: float = 0.0,
        budget: float | None = None,
        most_weight: float = 5.0,
        transition_weight: float = 0.0,
    ) -> None:
        by = "hard_concrete"
        super().__init__(structure, low, high, l0_weight, budget, most_weight, transition_weight, by)
        if not 0 < temperature <= 1:
            raise ValueError(f"temperature must be within (0, 1]; got {temperature}")
        self.temperature = temperature

    def sample_unit(self, scores: Tensor) -> Tensor:
        """See :class:`StretchAndRectify`."""
        return (Logistic().sample(scores.double()) / self.temperature).sigmoid()

    def log_tails(self, logit: float, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`StretchAndRectify`."""
        z = self.temperature * logit - scores
        return F.logsigmoid(z), F.logsigmoid(-z)

    def log_density(self, logits: Tensor, scores: Tensor) -> Tensor:
        """See :class:`StretchAndRectify`."""
        return math.log(self.temperature) + Logistic().log_prob(self.temperature * logits, scores)


class HardKuma(StretchAndRectify):
    r"""HardKuma variables: S has a Kumaraswamy distribution, ``P(S <= s) = 1 - (1 - s^a)^b``
    (Bastings, Aziz and Titov 2019, section 3.1).

    Both parameters are functions of one score s: ``a = softplus(s + c)`` and ``b = softplus(c - s)``.
    The constant c gives ``a = b = concentration`` at ``s = 0``; a concentration of 1 is the uniform
    distribution. A model that outputs a and b separately is more general. See
    :class:`StretchAndRectify`.

    Args:
        structure: see there.
        concentration: a and b at score 0, positive.
        low: see there.
        high: see there.
        l0_weight: see there.
        budget: see there.
        most_weight: see there.
        transition_weight: see there.

    Raises:
        UnsupportedError: see there.
        ValueError: see there.
    """

    def __init__(
        self,
        structure: Structure,
        concentration: float = 1.0,
        low: float = -0.1,
        high: float = 1.1,
        l0_weight: float = 0.0,
        budget: float | None = None,
        most_weight: float = 5.0,
        transition_weight: float = 0.0,
    ) -> None:
        by = "hard_kuma"
        super().__init__(structure, low, high, l0_weight, budget, most_weight, transition_weight, by)
        check_positive("concentration", concentration)
        self.concentration = concentration
        self.shift = concentration + math.log(-math.expm1(-concentration))  # softplus(shift) = concentration
        self.vertex_distribution = PerturbAndMap(_Rounded(self))

    def _log_parameters(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``log a`` and ``log b``."""
        return _SOFTPLUS.log_rate(scores + self.shift), _SOFTPLUS.log_rate(self.shift - scores)

    def sample_unit(self, scores: Tensor) -> Tensor:
        """See :class:`StretchAndRectify`."""
        log_a, log_b = self._log_parameters(scores.double())
        # 1 - S^a = V^(1/b) for a uniform V = exp(-E).
        return (_log1mexp(wide_exponentials(scores).log() - log_b) * (-log_a).exp()).exp()

    def log_tails(self, logit: float, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`StretchAndRectify`."""
        log_a, log_b = self._log_parameters(scores)
        log_power = log_a + math.log(np.logaddexp(0.0, -logit))  # log(-log s^a)
        log_cost = log_b + _log_minus(_log1mexp(log_power), -log_power.exp())
        return _log1mexp(log_cost), -log_cost.exp()

    def log_density(self, logits: Tensor, scores: Tensor) -> Tensor:
        """See :class:`StretchAndRectify`."""
        log_a, log_b = self._log_parameters(scores)
        log_power = log_a + (-F.logsigmoid(logits)).log()
        rest = log_a + log_b - log_power.exp() + F.logsigmoid(-logits)
        return rest + (log_b.exp() - 1) * _log1mexp(log_power)


class _Rounded(Utility):
    """The utility whose argmax is the hard vertex of an estimator: a part is chosen if S > 1/2."""

    is_location_family = False

    def __init__(self, estimator: HardKuma) -> None:
        self.estimator = estimator

    def __repr__(self) -> str:
        return "HardKuma - 1/2"

    def _sample(self, scores: Tensor) -> Tensor:
        return (self.estimator.sample_unit(scores) - 0.5).to(scores.dtype)

    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        """See :class:`~structgrad.estimators.utilities.Utility`."""
        unit = (utility + 0.5).double()
        inside = self.estimator.log_density(unit.logit(), scores.double())
        return (inside - unit.log() - (-unit).log1p()).to(utility.dtype)

    def kl(self, scores: Tensor) -> Tensor:
        """See :class:`~structgrad.estimators.utilities.Utility`."""
        raise NotImplementedError("the divergence of HardKuma is that of its mixed variables, Estimate.kl")


_SOFTPLUS = NegExponential("softplus")


def _log1mexp(log_x: Tensor) -> Tensor:
    """``log(1 - exp(-exp(log_x)))``, from -inf to 0, right for all arguments of float64."""
    low = log_x < -30.0
    x = torch.where(low, 0.0, log_x).exp()
    # Near 0 the difference is x itself.
    return torch.where(low, log_x, torch.log(-torch.expm1(-x)))


def _log_minus(log_value: Tensor, near: Tensor) -> Tensor:
    """``log(-y)`` for ``y = log(1 - exp(near))`` <= 0; it is ``near`` if y has no digits left."""
    gone = near < -30.0
    return torch.where(gone, near, (-torch.where(gone, -1.0, log_value)).log())


__all__ = ["HardConcrete", "HardKuma", "StretchAndRectify"]
