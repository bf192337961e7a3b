"""Baselines of score-function estimators. An estimator subtracts a baseline from the objective to
reduce variance.

To use a baseline of your own, subclass :class:`Baseline` and write
``Reinforce(structure, baseline=Mine())``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from structgrad.common.ranges import check_choice, check_count, check_range
from structgrad.estimators.base import SizeMismatchError
from structgrad.structures.base import Structure

BaselineName = Literal["none", "ema", "elbo", "batch", "sample", "greedy", "loo", "nvil"]


class RunningMean(nn.Module):
    """Exponential moving average of a signal over past steps, and its variance if that is wanted.

    They start at zero and are corrected for it as in Adam. Both are zero before the first
    :meth:`update`. Estimators read them before they update them: a baseline that has seen the
    action for which it is subtracted would be biased.

    Args:
        decay: the weight of the past.
        with_deviation: keep the variance as well, for :attr:`deviation`.

    Raises:
        ValueError: unless ``0 <= decay < 1``.
    """

    total: Tensor
    squares: Tensor
    weight: Tensor

    def __init__(self, decay: float, with_deviation: bool = False) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1); got {decay}")
        self.decay, self.with_deviation = decay, with_deviation
        for name in ("total", "squares", "weight"):
            self.register_buffer(name, torch.zeros(()))

    @property
    def mean(self) -> Tensor:
        """The running mean: scalar."""
        return self.total / self._divisor

    @property
    def deviation(self) -> Tensor:
        """The running standard deviation: scalar.

        Raises:
            ValueError: without ``with_deviation``.
        """
        if not self.with_deviation:
            raise ValueError("this running mean keeps no variance; build it with with_deviation=True")
        return (self.squares / self._divisor).sqrt()

    @property
    def _divisor(self) -> Tensor:
        """The weight; any positive number before the first update, when all is 0."""
        return self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Move towards the mean and variance of ``values``, any shape. The variance is around the
        running mean, the first time around the mean of ``values``. Empty values do nothing, nor do
        values of which one is not finite: a loop of one's own may skip such a step.
        """
        if not values.numel():
            return
        values = values.detach().to(self.total)
        mean = values.mean()
        counts, share = mean.isfinite(), 1 - self.decay
        if self.with_deviation:
            # Before the first update there is no mean yet. Around 0 the variance would be that of far larger numbers.
            variance = (values - torch.where(self.weight > 0, self.mean, mean)).square().mean()
            self.squares = torch.where(counts, self.squares.lerp(variance, share), self.squares)
        self.total = torch.where(counts, self.total.lerp(mean, share), self.total)
        self.weight = torch.where(counts, self.weight.lerp(torch.ones_like(self.weight), share), self.weight)


@dataclass(frozen=True)
class Outcome:
    """The results of a training step.

    Attributes:
        losses: ``[batch, K]``, detached: the objective at the samples.
        rival: ``[batch, 1]``, detached: the objective at the vertex of :meth:`Baseline.rival`;
            ``[batch, 0]`` for none.
        kl: ``[batch]``, detached: the divergence of the latent distribution from its prior.
        kl_weight: the factor by which the caller multiplies ``kl``.
        context: ``[batch, features]``, features of the examples from the caller, or None.
    """

    losses: Tensor
    rival: Tensor
    kl: Tensor
    kl_weight: float
    context: Tensor | None


