"""Score-function estimators (REINFORCE): the action is the vertex, the trace or the noise."""

from __future__ import annotations

import abc
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse
from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.ranges import check_choice, check_count
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    Objective,
    Over,
    PerturbAndMap,
    VertexDistribution,
    evaluate,
    gibbs_divergence,
    replicate,
    utility_divergence,
)
from structgrad.estimators.baselines import Baseline, BaselineName, Outcome, make_baseline
from structgrad.estimators.utilities import NegExponential, Utility, UtilityName, make_utility
from structgrad.structures.base import Structure, Trace, UnsupportedError

ActionName = Literal["X", "T", "E", "U"]

#: The largest log-rate: exponentials with smaller or larger rates are not float64 numbers.
_REACH = 600.0


def exponentials(log_rates: Tensor, exists: Tensor) -> Tensor:
    """A sample of ``E ~ Exp(exp(log_rates))``, without gradient, 1 where no part exists.

    It is float64: with log-rates of +-100 the float32 values would be 0 or infinite, and ties would
    decide.

    Args:
        log_rates: ``[batch, ...]``.
        exists: bool of that shape; log-rates where it is False are never read.

    Returns:
        float64, positive and finite.

    Raises:
        ValueError: for log-rates beyond +-600, in eager CPU code.
    """
    held = torch.where(exists, log_rates.detach(), 0.0).double()
    beyond = (held.abs() > _REACH).flatten(1).any(1)
    refuse(
        beyond,
        "has scores beyond +-600: as log-rates of exponentials (traces) float64 cannot hold them; "
        "scale or clip the scores, or take an estimator without a trace",
    )
    return torch.where(exists, wide_exponentials(log_rates) * held.neg().exp(), 1.0)


