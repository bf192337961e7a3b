"""The contract of every gradient estimator."""

from __future__ import annotations

import abc
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from structgrad.algorithms.autocast import under_autocast_of, without_autocast
from structgrad.algorithms.eager import values_can_be_read
from structgrad.common.ranges import check_positive
from structgrad.common.text import Configured, options
from structgrad.estimators.utilities import SumOfGamma, Utility
from structgrad.structures.base import Structure, UnsupportedError

#: ``(vertices [N, *parts], rows int64 [N]) -> losses [N]``: the downstream loss of N vertices; row r belongs to
#: example r.
Objective = Callable[[Tensor, Tensor], Tensor]

#: The variables of a divergence: the random utilities of the parts, or the vertices.
Over = Literal["parts", "vertex"]


class SizeMismatchError(ValueError):
    """An estimator was built for another size of context or parts than the task has.

    Only the first batch shows it, as a structure does not know the sizes of its parts.
    """


@dataclass(frozen=True)
class Divergence:
    """The KL divergence of a latent distribution from its prior.

    Some estimators have none, which is never 0. Without noise the vertex is a point mass,
    ``log |X|`` nats from the uniform distribution. Sums of gammas have no density. The argmax that
    evaluates structured attention is no sample of the Gibbs distribution that trained it. Matchings
    that are not listed cannot be counted. A task may take the point mass instead
    (``Task.latent_kl``).

    Attributes:
        value: ``[batch]``, in nats, differentiable in the scores; every part counted once.
        over: ``parts`` is a sum over parts: each term is the divergence of one independent utility
            from a utility of score 0. It is an upper bound on the divergence of the vertices that
            the utilities decide. ``vertex`` is the divergence of the distribution of the evaluated
            vertices from the uniform one over the set: ``log |X| - H``. With ``prior_scores`` (see
            :meth:`Estimator.forward`) the prior has these scores instead of 0. It is their Gibbs
            distribution, or the distribution of utilities with these scores.
    """

    value: Tensor
    over: Over


@dataclass(frozen=True)
class PerturbAndMap:
    """The distribution of ``argmax_x <x, scores + scale * noise>``.

    Attributes:
        utility: the noise; any object with ``sample(scores)``.
        scale: the scale of the noise.
        everywhere: whether all parts are perturbed, rather than only those of
            ``structure.noisy_parts``.
    """

    utility: Utility | SumOfGamma
    scale: float = 1.0
    everywhere: bool = False


#: The distribution of hard vertices. It is the Gibbs distribution ``p(x) ~ exp <x, s>``, that of
#: the vertex of the trace of ``E ~ Exp(exp(s))``, or that of the argmax of random utilities.
VertexDistribution = Literal["gibbs", "trace"] | PerturbAndMap


