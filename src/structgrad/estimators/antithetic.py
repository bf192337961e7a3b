"""Antithetic score functions for independent bits."""

from __future__ import annotations

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
    per_example,
    with_gradient,
)
from structgrad.estimators.utilities import Logistic
from structgrad.structures.base import Structure


class DisARM(GibbsEstimator):
    r"""DisARM, also known as U2G: two antithetic samples of independent bits (Dong et al. 2020; Yin
    et al. 2020).

    With logistic noise Z, ``b = [s + Z > 0]`` and ``b' = [s - Z > 0]``, the gradient for bit i is

    .. math:: \tfrac 1 2 (L(b) - L(b')) (b_i - b'_i) \sigma(|s_i|),

    unbiased, and 0 if both samples agree. The decoder learns from both samples. ``kl`` is over the
    vertex. In evaluation there is one sample an example.

    Args:
        structure: ``Subset``, whose bits are independent.
        n_pairs: number of pairs an example; all are evaluated in one call.

    Raises:
        UnsupportedError: for another structure.
        TypeError: if n_pairs is not a whole number.
        ValueError: if n_pairs is below 1.
    """

    def __init__(self, structure: Structure, n_pairs: int = 1) -> None:
        super().__init__(structure)
        if not structure.is_independent:
            raise UnsupportedError(f"estimator disarm needs independent bits (Subset); got {structure.name}")
        check_count("n_pairs", n_pairs)
        self.n_pairs = n_pairs

    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """See :class:`~structgrad.estimators.base.GibbsEstimator`."""
        structure = self.structure
        exists = structure.parts(scores, mask)
        finite = torch.where(exists, scores, 0.0)
        held = finite.detach()
        noise = Logistic().sample(torch.zeros_like(held), self.n_pairs)
        masks = None if mask is None else mask.expand(scores.shape)
        # [batch, pairs, 2, *parts]
        pairs = torch.stack([structure.argmax(held + sign * noise, masks) for sign in (1, -1)], 2).transpose(0, 1)
        losses, vertices, rows = evaluate(objective, pairs.flatten(1, 2))
        losses = losses.unflatten(1, (self.n_pairs, 2))
        half = (losses[..., 0] - losses[..., 1]).detach() / 2
        disagree = pairs[:, :, 0] - pairs[:, :, 1]
        gradient = (per_example(half, disagree) * disagree).mean(1) * held.abs().sigmoid()
        to_scores = with_gradient(finite, torch.where(exists, gradient, 0.0))
        return Estimate(
            surrogate=losses.mean((1, 2)) + to_scores,
            objective=losses.detach().mean((1, 2)),
            divergence=divergence,
            vertices=vertices,
            rows=rows,
            weights=scores.new_full(rows.shape, 1 / (2 * self.n_pairs)),
        )


__all__ = ["DisARM"]
