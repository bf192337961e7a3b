"""Score functions with a control variate on the noise: RELAX (a learned critic) and REBAR (the
relaxed objective).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.ranges import check_choice, check_count, check_positive
from structgrad.estimators.base import (
    Estimate,
    Estimator,
    Objective,
    SizeMismatchError,
    evaluate,
    example_rows,
    gibbs_divergence,
    pathwise,
    per_example,
    replicate,
    require_gradients,
    utility_divergence,
    with_gradient,
    with_gradients,
)
from structgrad.estimators.score_function import exponentials
from structgrad.estimators.utilities import Logistic, NegExponential
from structgrad.structures.base import Noise, Structure, Trace

CriticName = Literal["flat", "parts"]


class ControlVariate(Estimator):
    r"""The common part of RELAX and REBAR (Grathwohl et al. 2018; Struminsky et al. 2021, equation
    6).

    Utilities u decide a discrete action b of known probability, which makes the vertex x. u~ is a
    fresh sample of u given b. Both are reparameterised in the scores. With a critic c, the gradient
    estimate of an example is

    .. math:: g = (L(x) - c(\tilde u)) \nabla \log p(b) - \nabla c(\tilde u) + \nabla c(u),

    unbiased for every c. The critic's parameters descend ``||g||^2``, whose mean is the variance up
    to a constant. The critic gets this gradient and no other, the scores get g, and the decoder
    gets the gradient of the mean of L(x).

    Here b is the trace and ``u = -log E``. For ``Subset`` b is the vertex itself and u has logistic
    noise. In evaluation there is one vertex an example.

    Args:
        structure: needs ``trace``, ``trace_log_prob`` and ``conditional``; or, like ``Subset``,
            ``conditional_utility``.
        n_samples: K, the number of samples an example; g is their mean. All are evaluated in one
            call of the objective.
        by: the estimator's name, for the message.

    Raises:
        UnsupportedError: if the structure lacks these oracles.
        TypeError: if n_samples is not a whole number.
        ValueError: if n_samples is below 1.
    """

    def __init__(self, structure: Structure, n_samples: int, by: str) -> None:
        super().__init__(structure)
        check_count("n_samples", n_samples)
        self.explicit = "conditional_utility" in structure.oracles
        if not self.explicit:
            structure.require("trace", "trace_log_prob", "conditional", by=by)
        self.n_samples = n_samples
        self.kl_over = "vertex" if self.explicit else "parts"
        self.vertex_distribution = "gibbs" if self.explicit else "trace"

    @abc.abstractmethod
    def criticise(self, sample: Sample, objective: Objective, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate objective and critic.

        Args:
            sample: K samples an example.
            objective: must be called once.
            context: ``[batch, features]``, or None.

        Returns:
            losses ``[batch, K]``; critic ``[batch, K, 2]``; and the vertices at which the objective
            was evaluated, ``[batch, M, *vertex]``, of which the first K are the sample's.
        """

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
        finite = torch.where(exists, scores, 0.0)
        if self.explicit:
            divergence = gibbs_divergence(self.structure, scores, mask, prior_scores)
        else:
            divergence = utility_divergence(self.structure, NegExponential(), scores, exists, prior_scores)
        if not self.training:
            hard = self._draw(finite.detach(), exists, mask)[0]
            return pathwise(objective, hard, 1, divergence)
        require_gradients(type(self).__name__)
        with torch.enable_grad():
            sample = self._sample(finite, exists, mask)
            losses, critic, evaluated = self.criticise(sample, objective, context)
            gradient, to_critic = self._gradients(sample, losses.detach(), critic)
        for_scores, for_critic = with_gradient(finite, gradient), with_gradients(*to_critic)
        batch, samples = evaluated.shape[:2]
        weights = scores.new_zeros(batch, samples)
        weights[:, : self.n_samples] = 1 / self.n_samples
        return Estimate(
            surrogate=losses.mean(1) + for_scores + for_critic,
            objective=losses.detach().mean(1),
            divergence=divergence,
            vertices=evaluated.flatten(0, 1),
            rows=example_rows(batch, samples, scores.device),
            weights=weights.flatten(),
            metrics={"squared_gradient": gradient.square().flatten(1).sum(1).mean()},
        )

    # --- samples ----------------------------------------------------------------------------------------------------

    def _sample(self, scores: Tensor, exists: Tensor, mask: Tensor | None) -> Sample:
        """K actions an example, with both utilities."""
        exists = replicate(exists, None, self.n_samples)[0]
        each, mask = replicate(scores.detach(), mask, self.n_samples)
        leaf = each.clone().requires_grad_()
        vertices, action, first = self._draw(leaf.detach(), exists, mask)
        noise = self._noise(action, leaf)
        second = torch.where(exists, self._conditional(action, leaf, mask, noise), 0.0)
        utilities = torch.stack([torch.where(exists, first, 0.0), second.detach()], 2).requires_grad_()
        return Sample(leaf, exists, mask, vertices, action, noise, second, utilities)

    def _draw(self, scores: Tensor, exists: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace, Tensor]:
        """Vertices, the actions that give them, and the utilities u that decided the actions."""
        if self.explicit:
            utilities = Logistic().sample(scores)
            vertices = self.structure.argmax(utilities, mask)
            return vertices, vertices, utilities
        sample = exponentials(scores, exists)
        trace = self.structure.trace(sample, mask)
        trace = Trace(trace.vertex.to(scores.dtype), trace.choices)
        return trace.vertex, trace, -sample.log().to(scores)

    def _noise(self, action: Tensor | Trace, scores: Tensor) -> Tensor | Noise:
        """The noise of u~."""
        if isinstance(action, Trace):
            return self.structure.conditional_noise(action, scores)
        return wide_exponentials(scores)

    def _conditional(
        self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None, noise: Tensor | Noise
    ) -> Tensor:
        """u~, reparameterised in the scores and in their dtype.

        It is computed in float64, where exponentials of log-rates of +-100 are finite and
        differences have nine digits.
        """
        if isinstance(action, Trace):
            assert isinstance(noise, tuple)
            return -self.structure.conditional(action, scores.double(), mask, noise).log().to(scores)
        assert isinstance(noise, Tensor)
        return self.structure.conditional_utility(action, scores.double(), mask, noise).to(scores)

    # --- gradients --------------------------------------------------------------------------------------------------

    def _gradients(
        self, sample: Sample, losses: Tensor, critic: Tensor
    ) -> tuple[Tensor, tuple[list[nn.Parameter], tuple[Tensor, ...]]]:
        """The estimate g, ``[batch, *parts]``, and the parameters with their gradients of the mean of ``||g||^2``."""
        parameters = [p for p in self.parameters() if p.requires_grad]  # none if the user has frozen them
        difference = (critic[..., 0] - critic[..., 1]).sum()
        (slopes,) = torch.autograd.grad(difference, sample.utilities, create_graph=True)
        slopes = torch.where(sample.exists[:, :, None], slopes, 0.0)
        (score,) = torch.autograd.grad(self._log_prob(sample).sum(), sample.scores)
        # u is the scores plus noise; u~ is not.
        (pulled,) = torch.autograd.grad(sample.second, sample.scores, slopes[:, :, 1].detach())
        signal = losses - critic[..., 1].detach()
        each = per_example(signal, score) * score + slopes[:, :, 0].detach() + pulled
        gradient = each.mean(1)

        if not parameters:
            return gradient, ([], ())
        # g is linear in c(u~), grad c(u) and grad c(u~): the derivative of ||g||^2 is that of <2 g, g> with one g held.
        held = (2 * gradient[:, None] / self.n_samples).expand(score.shape)
        # A loss that is not finite moves nothing of the critic; the others' gradients are not hurt.
        held = torch.where(held.isfinite(), held, 0.0)
        along = torch.stack([held, self._push(sample, held)], 2)
        change = (along * slopes).flatten(1).sum(1) - ((held * score).flatten(2).sum(2) * critic[..., 1]).sum(1)
        found = torch.autograd.grad(change.mean(), parameters, retain_graph=True)
        return gradient, (parameters, found)

    def _log_prob(self, sample: Sample) -> Tensor:
        if isinstance(sample.action, Trace):
            return self.structure.trace_log_prob(sample.action, sample.scores, sample.mask)
        return self.structure.log_prob(sample.action, sample.scores, sample.mask)

    @torch.no_grad()
    def _push(self, sample: Sample, direction: Tensor) -> Tensor:
        """Derivative of u~ along a direction of the scores, with the noise held fixed.

        It uses central differences in float64 (nine digits), which are two calls of compiled code.
        Automatic derivatives would differentiate that code twice, in plain torch.
        """
        # A zero is appended, so that the largest exists without parts too.
        length = (
            torch.nn.functional.pad(direction.flatten(2).abs(), (0, 1))
            .amax(2)
            .clamp_min(torch.finfo(direction.dtype).tiny)
        )
        length = per_example(length, direction).double()
        step = 1e-5 * direction.double() / length
        there, back = (
            self._conditional(sample.action, sample.scores.double() + sign * step, sample.mask, sample.noise)
            for sign in (1, -1)
        )
        return torch.where(sample.exists, (there - back) / 2e-5 * length, 0.0).to(direction)


