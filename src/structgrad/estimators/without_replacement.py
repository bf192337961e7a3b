"""Score functions from samples without replacement."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structgrad.common.ranges import check_count
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    GibbsEstimator,
    Objective,
    UnsupportedError,
    evaluate,
)
from structgrad.estimators.utilities import Gumbel
from structgrad.structures.base import Structure

#: Trapezoids of width 1/4 in log t. The integrand below is entire in log t. It decays exponentially
#: to the left and doubly exponentially to the right, so the error is of the order of float64's
#: rounding.
_GRID = (-45.0, 4.5, 0.25)


def log_prob_of_sets(log_share: Tensor, member: Tensor) -> Tensor:
    r"""Probability that sampling without replacement finds a set S before anything else (Kool et
    al. 2020).

    .. math:: p(S) = \int_0^\infty e^{-t} \prod_{s \in S} (1 - e^{-a_s t}) dt, \qquad a_s = p_s / p(\text{not } S)

    All terms are positive, so nothing cancels however small the probabilities are.

    Args:
        log_share: ``[*batch, k]``, log a_s in float64; inf where nothing is left outside S.
        member: bool, broadcastable to it: the elements of S (others count as absent).

    Returns:
        log p(S), ``[*batch]``.
    """
    first, last, width = _GRID
    x = torch.arange(first, last, width, dtype=torch.float64, device=log_share.device)
    exponent = -(x + log_share[..., None]).exp()
    inside = torch.where(member[..., None], torch.log(-torch.expm1(exponent)), 0.0)
    return (inside.sum(-2) + x - x.exp()).logsumexp(-1) + math.log(width)


class WithoutReplacement(GibbsEstimator):
    r"""The unordered-set estimator: k *different* categories, weighted without bias (Kool, van Hoof
    and Welling 2020).

    S is the set of the k categories of highest Gumbel-perturbed scores. With the leave-one-out
    ratio :math:`R(S, s) = p^{D \setminus s}(S \setminus s) / p(S)`,

    .. math:: \sum_{s \in S} R(S, s) \nabla p_s \Bigl( L(s) - \sum_{s' \in S} p_{s'} R^{D \setminus s}(S, s') L(s')
        \Bigr)

    is unbiased, with a baseline from the same k evaluations. The decoder's gradient is weighted by
    :math:`p_s R(S, s)`. If k is the number of categories, this is the exact sum. ``kl`` is over the
    vertex. In evaluation there is one Gibbs sample an example.

    Args:
        structure: ``OneHot``.
        k: number of categories evaluated an example (fewer if fewer exist).
        baseline: False drops the baseline.

    Raises:
        UnsupportedError: for another structure.
        TypeError: if k is not a whole number.
        ValueError: if k is below 1 (below 2 with the baseline).
    """

    def __init__(self, structure: Structure, k: int = 4, baseline: bool = True) -> None:
        super().__init__(structure)
        if not structure.is_categorical:
            raise UnsupportedError(
                f"estimator without_replacement needs one category out of all (OneHot); got {structure.name}"
            )
        check_count("k", k, least=1 + baseline)
        self.k, self.baseline = k, baseline

    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """See :class:`~structgrad.estimators.base.GibbsEstimator`."""
        exists = self.structure.parts(scores, mask)
        log_p = torch.where(exists, scores, -math.inf).log_softmax(-1)
        k = min(self.k, scores.shape[-1])
        with torch.no_grad():
            noisy = Gumbel().sample(torch.where(exists, scores, 0.0).double())
            chosen = torch.where(exists, noisy, -math.inf).topk(k, -1).indices
            real = exists.gather(-1, chosen)
            # If fewer exist, the first fills up with weight 0, so that the objective gets vertices
            # only.
            chosen = torch.where(real, chosen, chosen[:, :1])
            log_ratio, log_second = self._log_ratios(log_p.double(), chosen, real)
        # The first of a row is real. It lends its value to those that are not, whose weight is 0.
        log_chosen = log_p.gather(-1, chosen)
        wide = log_chosen.detach().double()
        weights = torch.where(real, (wide + log_ratio).exp(), 0.0).to(scores.dtype)
        vertices = torch.nn.functional.one_hot(chosen, scores.shape[-1]).to(scores.dtype)
        losses, evaluated, rows = evaluate(objective, vertices)
        held = signal = losses.detach()
        if self.baseline:
            of_others = (wide[:, None] + log_second).exp().to(scores.dtype)
            signal = held - (of_others * held[:, None]).sum(-1)
        return Estimate(
            surrogate=(weights * (losses + signal * log_chosen)).sum(1),
            objective=(weights * held).sum(1),
            divergence=divergence,
            vertices=evaluated,
            rows=rows,
            weights=weights.flatten(),
        )

    @staticmethod
    def _log_ratios(log_p: Tensor, chosen: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """``log R(S, s)`` ``[batch, k]`` and ``log R^{D - s}(S, s')`` ``[batch, k, k]``, -inf where s' is missing."""
        k = chosen.shape[-1]
        taken = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, chosen, True)
        rest = torch.where(taken, -math.inf, log_p).logsumexp(-1, keepdim=True)
        share = torch.where(real, log_p.gather(-1, chosen), 0.0) - rest
        without = ~torch.eye(k, dtype=torch.bool, device=log_p.device)
        whole = log_prob_of_sets(share, real)
        one = log_prob_of_sets(share[:, None], real[:, None] & without)
        two = log_prob_of_sets(share[:, None, None], real[:, None, None] & without[:, None] & without[None, :])
        second = torch.where(without, two - one[:, :, None], 0.0)
        return one - whole[:, None], torch.where(real[:, None], second, -math.inf)


__all__ = ["WithoutReplacement", "log_prob_of_sets"]
