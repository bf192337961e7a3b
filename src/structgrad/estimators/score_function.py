"""Score-function estimators (REINFORCE): the action is the vertex, the trace or the noise."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from structgrad.algorithms.noise import wide_exponentials
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    Objective,
    PerturbAndMap,
    gibbs_divergence,
    utility_divergence,
)
from structgrad.estimators.utilities import NegExponential, Utility, UtilityName, make_utility
from structgrad.structures.base import Structure, Trace, UnsupportedError

Action = Literal["X", "T", "E", "U"]
Baseline = Literal["none", "ema", "elbo", "batch", "sample", "greedy", "loo", "nvil"]


def exponentials(log_rates: Tensor, exists: Tensor) -> Tensor:
    """A sample of ``E ~ Exp(exp(log_rates))``, without gradient, 1 where no part exists.

    In float64: with log-rates of +-100 the float32 values would be 0 or infinite, and ties would decide.

    Args:
        log_rates: any shape.
        exists: bool of that shape; log-rates where it is False are never looked at.

    Returns:
        float64, positive and finite for log-rates within +-600.
    """
    sample = wide_exponentials(log_rates) * torch.where(exists, log_rates.detach(), 0.0).double().neg().exp()
    return torch.where(exists, sample, 1.0)


def draw_trace(structure: Structure, log_rates: Tensor, mask: Tensor | None) -> Trace:
    """A sample of the trace; its vertex is in the dtype of ``log_rates``."""
    trace = structure.trace(exponentials(log_rates, structure.parts(log_rates, mask)), mask)
    return Trace(trace.vertex.to(log_rates.dtype), trace.choices)


class RunningMean(nn.Module):
    """Exponential moving average and variance of a signal over past steps.

    They start at zero and are corrected for it as in Adam; both are zero before the first :meth:`update`.
    Estimators read them before they update them: a baseline that has seen the action it is subtracted for
    would be biased.

    Args:
        decay: weight of the past.

    Raises:
        ValueError: unless ``0 <= decay < 1``.
    """

    total: Tensor
    squares: Tensor
    weight: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1); got {decay}")
        self.decay = decay
        for name in ("total", "squares", "weight"):
            self.register_buffer(name, torch.zeros(()))

    @property
    def mean(self) -> Tensor:
        """The running mean: scalar."""
        return self.total / self._divisor

    @property
    def deviation(self) -> Tensor:
        """The running standard deviation: scalar."""
        return (self.squares / self._divisor).sqrt()

    @property
    def _divisor(self) -> Tensor:
        """The weight; anything positive before the first update, when all is 0."""
        return self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Move towards the mean and variance (around the running mean) of ``values``, any shape; not for none."""
        if not values.numel():
            return
        values = values.detach().to(self.total)
        variance = (values - self.mean).square().mean()
        self.total = self.total.lerp(values.mean(), 1 - self.decay)
        self.squares = self.squares.lerp(variance, 1 - self.decay)
        self.weight = self.weight.lerp(torch.ones_like(self.weight), 1 - self.decay)


