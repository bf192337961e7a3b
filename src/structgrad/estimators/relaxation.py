"""Relaxed gradient estimators: stochastic softmax tricks, and their deterministic relatives."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from structgrad.algorithms.derivatives import first_order_only
from structgrad.common.ranges import check_choice, check_count, check_positive, check_range
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    Objective,
    Over,
    PerturbAndMap,
    UnsupportedError,
    check_temperature,
    flat_replicas,
    gibbs_divergence,
    pathwise,
    temperature_of,
    utility_divergence,
)
from structgrad.estimators.utilities import Utility, UtilityName, make_utility
from structgrad.structures.base import Structure
from structgrad.structures.one_hot import OneHot

Backward = Literal["exact", "finite_difference"]
Step = Literal["direction", "gradient"]
KL = Literal["utility", "distribution"]
Mapping = Literal["marginal", "sparsemap", "entmax"]
Evaluation = Literal["hard", "relaxed"]
Clip = Literal["scores", "utilities"]


class ExponentialSchedule(nn.Module):
    """A temperature that falls with the number of training steps:
    ``max(minimum, start exp(-rate step))``.

    The defaults are those of Correia et al. 2020. The step is a buffer: it is saved and resumed
    with the estimator.

    Args:
        start: temperature at step 0.
        minimum: the lowest temperature.
        rate: rate of the decay, per step.
        every: the temperature changes at multiples of this number of steps.

    Raises:
        TypeError: if ``every`` is not a whole number.
        ValueError: unless all temperatures are positive and finite, ``rate`` is finite and not
            negative, and ``every`` is positive.
    """

    step: Tensor

    def __init__(self, start: float = 1.0, minimum: float = 0.5, rate: float = 1e-4, every: int = 1000) -> None:
        super().__init__()
        if not (0 < minimum <= start < math.inf):
            raise ValueError(f"a temperature schedule needs 0 < minimum <= start; got {minimum} and {start}")
        check_range("rate", rate, least=0, below=math.inf)
        check_count("every", every)
        self.start, self.minimum, self.rate, self.every = start, minimum, rate, every
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """The current temperature, a scalar on the device of the buffer (so that no step waits for
        the device).
        """
        step = self.step.div(self.every, rounding_mode="floor") * self.every
        return (self.start * torch.exp(-self.rate * step)).clamp_min(self.minimum)

    def advance(self) -> None:
        """Count one training step."""
        self.step = self.step + 1


def clip_scores(structure: Structure, scores: Tensor, mask: Tensor | None, reach: float) -> Tensor:
    """``max(s, max(s) - reach) - max(s)`` over the existing parts of each example (Paulus et al.
    2020, D.2).

    Args:
        structure: says which entries are parts.
        scores: ``[*batch, *parts]``.
        mask: which parts exist.
        reach: the largest distance of a score below the highest.

    Returns:
        ``[*batch, *parts]``, within ``[-reach, 0]``; 0 for missing parts.
    """
    if not scores.shape[scores.dim() - structure.layout.ndim :].numel():
        return scores
    exists = structure.parts(scores, mask)
    top = torch.where(exists, scores, -math.inf).amax(tuple(range(-structure.layout.ndim, 0)), keepdim=True)
    return torch.where(exists, (scores - top).clamp_min(-reach), 0.0)


def _make_utility(structure: Structure, utility: str | Utility) -> Utility:
    """The utility, which may also be ``"gibbs"``."""
    if utility != "gibbs":
        return make_utility(utility)
    if structure.noise is None:
        raise UnsupportedError(
            f"utility=gibbs: no independent noise makes {structure.name} a Gibbs sample; use utility=gumbel, kl=utility"
        )
    return make_utility(structure.noise)


class _FiniteDifference(torch.autograd.Function):
    """The relaxation; its vector-Jacobian product is a central difference (Paulus et al. 2020,
    D.1).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        utility: Tensor,
        mask: Tensor | None,
        structure: Structure,
        relaxation: str,
        epsilon: float,
        along: Step,
    ) -> Tensor:
        ctx.save_for_backward(utility, mask)  # type: ignore[arg-type]
        ctx.settings = (structure, relaxation, epsilon, along)  # type: ignore[attr-defined]
        return structure.relax(relaxation, utility, mask)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        utility, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        structure, relaxation, epsilon, along = ctx.settings  # type: ignore[attr-defined]
        dims = tuple(range(-structure.layout.ndim, 0))
        exists = structure.parts(utility, mask)
        gradient = torch.where(exists, structure.layout.pull_back(gradients[0]), 0.0)
        size = gradient.new_ones(())
        if along == "direction":
            # The derivative along a direction scales with it. So the step is epsilon for any size
            # of the gradient.
            size = gradient.abs().amax(dims, keepdim=True)
        step = epsilon * gradient / torch.where(size > 0, size, 1.0)
        there, back = (structure.relax(relaxation, utility + sign * step, mask) for sign in (1, -1))
        product = (there - back) * (size / (2 * epsilon))
        return torch.where(exists, product, 0.0), None, None, None, None, None