class Baseline(nn.Module, abc.ABC):
    """A number that is subtracted from the objective.

    A baseline must not depend on the sample for which it is subtracted; then every choice is
    unbiased. Its parameters and buffers are part of the estimator. New state is assigned, never
    written into the old tensors.
    """

    #: Oracles that the baseline needs.
    needs: tuple[str, ...] = ()

    #: The smallest number of samples an example.
    least_samples: int = 1

    #: Whether an example's baseline depends on the other examples of its batch.
    mixes_examples: bool = False

    #: Whether it evaluates one more vertex; see :meth:`rival`.
    has_rival: bool = False

    def rival(self, structure: Structure, scores: Tensor, mask: Tensor | None, sample: Callable[[], Tensor]) -> Tensor:
        """One more vertex an example, evaluated in the same call of the objective, if
        ``has_rival``.

        Args:
            structure: the set of vertices.
            scores: ``[batch, *parts]``, detached.
            mask: which parts exist.
            sample: draws a vertex an example, independent of the samples of the gradient.

        Returns:
            ``[batch, *vertex]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has a rival, but does not say which")

    @abc.abstractmethod
    def predict(self, outcome: Outcome) -> Tensor:
        """The baseline, which the estimator detaches: a scalar, or ``[batch or 1, K or 1]``."""

    def normalize(self, advantage: Tensor) -> Tensor:
        """Scale the objective minus the baseline, ``[batch, K]``; by default it stays the same."""
        return advantage

    def update(self, outcome: Outcome, prediction: Tensor) -> Tensor | None:
        """Learn from a step, after its gradient.

        Args:
            outcome: the results of the step.
            prediction: the result of :meth:`predict` for it.

        Returns:
            a loss ``[batch]`` to be added to the surrogate, with the gradient of the baseline's
            parameters; or None.
        """
        return None


class NoBaseline(Baseline):
    """The baseline is zero."""

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`."""
        return outcome.losses.new_zeros(())


class MovingAverage(Baseline):
    """Exponential moving average of the objective over past steps, corrected for its start (zero on
    the first step).

    Args:
        decay: the weight of the past.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.running = RunningMean(decay)

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`."""
        return self.running.mean

    def update(self, outcome: Outcome, prediction: Tensor) -> None:
        """See :class:`Baseline`."""
        self.running.update(outcome.losses)


class ElboAverage(MovingAverage):
    """Moving average of the whole loss ``objective + kl_weight kl``, minus the example's own
    ``kl_weight kl``.

    The signal is then the loss minus its average (Paulus et al. 2020, C.1).

    Args:
        decay: the weight of the past.
    """

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`."""
        return self.running.mean - outcome.kl_weight * outcome.kl[:, None]

    def update(self, outcome: Outcome, prediction: Tensor) -> None:
        """See :class:`Baseline`."""
        self.running.update(outcome.losses + outcome.kl_weight * outcome.kl[:, None])


class BatchMean(Baseline):
    """Mean objective of the *other* examples of the batch."""

    mixes_examples = True

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`.

        Raises:
            ValueError: for a single example.
        """
        batch = len(outcome.losses)
        if batch == 1:
            raise ValueError("baseline batch needs at least two examples in a batch")
        means = outcome.losses.mean(1, keepdim=True)
        return (means.sum() - means) / max(1, batch - 1)


class IndependentSample(Baseline):
    """Objective of one independent sample (SFE+ of Correia et al. 2020, section 5.1). It costs one
    more evaluation.
    """

    has_rival = True

    def rival(self, structure: Structure, scores: Tensor, mask: Tensor | None, sample: Callable[[], Tensor]) -> Tensor:
        """See :class:`Baseline`."""
        return sample()

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`."""
        return outcome.rival


class SelfCritical(IndependentSample):
    """Objective of ``argmax(scores)`` (Rennie et al. 2017). It costs one more evaluation."""

    needs = ("argmax",)

    def rival(self, structure: Structure, scores: Tensor, mask: Tensor | None, sample: Callable[[], Tensor]) -> Tensor:
        """See :class:`Baseline`."""
        return structure.argmax(scores, mask)