@dataclass
class Estimate:
    """The result of an estimator for a batch.

    Attributes:
        surrogate: ``[batch]``. Its gradient estimates that of the expected objective, for encoder
            and decoder. Its value means nothing: minimise ``(surrogate + kl).mean()``, monitor
            :attr:`objective`, and return :attr:`loss` to an outer estimator.
        objective: ``[batch]``, detached: the (weighted) mean of the objective over the evaluated
            vertices.
        divergence: the divergence of the latent distribution from its prior, or None if it is not
            defined (see :attr:`Estimator.kl_over`). :attr:`kl` is its value.
        vertices: ``[N, *parts]``: the vertices at which the objective was evaluated. They are hard
            unless the estimator relaxes while training. ``vertices.requires_grad`` is False exactly
            when no gradient flows through them; then they are hard. Ask before you index them, as
            an indexed tensor has lost it where torch records no gradients.
        rows: int64 ``[N]``: the example of each vertex.
        weights: ``[N]``, detached: they sum to one within an example. For
            :class:`~structgrad.estimators.SumAndSample` their sum has the mean one.
        metrics: scalars worth logging, detached. ``decoder_calls`` (evaluated vertices per example)
            is always among them.
        exact: whether ``vertices`` and ``weights`` are the whole latent distribution rather than
            samples of it.
    """

    surrogate: Tensor
    objective: Tensor
    divergence: Divergence | None
    vertices: Tensor
    rows: Tensor
    weights: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = False
    _loss_was_taken: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Count the decoder calls."""
        calls = self.rows.numel() / max(1, self.surrogate.shape[0])
        self.metrics.setdefault("decoder_calls", torch.full((), calls, device=self.surrogate.device))

    @property
    def kl(self) -> Tensor:
        """KL divergence from the prior: ``[batch]``; see :class:`Divergence`.

        Raises:
            UnsupportedError: if the estimate has no KL divergence.
        """
        if self.divergence is None:
            raise UnsupportedError(
                "this estimate has no KL divergence: its estimator names no distribution of the latent variable "
                "(the vertex of an estimator without noise is a point mass, log |X| nats from the uniform distribution)"
            )
        return self.divergence.value

    @property
    def loss(self) -> Tensor:
        """The objective, with the gradient of the surrogate: ``[batch]``.

        An *outer* objective with a latent variable inside must return this. Its estimator reads the
        value, and the surrogate's value means nothing. See ``docs/estimators/nested.md``.
        """
        self._loss_was_taken = True
        return self.objective + (self.surrogate - self.surrogate.detach())

    def most_probable(self) -> Tensor:
        """The vertex with the largest weight in its example, among ties the first: its index, int64
        ``[batch]``.
        """
        order = self.weights.argsort(descending=True, stable=True)
        order = order[self.rows[order].argsort(stable=True)]
        examples = torch.arange(self.surrogate.shape[0], device=order.device)
        return order[torch.searchsorted(self.rows[order], examples)]

    def most_probable_vertices(self) -> Tensor:
        """The vertices of :meth:`most_probable`, ``[batch, *parts]``. They require a gradient if
        :attr:`vertices` do, also where torch records none.
        """
        chosen = self.vertices[self.most_probable()]
        return chosen.requires_grad_() if self.vertices.requires_grad else chosen

    def mean(self, values: Tensor) -> Tensor:
        """Average the ``values`` ``[N, ...]`` of the evaluated vertices over each example:
        ``[batch, ...]``.
        """
        weighted = values * self.weights.reshape(-1, *[1] * (values.dim() - 1))
        out = weighted.new_zeros(self.surrogate.shape[0], *values.shape[1:])
        return out.index_add(0, self.rows, weighted)


class Estimator(Configured, nn.Module, abc.ABC):
    """Turns scores and an objective into a surrogate whose gradient estimates that of the expected
    objective.

    Buffers and parameters hold the estimator's state (running baselines, critics, schedules). So it
    is saved, moved and resumed with the model. New state is assigned and never written into the old
    tensor, because the backward pass of a compiled step may still read that. In ``train()`` mode
    :meth:`forward` estimates gradients; in ``eval()`` mode it evaluates hard vertices.

    Args:
        structure: the set of vertices.

    Raises:
        UnsupportedError: at construction, if the structure lacks an oracle that the estimator
            needs.
        TypeError: at construction, for a name or a class in the place of a structure.
    """

    #: Whether the objective must be differentiable in the vertex and defined on relaxed ones.
    needs_differentiable_objective: ClassVar[bool] = False

    #: The variables of :attr:`Estimate.kl` in training; None if there is no KL. In evaluation it is
    #: the same, or there is no KL because the evaluated vertices have no such distribution (a
    #: relaxation evaluated at its argmax).
    kl_over: Over | None

    #: The distribution over hard vertices whose expected objective the gradient targets. Estimators without noise are
    #: compared with the Gibbs distribution.
    vertex_distribution: VertexDistribution = "gibbs"

    #: Whether the estimate of an example depends on the other examples of its batch (baselines that
    #: average over them).
    mixes_examples: bool = False

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        if not isinstance(structure, Structure):
            raise TypeError(f"structure must be an object, e.g. KSubset(2); got {structure!r}")
        self.structure = structure
        self._reaches_vertices = False

    def extra_repr(self) -> str:
        """The structure and the options, for ``repr``."""
        return ", ".join(part for part in (repr(self.structure), options(self, ["structure"])) if part)

    def forward(
        self,
        scores: Tensor,
        objective: Objective,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        kl_weight: float = 1.0,
        prior_scores: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Estimate:
        """Estimate the gradient of the expected objective.

        Args:
            scores: ``[batch, *parts]``. Half precision is widened to float32, which is then the
                type of the vertices.
            objective: ``(vertices [N, *parts], rows [N]) -> losses [N]``. It is called once a step
                with all vertices that must be evaluated. Losses in half precision, whole numbers
                and truth values become numbers of the vertices' type.
            mask: which parts exist, broadcastable to the scores.
            context: ``[batch, features]`` for input-dependent baselines; others ignore it.
            kl_weight: the factor by which the caller multiplies :attr:`Estimate.kl` when it adds it
                to the surrogate. Baselines that follow the whole loss need it; others ignore it.
            prior_scores: scores of the prior, ``[*parts]`` or ``[batch, *parts]``. The KL
                divergence is from this prior, and the scores learn through it. None is the uniform
                prior, with scores 0.
            lengths: in the place of a mask, int64 ``[batch]``; see :meth:`Structure.length_mask`.

        Returns:
            the :class:`Estimate`.

        Raises:
            UnsupportedError: for prior scores if the estimator has no KL divergence (see
                :attr:`kl_over`).
            ValueError: unless scores have exactly one batch dimension, the context has the documented
                shape, and the objective returns one number a vertex. For estimators that differentiate
                the objective, it must also depend on the vertices differentiably.
            TypeError: for an objective that returns no tensor, or complex losses.
            TypeError, ValueError: for inputs that the structure refuses; see
                :meth:`Structure.check`.
        """
        layout = self.structure.layout
        if scores.dim() != layout.ndim + 1:
            parts = ", ".join(("batch", *layout.dimensions))
            raise ValueError(
                f"estimators over {self.structure.name} take scores [{parts}], with exactly one batch "
                f"dimension; got {list(scores.shape)}"
            )
        if context is not None and (context.dim() != 2 or len(context) != len(scores)):
            raise ValueError(
                f"context has shape [batch, features], and the batch {len(scores)}; got {list(context.shape)}"
            )
        if scores.dtype in (torch.float16, torch.bfloat16):  # mixed precision
            scores = scores.float()
        mask = self.structure.mask_from(mask, lengths, scores)
        self.structure.check(scores, mask)
        if prior_scores is not None:
            prior_scores = self._prior(prior_scores, scores, mask)
        objective = self._checked(under_autocast_of(scores, objective))
        estimate = without_autocast(self.estimate)(scores, objective, mask, context, kl_weight, prior_scores)
        if not torch.compiler.is_compiling() and (inner := getattr(_NESTED, "estimates", None)) is not None:
            inner.append(estimate)
        return estimate

    @abc.abstractmethod
    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        """The method that an estimator implements: :meth:`forward` after its checks. Prior scores
        have the shape and the dtype of the scores.
        """

    def _prior(self, prior_scores: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Prior scores in the shape and the dtype of the scores, checked."""
        if self.kl_over is None:
            raise UnsupportedError(
                f"{type(self).__name__} has no KL divergence from a prior, so that prior_scores would change nothing"
            )
        if not prior_scores.is_floating_point():
            raise TypeError(f"prior_scores must be floating point; got {prior_scores.dtype}")
        try:
            prior_scores = prior_scores.to(scores.dtype).expand(scores.shape)
        except RuntimeError:
            raise ValueError(
                f"prior_scores {list(prior_scores.shape)} do not broadcast to the scores {list(scores.shape)}"
            ) from None
        self.structure.check(prior_scores, mask)
        return prior_scores

    def _checked(self, objective: Objective) -> Objective:
        """The objective, with checks of its losses."""

        def checked(vertices: Tensor, rows: Tensor) -> Tensor:
            losses = objective(vertices, rows) if torch.compiler.is_compiling() else _nested(objective, vertices, rows)
            if not isinstance(losses, Tensor):
                raise TypeError(f"the objective must return a tensor of losses; got {type(losses).__name__}")
            if losses.shape != rows.shape:
                raise ValueError(
                    f"the objective must return one number a vertex, {list(rows.shape)}; got {list(losses.shape)}"
                )
            if losses.is_complex():
                raise TypeError(f"losses must be real; the objective returned {losses.dtype}")
            if losses.dtype not in (torch.float32, torch.float64):
                # Sums and differences of losses would round: a baseline would know the loss from which it is taken.
                losses = losses.to(vertices.dtype)
            if self.training and self.needs_differentiable_objective and vertices.requires_grad:
                # The path back is searched once; whether there is a gradient at all costs nothing.
                if not (losses.requires_grad and (self._reaches_vertices or _depends(losses, vertices))):
                    raise ValueError(
                        f"{type(self).__name__} differentiates the objective, whose losses do not depend on the "
                        "vertices differentiably; a score-function estimator does not need that"
                    )
                self._reaches_vertices = True
            return losses

        return checked