class SST(Estimator):
    r"""Stochastic softmax trick: the gradient of the objective at a relaxed random vertex (Paulus
    et al. 2020).

    A random vertex is ``argmax_x <x, U>`` with utilities U around the scores. In training the
    objective is evaluated at ``argmax_x <x, U> - t f(x)`` over conv(X) instead, and differentiated
    through it. The gradient is exact for the objective at relaxed vertices and biased for the one
    at hard vertices. A lower temperature t has less bias and more variance. In evaluation vertices
    are hard.

    With ``kl="utility"``, :attr:`Estimate.kl` is over parts: the KL divergence of the utilities
    from their prior (scores 0), summed over the perturbed parts. It is an upper bound on the KL of
    the vertices. It uses the scores before clipping, and is infinite where float32 cannot hold it
    (Gumbel at scores below -88).

    With ``kl="distribution"`` it is over the vertex: the divergence of the Gibbs distribution from
    the uniform one. The vertices must then be Gibbs samples (``OneHot`` with gumbel, ``Subset``
    with logistic utilities; Correia et al. 2020, footnote 4).

    Args:
        structure: the set of vertices.
        relaxation: a key of ``structure.relaxations``; it defines f.
        utility: noise by name or as an object. ``"gibbs"`` is the noise that makes hard vertices
            samples of the Gibbs distribution, if there is one (gumbel for ``OneHot``, logistic for
            ``Subset``).
        temperature: t: a number, a schedule, a tensor ``[]`` (a parameter is learnt), or one number
            an example, ``[batch]``.
        clip_range: scores lie at most this far below the highest of their example, which becomes 0,
            in training only (Paulus et al., D.2: 15). It is for structures whose vertices all have
            equally many parts, and for utilities ``scores + noise``. Elsewhere it would change the
            distribution.
        clip: what ``clip_range`` clips. ``"utilities"`` clips U / t, the argument of the
            relaxation, as the code released with Paulus et al. does. Any utilities may then be
            clipped, and scores may lie ``t clip_range`` apart.
        straight_through: evaluate the objective at the hard vertex, differentiate through the
            relaxed one.
        n_samples: number of samples an example in training; the objective and gradients are
            averaged.
        backward: ``"finite_difference"`` replaces differentiation of the relaxation by two more
            calls of it (Paulus et al., equation 56).
        epsilon: size of the change of the utilities in these two calls.
        step: what epsilon multiplies. ``"direction"``: the gradient divided by its largest entry,
            so that no utility changes by more than epsilon. ``"gradient"``: the gradient itself, as
            in equation 56 and in the code released with it. No entry of the derivative then exceeds
            1 / (2 epsilon), and float32 loses the change where gradients are tiny.
        kl: see above.
        evaluation: ``"relaxed"`` evaluates relaxed vertices at the current temperature. Correia et
            al. (2020) test Gumbel-softmax so in their released code. Scores are then not clipped,
            and there is one sample an example.

    Raises:
        UnsupportedError: if the structure lacks the relaxation, the argmax, or an oracle that
            ``kl`` needs; for ``kl="distribution"``, if the vertices are not Gibbs samples.
        TypeError: if n_samples is not a whole number.
        ValueError: for options out of range or that do not fit together.
    """

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(
        self,
        structure: Structure,
        relaxation: str = "exp_family",
        utility: UtilityName | Literal["gibbs"] | Utility = "gumbel",
        temperature: float | Tensor | ExponentialSchedule = 1.0,
        clip_range: float | None = None,
        clip: Clip = "scores",
        straight_through: bool = False,
        n_samples: int = 1,
        backward: Backward = "exact",
        epsilon: float = 1e-2,
        step: Step = "direction",
        kl: KL = "utility",
        evaluation: Evaluation = "hard",
    ) -> None:
        super().__init__(structure)
        by = f"estimator sst (relaxation={relaxation})"
        structure.require("argmax", by=by)
        found = structure.require_relaxation(relaxation, by=by)
        self.utility = _make_utility(structure, utility)
        if not isinstance(temperature, ExponentialSchedule):
            check_temperature(temperature)
        check_count("n_samples", n_samples)
        check_choice("clip", clip, get_args(Clip))
        if clip_range is None:
            if clip != "scores":
                raise ValueError(f"clip={clip} says what clip_range clips; give it one, or leave clip out")
        else:
            if not clip_range > 0:
                raise ValueError(f"clip_range must be positive; got {clip_range}")
            if not structure.constant_size or not (clip == "utilities" or self.utility.is_location_family):
                raise ValueError(
                    "clip_range would change the distribution: it needs vertices of equally many parts "
                    f"({structure.name}: {structure.constant_size}) and utilities that are scores plus noise "
                    f"({type(self.utility).__name__}: {self.utility.is_location_family})"
                )
        self.vertex_distribution = PerturbAndMap(self.utility)
        self.draws = found.draws
        if straight_through and self.draws is not None:
            raise ValueError(f"straight_through needs one utility a sample, and {relaxation} takes {self.draws}")
        check_choice("backward", backward, get_args(Backward))
        if backward == "finite_difference":
            structure.require_relaxation(relaxation, by=f"{by}, backward={backward}", symmetric=True)
        check_positive("epsilon", epsilon)
        check_choice("step", step, get_args(Step))
        if step != "direction" and backward != "finite_difference":
            raise ValueError(f"step={step} is that of backward=finite_difference; give both, or leave step out")
        check_choice("kl", kl, get_args(KL))
        check_choice("evaluation", evaluation, get_args(Evaluation))
        if straight_through and evaluation == "relaxed":
            raise ValueError("straight_through is about hard vertices; evaluation=relaxed is not")
        if kl == "distribution":
            structure.require("log_partition", "entropy", by="estimator sst (kl=distribution)")
            if structure.noise is None or type(make_utility(structure.noise)) is not type(self.utility):
                raise UnsupportedError(
                    "kl=distribution is that of the Gibbs distribution, from which "
                    f"{type(self.utility).__name__} utilities do not sample {structure.name}; use kl=utility"
                )
        self.relaxation, self.temperature = relaxation, temperature
        self.clip_range, self.clip = clip_range, clip
        self.straight_through, self.n_samples = straight_through, n_samples
        self.backward_by, self.epsilon, self.step = backward, epsilon, step
        self.evaluation = evaluation
        self.kl_over = "vertex" if kl == "distribution" else "parts"

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
        divergence = self._divergence(scores, mask, prior_scores)
        if not self.training and self.evaluation == "hard":
            with torch.no_grad():
                vertices = self.structure.argmax(self.perturb(scores, mask), mask)
            return pathwise(objective, vertices, 1, divergence)
        temperature, metrics = self.temperature, {}
        if not self.training:
            with torch.no_grad():
                current = self._temperature(scores)
                vertices = self.relax(self.perturb(scores, mask, self.draws) / current, mask, current)
            # Vertices that are not hard require a gradient: see Estimate.vertices.
            return pathwise(objective, vertices.requires_grad_(), 1, divergence)
        current = self._temperature(scores)
        if isinstance(temperature, ExponentialSchedule):
            temperature.advance()
            assert isinstance(current, Tensor)
            metrics["temperature"] = current
        if self.clip_range is not None and self.clip == "scores":
            scores = clip_scores(self.structure, scores, mask, self.clip_range)
        if self.n_samples > 1:
            scores, mask = flat_replicas(scores, mask, self.n_samples)
            if isinstance(current, Tensor) and current.dim():
                current = current.repeat_interleave(self.n_samples, 0)
        utilities = self.perturb(scores, mask, self.draws)
        sharpened = utilities / current
        if self.clip_range is not None and self.clip == "utilities":
            sharpened = clip_scores(self.structure, sharpened, mask, self.clip_range)
        vertices = self.relax(sharpened, mask, current)
        if self.straight_through:
            # The relaxed terms cancel exactly, so the value is that of the hard vertex to the last
            # bit.
            vertices = self.structure.argmax(utilities, mask) + (vertices - vertices.detach())
        return pathwise(objective, vertices, self.n_samples, divergence, metrics)

    def _temperature(self, scores: Tensor) -> float | Tensor:
        """The current temperature, in a form that divides utilities of these scores."""
        if isinstance(self.temperature, ExponentialSchedule):
            current: Tensor = self.temperature()
            return current
        return temperature_of(self.temperature, scores)

    def perturb(self, scores: Tensor, mask: Tensor | None, draws: int | None = None) -> Tensor:
        """Random utilities ``[*batch, *parts]`` (``[draws, *batch, *parts]``), differentiable in the scores."""
        scores = torch.where(self.structure.parts(scores, mask), scores, 0.0)
        return torch.where(self.structure.noisy_parts(scores), self.utility.sample(scores, draws), scores)

    def relax(self, utilities: Tensor, mask: Tensor | None, temperature: float | Tensor) -> Tensor:
        """Relaxed vertices for utilities that have been divided by the temperature."""
        if self.backward_by == "exact":
            return self.structure.relax(self.relaxation, utilities, mask, temperature)
        how = (self.structure, self.relaxation, self.epsilon, self.step)
        relaxed: Tensor = _FiniteDifference.apply(utilities, mask, *how)
        return relaxed

    def _divergence(self, scores: Tensor, mask: Tensor | None, prior_scores: Tensor | None) -> Divergence:
        if self.kl_over == "vertex":
            return gibbs_divergence(self.structure, scores, mask, prior_scores)
        noisy = self.structure.parts(scores, mask) & self.structure.noisy_parts(scores)
        return utility_divergence(self.structure, self.utility, scores, noisy, prior_scores)