class Action(abc.ABC):
    """The sampled variable, which decides the vertex, and its probability.

    Args:
        structure: the set of vertices.
        by: who asks, for messages.

    Raises:
        UnsupportedError: if the structure lacks an oracle that the action needs.
    """

    needs: ClassVar[tuple[str, ...]]
    kl_over: ClassVar[Over] = "parts"
    vertex_distribution: VertexDistribution = "trace"
    utility: Utility = NegExponential()

    def __init__(self, structure: Structure, by: str) -> None:
        structure.require(*self.needs, by=by)
        self.structure = structure

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abc.abstractmethod
    def sample(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace]:
        """Vertices ``[batch, ..., *vertex]`` and the actions that give them, for detached scores."""

    @abc.abstractmethod
    def log_prob(self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probability or log-density of the actions, differentiable in the scores: ``[batch, ...]``."""

    def divergence(self, scores: Tensor, mask: Tensor | None, prior_scores: Tensor | None) -> Divergence:
        """The divergence of the sampled variable from its prior."""
        exists = self.structure.parts(scores, mask)
        return utility_divergence(self.structure, self.utility, scores, exists, prior_scores)

    def _density(self, density: Tensor, exists: Tensor) -> Tensor:
        """The sum of log-densities over the parts that exist."""
        return torch.where(exists, density, 0.0).flatten(-self.structure.layout.ndim).sum(-1)


class VertexAction(Action):
    """X: the vertex itself, a Gibbs sample."""

    needs = ("sample", "log_prob", "log_partition", "entropy")
    kl_over = "vertex"
    vertex_distribution = "gibbs"

    def sample(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace]:
        """See :class:`Action`."""
        vertices = self.structure.sample(scores, mask)
        return vertices, vertices

    def log_prob(self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`Action`."""
        assert isinstance(action, Tensor)
        return self.structure.log_prob(action, scores, mask)

    def divergence(self, scores: Tensor, mask: Tensor | None, prior_scores: Tensor | None) -> Divergence:
        """See :class:`Action`."""
        return gibbs_divergence(self.structure, scores, mask, prior_scores)


class TraceAction(Action):
    """T: the trace of ``E ~ Exp(exp(scores))``."""

    needs = ("trace", "trace_log_prob")

    def sample(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace]:
        """See :class:`Action`."""
        trace = self.structure.trace(exponentials(scores, self.structure.parts(scores, mask)), mask)
        trace = Trace(trace.vertex.to(scores.dtype), trace.choices)
        return trace.vertex, trace

    def log_prob(self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`Action`."""
        assert isinstance(action, Trace)
        return self.structure.trace_log_prob(action, scores, mask)


class ExponentialsAction(Action):
    """E: the exponentials. The action is their logarithm."""

    needs = ("trace",)

    def sample(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace]:
        """See :class:`Action`."""
        sample = exponentials(scores, self.structure.parts(scores, mask))
        return self.structure.trace(sample, mask).vertex.to(scores.dtype), sample.log().to(scores.dtype)

    def log_prob(self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`Action`."""
        assert isinstance(action, Tensor)
        exists = self.structure.parts(scores, mask)
        finite = torch.where(exists, scores, 0.0)
        # Rate times E is computed as one exponential, so that no factor overflows or underflows.
        return self._density(finite - (finite + action).exp(), exists)


class UtilitiesAction(Action):
    """U: random utilities. The vertex is their argmax."""

    needs = ("argmax",)

    def __init__(self, structure: Structure, by: str, utility: UtilityName | Utility | None) -> None:
        super().__init__(structure, by)
        if not structure.perturbs_all_parts:
            raise UnsupportedError(
                f"estimator reinforce (action=U) needs noise on every part; {structure.name} perturbs only some"
            )
        self.utility = make_utility(utility or structure.noise or "gumbel")
        self.vertex_distribution = PerturbAndMap(self.utility)

    def sample(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace]:
        """See :class:`Action`."""
        utilities = self.utility.sample(torch.where(self.structure.parts(scores, mask), scores, 0.0))
        return self.structure.argmax(utilities, mask), utilities

    def log_prob(self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`Action`."""
        assert isinstance(action, Tensor)
        exists = self.structure.parts(scores, mask)
        return self._density(self.utility.log_prob(action, torch.where(exists, scores, 0.0)), exists)


class Reinforce(Estimator):
    r"""The score-function estimator ``(L(x) - b) grad log p(action)``, plus the pathwise gradient
    of ``L``.

    | action | sampled variable | distribution of the vertex | ``kl`` |
    |---|---|---|---|
    | ``X`` | the vertex | Gibbs | of Gibbs from uniform |
    | ``T`` | the trace of ``E ~ Exp(exp(scores))`` | perturb-and-MAP | of E from ``Exp(1)`` |
    | ``E`` | the exponentials E | as for T | of E from ``Exp(1)`` |
    | ``U`` | utilities whose argmax is x | perturb-and-MAP | of U from its prior |

    If the vertices have the same distribution, ``Var[X] <= Var[T] <= Var[E]`` for one vector of
    scores (Struminsky et al. 2021, section 3.2, equations 1-5). U with Gumbel noise is Paulus et
    al. 2020, C.1.

    The baseline b never sees the action for which it is subtracted, and it is detached. So every
    choice is unbiased, and the decoder's gradient is exactly that of the mean objective.

    Args:
        structure: the set of vertices.
        action: X needs ``sample``, ``log_prob``, ``log_partition``, ``entropy``; T needs ``trace``,
            ``trace_log_prob``; E needs ``trace``; U needs ``argmax``.
        baseline: a name, see :func:`~structgrad.estimators.baselines.make_baseline`, or a
            :class:`~structgrad.estimators.baselines.Baseline` of your own.
        n_samples: K, the number of samples an example; the gradients are averaged. All are
            evaluated in one call of the objective.
        utility: the noise, for action U only. None takes the noise that gives the structure's Gibbs
            distribution if it names one (``Subset``: logistic), and otherwise Gumbel.
        decay: an option of baselines given by name, like the next three.
        context_size: see there.
        hidden_size: see there.
        normalize_variance: see there.

    Raises:
        UnsupportedError: if the structure lacks an oracle that the action needs.
        TypeError: if n_samples, context_size or hidden_size is not a whole number.
        ValueError: for options out of range or that do not fit together.
    """

    def __init__(
        self,
        structure: Structure,
        action: ActionName = "X",
        baseline: BaselineName | Baseline = "none",
        n_samples: int = 1,
        utility: UtilityName | Utility | None = None,
        decay: float = 0.99,
        context_size: int | None = None,
        hidden_size: int = 100,
        normalize_variance: bool = False,
    ) -> None:
        super().__init__(structure)
        check_choice("action", action, get_args(ActionName))
        if utility is not None and action != "U":
            raise ValueError(f"utility works only with action U; got action {action}, utility {utility!r}")
        self.baseline = make_baseline(baseline, decay, context_size, hidden_size, normalize_variance)
        check_count("n_samples", n_samples, least=self.baseline.least_samples)
        name = baseline if isinstance(baseline, str) else type(baseline).__name__
        by = f"estimator reinforce (action={action}, baseline={name})"
        self.action: Action
        if action == "U":
            self.action = UtilitiesAction(structure, by, utility)
        else:
            kinds: dict[str, type[VertexAction | TraceAction | ExponentialsAction]]
            kinds = {"X": VertexAction, "T": TraceAction, "E": ExponentialsAction}
            self.action = kinds[action](structure, by)
        structure.require(*self.baseline.needs, by=by)
        self.n_samples, self.mixes_examples = n_samples, self.baseline.mixes_examples
        self.kl_over, self.vertex_distribution = self.action.kl_over, self.action.vertex_distribution

    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        """See :class:`~structgrad.estimators.base.Estimator`; ``context`` and ``kl_weight`` are for baselines."""
        samples = self.n_samples if self.training else 1
        each, masks = replicate(scores, mask, samples)
        vertices, action = self.action.sample(each.detach(), masks)
        if self.training and self.baseline.has_rival:
            held = scores.detach()
            rival = self.baseline.rival(self.structure, held, mask, lambda: self.action.sample(held, mask)[0])
            vertices = torch.cat([vertices, rival[:, None]], 1)
        losses, evaluated, rows = evaluate(objective, vertices)
        losses, of_rival = losses[:, :samples], losses[:, samples:].detach()
        divergence = self.action.divergence(scores, mask, prior_scores)
        surrogate, signal = losses.mean(1), losses.detach()
        if self.training:
            outcome = Outcome(signal, of_rival, divergence.value.detach(), kl_weight, context)
            prediction = self.baseline.predict(outcome)
            _check_prediction(prediction, signal)
            advantage = self.baseline.normalize(signal - prediction.detach())
            log_prob = self.action.log_prob(action, each, masks)
            surrogate = surrogate + (advantage * log_prob).mean(1)
            penalty = self.baseline.update(outcome, prediction)
            surrogate = surrogate if penalty is None else surrogate + penalty
        weights = torch.cat([torch.full_like(signal, 1 / samples), torch.zeros_like(of_rival)], 1)
        return Estimate(surrogate, signal.mean(1), divergence, evaluated, rows, weights.flatten())


def _check_prediction(prediction: Tensor, losses: Tensor) -> None:
    """Refuse a baseline that broadcasting would take for that of other examples."""
    batch, samples = losses.shape
    fits = prediction.dim() == 2 and prediction.shape[0] in (1, batch) and prediction.shape[1] in (1, samples)
    if prediction.dim() and not fits:
        raise ValueError(
            f"a baseline predicts a scalar, or [{batch} or 1, {samples} or 1] for {batch} examples with "
            f"{samples} samples; got {list(prediction.shape)}"
        )


__all__ = [
    "Action",
    "ActionName",
    "ExponentialsAction",
    "Reinforce",
    "TraceAction",
    "UtilitiesAction",
    "VertexAction",
    "exponentials",
]
