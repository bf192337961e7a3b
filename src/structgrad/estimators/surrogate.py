"""Surrogate gradients: hard vertices in the forward pass, a replacement for the argmax's derivative
backward.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from structgrad.algorithms.derivatives import first_order_only
from structgrad.common.ranges import check_choice, check_count, check_positive
from structgrad.estimators.base import (
    Estimate,
    Estimator,
    Objective,
    PerturbAndMap,
    flat_replicas,
    pathwise,
    utility_divergence,
)
from structgrad.estimators.utilities import SumOfGamma, Utility, UtilityName, make_utility
from structgrad.structures.base import Structure

Method = Literal["identity", "spigot", "blackbox", "imle"]


class _Surrogate(torch.autograd.Function):
    """``argmax_x <x, utility>`` with the surrogate's vector-"Jacobian" product."""

    @staticmethod
    def forward(ctx: Any, utility: Tensor, mask: Tensor | None, estimator: SurrogateGradient) -> Tensor:
        vertex = estimator.structure.argmax(utility, mask)
        ctx.save_for_backward(utility, mask, vertex)
        ctx.estimator = estimator
        return vertex

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        utility, mask, vertex = ctx.saved_tensors
        gradient = ctx.estimator.pull_back(gradients[0].detach(), vertex.detach(), utility.detach(), mask)
        return first_order_only(gradient, "a surrogate gradient", gradients[0], utility), None, None


class SurrogateGradient(Estimator):
    r"""The objective at the hard vertex ``x = argmax_x <x, u>``, with a surrogate gradient.

    With ``v`` the objective's gradient at x, the gradient of u is defined as

    - ``identity``: ``v``, straight-through (Bengio et al. 2013);
    - ``spigot``: ``x - proj(x - step v)``, with the projection on conv(X) (Peng et al. 2018;
      Niculae et al., 4.2);
    - ``blackbox``: ``(x - argmax(u - step v)) / step``, linear interpolation (Pogančić et al. 2020;
      Niculae et al., 4.3, with the sign of an objective that is maximised);
    - ``imle``: the same with ``u = scores + noise`` in both places (Niepert et al. 2021; Niculae et
      al., 5.7). There the learning rate includes the factor ``1 / step``.

    Utilities are the scores themselves unless ``utility`` names a noise (``imle`` always has one).
    All methods are biased. Vertices are hard in training and in evaluation. In training they carry
    a gradient, so decoders may not use their sparse path.

    ``kl`` is over parts: the divergence of the utilities from their prior (scores 0). There is none
    without noise, and none for sum-of-gamma noise, whose density has no closed form.

    Args:
        structure: the set of vertices.
        method: see above.
        step: size of the step (eta of spigot; lambda of blackbox and imle); not for ``identity``. It
            multiplies the gradient that arrives, which a mean over the batch divides by its size.
        utility: noise by name or as an object, :class:`SumOfGamma` for k-subsets; None for no
            noise. ``imle`` takes Gumbel if it is None.
        n_samples: number of samples an example in training, with noise.

    Raises:
        UnsupportedError: if the structure has no argmax (spigot: no projection), or its vertices
            have another shape than its scores.
        TypeError: if n_samples is not a whole number.
        ValueError: for options out of range or that do not fit together.
    """

    needs_differentiable_objective: ClassVar[bool] = True

    def __init__(
        self,
        structure: Structure,
        method: Method = "identity",
        step: float | None = None,
        utility: UtilityName | Utility | SumOfGamma | None = None,
        n_samples: int = 1,
    ) -> None:
        super().__init__(structure)
        check_choice("method", method, get_args(Method))
        by = f"estimator {method}"
        structure.require("argmax", *(["project"] if method == "spigot" else []), by=by)
        structure.require_linear(by=by)
        if (method == "identity") != (step is None):
            raise ValueError(f"every method needs a step except identity, which takes none; got {method}, step={step}")
        if step is not None:
            check_positive("step", step)
        if method == "imle" and utility is None:
            utility = "gumbel"
        check_count("n_samples", n_samples)
        if n_samples > 1 and utility is None:
            raise ValueError(f"n_samples must be at least 1, and 1 without noise; got {n_samples}")
        self.method, self.step, self.n_samples = method, step, n_samples
        self.utility: Utility | SumOfGamma | None
        self.utility = utility if utility is None or isinstance(utility, SumOfGamma) else make_utility(utility)
        self.kl_over = "parts" if isinstance(self.utility, Utility) else None
        if self.utility is not None:
            self.vertex_distribution = PerturbAndMap(self.utility)

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
        samples = self.n_samples if self.training else 1
        divergence = None
        if isinstance(self.utility, Utility):
            noisy = self.structure.parts(scores, mask) & self.structure.noisy_parts(scores)
            divergence = utility_divergence(self.structure, self.utility, scores, noisy, prior_scores)
        if samples > 1:
            scores, mask = flat_replicas(scores, mask, samples)
        utility = torch.where(self.structure.parts(scores, mask), scores, 0.0)
        if self.utility is not None:
            utility = torch.where(self.structure.noisy_parts(utility), self.utility.sample(utility), utility)
        if self.training:
            vertices: Tensor = _Surrogate.apply(utility, mask, self)
        else:
            vertices = self.structure.argmax(utility, mask)
        return pathwise(objective, vertices, samples, divergence)

    def pull_back(self, gradient: Tensor, vertex: Tensor, utility: Tensor, mask: Tensor | None) -> Tensor:
        """The surrogate gradient for the utilities: ``[*batch, *parts]``.

        Args:
            gradient: the objective's gradient for the vertex, one number an entry.
            vertex: the argmax.
            utility: the utilities of the argmax.
            mask: which parts exist.
        """
        exists = self.structure.parts(utility, mask)
        gradient = torch.where(exists, self.structure.layout.pull_back(gradient), 0.0)
        if self.step is None:
            return gradient
        if self.method == "spigot":
            moved = vertex - self.structure.project(vertex - self.step * gradient, mask)
        else:
            moved = (vertex - self.structure.argmax(utility - self.step * gradient, mask)) / self.step
        return torch.where(exists, moved, 0.0)