def require_gradients(by: str) -> None:
    """For training steps that ask for gradients themselves.

    Raises:
        RuntimeError: within ``torch.inference_mode``, where there are none.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"a training step of {by} asks for gradients, which torch.inference_mode() forbids; call .eval() before"
        )


#: ``estimates``: the estimates made while the objective of an outer estimator is called.
_NESTED = threading.local()


def _nested(objective: Objective, vertices: Tensor, rows: Tensor) -> Tensor:
    """Call an objective, and warn if it passes on the surrogate of an inner estimate as if that
    were a loss.
    """
    outer = getattr(_NESTED, "estimates", None)
    inner: list[Estimate] = []
    _NESTED.estimates = inner
    try:
        losses = objective(vertices, rows)
    finally:
        _NESTED.estimates = outer
    for estimate in inner:
        surrogate = estimate.surrogate
        if estimate._loss_was_taken or not (surrogate.requires_grad and values_can_be_read(surrogate)):
            continue
        if not torch.allclose(surrogate.detach(), estimate.objective) and _depends(losses, surrogate):
            warnings.warn(
                "an objective returns Estimate.surrogate of an inner latent variable. The surrogate's value means "
                "nothing, so the outer gradient is wrong; return Estimate.loss",
                stacklevel=4,
            )
    return losses


def _depends(losses: Tensor, vertices: Tensor) -> bool:
    """Whether the graph of ``losses`` leads to ``vertices``."""
    if torch.compiler.is_compiling():
        return True
    goal = torch.autograd.graph.get_gradient_edge(vertices).node
    waiting, seen = [losses.grad_fn], {losses.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is goal:
            return True
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


class GibbsEstimator(Estimator):
    """An estimator of the expected objective under the Gibbs distribution.

    ``kl`` is the divergence of the Gibbs distribution from the uniform one, over the vertex. In
    evaluation there is one sample an example. A subclass defines the training step.
    """

    kl_over: Over | None = "vertex"

    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        """See :class:`Estimator`."""
        divergence = gibbs_divergence(self.structure, scores, mask, prior_scores)
        if not self.training:
            return pathwise(objective, self.structure.sample(scores.detach(), mask), 1, divergence)
        return self.train_step(scores, objective, mask, divergence)

    @abc.abstractmethod
    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """:meth:`estimate` in training.

        Args:
            scores: see :meth:`Estimator.forward`.
            objective: see there.
            mask: see there.
            divergence: the divergence for the estimate.
        """


def replicate(scores: Tensor, mask: Tensor | None, samples: int) -> tuple[Tensor, Tensor | None]:
    """Copies of scores and mask for several samples: views ``[batch, samples, *parts]``.

    Args:
        scores: ``[batch, *parts]``.
        mask: broadcastable to the scores, or None, which stays None.
        samples: the number of samples an example.
    """
    shape = (scores.shape[0], samples, *scores.shape[1:])
    masks = None if mask is None else mask.expand(scores.shape)[:, None].expand(shape)
    return scores[:, None].expand(shape), masks


def flat_replicas(scores: Tensor, mask: Tensor | None, samples: int) -> tuple[Tensor, Tensor | None]:
    """The same in one dimension, the samples of one example side by side: ``[batch * samples, *parts]``."""
    each, masks = replicate(scores, mask, samples)
    return each.flatten(0, 1), None if masks is None else masks.flatten(0, 1)


def example_rows(batch: int, vertices: int, device: torch.device) -> Tensor:
    """The example of each vertex if every example has ``vertices`` of them in a row: int64
    ``[batch * vertices]``.
    """
    return torch.arange(batch, device=device).repeat_interleave(vertices)


def evaluate(objective: Objective, vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call the objective once for all vertices of all examples.

    Args:
        objective: the downstream loss.
        vertices: ``[batch, M, *vertex]``.

    Returns:
        the losses ``[batch, M]``, and vertices ``[batch * M, *vertex]`` and rows ``[batch * M]``
        for an :class:`Estimate`.
    """
    batch, count = vertices.shape[:2]
    rows = example_rows(batch, count, vertices.device)
    flat = vertices.flatten(0, 1)
    return objective(flat, rows).reshape(batch, count), flat, rows