@dataclass
class Sample:
    """K samples an example, and the tensors that their derivatives need.

    Attributes:
        scores: ``[batch, K, *parts]``, a leaf; 0 for missing parts.
        exists: bool ``[batch, K, *parts]``.
        mask: the same for the structure, or None.
        vertices: ``[batch, K, *vertex]``, hard.
        action: b, in the same batch shape.
        noise: the noise of u~.
        second: u~, differentiable in the scores.
        utilities: ``[batch, K, 2, *parts]``: u and u~, a leaf; 0 for missing parts.
    """

    scores: Tensor
    exists: Tensor
    mask: Tensor | None
    vertices: Tensor
    action: Tensor | Trace
    noise: Tensor | Noise
    second: Tensor
    utilities: Tensor

    @property
    def scores_of_both(self) -> Tensor:
        """The scores in the shape of the utilities, detached."""
        return self.scores.detach()[:, :, None].expand(self.utilities.shape)

    @property
    def mask_of_both(self) -> Tensor | None:
        """The mask in the shape of the utilities."""
        return None if self.mask is None else self.mask[:, :, None].expand(self.utilities.shape)


class Critic(nn.Module, abc.ABC):
    """Hidden units of the utilities, to which those of the context are added; ReLU; one number.

    Args:
        each: the first layers.
        hidden_size: number of hidden units.
        context_size: number of features of the context; None if the critic does not read it.
    """

    def __init__(self, each: nn.Module, hidden_size: int, context_size: int | None) -> None:
        super().__init__()
        self.each = each
        self.whole = nn.Sequential(nn.ReLU(), _zero(nn.Linear(hidden_size, 1)))
        self.of_context = None if context_size is None else nn.Linear(context_size, hidden_size, bias=False)

    @abc.abstractmethod
    def of_utilities(self, utilities: Tensor, scores: Tensor, exists: Tensor) -> Tensor:
        """``[*batch, P]`` -> ``[*batch, hidden_size]``."""

    def forward(self, utilities: Tensor, scores: Tensor, exists: Tensor, context: Tensor | None) -> Tensor:
        """``[batch, K, 2, P]`` and ``[batch, features]`` -> ``[batch, K, 2]``.

        Raises:
            SizeMismatchError: without a context that the critic reads, or for one of another size.
        """
        dtype = next(self.parameters()).dtype
        hidden = self.of_utilities(utilities.to(dtype), scores.to(dtype), exists)
        if self.of_context is not None:
            size = self.of_context.in_features
            if context is None or context.shape[1] != size:
                got = "the task passes none" if context is None else f"the context has {context.shape[1]} features"
                raise SizeMismatchError(f"the critic of relax has context_size {size}; {got}")
            hidden = hidden + self.of_context(context.detach().to(dtype))[:, None, None]
        out: Tensor = self.whole(hidden)
        return out[..., 0].to(utilities.dtype)