class AdaptiveIMLE(SurrogateGradient):
    r"""I-MLE with a step that adapts to the sparsity of the gradient (Minervini, Franceschi and
    Niepert 2023).

    Let ``v`` be the gradient at the vertex. The gradient of ``u = scores + noise`` is defined as
    the central difference ``(argmax(u + step v) - argmax(u - step v)) / (2 step)``. In every
    example ``step = alpha |u| / |v|``. A small step finds no other vertex, so that the gradient
    is 0. A large step is biased. After every step alpha moves by ``rate``. It moves so that a
    moving average of the number of non-zero entries an example approaches ``target``.

    alpha and the average are buffers: they are saved and resumed. Backward passes move them.

    Args:
        structure: see :class:`SurrogateGradient`.
        utility: see :class:`SurrogateGradient`.
        n_samples: number of samples an example in training.
        target: the wanted number of non-zero entries of the gradient an example.
        rate: the change of alpha in a step.
        decay: decay of the moving average.

    Raises:
        UnsupportedError: see :class:`SurrogateGradient`.
        ValueError: for options out of range.
    """

    alpha: Tensor
    found: Tensor

    def __init__(
        self,
        structure: Structure,
        utility: UtilityName | Utility | SumOfGamma = "gumbel",
        n_samples: int = 1,
        target: float = 1.0,
        rate: float = 1e-3,
        decay: float = 0.9,
    ) -> None:
        super().__init__(structure, "imle", 1.0, utility, n_samples)
        if not (0 < target < math.inf and 0 < rate < math.inf and 0 <= decay < 1):
            raise ValueError(f"target and rate must be positive, decay within [0, 1); got {target}, {rate} and {decay}")
        self.target, self.rate, self.decay = target, rate, decay
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("found", torch.full((), float(target)))

    def pull_back(self, gradient: Tensor, vertex: Tensor, utility: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`SurrogateGradient`; also moves alpha."""
        exists = self.structure.parts(utility, mask)
        gradient = torch.where(exists, self.structure.layout.pull_back(gradient), 0.0)
        dims = tuple(range(-self.structure.layout.ndim, 0))
        length = gradient.square().sum(dims, keepdim=True).sqrt()
        reach = torch.where(exists, utility, 0.0).square().sum(dims, keepdim=True).sqrt()
        step = self.alpha.to(gradient) * reach / torch.where(length > 0, length, 1.0)
        there, back = (self.structure.argmax(utility + sign * step * gradient, mask) for sign in (1, -1))
        moved = torch.where(exists, (there - back) / torch.where(step > 0, 2 * step, 1.0), 0.0)
        if not len(moved):
            return moved
        with torch.no_grad():
            entries = (moved != 0).to(self.found).sum(dims).mean()
            self.found = self.found.lerp(entries, 1 - self.decay)
            self.alpha = (self.alpha + self.rate * torch.sign(self.target - self.found)).clamp(min=0.0)
        return moved