class Deterministic(Estimator):
    r"""The objective at a relaxed vertex without noise, ``argmax_x <x, s> - f(x)`` over conv(X),
    and its gradient.

    - ``marginal``: mean of the Gibbs distribution (structured attention, Kim et al. 2017);
    - ``sparsemap``: Euclidean projection on conv(X) (Niculae et al. 2018; sparsemax for
      ``OneHot``);
    - ``entmax``: entmax with parameter alpha, for one category out of all, as ``OneHot`` (Peters
      et al. 2019; learned: Correia et al. 2019).

    In training this is exact for the objective of the relaxed model. In evaluation the vertex is
    ``argmax(scores)``, which is hard. While training, ``marginal`` has a ``kl`` if the structure
    can compute it. It is the divergence of the Gibbs distribution, whose mean the vertex is, from
    the uniform one. The other mappings are not means of a particular distribution, and the argmax
    in evaluation is not a sample of the Gibbs distribution. So these have no ``kl``.

    Args:
        structure: the set of vertices.
        mapping: see above.
        alpha: the alpha of entmax, at least 1; 1 is softmax, 2 sparsemax.
        learn_alpha: make alpha a parameter with this start; it stays within (1, 2).

    Raises:
        UnsupportedError: if the structure lacks the mapping.
        ValueError: for an unknown mapping, or an alpha out of range.
    """

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(
        self, structure: Structure, mapping: Mapping = "marginal", alpha: float | None = None, learn_alpha: bool = False
    ) -> None:
        super().__init__(structure)
        check_choice("mapping", mapping, get_args(Mapping))
        by = f"estimator {mapping}"
        structure.require("argmax", by=by)
        if mapping == "entmax":
            if not structure.is_categorical:
                raise UnsupportedError(f"{by} needs one category out of all (OneHot); got {structure.name}")
            alpha = 1.5 if alpha is None else alpha
            if not (1 < alpha < 2 if learn_alpha else 1 <= alpha < math.inf):
                raise ValueError(f"alpha must be {'within (1, 2)' if learn_alpha else 'at least 1'}; got {alpha}")
        else:
            if alpha is not None or learn_alpha:
                raise ValueError(f"alpha belongs to mapping=entmax; got {mapping}")
            structure.require({"marginal": "marginals", "sparsemap": "project"}[mapping], by=by)
        self.mapping, self.alpha = mapping, alpha
        has_kl = mapping == "marginal" and {"log_partition", "entropy"} <= structure.oracles
        self.kl_over = "vertex" if has_kl else None
        self.logit = nn.Parameter(torch.logit(torch.tensor(alpha) - 1)) if learn_alpha else None

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
        metrics = {} if self.logit is None else {"alpha": self.current_alpha().detach()}
        if not self.training:
            return pathwise(objective, self.structure.argmax(scores, mask), 1, None, metrics)
        divergence = gibbs_divergence(self.structure, scores, mask, prior_scores) if self.kl_over == "vertex" else None
        return pathwise(objective, self.relax(scores, mask), 1, divergence, metrics)

    def current_alpha(self) -> Tensor:
        """The learned alpha, a scalar."""
        assert self.logit is not None
        return 1 + self.logit.sigmoid()

    def relax(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The relaxed vertex ``[*batch, *parts]``."""
        if self.mapping == "marginal":
            return self.structure.marginals(scores, mask)
        if self.mapping == "sparsemap":
            return self.structure.project(scores, mask)
        assert self.alpha is not None
        alpha = self.alpha if self.logit is None else self.current_alpha()
        layout, exists = self.structure.layout, self.structure.parts(scores, mask)
        point = OneHot().entmax(layout.flatten(scores), alpha, layout.flatten(exists))
        return layout.unflatten(point, scores.shape[-layout.ndim :])


class _MeanArgmax(torch.autograd.Function):
    """Mean of perturbed argmaxes, differentiated through the density of the noise."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, scores: Tensor, vertices: Tensor, slope: Tensor, sigma: float
    ) -> Tensor:
        ctx.save_for_backward(scores, vertices, slope)
        ctx.sigma = sigma  # type: ignore[attr-defined]
        return vertices.mean(0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores, vertices, slope = ctx.saved_tensors  # type: ignore[attr-defined]
        # Vertices may have another shape than the scores. <gradient, vertex> is one number for each
        # sample and example.
        inner = (vertices * gradients[0]).flatten(2).sum(-1)
        inner = inner.reshape(*inner.shape, *[1] * (slope.dim() - 2))
        gradient = (inner * slope).mean(0) / ctx.sigma  # type: ignore[attr-defined]
        return first_order_only(gradient, "the mean of perturbed argmaxes", scores), None, None, None


def mean_argmax(
    scores: Tensor, vertices: Tensor, noise: Tensor, utility: Utility, exists: Tensor, sigma: float
) -> Tensor:
    """Mean over samples of ``vertices = argmax(scores + sigma noise)``, differentiable once in the
    scores.

    The Jacobian is estimated from the same samples (Berthet et al. 2020, section 3.1).

    Args:
        scores: ``[*batch, *parts]``, finite.
        vertices: ``[n_samples, *batch, *vertex]``.
        noise: ``[n_samples, *batch, *parts]``, a sample of ``utility`` at scores 0; the noise is
            added to scores.
        utility: the noise.
        exists: bool ``[*batch, *parts]``: which entries are parts.
        sigma: scale of the noise.

    Returns:
        ``[*batch, *vertex]``.
    """
    if torch.is_inference_mode_enabled():  # no gradient at all, not even that of the noise
        return vertices.mean(0)
    with torch.enable_grad():
        noise = noise.detach().requires_grad_()
        (score,) = torch.autograd.grad(utility.log_prob(noise, torch.zeros_like(noise)).sum(), noise)
    mean: Tensor = _MeanArgmax.apply(scores, vertices, torch.where(exists, -score, 0.0), sigma)
    return mean


class Perturbed(Estimator):
    r"""The objective at the mean of perturbed argmaxes, ``E argmax_x <x, s + sigma Z>`` (Berthet et
    al. 2020).

    The mean is smooth in the scores. Its Jacobian is
    ``E[x(s + sigma Z) (-grad log p(Z))^T] / sigma``. Both are estimated from the same ``n_samples``
    samples. So the gradient for the scores is noisy, and the objective's gradient is taken at the
    estimated mean. This works for every structure with an argmax. In evaluation the vertex is one
    perturbed argmax. ``kl`` is that of the utilities ``s / sigma + Z`` from their prior (scores 0).

    Args:
        structure: the set of vertices.
        utility: noise Z: gumbel, gaussian or logistic.
        sigma: its scale, the analogue of a temperature.
        n_samples: number of argmaxes an example in training; the objective is evaluated once.

    Raises:
        UnsupportedError: if the structure has no argmax.
        TypeError: if n_samples is not a whole number.
        ValueError: for options out of range.
    """

    needs_differentiable_objective: ClassVar[bool] = True
    kl_over: Over | None = "parts"

    def __init__(
        self,
        structure: Structure,
        utility: UtilityName | Utility = "gaussian",
        sigma: float = 1.0,
        n_samples: int = 10,
    ) -> None:
        super().__init__(structure)
        structure.require("argmax", by="estimator perturbed")
        self.utility = make_utility(utility)
        if not self.utility.is_location_family:
            raise ValueError(f"perturbed needs utilities that are scores plus noise; got {type(self.utility).__name__}")
        check_positive("sigma", sigma)
        check_count("n_samples", n_samples)
        self.sigma, self.n_samples = sigma, n_samples
        self.vertex_distribution = PerturbAndMap(self.utility, sigma, everywhere=True)

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
        exists = self.structure.parts(scores, mask)
        safe = torch.where(exists, scores, 0.0)
        prior = None if prior_scores is None else prior_scores / self.sigma
        divergence = utility_divergence(self.structure, self.utility, safe / self.sigma, exists, prior)
        samples = self.n_samples if self.training else 1
        noise = self.utility.sample(torch.zeros_like(safe), samples)
        vertices = self.structure.argmax(safe.detach() + self.sigma * noise, mask)
        if not self.training:
            return pathwise(objective, vertices[0], 1, divergence)
        mean = mean_argmax(safe, vertices, noise, self.utility, exists, self.sigma)
        return pathwise(objective, mean, 1, divergence)
