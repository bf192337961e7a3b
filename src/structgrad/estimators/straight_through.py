"""Hard vertices in the forward pass, the derivative of a smooth function in the backward pass."""

from __future__ import annotations

import abc
import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from structgrad.common.ranges import check_choice, check_count
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    GibbsEstimator,
    Objective,
    Over,
    UnsupportedError,
    check_temperature,
    gibbs_divergence,
    pathwise,
    temperature_of,
    utility_divergence,
)
from structgrad.estimators.score_function import exponentials
from structgrad.estimators.utilities import NegExponential
from structgrad.structures.base import Structure, Trace

Forward = Literal["argmax", "sample"]


def _carry(hard: Tensor, smooth: Tensor) -> Tensor:
    """The value of ``hard``, to the last bit, with the gradient of ``smooth``."""
    return hard + (smooth - smooth.detach())


class StraightThrough(Estimator):
    """A hard vertex in the forward pass, the Jacobian of a relaxation at the scores in the backward
    pass.

    - ``forward="argmax"``: no noise. With the marginals this is Softmax-ST and its structured form,
      with the projection its sparse form (Niculae et al., *Discrete Latent Structure in Neural
      Networks*, section 4.2).
    - ``forward="sample"``: a sample of the Gibbs distribution. With the marginals this is SIMPLE
      (Ahmed et al. 2023), which the paper applies to k-subsets. Its mean is exact, and so is the
      gradient of a linear objective.

    The estimator is biased. Its only noise is that of the sample. In evaluation the vertex is drawn
    as in training. ``kl`` of a sample is over the vertex; a vertex without noise has none.

    Args:
        structure: the set of vertices.
        relaxation: a key of ``structure.relaxations``.
        forward: see above.
        temperature: scores are divided by it in the relaxation only.

    Raises:
        UnsupportedError: if the structure lacks the relaxation or, for samples, ``sample``,
            ``entropy`` or ``log_partition``.
        ValueError: for options out of range.
    """

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(
        self,
        structure: Structure,
        relaxation: str = "exp_family",
        forward: Forward = "argmax",
        temperature: float | Tensor = 1.0,
    ) -> None:
        super().__init__(structure)
        by = f"estimator straight_through (relaxation={relaxation})"
        check_choice("forward", forward, get_args(Forward))
        structure.require(*(["argmax"] if forward == "argmax" else ["sample", "entropy", "log_partition"]), by=by)
        structure.require_linear(by=by)
        structure.require_relaxation(relaxation, by=by, one_draw=True)
        check_temperature(temperature)
        self.relaxation, self.draw, self.temperature = relaxation, forward, temperature
        self.kl_over: Over | None = "vertex" if forward == "sample" else None

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
        if self.draw == "sample":
            divergence = gibbs_divergence(self.structure, scores, mask, prior_scores)
            hard = self.structure.sample(scores.detach(), mask)
        else:
            divergence = None
            hard = self.structure.argmax(scores.detach(), mask)
        if not self.training:
            return pathwise(objective, hard, 1, divergence)
        safe = torch.where(self.structure.parts(scores, mask), scores, 0.0)
        temperature = temperature_of(self.temperature, scores)
        smooth = self.structure.relax(self.relaxation, safe / temperature, mask, temperature)
        return pathwise(objective, _carry(hard, smooth), 1, divergence)


class GumbelRao(Estimator):
    """Straight-through stochastic softmax trick, Rao-Blackwellised (Paulus, Maddison and Krause
    2021).

    The relaxation's Jacobian is averaged over utilities *given* the vertex. The mean of the
    gradient is that of ``sst`` with ``straight_through`` and one sample. The variance is at most
    the same, and falls with more conditional samples. The objective is evaluated once.

    The paper is about ``OneHot``. Here every structure is allowed whose argmax depends only on the
    order of the utilities (e.g. a matroid). The trace takes the place of the category.
    Exponentials, smallest first, and Gumbel utilities ``-log E``, largest first, choose the same
    vertex.

    ``kl`` is over the vertex if it is a Gibbs sample (``OneHot``), otherwise over the parts'
    exponentials.

    Args:
        structure: must be ordinal (:attr:`Structure.is_ordinal`) and have ``trace``,
            ``conditional`` and the relaxation.
        n_conditional: number of utilities an example given its trace.
        relaxation: a key of ``structure.relaxations``.
        temperature: the temperature of the relaxation.

    Raises:
        UnsupportedError: if the structure lacks these.
        TypeError: if n_conditional is not a whole number.
        ValueError: for options out of range.
    """

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(
        self,
        structure: Structure,
        n_conditional: int = 10,
        relaxation: str = "exp_family",
        temperature: float | Tensor = 1.0,
    ) -> None:
        super().__init__(structure)
        by = f"estimator gumbel_rao (relaxation={relaxation})"
        if not structure.is_ordinal:
            raise UnsupportedError(
                f"{by} needs an argmax that depends only on the order of the utilities, as for a matroid, which "
                f"{structure.name} lacks"
            )
        structure.require("trace", "conditional", by=by)
        structure.require_relaxation(relaxation, by=by, one_draw=True)
        check_count("n_conditional", n_conditional)
        check_temperature(temperature)
        self.relaxation, self.temperature, self.n_conditional = relaxation, temperature, n_conditional
        self.kl_over: Over | None = "vertex" if structure.noise == "gumbel" else "parts"
        self.vertex_distribution = "trace"

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
        structure = self.structure
        exists = structure.parts(scores, mask)
        divergence = self._divergence(scores, mask, exists, prior_scores)
        # In float64, where exponentials of log-rates of +-100 are finite.
        rates = torch.where(exists, scores.detach(), 0.0).double()
        trace = structure.trace(exponentials(rates, exists), mask)
        hard = trace.vertex.to(scores.dtype)
        if not self.training:
            return pathwise(objective, hard, 1, divergence)
        shape = (self.n_conditional, *scores.shape)
        masks = None if mask is None else mask.expand(scores.shape).expand(shape)
        repeated = Trace(*(t.expand(self.n_conditional, *t.shape) for t in (trace.vertex, trace.choices)))
        given = -structure.conditional(repeated, rates.expand(shape), masks).log().to(scores.dtype)
        # The noise is held fixed: utilities move as the scores do.
        safe = torch.where(exists, scores, 0.0)
        utilities = torch.where(exists, given, 0.0) + (safe - safe.detach())
        temperature = temperature_of(self.temperature, scores)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature[None]  # the same for every utility of an example
        smooth = structure.relax(self.relaxation, utilities / temperature, masks, temperature).mean(0)
        return pathwise(objective, _carry(hard, smooth), 1, divergence)

    def _divergence(
        self, scores: Tensor, mask: Tensor | None, exists: Tensor, prior_scores: Tensor | None
    ) -> Divergence:
        if self.kl_over == "vertex":
            return gibbs_divergence(self.structure, scores, mask, prior_scores)
        return utility_divergence(self.structure, NegExponential(), scores, exists, prior_scores)