class LeaveOneOut(Baseline):
    """Mean objective of the other samples of the same example (Struminsky et al. 2021, equation 7)."""

    least_samples = 2

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`."""
        losses = outcome.losses
        return (losses.sum(1, keepdim=True) - losses) / (losses.shape[1] - 1)


class LearntBaseline(Baseline):
    """A network of the context plus a running mean of its errors (NVIL; Mnih & Gregor 2014).

    It is trained by squared error within the surrogate. The context is detached, so the baseline
    trains only itself.

    Args:
        context_size: number of features of the context.
        hidden_size: width of the network's one hidden layer (ReLU).
        decay: decay of the running mean and variance.
        normalize_variance: divide the learning signal by ``max(1, running standard deviation)``
            (Mnih & Gregor, 2.3.3).

    Raises:
        TypeError: if a size is not a whole number.
        ValueError: for a size below 1, or a decay outside [0, 1).
    """

    def __init__(
        self, context_size: int, hidden_size: int = 100, decay: float = 0.99, normalize_variance: bool = False
    ) -> None:
        super().__init__()
        check_count("context_size", context_size)
        check_count("hidden_size", hidden_size)
        self.running, self.normalize_variance = RunningMean(decay, normalize_variance), normalize_variance
        self.network = nn.Sequential(nn.Linear(context_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1))

    def predict(self, outcome: Outcome) -> Tensor:
        """See :class:`Baseline`.

        Raises:
            SizeMismatchError: without a context, or for one of another size.
        """
        if outcome.context is None:
            raise SizeMismatchError("baseline nvil needs the context; the task passes none")
        if outcome.context.shape[1] != self.network[0].in_features:
            raise SizeMismatchError(
                f"baseline nvil has context_size {self.network[0].in_features}; the context has "
                f"{outcome.context.shape[1]} features"
            )
        of_context: Tensor = self.network(outcome.context.detach().to(next(self.parameters()).dtype))
        return of_context.to(outcome.losses.dtype) + self.running.mean

    def normalize(self, advantage: Tensor) -> Tensor:
        """See :class:`Baseline`."""
        return advantage / self.running.deviation.clamp_min(1.0) if self.normalize_variance else advantage

    def update(self, outcome: Outcome, prediction: Tensor) -> Tensor:
        """See :class:`Baseline`."""
        error = outcome.losses - prediction
        self.running.update(error + self.running.mean)
        return error.square().mean(1)


def make_baseline(
    baseline: BaselineName | Baseline,
    decay: float = 0.99,
    context_size: int | None = None,
    hidden_size: int = 100,
    normalize_variance: bool = False,
) -> Baseline:
    """The baseline with this name; an object is returned as it is.

    Args:
        baseline: ``none``, ``ema`` (:class:`MovingAverage`), ``elbo`` (:class:`ElboAverage`),
            ``batch`` (:class:`BatchMean`), ``sample`` (:class:`IndependentSample`), ``greedy``
            (:class:`SelfCritical`), ``loo`` (:class:`LeaveOneOut`), ``nvil``
            (:class:`LearntBaseline`), or an object.
        decay: decay of ``ema``, ``elbo`` and ``nvil``. The others do not read it.
        context_size: for ``nvil`` only.
        hidden_size: for ``nvil``. The others do not read it.
        normalize_variance: for ``nvil`` only.

    Raises:
        TypeError: if a size is not a whole number.
        ValueError: for an unknown name, a ``context_size`` or ``normalize_variance`` of another
            baseline, or options out of range.
    """
    check_range("decay", decay, least=0, below=1)
    check_count("hidden_size", hidden_size)
    if (baseline == "nvil") != (context_size is not None):
        raise ValueError(
            f"baseline nvil needs context_size, and no other baseline takes it; got {baseline}, {context_size}"
        )
    if normalize_variance and baseline != "nvil":
        raise ValueError(f"normalize_variance works only with baseline nvil; got {baseline}")
    if isinstance(baseline, Baseline):
        return baseline
    check_choice("baseline", baseline, get_args(BaselineName))
    if context_size is not None:
        return LearntBaseline(context_size, hidden_size, decay, normalize_variance)
    if baseline in ("ema", "elbo"):
        return MovingAverage(decay) if baseline == "ema" else ElboAverage(decay)
    simple: dict[str, type[Baseline]] = {
        "none": NoBaseline,
        "batch": BatchMean,
        "sample": IndependentSample,
        "greedy": SelfCritical,
        "loo": LeaveOneOut,
    }
    return simple[baseline]()


__all__ = [
    "Baseline",
    "BaselineName",
    "BatchMean",
    "ElboAverage",
    "IndependentSample",
    "LearntBaseline",
    "LeaveOneOut",
    "MovingAverage",
    "NoBaseline",
    "Outcome",
    "RunningMean",
    "SelfCritical",
    "make_baseline",
]
