"""Importance-weighted bounds: several samples inside one logarithm."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from structgrad.common.ranges import check_choice, check_count
from structgrad.estimators.base import (
    Estimate,
    Estimator,
    Objective,
    Over,
    evaluate,
    gibbs_divergence,
    log_size,
    pathwise,
    replicate,
)
from structgrad.structures.base import Structure

Signal = Literal["bound", "leave_one_out"]


class ImportanceWeighted(Estimator):
    r"""The importance-weighted bound of K samples x_k ~ q, the Gibbs distribution (Burda et al.
    2016),

    .. math:: B = \log \frac 1 K \sum_k w_k, \qquad \log w_k = -L(x_k) + \log p(x_k) - \log q(x_k),

    for an objective L that is ``-log p(data | x)`` in nats, with p uniform over the vertices or the
    Gibbs distribution of ``prior_scores``. Its gradient has two terms. The first is the gradient of
    B with the samples held fixed. The second is, for every sample, a learning signal times
    ``grad log q(x_k)``:

    - ``bound``: B itself (the score function of the importance-weighted auto-encoder);
    - ``leave_one_out``: B minus the same with w_k replaced by the geometric mean of the others
      (VIMCO; Mnih and Rezende 2016). Needs K >= 2.

    Both are unbiased for the gradient of E[B], which approaches ``log p(data)`` as K grows.

    The KL is *inside* the logarithm, but the contract is the usual one. ``kl`` is that of q, and
    callers add it. The surrogate subtracts it again, so that ``surrogate + kl`` has the gradient of
    -B. This needs a caller that adds it with weight 1; another weight is an error. ``objective``
    and ``kl`` still make the ordinary ELBO; the metric ``bound`` is B. In evaluation there is one
    sample an example.

    Args:
        structure: needs ``sample``, ``log_prob``, ``log_partition``, ``entropy``.
        n_samples: K.
        signal: see above.

    Raises:
        UnsupportedError: if the structure lacks an oracle.
        TypeError: if n_samples is not a whole number.
        ValueError: for options out of range; from a call, for a KL with another weight than 1.
    """

    kl_over: Over | None = "vertex"

    def __init__(self, structure: Structure, n_samples: int = 5, signal: Signal = "leave_one_out") -> None:
        super().__init__(structure)
        structure.require("sample", "log_prob", "log_partition", "entropy", by="estimator importance_weighted")
        check_choice("signal", signal, get_args(Signal))
        check_count(f"n_samples for signal={signal}", n_samples, least=2 if signal == "leave_one_out" else 1)
        self.n_samples, self.signal = n_samples, signal

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
        if kl_weight != 1:
            raise ValueError(
                f"importance_weighted has the KL in its logarithm, with weight 1; this loss weighs it by {kl_weight:g}"
            )
        structure, k = self.structure, self.n_samples
        divergence = gibbs_divergence(structure, scores, mask, prior_scores)
        if not self.training:
            return pathwise(objective, structure.sample(scores.detach(), mask), 1, divergence)
        each, masks = replicate(scores, mask, k)
        vertices = structure.sample(each.detach(), masks)
        losses, evaluated, rows = evaluate(objective, vertices)
        log_q = structure.log_prob(vertices, each, masks)
        if prior_scores is None:
            log_prior = -log_size(structure, scores, mask)[:, None]
        else:
            log_prior = structure.log_prob(vertices, replicate(prior_scores, None, k)[0], masks)
        log_w = log_prior - losses - log_q
        bound = log_w.logsumexp(1) - math.log(k)
        signal = self._signal(log_w.detach(), bound.detach())
        return Estimate(
            surrogate=-bound - (signal * log_q).sum(1) - divergence.value,
            objective=losses.detach().mean(1),
            divergence=divergence,
            vertices=evaluated,
            rows=rows,
            weights=scores.new_full(rows.shape, 1 / k),
            metrics={"bound": bound.detach().mean()},
        )

    def _signal(self, log_w: Tensor, bound: Tensor) -> Tensor:
        """The learning signal of every sample: ``[batch, K]``."""
        if self.signal == "bound":
            return bound[:, None].expand_as(log_w)
        k = log_w.shape[1]
        others = (log_w.sum(1, keepdim=True) - log_w) / (k - 1)
        replaced = torch.where(torch.eye(k, dtype=torch.bool, device=log_w.device), others[:, :, None], log_w[:, None])
        return bound[:, None] - (replaced.logsumexp(2) - math.log(k))


__all__ = ["ImportanceWeighted"]