class _OneHotStraightThrough(GibbsEstimator):
    """A Gibbs sample of a ``OneHot`` in the forward pass; subclasses define the backward pass."""

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(self, structure: Structure, temperature: float | Tensor, by: str) -> None:
        super().__init__(structure)
        if not structure.is_categorical:
            raise UnsupportedError(f"estimator {by} needs one category out of all (OneHot); got {structure.name}")
        check_temperature(temperature)
        self.temperature = temperature

    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """See :class:`~structgrad.estimators.base.GibbsEstimator`."""
        hard = self.structure.sample(scores.detach(), mask)
        exists = self.structure.parts(scores, mask)
        lowest = torch.finfo(scores.dtype).min
        smooth = self.smooth(torch.where(exists, scores, lowest), hard)
        return pathwise(objective, _carry(hard, torch.where(exists, smooth, 0.0)), 1, divergence)

    @abc.abstractmethod
    def smooth(self, scores: Tensor, hard: Tensor) -> Tensor:
        """The function that the backward pass differentiates: ``[batch, K]``, in the shape of both
        arguments.
        """


class ReinMax(_OneHotStraightThrough):
    r"""ReinMax: a straight-through estimator of second order (Liu et al. 2023).

    Let D be the sample and :math:`\pi_1 = (D + softmax(s / t)) / 2`. The Jacobian is twice that of
    the softmax at :math:`\pi_1` minus half that at :math:`softmax(s)`. This is Heun's rule for the
    difference of the objective between two categories. It is unbiased for quadratic objectives at t
    = 1. ``kl`` is over the vertex.

    Args:
        structure: ``OneHot``.
        temperature: t, at least 1 in the paper.

    Raises:
        UnsupportedError: for another structure.
        ValueError: unless the temperature is positive.
    """

    def __init__(self, structure: Structure, temperature: float | Tensor = 1.0) -> None:
        super().__init__(structure, temperature, "reinmax")

    def smooth(self, scores: Tensor, hard: Tensor) -> Tensor:
        """See the class."""
        with torch.no_grad():
            middle = (hard + (scores / temperature_of(self.temperature, scores)).softmax(-1)) / 2
            # Scores whose softmax is the midpoint; categories of probability 0 stay out of it.
            target = middle.log().clamp_min(torch.finfo(scores.dtype).min)
        at_middle = (target + (scores - scores.detach())).softmax(-1)
        return 2 * at_middle - scores.softmax(-1) / 2


class GappedStraightThrough(_OneHotStraightThrough):
    """Gapped straight-through (Fan et al. 2022).

    The relaxation is taken at scores that are moved, without noise, just so far that the sampled
    category leads by a gap. The sampled category's score is raised to the highest. Scores less than
    ``gap`` below it are lowered to ``gap`` below it. The moves are constants in the backward pass.
    ``kl`` is over the vertex.

    Args:
        structure: ``OneHot``.
        temperature: the temperature of the softmax.
        gap: at least 0.

    Raises:
        UnsupportedError: for another structure.
        ValueError: for options out of range.
    """

    def __init__(self, structure: Structure, temperature: float | Tensor = 1.0, gap: float = 1.0) -> None:
        super().__init__(structure, temperature, "gapped_st")
        if not 0 <= gap < math.inf:
            raise ValueError(f"gap must not be negative; got {gap}")
        self.gap = gap

    def smooth(self, scores: Tensor, hard: Tensor) -> Tensor:
        """See the class."""
        with torch.no_grad():
            top = scores.amax(-1, keepdim=True)
            chosen = hard > 0
            moved = torch.where(chosen, top, torch.minimum(scores, top - self.gap))
        return ((moved + (scores - scores.detach())) / temperature_of(self.temperature, scores)).softmax(-1)


__all__ = ["GappedStraightThrough", "GumbelRao", "ReinMax", "StraightThrough"]
