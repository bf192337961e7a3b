"""Marginalisation: exact sums over a dense or sparse distribution, and sums completed by one sample."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from structgrad.algorithms.capped_simplex import project_capped_simplex
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.products import product
from structgrad.common.ranges import check_choice, check_count
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    GibbsEstimator,
    Objective,
    evaluate,
    example_rows,
    log_size,
    per_example,
    replicate,
)
from structgrad.estimators.baselines import RunningMean
from structgrad.structures.base import SparseDistribution, Structure
from structgrad.structures.derived import sparsemap as active_set

Distribution = Literal["softmax", "sparsemax", "topk_sparsemax", "sparsemap"]
Decomposition = Literal["structure", "active_set"]
Start = Literal["argmax", "random"]


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of the last dimension on the simplex (Martins & Astudillo 2016).

    Its gradient is exact.

    Args:
        scores: ``[..., k]``. An entry of -inf is missing (at least one must exist); its weight and
            gradient are 0.

    Returns:
        ``[..., k]``, non-negative, summing to one.
    """
    return project_capped_simplex(scores, scores > -math.inf, 1)  # no entry exceeds the sum


class Marginalize(Estimator):
    r"""The exact expectation ``sum_x w(x) L(x)`` under a distribution over vertices.

    It is deterministic and differentiable in both factors.

    | distribution | weights | needs | decoder calls |
    |---|---|---|---|
    | ``softmax`` | Gibbs distribution | ``enumerate`` (tiny sets) | all vertices |
    | ``sparsemax`` | projection on the simplex | ``enumerate`` (tiny sets) | the support |
    | ``topk_sparsemax`` | the same among the k best vertices | ``top_k`` | the support, <= k |
    | ``sparsemap`` | those of ``structure.sparsemap`` | ``sparsemap`` | the support |

    The source is Correia et al. (2020), equations 2-4 and sections 3-4. For ``OneHot`` the first
    two are the paper's dense and sparse baselines. The objective is evaluated on the support only,
    ragged through ``rows``. Finding the ragged support waits for the device once a step
    (``softmax`` without a mask does not wait). For ``topk_sparsemax`` the metric ``certified`` is
    the fraction of examples with fewer than k vertices in their support. There the result is the
    sparsemax over *all* vertices. Weights are the same in training and in evaluation.

    ``kl`` is over the vertex: the divergence from the uniform distribution over all vertices,
    ``log |X| - H(w)``, or from the Gibbs distribution of ``prior_scores``. It is not defined if the
    vertices are neither listed nor counted (``log_partition``).

    **Options of sparsemap.** SparseMAP's mean is the projection of the scores. On a cube it has no
    gradient for a bit whose score lies outside [0, 1]. With ``centred`` the two states of a part
    have the scores ``(s, 0)``, as in the paper's released code. This is the projection of
    ``(s + 1) / 2``, which is uniform at scores 0 and has a gradient within (-1, 1).

    Several distributions have that mean. With ``decomposition="structure"`` the estimator takes the
    structure's own, in closed form where one exists. With ``"active_set"`` it takes that of the
    active-set method, as the paper does. The distributions differ in entropy (``kl``) and in the
    number of decoder calls. The active-set method begins with the argmax of the scores. With
    ``start="random"`` it begins with a uniformly random vertex, as the released code does in
    training and test.

    Args:
        structure: the set of vertices.
        distribution: see above.
        k: number of vertices, for ``topk_sparsemax`` only.
        centred: see above; for ``sparsemap``.
        decomposition: see above; for ``sparsemap``.
        start: see above; for ``decomposition="active_set"``.

    Raises:
        UnsupportedError: if the structure lacks the oracle, or ``sample`` for a random start.
        TypeError: if k is not a whole number.
        ValueError: for an unknown distribution or a k that does not belong to it.
    """

    def __init__(
        self,
        structure: Structure,
        distribution: Distribution = "softmax",
        k: int | None = None,
        centred: bool = False,
        decomposition: Decomposition = "structure",
        start: Start = "argmax",
    ) -> None:
        super().__init__(structure)
        check_choice("distribution", distribution, get_args(Distribution))
        if (distribution == "topk_sparsemax") != (k is not None):
            raise ValueError(
                f"distribution topk_sparsemax needs k, and no other distribution takes it; got {distribution}, k={k}"
            )
        if k is not None:
            check_count("k", k)
        check_choice("decomposition", decomposition, get_args(Decomposition))
        if distribution != "sparsemap" and (centred or decomposition != "structure"):
            raise ValueError(f"centred and decomposition work only with distribution sparsemap; got {distribution}")
        check_choice("start", start, get_args(Start))
        if start != "argmax":
            if decomposition != "active_set":
                raise ValueError(f"start works only with decomposition active_set; got {decomposition}")
            structure.require("sample", by="estimator marginalize (start=random)")
        oracle = {"topk_sparsemax": "top_k", "sparsemap": "sparsemap"}.get(distribution, "enumerate")
        by = f"estimator marginalize (distribution={distribution})"
        structure.require(oracle, by=by)
        if oracle == "enumerate":
            structure.require_linear(by=by)
        self.distribution, self.k = distribution, k
        self.centred, self.decomposition, self.start = centred, decomposition, start
        self.kl_over = "vertex" if oracle == "enumerate" or "log_partition" in structure.oracles else None
        self._vertices: dict[torch.Size, Tensor] = {}

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
        batch = scores.shape[0]
        sparse, log_weights, log_count, metrics = self._weigh(scores, mask)
        losses = objective(sparse.vertices, sparse.rows)
        if prior_scores is not None:
            log_weights = log_weights - self._log_prior(sparse, prior_scores, mask)
        terms = torch.stack([sparse.weights * losses, sparse.weights * log_weights], -1)
        expected, relative = terms.new_zeros(batch, 2).index_add(0, sparse.rows, terms).unbind(-1)
        if prior_scores is None and log_count is not None:  # the uniform prior
            relative = log_count + relative
        return Estimate(
            surrogate=expected,
            objective=expected.detach(),
            divergence=None if log_count is None else Divergence(relative, "vertex"),
            vertices=sparse.vertices,
            rows=sparse.rows,
            weights=sparse.weights.detach(),
            metrics=metrics,
            exact=True,
        )

    def _log_prior(self, sparse: SparseDistribution, prior_scores: Tensor, mask: Tensor | None) -> Tensor:
        """The log-probability of every evaluated vertex under the Gibbs distribution of the prior scores: ``[N]``."""
        wide, rows = prior_scores.double(), sparse.rows
        if self.distribution in ("sparsemap", "topk_sparsemax"):
            log_z = self.structure.log_partition(wide, mask)
        else:
            log_z = self._all(wide, mask)[1].logsumexp(-1)
        masks = None if mask is None else mask.expand(prior_scores.shape)[rows]
        log_p = self.structure.inner(sparse.vertices.double(), wide[rows], masks) - log_z[rows]
        return log_p.to(prior_scores.dtype)

    def _weigh(
        self, scores: Tensor, mask: Tensor | None
    ) -> tuple[SparseDistribution, Tensor, Tensor | None, dict[str, Tensor]]:
        """The distribution, the logarithms of its weights, ``log |X|`` ``[batch]`` if known, and metrics."""
        if self.distribution in ("sparsemap", "topk_sparsemax"):
            log_count = log_size(self.structure, scores, mask) if self.kl_over else None
        if self.distribution == "sparsemap":
            scores = (scores + 1) / 2 if self.centred else scores
            if self.decomposition == "structure":
                sparse = self.structure.sparsemap(scores, mask)
            else:
                # The Gibbs distribution of scores 0 is the uniform one.
                start = self.structure.sample(torch.zeros_like(scores), mask) if self.start == "random" else None
                sparse = active_set(self.structure, scores, mask, start=start)
            return sparse, sparse.weights.log(), log_count, {}
        if self.k is not None:
            vertices, values = self.structure.top_k(scores, self.k, mask)
            weights = sparsemax(values)
            sparse = _select(vertices, weights, weights > 0)
            certified = ((weights > 0).sum(-1) < self.k).to(scores).mean()
            return sparse, sparse.weights.log(), log_count, {"certified": certified}
        vertices, values = self._all(scores, mask)
        exist = values > -math.inf
        log_count = exist.sum(-1).to(values).log()
        if self.distribution == "softmax":
            log_weights = values.log_softmax(-1)
            if mask is None:  # all vertices exist, so there is no ragged support to wait for
                rows = example_rows(len(scores), values.shape[1], scores.device)
                whole = SparseDistribution(vertices.flatten(0, 1), rows, log_weights.exp().flatten())
                return whole, log_weights.flatten(), log_count, {}
            return _select(vertices, log_weights.exp(), exist), log_weights[exist], log_count, {}
        sparse = _select(vertices, (weights := sparsemax(values)), weights > 0)
        return sparse, sparse.weights.log(), log_count, {}

    def _all(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every vertex, ``[batch, V, *parts]`` (a view), and the values ``[batch, V]``.

        The value of a vertex that uses a missing part is -inf.
        """
        shape = scores.shape[1:]
        if shape not in self._vertices or self._vertices[shape].device != scores.device:
            with torch.inference_mode(False):  # training must be able to use them as well
                self._vertices[shape] = self.structure.enumerate(*shape).to(scores.device)
        vertices, there = self.structure.restrict(self._vertices[shape].to(scores.dtype), scores, mask)
        flatten = self.structure.layout.flatten
        known = torch.where(flatten(self.structure.parts(scores, mask)), flatten(scores), 0.0)
        flat = flatten(vertices)
        values = product(known, flat.T) if flat.dim() == 2 else product(flat, known.unsqueeze(-1)).squeeze(-1)
        if mask is not None:
            values = torch.where(there, values, -math.inf)
            none = ~there.any(-1)
            if values_can_be_read(none) and bool(none.any()):
                raise ValueError(
                    f"example {int(none.nonzero()[0])} has no vertex of full size under its mask; "
                    f"{self.structure.name} cannot be enumerated at smaller sizes in the same batch"
                )
        return vertices.expand(*values.shape, *scores.shape[1:]), values


def _select(vertices: Tensor, weights: Tensor, keep: Tensor) -> SparseDistribution:
    """The ragged form of ``[batch, k]`` weighted vertices.

    The host reads the number of kept vertices; here a step waits for the device.
    """
    rows, columns = keep.nonzero(as_tuple=True)
    return SparseDistribution(vertices[rows, columns], rows, weights[rows, columns])


class SumAndSample(GibbsEstimator):
    r"""Rao-Blackwellised score function (Liu et al. 2019).

    The k best vertices are summed exactly, and one sample estimates the rest.

    With p the Gibbs distribution, C its k best vertices and x' ~ p( . | not C),

    .. math:: \sum_{x \in C} (L(x) - b) \nabla p(x) + (1 - p(C)) (L(x') - b) \nabla \log p(x')

    is unbiased for every b that does not see x'. Here b is the running mean of past objectives
    (zero on the first step). The decoder's gradient is weighted in the same way: p(x) on C and 1 -
    p(C) on x'. There are k + 1 evaluations an example, in one call.

    For ``OneHot`` x' is drawn with the k best masked out. For other structures it is the first of
    ``tries`` Gibbs samples that is not in C. Its weight is ``(1 - p(C)) / (1 - p(C)^tries)``, or
    zero if no such sample is found. This is unbiased for any number of tries and neither loops nor
    waits. In evaluation there is one Gibbs sample an example. ``kl`` is that of the Gibbs
    distribution from the uniform one.

    Args:
        structure: needs ``top_k``, ``sample``, ``log_prob``, ``log_partition``, ``entropy``.
        k: number of vertices summed exactly.
        tries: see above; ``OneHot`` needs none.
        decay: the decay of the running mean.

    Raises:
        UnsupportedError: if the structure lacks an oracle.
        TypeError: if k or tries is not a whole number.
        ValueError: for k, tries or decay out of range.
    """

    def __init__(self, structure: Structure, k: int = 1, tries: int = 16, decay: float = 0.99) -> None:
        super().__init__(structure)
        check_count("k", k)
        check_count("tries", tries)
        structure.require("top_k", "sample", "log_prob", "log_partition", "entropy", by="estimator sum_and_sample")
        self.k, self.tries = k, tries
        self.running = RunningMean(decay)

    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """See :class:`~structgrad.estimators.base.GibbsEstimator`."""
        structure = self.structure
        best, values = structure.top_k(scores, self.k, mask)
        probabilities = (values - structure.log_partition(scores, mask)[:, None]).exp()
        if self.k > 1:
            # If there are fewer than k vertices, the best one fills up with weight 0. So the
            # objective gets vertices only.
            exist = values > -math.inf
            best = torch.where(per_example(exist, best), best, best[:, :1])
            probabilities = torch.where(exist, probabilities, 0.0)
        other, factor = self._rest(scores, mask, best, probabilities.detach())
        losses, vertices, rows = evaluate(objective, torch.cat([best, other[:, None]], 1))

        # Score-function weights: p on C (its gradient is that of p itself), factor * log p on the sample.
        signal = losses.detach() - self.running.mean
        score = torch.cat([probabilities, (factor * structure.log_prob(other, scores, mask))[:, None]], 1)
        weights = torch.cat([probabilities.detach(), factor[:, None]], 1)
        surrogate = torch.addcmul(weights * losses, score, signal).sum(1)
        value = (weights * losses.detach()).sum(1)
        self.running.update(value)
        return Estimate(surrogate, value, divergence, vertices, rows, weights.flatten())

    @torch.no_grad()
    def _rest(self, scores: Tensor, mask: Tensor | None, best: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """A vertex outside C, ``[batch, *parts]``, and its weight ``[batch]``, whose mean is the mass
        there.
        """
        structure = self.structure
        if structure.is_categorical:
            chosen = best.sum(1) > 0
            mass = structure.marginals(scores, mask).masked_fill(chosen, 0.0).sum(-1)
            # Below all others, but above missing categories: if all are chosen, the sample is one
            # of them.
            rest = scores.masked_fill(chosen, torch.finfo(scores.dtype).min / 2)
            return structure.sample(rest, mask), mass
        tries = structure.sample(*replicate(scores, mask, self.tries))
        same = (tries.flatten(2)[:, :, None] == best.flatten(2)[:, None]).all(-1)
        outside = ~same.any(-1)
        first = outside.to(torch.uint8).argmax(1)
        other = tries[torch.arange(len(tries), device=tries.device), first]
        inside_mass = probabilities.sum(1).clamp(max=1.0)  # above 1 by rounding only
        mass = 1 - inside_mass
        accepted = -torch.expm1(self.tries * inside_mass.log())
        weight = torch.where(outside.any(1) & (mass > 0), mass / accepted, 0.0)
        return other, weight
