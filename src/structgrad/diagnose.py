"""Bias, variance and cost of gradient estimators, measured against enumeration on tiny problems.

``structgrad-diagnose`` is the command.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from structgrad.estimators.base import Estimator, PerturbAndMap, VertexDistribution
from structgrad.estimators.utilities import Gumbel, NegExponential, Utility, make_utility
from structgrad.structures import Structure

#: Distributions that can be enumerated; see :data:`structgrad.estimators.base.VertexDistribution`.
Distribution = Literal["gibbs", "trace"]

#: The number of features in the context of a problem.
FEATURES = 8
#: Half the step of the differences that replace the derivative of noise without a density.
_STEP = 0.05


class Decoder(nn.Module):
    """A small non-linear objective ``v^T tanh(W x + c_example)``, defined on hard and relaxed
    vertices, float64.

    Args:
        shape: shape of a vertex.
        batch: number of examples. Row r belongs to example ``r % batch``, so that a batch can be
            repeated.
        hidden: width.
    """

    def __init__(self, shape: torch.Size, batch: int, hidden: int = 5) -> None:
        super().__init__()
        size = shape.numel()
        self.first = nn.Parameter(2 * torch.randn(size, hidden, dtype=torch.float64) / size**0.5)
        self.last = nn.Parameter(torch.randn(hidden, dtype=torch.float64))
        self.context = nn.Parameter(torch.randn(batch, hidden, dtype=torch.float64))

    def forward(self, vertices: Tensor, rows: Tensor) -> Tensor:
        """The objective: ``[N]``."""
        inside = vertices.flatten(1).to(self.first) @ self.first + self.context[rows % len(self.context)]
        return torch.tanh(inside) @ self.last


@dataclass
class Problem:
    """A tiny problem whose expected objective can be summed exactly.

    Attributes:
        structure: the set of vertices.
        scores: ``[batch, *parts]``, float64, a leaf that requires a gradient.
        decoder: the objective.
        mask: bool ``[batch, *parts]``, which parts exist.
        context: ``[batch, features]``, for input-dependent baselines.
    """

    structure: Structure
    scores: Tensor
    decoder: Decoder
    mask: Tensor
    context: Tensor
    _vertices: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def make(
        structure: Structure,
        shape: tuple[int, ...],
        batch: int = 2,
        mask: Tensor | None = None,
        scale: float = 1.0,
        seed: int = 0,
        features: int = FEATURES,
    ) -> Problem:
        """Random scores, decoder and context.

        Args:
            structure: the set of vertices.
            shape: of the scores of one example.
            batch: number of examples.
            mask: bool, broadcastable to ``[batch, *shape]``.
            scale: standard deviation of the scores.
            seed: seed of all random numbers; the global generator keeps its state.
            features: number of features of the context.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scores = (scale * torch.randn(batch, *shape, dtype=torch.float64)).requires_grad_()
            full = torch.ones((), dtype=torch.bool) if mask is None else mask
            full = full.expand(scores.shape)
            vertex = structure.argmax(scores, full)
            decoder = Decoder(vertex.shape[1:], batch)
            return Problem(structure, scores, decoder, full, torch.randn(batch, features, dtype=torch.float64))

    def to(self, device: torch.device) -> Problem:
        """The same problem on another device, or itself."""
        if device == self.scores.device:
            return self
        scores = self.scores.detach().to(device).requires_grad_()
        decoder = copy.deepcopy(self.decoder).to(device)
        return Problem(self.structure, scores, decoder, self.mask.to(device), self.context.to(device))

    @property
    def variables(self) -> list[Tensor]:
        """Scores, then decoder parameters."""
        return [self.scores, *self.decoder.parameters()]

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient of a scalar for all variables, flat: ``[D]``."""
        gradients = torch.autograd.grad(value, self.variables, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients])

    @property
    def is_score(self) -> Tensor:
        """Which entries of a flat gradient belong to the scores: bool ``[D]``."""
        sizes = [v.numel() for v in self.variables]
        return torch.arange(sum(sizes)) < sizes[0]

    def vertices(self, example: int) -> Tensor:
        """Every vertex of an example under its mask, ``[V, *parts]``.

        These are the vertices that the structure lists and that use no missing part. If it lists
        none, or nodes are missing, the argmaxes of many random directions are added.

        Raises:
            ArithmeticError: if the structure's own ``log_partition`` says that some are missing.
        """
        if example not in self._vertices:
            self._vertices[example] = self._find_vertices(example)
        return self._vertices[example]

    def _find_vertices(self, example: int) -> Tensor:
        structure, mask = self.structure, self.mask[example]
        scores = self.scores[example].detach()
        found = []
        # Vertices of another shape than the scores do not show which parts they use, so a mask
        # cannot filter them.
        linear, whole = structure.is_linear, bool(mask.all())
        if "enumerate" in structure.oracles and (linear or whole):
            every = structure.enumerate(*scores.shape)
            exists = structure.layout.mirror(structure.parts(scores, mask).to(every)) > 0
            found.append(every[~((every > 0) & ~exists).flatten(1).any(1)])
        if not whole or not found:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found.append(structure.argmax(torch.randn(4000, *scores.shape, dtype=torch.float64), mask))
        vertices: Tensor = torch.cat(found).unique(dim=0)
        if linear and not whole:
            # If nodes are missing, a vertex of the full size is no vertex of the example.
            kept = structure.argmax(2 * vertices - 1, mask)
            vertices = vertices[(kept == vertices).flatten(1).all(1)]
        if "log_partition" in structure.oracles:
            missed = structure.log_partition(torch.zeros_like(scores), mask).exp().item() - len(vertices)
            if abs(missed) > 0.5:
                raise ArithmeticError(
                    f"{structure.name}: {len(vertices)} vertices were found, {missed:+.0f} are missing"
                )
        return vertices

    def probabilities(self, example: int, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """Vertices ``[V, *parts]`` and their probabilities ``[V]``, differentiable in the scores.

        For ``trace`` every trace counts with its own vertex, so a vertex may occur several times.
        Structures whose vertices are not linear in the scores have no Gibbs distribution; the
        trace's distribution replaces it.

        Raises:
            ArithmeticError: if the probabilities of the traces do not sum to one.
        """
        scores, mask = self.scores[example], self.mask[example]
        if distribution == "gibbs" and self.structure.is_linear:
            vertices = self.vertices(example)
            parts = self.structure.parts(scores, mask)
            values = (vertices * torch.where(parts, scores, 0.0)).flatten(1).sum(1)
            return vertices, values.softmax(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Costs whose sizes differ wildly reach every trace, however small the rates make it.
            draws = torch.randn(40_000, *scores.shape, dtype=torch.float64).mul_(3).exp_()
            trace = self.structure.trace(draws, mask)
        _, label = trace.choices.flatten(1).unique(dim=0, return_inverse=True)
        first = torch.full((int(label.max()) + 1,), len(label))
        first = first.scatter_reduce(0, label, torch.arange(len(label)), "amin")
        trace = type(trace)(trace.vertex[first], trace.choices[first])
        log_prob = self.structure.trace_log_prob(trace, scores.expand(len(first), *scores.shape), mask)
        probabilities = log_prob.exp()
        total = probabilities.sum().item()
        if abs(total - 1) > 1e-6:
            raise ArithmeticError(f"{self.structure.name}: the traces found have probability {total}, not 1")
        return trace.vertex.double(), probabilities

    def expected(self, distribution: Distribution) -> Tensor:
        """The expected objective summed over the examples, by enumeration: a differentiable scalar."""
        total = torch.zeros((), dtype=torch.float64)
        for example in range(len(self.scores)):
            vertices, probabilities = self.probabilities(example, distribution)
            rows = torch.full((len(vertices),), example)
            total = total + probabilities @ self.decoder(vertices, rows)
        return total

    def perturb_and_map(self, distribution: PerturbAndMap, samples: int, chunk: int = 2000) -> Tensor:
        """Gradients of the expected objective under perturb-and-MAP: ``[samples // chunk, D]``.

        Each row is a mean of ``chunk`` estimates. For the scores these are score-function estimates
        (the action is the utility), minus a constant known from a first batch. If the noise has no
        density, they are central differences at the same noise, with a bias of the order of the
        squared step.
        """
        utility, scale = distribution.utility, distribution.scale
        estimates, baseline = [], torch.zeros(len(self.scores), 1, dtype=torch.float64)
        for step in range(samples // chunk + 1):
            scores = torch.where(self.structure.parts(self.scores, self.mask), self.scores, 0.0)
            scores = scores[:, None].expand(-1, chunk, *scores.shape[1:])
            moves = self.structure.parts(scores, self.mask[:, None])
            if not distribution.everywhere:
                moves = moves & self.structure.noisy_parts(scores)
            fixed = scores.detach()
            utilities = torch.where(moves, scale * utility.sample(fixed / scale), fixed)
            losses = self._losses(utilities)
            if isinstance(utility, Utility):
                density = utility.log_prob(utilities / scale, scores / scale)
                log_prob = torch.where(moves, density, 0.0).flatten(2).sum(-1)
                value = ((losses.detach() - baseline) * log_prob + losses).mean(1).sum()
                baseline = losses.detach().mean(1, keepdim=True)
            else:
                slope = self._differences(utilities)
                value = losses.mean(1).sum() + (self.scores * slope).sum()
            if step > 0:
                estimates.append(self.gradient(value))
        return torch.stack(estimates)

    def _losses(self, utilities: Tensor) -> Tensor:
        """The objective at the argmax of ``[batch, N, *parts]``: ``[batch, N]``."""
        vertices = self.structure.argmax(utilities, self.mask[:, None].expand(utilities.shape))
        rows = torch.arange(len(utilities)).repeat_interleave(utilities.shape[1])
        losses: Tensor = self.decoder(vertices.flatten(0, 1), rows)
        return losses.reshape(utilities.shape[:2])

    @torch.no_grad()
    def _differences(self, utilities: Tensor) -> Tensor:
        """Central differences of the mean objective for a shift of every part's utility: ``[batch, *parts]``."""
        slope = torch.zeros_like(self.scores)
        for part in self.structure.parts(self.scores[0]).nonzero():
            shift = torch.zeros_like(self.scores[0])
            shift[tuple(part)] = _STEP
            there, back = (self._losses(utilities + sign * shift).mean(1) for sign in (1, -1))
            slope[(slice(None), *part)] = (there - back) / (2 * _STEP)
        return torch.where(self.structure.parts(self.scores, self.mask), slope, 0.0)

    def estimates(self, estimator: Estimator, count: int, repeats: int = 100) -> Iterator[Tensor]:
        """``count`` gradient estimates ``[D]``, each the mean over ``repeats`` copies of the batch in one call."""
        tile = [repeats] + [1] * (self.scores.dim() - 1)
        mask, context = self.mask.repeat(tile), self.context.repeat(repeats, 1)
        for _ in range(count):
            estimate = estimator(self.scores.repeat(tile), self.decoder, mask=mask, context=context)
            yield self.gradient(estimate.surrogate.sum() / repeats)


# --- what an estimator is measured against --------------------------------------------------------------------------


def target(estimator: Estimator) -> VertexDistribution:
    """The distribution over hard vertices whose expected objective the estimator's gradient
    targets.

    It is the estimator's own (:attr:`Estimator.vertex_distribution`). If perturb-and-MAP is the
    Gibbs distribution or that of the trace, the enumerated one is returned.
    """
    structure, distribution = estimator.structure, estimator.vertex_distribution
    if not isinstance(distribution, PerturbAndMap) or distribution.scale != 1 or distribution.everywhere:
        return distribution
    utility = distribution.utility
    if structure.noise is not None and type(make_utility(structure.noise)) is type(utility):
        return "gibbs"
    if not {"trace", "trace_log_prob"} <= structure.oracles:
        return distribution
    # Gumbel utilities have the order of negative exponential ones.
    if isinstance(utility, Gumbel) and structure.is_ordinal:
        return "trace"
    costs = isinstance(utility, NegExponential) and utility.rate == "exp"
    return "trace" if costs and structure.trace_is_argmax else distribution


@dataclass
class Quality:
    """Bias and variance of the gradients for one group of variables, relative to the true
    gradient's norm.

    Attributes:
        bias: norm of the difference between the mean estimate and the truth.
        error: standard error of that norm; a measured bias of this size may be zero.
        variance: total variance of one estimate (one call for one batch), divided by the squared
            norm.
    """

    bias: float
    error: float
    variance: float


@dataclass
class Diagnosis:
    """The result of :func:`diagnose`.

    Attributes:
        truth: the distribution against which the estimator was measured.
        scores: quality of the gradient for the scores.
        decoder: quality of the gradient for the decoder's parameters.
        decoder_calls: number of evaluated vertices an example.
        milliseconds: time of forward and backward passes of one example, within a large batch.
    """

    truth: str
    scores: Quality
    decoder: Quality
    decoder_calls: float
    milliseconds: float


def diagnose(
    estimator: Estimator,
    problem: Problem,
    samples: int = 2000,
    truth: VertexDistribution | None = None,
    reference_samples: int = 200_000,
) -> Diagnosis:
    """Measure an estimator.

    Args:
        estimator: an estimator over the problem's structure, for float64 scores. A baseline that
            reads the context must fit the problem's context.
        problem: the problem on which it is measured.
        samples: number of gradient estimates.
        truth: the distribution of the expected objective; by default the estimator's own, see
            :func:`target`.
        reference_samples: number of samples for a truth without a closed form.
    """
    truth = target(estimator) if truth is None else truth
    if isinstance(truth, PerturbAndMap):
        reference = problem.perturb_and_map(truth, reference_samples)
        exact, doubt = reference.mean(0), reference.var(0) / len(reference)
        scale = "" if truth.scale == 1 else f" times {truth.scale:g}"
        name = f"perturb-and-MAP, {type(truth.utility).__name__}{scale}, {reference_samples} samples"
    else:
        exact = problem.gradient(problem.expected(truth))
        doubt = torch.zeros_like(exact)
        name = f"{truth}, enumerated"
    # A baseline that averages over other examples would see copies of a batch as such examples.
    count = samples if estimator.mixes_examples else min(50, max(2, samples // 10))
    repeats = max(1, samples // count)
    estimate = estimator(problem.scores, problem.decoder, mask=problem.mask, context=problem.context)
    problem.gradient(estimate.surrogate.sum())  # compile what is compiled on first use
    start = time.perf_counter()
    draws = torch.stack(list(problem.estimates(estimator, count, repeats)))
    seconds = time.perf_counter() - start
    off, variance = draws.mean(0) - exact, draws.var(0)

    def quality(which: Tensor) -> Quality:
        norm = exact[which].norm().clamp_min(1e-300)
        error = (variance / count + doubt)[which].sum().sqrt()
        spread = repeats * variance[which].sum() / norm.square()
        return Quality((off[which].norm() / norm).item(), (error / norm).item(), spread.item())

    return Diagnosis(
        truth=name,
        scores=quality(problem.is_score),
        decoder=quality(~problem.is_score),
        decoder_calls=estimate.metrics["decoder_calls"].item(),
        milliseconds=1e3 * seconds / (count * repeats * len(problem.scores)),
    )