class FlatCritic(Critic):
    """One hidden layer over all utilities of an example, for a fixed number of parts.

    See Struminsky et al. (2021), toy problem.
    """

    def __init__(self, size: int, hidden_size: int, context_size: int | None) -> None:
        super().__init__(nn.Linear(size, hidden_size), hidden_size, context_size)
        self.size = size

    def of_utilities(self, utilities: Tensor, scores: Tensor, exists: Tensor) -> Tensor:
        """See :class:`Critic`.

        Raises:
            SizeMismatchError: for another number of parts.
        """
        if utilities.shape[-1] != self.size:
            raise SizeMismatchError(
                f"the critic of relax was built for {self.size} parts (shape); the task has {utilities.shape[-1]}"
            )
        hidden: Tensor = self.each(utilities)
        return hidden


class PartsCritic(Critic):
    """A network for any number of parts.

    One network is applied to every part and averaged over the existing parts; a second network
    follows.
    """

    def __init__(self, hidden_size: int, context_size: int | None) -> None:
        each = nn.Sequential(nn.Linear(2, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size))
        super().__init__(each, hidden_size, context_size)

    def of_utilities(self, utilities: Tensor, scores: Tensor, exists: Tensor) -> Tensor:
        """See :class:`Critic`.

        The last layer is linear, so it is applied to the mean, and not to every part.
        """
        first, activation, last = self.each.children()
        hidden = activation(first(torch.stack([utilities, scores], -1)))
        count = exists.sum(-1, keepdim=True)
        weights = exists.to(hidden) / count.clamp_min(1)
        mean = (weights.unsqueeze(-2) @ hidden).squeeze(-2)
        out: Tensor = torch.where(count > 0, last(mean), 0.0)
        return out


