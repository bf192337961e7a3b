"""An estimator for tests of tasks, whose vertices a test chooses by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from structgrad.estimators.base import Divergence, Estimate, Estimator, Objective, Over
from structgrad.structures.base import Structure

#: The surrogate is this times the objective, so a test sees which of the two a loss contains.
SURROGATE = 3.0


class Given(Estimator):
    """Evaluates given vertices, whatever the scores are. Nothing about the result is random.

    Args:
        structure: the structure of the vertices.
        vertices: ``[N, *parts]``.
        rows: int64 ``[N]``, in any order.
        weights: ``[N]``.
        kl: the divergence ``[batch]``, or None.
        over: the variables of the divergence.
    """

    #: The arguments of the last call.
    mask: Tensor | None
    context: Tensor | None
    kl_weight: float

    def __init__(
        self,
        structure: Structure,
        vertices: Tensor,
        rows: Tensor,
        weights: Tensor,
        kl: Tensor | None = None,
        over: Over = "vertex",
    ) -> None:
        super().__init__(structure)
        self.vertices, self.rows, self.weights, self.kl = vertices, rows, weights, kl
        self.kl_over = None if kl is None else over

    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        self.mask, self.context, self.kl_weight = mask, context, kl_weight
        losses = objective(self.vertices, self.rows)
        mean = losses.new_zeros(len(scores)).index_add(0, self.rows, self.weights * losses)
        divergence = None if self.kl is None or self.kl_over is None else Divergence(self.kl, self.kl_over)
        return Estimate(SURROGATE * mean, mean.detach(), divergence, self.vertices, self.rows, self.weights)


def weighted_sums(rows: Tensor, values: list[float], weights: Tensor) -> Tensor:
    """The weighted sum of the values of each example's vertices, one vertex after the other."""
    out = torch.zeros(int(rows.max()) + 1, dtype=weights.dtype)
    for row, value, weight in zip(rows.tolist(), values, weights.tolist(), strict=True):
        out[row] += weight * value
    return out