def with_gradient(variable: Tensor, gradient: Tensor) -> Tensor:
    """One number for each example, of value zero, whose gradient in ``variable`` is ``gradient``:
    ``[batch]``.

    Args:
        variable: ``[batch, ...]``, finite.
        gradient: a constant of the same shape.
    """
    return ((variable - variable.detach()) * gradient.detach()).flatten(1).sum(1)


def with_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor | Literal[0]:
    """The same for parameters that all examples share: a scalar, 0 without parameters. Added to every
    example, it counts once in their mean.
    """
    return sum(((p - p.detach()) * g.detach()).sum() for p, g in zip(parameters, gradients, strict=True))


def check_temperature(temperature: object) -> None:
    """Refuse an invalid temperature. It is a number, a tensor ``[]`` (e.g. a parameter), or one
    number an example, ``[batch]``.

    Raises:
        TypeError: if it is not a number.
        ValueError: unless it is positive and finite (for values of tensors, where reading them is
            free), or for another shape.
    """
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return
    if temperature.dim() > 1:
        raise ValueError(f"temperature is one number, or one an example, [batch]; got {list(temperature.shape)}")
    if values_can_be_read(temperature) and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError(f"temperature must be positive and finite; got {temperature.tolist()}")


def temperature_of(temperature: float | Tensor, scores: Tensor) -> float | Tensor:
    """A temperature in a form that divides utilities of these scores: a number, or
    ``[batch, 1, ...]``.

    Args:
        temperature: see :func:`check_temperature`.
        scores: ``[batch, *parts]``.

    Raises:
        ValueError: see there; or for another number of examples.
    """
    if not isinstance(temperature, Tensor):
        return temperature
    check_temperature(temperature)
    if temperature.dim() and len(temperature) != len(scores):
        raise ValueError(f"temperature has {len(temperature)} numbers, one an example; the batch has {len(scores)}")
    return per_example(temperature.to(scores), scores) if temperature.dim() else temperature.to(scores)


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """``[batch, ...]`` with trailing dimensions of size 1, so that it broadcasts against ``like``."""
    return values.reshape(*values.shape, *[1] * (like.dim() - values.dim()))