def _zero(layer: nn.Linear) -> nn.Linear:
    """Set the layer to zero, where the estimator is plain T-REINFORCE."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class RELAX(ControlVariate):
    """RELAX: T-REINFORCE with a learned control variate on the exponentials; see
    :class:`ControlVariate`.

    Args:
        structure: see :class:`ControlVariate`.
        critic: ``flat``, one hidden layer over all utilities, or ``parts``, which is permutation
            invariant and works for any number of parts. Both start at zero.
        shape: the shape of the parts, for ``flat`` only.
        hidden_size: the width of the critic.
        n_samples: K.
        context_size: number of features of the context, which the critic then reads as well, such as
            the encoder's state. So it can tell examples of high loss from others. None: it does not
            read it.

    Raises:
        UnsupportedError: see :class:`ControlVariate`.
        TypeError: for an n_samples, a hidden_size, a context_size or a shape without whole numbers.
        ValueError: for sizes below 1; for an unknown critic, or a shape that does not go with it or
            with the parts.
        SizeMismatchError: from a call, for a context or parts of another size.
    """

    def __init__(
        self,
        structure: Structure,
        critic: CriticName = "parts",
        shape: Sequence[int] | None = None,
        hidden_size: int = 32,
        n_samples: int = 1,
        context_size: int | None = None,
    ) -> None:
        super().__init__(structure, n_samples, by="estimator relax")
        check_choice("critic", critic, get_args(CriticName))
        check_count("hidden_size", hidden_size)
        if context_size is not None:
            check_count("context_size", context_size)
        if (critic == "flat") != (shape is not None):
            raise ValueError(
                f"critic flat needs a shape, and no other critic takes one; got critic {critic}, shape {shape}"
            )
        self.critic: Critic
        if shape is None:
            self.critic = PartsCritic(hidden_size, context_size)
        else:
            layout = structure.layout
            for length in shape:
                check_count("shape", length)
            if len(shape) != layout.ndim:
                raise ValueError(f"shape is that of the parts, [{', '.join(layout.dimensions)}]; got {list(shape)}")
            parts = torch.empty(*shape)
            layout.check(parts)
            size = layout.flatten(parts).numel()
            self.critic = FlatCritic(size, hidden_size, context_size)

    def criticise(self, sample: Sample, objective: Objective, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`ControlVariate`."""
        flatten, scores = self.structure.layout.flatten, sample.scores_of_both
        exists = flatten(self.structure.parts(scores, sample.mask_of_both))
        critic = self.critic(flatten(sample.utilities), flatten(scores), exists, context)
        return evaluate(objective, sample.vertices)[0], critic, sample.vertices


class REBAR(ControlVariate):
    r"""REBAR: the critic is ``eta L(relaxed x(u / temperature))`` (Tucker et al. 2017); see
    :class:`ControlVariate`.

    eta and the temperature are learned like the critic of RELAX. A sample takes three evaluations,
    two of them relaxed, in one call. The decoder learns from the hard one only. The gradients of
    eta and the temperature differentiate the relaxation and the objective twice.

    Args:
        structure: see :class:`ControlVariate`.
        relaxation: a key of ``structure.relaxations``.
        temperature: the initial temperature.
        eta: the initial eta.
        learn_temperature: False keeps the temperature fixed.
        n_samples: K.

    Raises:
        UnsupportedError: see :class:`ControlVariate`; or if the structure lacks the relaxation.
        ValueError: unless the temperature is positive.
    """

    needs_differentiable_objective = True

    def __init__(
        self,
        structure: Structure,
        relaxation: str = "exp_family",
        temperature: float = 0.5,
        eta: float = 1.0,
        learn_temperature: bool = True,
        n_samples: int = 1,
    ) -> None:
        super().__init__(structure, n_samples, by="estimator rebar")
        structure.require_relaxation(relaxation, by=f"estimator rebar (relaxation={relaxation})", one_draw=True)
        check_positive("temperature", temperature)
        self.relaxation = relaxation
        self.eta = nn.Parameter(torch.tensor(float(eta)))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)

    def criticise(self, sample: Sample, objective: Objective, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`ControlVariate`."""
        temperature = self.log_temperature.exp()
        utilities = sample.utilities / temperature
        relaxed = self.structure.relax(self.relaxation, utilities, sample.mask_of_both, temperature)
        evaluated = torch.cat([sample.vertices, relaxed.flatten(1, 2)], 1)
        samples = self.n_samples
        losses, _, _ = evaluate(objective, evaluated)
        critic = self.eta * losses[:, samples:].reshape(len(evaluated), samples, 2)
        return losses[:, :samples], critic, evaluated
