"""Score functions whose control variates come from a discrete Stein operator."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from structgrad.common.ranges import check_count, check_range
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    GibbsEstimator,
    Objective,
    UnsupportedError,
    evaluate,
    replicate,
    require_gradients,
    with_gradient,
    with_gradients,
)
from structgrad.structures.base import Structure


class RODEO(GibbsEstimator):
    r"""RODEO: leave-one-out score function with two control variates of mean zero (Shi et al.
    2022).

    A step of the Gibbs sampler does not change the distribution q of independent bits. So

    .. math:: (A h)(x) = \frac 1 D \sum_i q(\bar x_i) (h(x^{(i)}) - h(x)), \qquad x^{(i)}: \text{bit
    i flipped,}

    has mean zero for every function h. With K samples,

    .. math:: g = \frac 1 K \sum_k \Bigl( L(x_k) - \frac 1 {K - 1} \sum_{j \ne k} [L(x_j) + (A h_j)(x_j)] \Bigr)
        \nabla \log q(x_k) + (A (h'_k \nabla \log q))(x_k),

    is unbiased, as :math:`h_k` and :math:`h'_k` see the other samples only. A small network
    computes both. Its inputs are the others' mean objective and the mean of their linear expansions
    at the point in question. This needs the objective's gradient at hard vertices, but no more
    evaluations. The network starts at zero, where the estimator is leave-one-out. It descends
    :math:`|g|^2`, whose mean is the variance up to a constant.

    ``kl`` is over the vertex. In evaluation there is one sample an example.

    Args:
        structure: ``Subset``, whose bits are independent.
        n_samples: K, at least 2; all are evaluated in one call.
        hidden_size: width of the network.
        decay: decay of the running mean of ``|L|``, which scales the network's input and output.

    Raises:
        UnsupportedError: for another structure.
        TypeError: for an n_samples or a hidden_size that is not a whole number.
        ValueError: for options out of range.
    """

    needs_differentiable_objective: ClassVar[bool] = True
    scale: Tensor

    def __init__(self, structure: Structure, n_samples: int = 2, hidden_size: int = 32, decay: float = 0.99) -> None:
        super().__init__(structure)
        if not structure.is_independent:
            raise UnsupportedError(f"estimator rodeo needs independent bits (Subset); got {structure.name}")
        check_count("n_samples", n_samples, least=2)
        check_count("hidden_size", hidden_size)
        check_range("decay", decay, least=0, below=1)
        self.n_samples, self.decay = n_samples, decay
        last = nn.Linear(hidden_size, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(2, hidden_size), nn.SiLU(), last)
        self.register_buffer("scale", torch.ones(()))

    def train_step(self, scores: Tensor, objective: Objective, mask: Tensor | None, divergence: Divergence) -> Estimate:
        """See :class:`~structgrad.estimators.base.GibbsEstimator`."""
        require_gradients("RODEO")
        structure, batch, k = self.structure, scores.shape[0], self.n_samples
        with torch.enable_grad():
            vertices = structure.sample(*replicate(scores.detach(), mask, k)).requires_grad_()
            losses, evaluated, rows = evaluate(objective, vertices)
            (slopes,) = torch.autograd.grad(losses.sum(), vertices, retain_graph=True)
        layout = structure.layout
        flat, slopes = layout.flatten(vertices.detach()), layout.flatten(layout.pull_back(slopes))
        exists = layout.flatten(structure.parts(scores, mask))
        finite = torch.where(exists, layout.flatten(scores), 0.0)
        with torch.enable_grad():
            gradient = self._gradient(flat, losses.detach(), slopes, finite.detach(), exists)
            parameters = [p for p in self.network.parameters() if p.requires_grad]  # none if the user has frozen them
            length = gradient.square().sum(-1).mean()
            to_parameters = torch.autograd.grad(length, parameters) if parameters else ()
        with torch.no_grad():
            if batch:  # a step with a loss that is not finite does not count
                size = losses.detach().abs().mean().to(self.scale)
                self.scale = torch.where(size.isfinite(), self.scale.lerp(size, 1 - self.decay), self.scale)
        to_scores = with_gradient(finite, gradient)
        to_network = with_gradients(parameters, to_parameters)
        return Estimate(
            surrogate=losses.mean(1) + to_scores + to_network,
            objective=losses.detach().mean(1),
            divergence=divergence,
            vertices=evaluated,
            rows=rows,
            weights=scores.new_full(rows.shape, 1 / k),
            metrics={"squared_gradient": gradient.detach().square().sum(1).mean()},
        )

    def _gradient(self, x: Tensor, losses: Tensor, slopes: Tensor, scores: Tensor, exists: Tensor) -> Tensor:
        """g: ``[batch, P]``, differentiable in the network.

        Args:
            x: ``[batch, K, P]``, the samples.
            losses: ``[batch, K]``.
            slopes: ``[batch, K, P]``, gradients of the losses.
            scores: ``[batch, P]``.
            exists: bool ``[batch, P]``.
        """
        k = x.shape[1]

        def of_others(values: Tensor) -> Tensor:
            return (values.sum(1, keepdim=True) - values) / (k - 1)

        exists = exists[:, None]
        toggle = 1 - 2 * x
        slope = of_others(slopes)
        at_x = (slope * x).sum(-1) - of_others((slopes * x).sum(-1))
        here, here_second = self._functions(of_others(losses), at_x)
        flipped = at_x[..., None] + slope * toggle
        there, there_second = self._functions(of_others(losses)[..., None].expand_as(flipped), flipped)
        # The probability that bit i takes its other value, divided by the number of bits.
        rate = torch.where(exists, (scores[:, None] * toggle).sigmoid(), 0.0) / exists.sum(-1, keepdim=True).clamp_min(
            1
        )
        control = (rate * (there - here[..., None])).sum(-1)
        score = torch.where(exists, x - scores[:, None].sigmoid(), 0.0)
        signal = losses - of_others(losses + control)
        moved = (rate * (there_second - here_second[..., None])).sum(-1)
        return ((signal + moved)[..., None] * score + rate * there_second * toggle).mean(1)

    def _functions(self, loss: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Both functions of the others' mean objective and of its expansion; each has the
        arguments' shape.
        """
        dtype = next(self.network.parameters()).dtype
        inputs = torch.stack([loss, linear], -1).to(dtype) / self.scale
        first, second = (self.network(inputs) * self.scale).to(loss.dtype).unbind(-1)
        return first, second


__all__ = ["RODEO"]