def pathwise(
    objective: Objective,
    vertices: Tensor,
    samples: int,
    divergence: Divergence | None,
    metrics: dict[str, Tensor] | None = None,
) -> Estimate:
    """The estimate whose surrogate is the mean objective itself: all gradients flow through the
    vertices.

    Args:
        objective: the downstream loss.
        vertices: ``[batch * samples, *parts]``, the samples of one example side by side.
        samples: the number of samples an example.
        divergence: see :class:`Estimate`.
        metrics: see there.
    """
    rows = example_rows(vertices.shape[0] // samples, samples, vertices.device)
    losses = objective(vertices, rows).reshape(-1, samples).mean(1)
    weights = vertices.new_full(rows.shape, 1 / samples)
    return Estimate(losses, losses.detach(), divergence, vertices, rows, weights, metrics or {})


def log_size(structure: Structure, scores: Tensor, mask: Tensor | None) -> Tensor:
    """``log |X|``, without gradient: ``[*batch]``.

    It is the divergence of a point mass from the uniform distribution, the largest of all.
    """
    with torch.no_grad():
        if mask is not None:
            return structure.log_partition(torch.zeros_like(scores), mask)
        batch, parts = scores.shape[: -structure.layout.ndim], scores.shape[-structure.layout.ndim :]
        return structure.log_partition(scores.new_zeros(parts)).expand(batch)  # of all examples


def gibbs_divergence(
    structure: Structure, scores: Tensor, mask: Tensor | None, prior_scores: Tensor | None = None
) -> Divergence:
    """The divergence of the Gibbs distribution from that of the prior scores, over the same
    vertices. Without prior scores it is from the uniform one, ``log |X| - H``.
    """
    if prior_scores is not None:
        return Divergence(structure.kl(scores, prior_scores, mask), "vertex")
    return Divergence(log_size(structure, scores, mask) - structure.entropy(scores, mask), "vertex")


def utility_divergence(
    structure: Structure, utility: Utility, scores: Tensor, noisy: Tensor, prior_scores: Tensor | None = None
) -> Divergence:
    """The divergence of the utilities of the parts ``noisy`` (bool ``[*batch, *parts]``, each once)
    from those of the prior scores. Without prior scores it is from score 0.
    """
    known = torch.where(noisy, scores, 0.0)
    each = utility.kl(known) if prior_scores is None else utility.kl_from(known, torch.where(noisy, prior_scores, 0.0))
    each = torch.where(noisy, each, 0.0)
    return Divergence(each.flatten(-structure.layout.ndim).sum(-1), "parts")


__all__ = [
    "Divergence",
    "Estimate",
    "Estimator",
    "GibbsEstimator",
    "Objective",
    "Over",
    "PerturbAndMap",
    "UnsupportedError",
    "VertexDistribution",
    "check_temperature",
    "evaluate",
    "example_rows",
    "flat_replicas",
    "gibbs_divergence",
    "log_size",
    "pathwise",
    "per_example",
    "replicate",
    "temperature_of",
    "utility_divergence",
    "with_gradient",
    "with_gradients",
]