class Reinforce(Estimator):
    r"""The score-function estimator ``(L(x) - b) grad log p(action)``, plus the pathwise gradient of ``L``.

    ======  =======================================  ===================  ==============================
    action  what is sampled                          vertex               ``kl``
    ======  =======================================  ===================  ==============================
    ``X``   the vertex                               Gibbs                of Gibbs from uniform
    ``T``   the trace of ``E ~ Exp(exp(scores))``    perturb-and-MAP      of E from ``Exp(1)``
    ``E``   the exponentials E                       as T                 of E from ``Exp(1)``
    ``U``   utilities, of which x is the argmax      perturb-and-MAP      of U from its prior
    ======  =======================================  ===================  ==============================

    For one vector of scores ``Var[X] <= Var[T] <= Var[E]`` (Struminsky et al. 2021, section 3.2, equations
    1-5), where their vertices have the same distribution. U with Gumbel noise is Paulus et al. 2020, C.1.

    Baselines b never see the action that they are subtracted for and are detached, so that every choice is
    unbiased and the decoder's gradient is exactly that of the mean objective:

    - ``ema``: exponential moving average of the objective over past steps, started at zero and corrected for
      it (zero on the first step);
    - ``elbo``: the same of the whole loss, ``objective + kl_weight kl`` (minus the ELBO), less the example's own
      ``kl_weight kl``, so that the signal is the loss less its average (Paulus et al. 2020, C.1);
    - ``batch``: mean objective of the *other* examples of the batch;
    - ``sample``: objective of one independent sample (SFE+ of Correia et al. 2020, section 5.1); costs one
      more evaluation;
    - ``greedy``: objective of ``argmax(scores)`` (self-critical); costs one more evaluation;
    - ``loo``: mean objective of the other samples of the same example (Struminsky et al., equation 7,
      E-/T-REINFORCE+);
    - ``nvil``: a network of ``context`` plus a running mean (Mnih & Gregor 2014), trained by squared error
      within the surrogate; the context is detached, so the baseline trains nothing but itself.

    Args:
        structure: the set of vertices.
        action: X needs ``sample``, ``log_prob``, ``log_partition``, ``entropy``; T needs ``trace``,
            ``trace_log_prob``; E needs ``trace``; U needs ``argmax``.
        baseline: see above.
        n_samples: K, samples an example; the gradients are averaged. All are evaluated in one call of the
            objective.
        utility: noise of action U, and of no other; None is the one that gives the structure's Gibbs
            distribution if it names one (``Subset``: logistic), else Gumbel.
        decay: of the running statistics of ``ema`` and ``nvil``.
        context_size: features of ``context``, for ``nvil`` only.
        hidden_size: of the ``nvil`` network (one hidden layer, ReLU).
        normalize_variance: divide the learning signal of ``nvil`` by ``max(1, running standard deviation)``
            (Mnih & Gregor, 2.3.3), which scales the encoder's gradient (only).

    Raises:
        UnsupportedError: if the structure lacks what the action needs.
        ValueError: for options that do not fit together.
    """

    def __init__(
        self,
        structure: Structure,
        action: Action = "X",
        baseline: Baseline = "none",
        n_samples: int = 1,
        utility: UtilityName | Utility | None = None,
        decay: float = 0.99,
        context_size: int | None = None,
        hidden_size: int = 100,
        normalize_variance: bool = False,
    ) -> None:
        super().__init__(structure)
        if action not in get_args(Action):
            raise ValueError(f"action must be one of {', '.join(get_args(Action))}; got {action!r}")
        if baseline not in get_args(Baseline):
            raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}; got {baseline!r}")
        if n_samples < 1 or (baseline == "loo" and n_samples < 2):
            raise ValueError(f"n_samples must be at least {2 if baseline == 'loo' else 1}; got {n_samples}")
        if utility is not None and action != "U":
            raise ValueError(f"utility goes with action U and no other; got action {action}, utility {utility!r}")
        if (baseline == "nvil") != (context_size is not None):
            raise ValueError(f"context_size goes with baseline nvil and no other; got {baseline}, {context_size}")
        if normalize_variance and baseline != "nvil":
            raise ValueError(f"normalize_variance goes with baseline nvil and no other; got {baseline}")
        needs = {
            "X": ("sample", "log_prob", "log_partition", "entropy"),
            "T": ("trace", "trace_log_prob"),
            "E": ("trace",),
            "U": ("argmax",),
        }[action]
        extra = ("argmax",) if baseline == "greedy" else ()
        structure.require(*needs, *extra, by=f"estimator reinforce (action={action}, baseline={baseline})")
        if action == "U":
            if not structure.perturbs_all_parts:
                raise UnsupportedError(
                    f"estimator reinforce (action=U) needs noise on every part; {structure.name} perturbs only some"
                )
            self.utility = make_utility(utility or structure.noise or "gumbel")
        self.action, self.baseline, self.n_samples = action, baseline, n_samples
        self.normalize_variance = normalize_variance
        self.kl_over = "vertex" if action == "X" else "parts"
        if action != "X":
            self.vertex_distribution = PerturbAndMap(self.utility) if action == "U" else "trace"
        self.mixes_examples = baseline == "batch"
        if baseline in ("ema", "elbo", "nvil"):
            self.running = RunningMean(decay)
        if context_size is not None:
            self.network = nn.Sequential(nn.Linear(context_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1))

    def estimate(
        self, scores: Tensor, objective: Objective, mask: Tensor | None, context: Tensor | None, kl_weight: float
    ) -> Estimate:
        """See :class:`~structgrad.estimators.base.Estimator`; ``context`` ``[batch, context_size]`` is for ``nvil``,
        ``kl_weight`` for ``elbo``.
        """
        batch = scores.shape[0]
        samples = self.n_samples if self.training else 1
        own = 1 if self.training and self.baseline in ("sample", "greedy") else 0
        exists = None if mask is None else mask.expand(scores.shape)[:, None]
        expanded = scores[:, None].expand(batch, samples, *scores.shape[1:])
        sample_mask = None if exists is None else exists.expand(expanded.shape)
        vertices, action = self._sample(expanded.detach(), sample_mask)
        if own:
            rival = self._rival(scores.detach(), mask)
            vertices = torch.cat([vertices, rival[:, None]], 1)
        rows = torch.arange(batch, device=scores.device).repeat_interleave(samples + own)
        losses = objective(vertices.flatten(0, 1), rows).reshape(batch, samples + own)
        losses, rival_loss = losses[:, :samples], losses[:, samples:].detach()
        signal = losses.detach()
        surrogate = losses.mean(1)
        divergence = self._divergence(scores, mask)
        if self.training:
            baseline, penalty = self._baseline(signal, rival_loss, divergence, kl_weight, context)
            advantage = signal - baseline
            if self.baseline in ("ema", "elbo", "nvil"):
                # What remains after the input-dependent part; for ema that is the objective itself, for elbo the loss.
                remains = advantage + self.running.mean
            if self.normalize_variance:
                advantage = advantage / self.running.deviation.clamp_min(1.0)
            log_prob = self._log_prob(action, expanded, sample_mask)
            surrogate = surrogate + (advantage * log_prob).mean(1) + penalty
            if self.baseline in ("ema", "elbo", "nvil"):
                self.running.update(remains)
        weights = torch.full_like(signal, 1 / samples)
        if own:
            weights = torch.cat([weights, torch.zeros_like(weights[:, :1])], 1)
        return Estimate(
            surrogate=surrogate,
            objective=signal.mean(1),
            divergence=divergence,
            vertices=vertices.flatten(0, 1),
            rows=rows,
            weights=weights.flatten(),
        )

    # --- actions ----------------------------------------------------------------------------------------------------

    def _sample(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | Trace]:
        """Vertices ``[*batch, *parts]`` and the actions that made them."""
        if self.action == "X":
            vertices = self.structure.sample(scores, mask)
            return vertices, vertices
        if self.action == "T":
            trace = draw_trace(self.structure, scores, mask)
            return trace.vertex, trace
        exists = self.structure.parts(scores, mask)
        if self.action == "U":
            utilities = self.utility.sample(torch.where(exists, scores, 0.0))
            return self.structure.argmax(utilities, mask), utilities
        sample = exponentials(scores, exists)
        return self.structure.trace(sample, mask).vertex.to(scores.dtype), sample.log().to(scores.dtype)

    def _log_prob(self, action: Tensor | Trace, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probability (X, T) or log-density (E, U) of the actions, differentiable in the scores:
        ``[*batch]``.
        """
        if isinstance(action, Trace):
            return self.structure.trace_log_prob(action, scores, mask)
        if self.action == "X":
            return self.structure.log_prob(action, scores, mask)
        exists = self.structure.parts(scores, mask)
        safe = torch.where(exists, scores, 0.0)
        # Of E, given its logarithm: rate * E is one exponential, so that neither factor over- or underflows.
        density = self.utility.log_prob(action, safe) if self.action == "U" else safe - (safe + action).exp()
        return torch.where(exists, density, 0.0).flatten(-self.structure.layout.ndim).sum(-1)

    def _rival(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The vertex whose objective is the baseline: ``[batch, *parts]``."""
        return self.structure.argmax(scores, mask) if self.baseline == "greedy" else self._sample(scores, mask)[0]

    def _divergence(self, scores: Tensor, mask: Tensor | None) -> Divergence:
        if self.action == "X":
            return gibbs_divergence(self.structure, scores, mask)
        utility = self.utility if self.action == "U" else NegExponential()
        return utility_divergence(self.structure, utility, scores, self.structure.parts(scores, mask))

    # --- baselines --------------------------------------------------------------------------------------------------

    def _baseline(
        self, losses: Tensor, rival: Tensor, divergence: Divergence, kl_weight: float, context: Tensor | None
    ) -> tuple[Tensor | float, Tensor | float]:
        """Detached baseline, broadcastable to ``losses`` ``[batch, K]``, and the training loss of the
        baseline, broadcastable to ``[batch]``.
        """
        batch, samples = losses.shape
        if self.baseline == "ema":
            return self.running.mean, 0.0
        if self.baseline == "elbo":
            return self.running.mean - kl_weight * divergence.value.detach()[:, None], 0.0
        if self.baseline in ("sample", "greedy"):
            return rival, 0.0
        if self.baseline == "loo":
            return (losses.sum(1, keepdim=True) - losses) / (samples - 1), 0.0
        if self.baseline == "batch":
            if batch < 2:
                raise ValueError("baseline batch needs at least two examples in a batch")
            means = losses.mean(1, keepdim=True)
            return (means.sum() - means) / (batch - 1), 0.0
        if self.baseline == "nvil":
            if context is None:
                raise ValueError("baseline nvil needs the context; the task passes none")
            prediction = self.network(context.detach())
            mean = self.running.mean
            return prediction.detach() + mean, (losses - mean - prediction).square().mean(1)
        return 0.0, 0.0
