"""Bias, variance and cost of gradient estimators, measured against enumeration on tiny problems.

``structgrad-diagnose`` is the command.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from structgrad.estimators.base import Estimator
from structgrad.estimators.utilities import Gumbel, NegExponential, Utility, make_utility
from structgrad.structures import Arborescence, KSubset, OneHot, SpanningTree, Structure
from structgrad.structures.family_item_recursions import ItemRecursion

#: Gibbs: ``p(x) ~ exp <x, s>``; trace: the vertex of ``structure.trace`` on ``E ~ Exp(exp(s))``.
Distribution = Literal["gibbs", "trace"]


class Decoder(nn.Module):
    """A small non-linear objective ``v^T tanh(W x + c_example)``, defined on hard and relaxed vertices, float64.

    Args:
        shape: of a vertex.
        batch: number of examples; row r belongs to example ``r % batch``, so that a batch can be repeated.
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
    """A tiny problem whose expected objective can be summed.

    Attributes:
        structure: the set of vertices.
        scores: ``[batch, *parts]``, float64, a leaf that requires its gradient.
        decoder: the objective.
        mask: bool ``[batch, *parts]``, which parts exist.
    """

    structure: Structure
    scores: Tensor
    decoder: Decoder
    mask: Tensor

    @staticmethod
    def make(
        structure: Structure,
        shape: tuple[int, ...],
        batch: int = 2,
        mask: Tensor | None = None,
        scale: float = 1.0,
        seed: int = 0,
    ) -> Problem:
        """Random scores and decoder.

        Args:
            structure: the set of vertices.
            shape: of the scores of one example.
            batch: number of examples.
            mask: bool, broadcastable to ``[batch, *shape]``.
            scale: standard deviation of the scores.
            seed: of scores and decoder; the global generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scores = (scale * torch.randn(batch, *shape, dtype=torch.float64)).requires_grad_()
            full = torch.ones((), dtype=torch.bool) if mask is None else mask
            full = full.expand(scores.shape)
            vertex = structure.argmax(scores, full)
            return Problem(structure, scores, Decoder(vertex.shape[1:], batch), full)

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

    def vertices(self, example: int, draws: int = 4000) -> Tensor:
        """Every vertex of an example under its mask, ``[V, *parts]``: the argmaxes of many random directions."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            directions = torch.randn(draws, *self.scores.shape[1:], dtype=torch.float64)
            vertices: Tensor = self.structure.argmax(directions, self.mask[example]).unique(dim=0)
            return vertices

    def probabilities(self, example: int, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """Vertices ``[V, *parts]`` and their probabilities ``[V]``, differentiable in the scores.

        For ``trace`` every trace is counted with its own vertex, so that a vertex may occur several times. Structures
        whose vertices are not linear in the scores have no Gibbs distribution: theirs is that of the trace.

        Raises:
            ArithmeticError: if the probabilities of the traces do not sum to one.
        """
        scores, mask = self.scores[example], self.mask[example]
        if distribution == "gibbs" and self.structure.vertex_layout is self.structure.layout:
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

    def perturbed(self, utility: Utility, samples: int, chunk: int = 2000) -> Tensor:
        """Gradients of the expected objective at the argmax of random utilities: ``[samples // chunk, D]``.

        Each row is a mean of ``chunk`` unbiased score-function estimates (the action is the utility), less a constant
        known from a first batch. For noise without closed form.
        """
        estimates, baseline = [], torch.zeros(len(self.scores), 1, dtype=torch.float64)
        for step in range(samples // chunk + 1):
            scores = torch.where(self.structure.parts(self.scores, self.mask), self.scores, 0.0)
            scores = scores[:, None].expand(-1, chunk, *scores.shape[1:])
            mask = self.mask[:, None]
            moves = self.structure.perturbed(scores) & self.structure.parts(scores, mask)
            utilities = torch.where(moves, utility.sample(scores.detach()), scores.detach())
            vertices = self.structure.argmax(utilities, mask)
            rows = torch.arange(len(scores)).repeat_interleave(chunk)
            losses = self.decoder(vertices.flatten(0, 1), rows).reshape(len(scores), chunk)
            log_prob = torch.where(moves, utility.log_prob(utilities, scores), 0.0).flatten(2).sum(-1)
            if step > 0:
                estimates.append(self.gradient(((losses.detach() - baseline) * log_prob + losses).mean(1).sum()))
            baseline = losses.detach().mean(1, keepdim=True)
        return torch.stack(estimates)

    def estimates(self, estimator: Estimator, count: int, repeats: int = 100) -> Iterator[Tensor]:
        """``count`` gradient estimates ``[D]``, each the mean over ``repeats`` copies of the batch in one call."""
        tile = [repeats] + [1] * (self.scores.dim() - 1)
        mask = self.mask.repeat(tile)
        for _ in range(count):
            estimate = estimator(self.scores.repeat(tile), self.decoder, mask=mask)
            yield self.gradient(estimate.surrogate.sum() / repeats)


# --- what an estimator is measured against --------------------------------------------------------------------------


def target(estimator: Estimator) -> Distribution | Utility:
    """The distribution of hard vertices whose expected objective the estimator is about.

    That of its own noise, if it has any: enumerated where perturb-and-MAP is the Gibbs distribution or that of the
    trace, and else the utility, for :meth:`Problem.perturbed`. Estimators without noise are about the Gibbs
    distribution.
    """
    structure, utility = estimator.structure, getattr(estimator, "utility", None)
    if not isinstance(utility, Utility):
        noisy = getattr(estimator, "action", "T" if hasattr(estimator, "critic") else "X") in ("T", "E")
        return "trace" if noisy and "trace" in structure.oracles else "gibbs"
    if structure.noise is not None and type(make_utility(structure.noise)) is type(utility):
        return "gibbs"
    # Of these the vertex depends on the order of the utilities alone, which Gumbel shares with exponential noise.
    ordered = isinstance(structure, OneHot | KSubset | SpanningTree | ItemRecursion)
    if isinstance(utility, Gumbel) and ordered:
        return "trace"
    costs = isinstance(utility, NegExponential) and utility.rate == "exp"
    return "trace" if costs and (ordered or isinstance(structure, Arborescence)) else utility


@dataclass
class Quality:
    """Bias and variance of the gradients for one group of variables, relative to the true gradient's norm.

    Attributes:
        bias: norm of the difference between the mean estimate and the truth.
        error: standard error of that norm: a bias of this size is no bias.
        variance: total variance of one estimate (one call for one batch), over the squared norm.
    """

    bias: float
    error: float
    variance: float


@dataclass
class Diagnosis:
    """What :func:`diagnose` measures.

    Attributes:
        truth: what the estimator was measured against.
        scores: quality of the gradient for the scores.
        decoder: quality of the gradient for the decoder's parameters.
        decoder_calls: evaluated vertices an example.
        milliseconds: forward and backward of one example, within a large batch.
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
    truth: Distribution | Utility | None = None,
    reference_samples: int = 200_000,
) -> Diagnosis:
    """Measure an estimator.

    Args:
        estimator: over the problem's structure, for float64 scores.
        problem: what it is measured on.
        samples: gradient estimates.
        truth: which expected objective it is measured against; by default its own, see :func:`target`.
        reference_samples: for a truth that has no closed form.
    """
    truth = target(estimator) if truth is None else truth
    if isinstance(truth, Utility):
        reference = problem.perturbed(truth, reference_samples)
        exact, doubt = reference.mean(0), reference.var(0) / len(reference)
        name = f"perturb-and-MAP, {type(truth).__name__}, {reference_samples} samples"
    else:
        exact = problem.gradient(problem.expected(truth))
        doubt = torch.zeros_like(exact)
        name = f"{truth}, enumerated"
    count = min(50, max(2, samples // 10))
    repeats = max(1, samples // count)
    estimate = estimator(problem.scores, problem.decoder, mask=problem.mask)
    problem.gradient(estimate.surrogate.sum())  # compiles what is compiled on first use
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
