"""MuProp: a score function whose control variate is the objective's Taylor expansion."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.estimators.base import Divergence, Estimate, GibbsEstimator, Objective, evaluate, require_gradients
from structgrad.structures.base import Structure


class MuProp(GibbsEstimator):
    r"""The score function with the objective's first-order expansion as its control variate (Gu et
    al. 2016).

    The expansion is around the mean of the Gibbs distribution. With a sample x of that distribution
    and its mean m, the gradient estimate for the scores is

    .. math:: (L(x) - L(m) - \langle \nabla L(m), x - m \rangle) \nabla \log p(x) + \nabla m^T
    \nabla L(m).

    It is unbiased, as :math:`E[(x - m) \nabla \log p(x)] = \nabla m`. The second term is exact, so
    a linear L leaves nothing to sample. The objective must be defined and differentiable at relaxed
    vertices; one call evaluates both. The decoder learns from the hard vertex only. ``kl`` is over
    the vertex. In evaluation there is one sample an example.

    Args:
        structure: needs ``sample``, ``log_prob``, ``marginals``, ``log_partition``, ``entropy``.

    Raises:
        UnsupportedError: if the structure lacks an oracle.
    """

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        needs = ("sample", "log_prob", "marginals", "log_partition", "entropy")
        structure.require(*needs, by="estimator muprop")

    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """See :class:`~structgrad.estimators.base.GibbsEstimator`."""
        require_gradients("MuProp")
        structure = self.structure
        vertices = structure.sample(scores.detach(), mask)
        mean = structure.marginals(scores, mask)
        with torch.enable_grad():
            centre = mean.detach().requires_grad_()
            losses, evaluated, rows = evaluate(objective, torch.stack([vertices, centre], 1))
            at_vertex, at_centre = losses.unbind(1)
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
            weights=(torch.arange(len(rows), device=rows.device) % 2 == 0).to(scores.dtype),
        )


__all__ = ["MuProp"]
