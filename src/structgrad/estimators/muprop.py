"""MuProp: a score function whose control variate is the objective's Taylor expansion."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.estimators.base import Estimate, Estimator, Objective, Over, each_once, gibbs_divergence
from structgrad.structures.base import Structure


class MuProp(Estimator):
    r"""The score function with the objective's first-order expansion around the mean as its control variate (Gu et al.
    2016).

    With a sample x of the Gibbs distribution and its mean m, the gradient estimate for the scores is

    .. math:: (L(x) - L(m) - \langle \nabla L(m), x - m \rangle) \nabla \log p(x) + \nabla m^T \nabla L(m),

    unbiased, as :math:`E[(x - m) \nabla \log p(x)] = \nabla m`; exact in the second term, so that nothing is left to
    sample where L is linear. The objective must be defined and differentiable at relaxed vertices; one call evaluates
    both. The decoder learns from the hard vertex only. ``kl`` is over the vertex. In evaluation: one sample an example.

    Args:
        structure: needs ``sample``, ``log_prob``, ``marginals``, ``log_partition``, ``entropy``.

    Raises:
        UnsupportedError: if the structure lacks an oracle.
    """

    needs_differentiable_objective: ClassVar[bool] = True
    kl_over: Over | None = "vertex"

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        needs = ("sample", "log_prob", "marginals", "log_partition", "entropy")
        structure.require(*needs, by="estimator muprop")

    def estimate(
        self, scores: Tensor, objective: Objective, mask: Tensor | None, context: Tensor | None, kl_weight: float
    ) -> Estimate:
        """See :class:`~structgrad.estimators.base.Estimator`."""
        structure, batch = self.structure, scores.shape[0]
        divergence = gibbs_divergence(structure, scores, mask)
        vertices = structure.sample(scores.detach(), mask)
        rows, weights = each_once(batch, scores.device)
        if not self.training:
            losses = objective(vertices, rows)
            return Estimate(losses, losses.detach(), divergence, vertices, rows, weights)
        mean = structure.marginals(scores, mask)
        with torch.enable_grad():
            centre = mean.detach().requires_grad_()
            evaluated, rows = torch.cat([vertices, centre]), rows.repeat(2)
            at_vertex, at_centre = objective(evaluated, rows).chunk(2)
            (slope,) = torch.autograd.grad(at_centre.sum(), centre, retain_graph=True)
        along = (slope * (vertices - centre.detach())).flatten(1).sum(1)
        signal = at_vertex.detach() - at_centre.detach() - along
        to_scores = signal * structure.log_prob(vertices, scores, mask) + (slope * mean).flatten(1).sum(1)
        return Estimate(
            surrogate=at_vertex + to_scores,
            objective=at_vertex.detach(),
            divergence=divergence,
            vertices=evaluated,
            rows=rows,
            weights=torch.cat([weights, torch.zeros_like(weights)]),
        )


__all__ = ["MuProp"]
