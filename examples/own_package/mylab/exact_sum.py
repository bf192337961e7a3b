"""An estimator: no estimate at all, the sum over every vertex."""

import torch
from torch import Tensor

from structgrad.estimators import Divergence, Estimate, Estimator, Objective
from structgrad.structures import Structure, UnsupportedError


class ExactSum(Estimator):
    """The expected objective under the Gibbs distribution, by enumeration; for small sets with all their parts."""

    kl_over = "vertex"

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        structure.require("enumerate", by="estimator exact_sum")

    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        """Evaluates all V vertices of every example."""
        if mask is not None and not mask.all():
            raise UnsupportedError("estimator exact_sum takes no examples with missing parts")
        every = self.structure.enumerate(*scores.shape[1:]).to(scores)
        batch, size = len(scores), len(every)
        values = self.structure.inner(every, scores[:, None].expand(batch, *every.shape))
        log_p = values.log_softmax(-1)
        rows = torch.arange(batch, device=scores.device).repeat_interleave(size)
        vertices = every.repeat(batch, *[1] * (every.dim() - 1))
        losses = objective(vertices, rows).reshape(batch, size)
        expected = (log_p.exp() * losses).sum(-1)
        prior = torch.zeros_like(scores) if prior_scores is None else prior_scores
        log_prior = self.structure.inner(every, prior[:, None].expand(batch, *every.shape)).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_prior)).sum(-1)
        divergence = Divergence(kl, over="vertex")
        return Estimate(expected, expected.detach(), divergence, vertices, rows, log_p.exp().detach().flatten())
