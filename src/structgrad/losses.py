"""Losses for supervised structures, where the right vertex y of every example is known.

Every loss here is a Fenchel-Young loss, or, for the hinge, its limit without a regulariser. See
Blondel et al. (2020) and Niculae et al., *Discrete Latent Structure in Neural Networks*, section
2.4. With a convex function f on conv(X), the loss is

    L(s, y) = max_{m in conv(X)} [<s, m> - f(m)] - [<s, y> - f(y)]  >=  0.

It is convex in the scores s and zero exactly where y is the regularised argmax. Its gradient is
``m*(s) - y``, so a training step needs only the relaxation m*.

| loss | f(m) | m*, the first half of the gradient |
|---|---|---|
| :func:`negative_log_likelihood` | least value of -H(p), p with mean m | marginals (conditional random field) |
| :func:`sparsemap_loss` | ``|m|^2 / 2`` | Euclidean projection |
| :func:`fenchel_young_loss` | that of the named relaxation | the relaxation |
| :func:`perturbed_loss` | conjugate of the mean maximum | mean of perturbed argmaxes |
| :func:`structured_hinge_loss` | 0, scores augmented by the cost | an argmax |
| :func:`sparsemax_loss` | ``|m|^2 / 2`` on the simplex | sparsemax |
| :func:`entmax_loss` | negative Tsallis entropy | entmax |

Functions return one loss an example. The modules of the same names hold the structure and reduce
over the batch. All take scores ``[*batch, *parts]``, the right vertex ``[*batch, *parts]`` in the
form of ``structure.argmax``, and a mask like every oracle. Missing parts are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from structgrad.algorithms.eager import refuse
from structgrad.common.ranges import check_choice, check_count, check_range
from structgrad.common.text import options
from structgrad.estimators.relaxation import mean_argmax
from structgrad.estimators.utilities import Utility, UtilityName, make_utility
from structgrad.structures import OneHot
from structgrad.structures.base import Structure
from structgrad.structures.far_scores import brought_near

Reduction = Literal["mean", "sum", "none"]


class _Conjugate(torch.autograd.Function):
    """``max_m <s, m> - f(m)`` as a function of s, whose derivative is the maximiser (Danskin 1966).

    The maximiser is taken without a graph. Only a second derivative, which is the first derivative
    of the maximiser, takes it again with a graph.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, maximiser: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]
    ) -> Tensor:
        best = maximiser(scores)
        ctx.save_for_backward(scores, best)
        ctx.maximiser = maximiser
        return value(best)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores, best = ctx.saved_tensors
        if torch.is_grad_enabled():
            best = ctx.maximiser(scores)
        gradient = gradients[0]
        return gradient.reshape(*gradient.shape, *[1] * (best.dim() - gradient.dim())) * best, None, None


def _check(structure: Structure, scores: Tensor, target: Tensor, mask: Tensor | None, by: str) -> Tensor:
    """The target in the dtype of the scores, without a gradient."""
    structure.check(scores, mask)
    structure.require_linear(by=by)
    if target.shape != scores.shape:
        raise ValueError(
            f"{by}: the target {list(target.shape)} has another shape than the scores {list(scores.shape)}"
        )
    return target.detach().to(scores.dtype)


def _sum(structure: Structure, values: Tensor, exists: Tensor) -> Tensor:
    return torch.where(exists, values, 0.0).flatten(-structure.layout.ndim).sum(-1)


def negative_log_likelihood(
    structure: Structure, scores: Tensor, target: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None
) -> Tensor:
    """``log sum_x exp <x, s> - <y, s>``, the loss of a conditional random field (Lafferty et al.
    2001).

    Args:
        structure: needs ``log_prob``.
        scores: ``[*batch, *parts]``.
        target: ``[*batch, *parts]``, the right vertices.
        mask: which parts exist.
        lengths: in the place of a mask; see :meth:`Structure.length_mask`.

    Returns:
        ``[*batch]``, at least 0. Second derivatives exist if those of the structure's ``log_prob``
        do.

    Raises:
        UnsupportedError: if the structure lacks ``log_prob``.
        ValueError: for a target of another shape than the structure's vertices.
    """
    mask = structure.mask_from(mask, lengths, scores)
    structure.require("log_prob", by="negative_log_likelihood")
    structure.check(scores, mask)
    return -structure.log_prob(target.detach().to(scores.dtype), scores, mask)


def fenchel_young_loss(
    structure: Structure,
    scores: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    relaxation: str = "euclidean",
    lengths: Tensor | None = None,
) -> Tensor:
    """``max_{m in conv(X)} [<s, m> - f(m)] - [<s, y> - f(y)]`` (Blondel et al. 2020, definition 2).

    Args:
        structure: must have the relaxation.
        scores: ``[*batch, *parts]``.
        target: ``[*batch, *parts]``, the right vertices. They may also be other points of conv(X)
            (e.g. means of annotators), unless the relaxation is ``exp_family``.
        mask: which parts exist.
        relaxation: defines f. It is |m|^2 / 2 for ``euclidean``, the sum of m log m - m for
            ``categorical`` and ``sinkhorn``, and that of m log m + (1 - m) log(1 - m) for ``binary``. For
            ``exp_family`` it is that of :func:`negative_log_likelihood`.
        lengths: in the place of a mask; see :meth:`Structure.length_mask`.

    Returns:
        ``[*batch]``, at least 0 (up to rounding).

    Raises:
        UnsupportedError: if the structure lacks the relaxation, or the relaxation is no regularised
            argmax.
        ValueError: for a target of another shape than the scores.
    """
    mask = structure.mask_from(mask, lengths, scores)
    if relaxation == "exp_family":
        return negative_log_likelihood(structure, scores, target, mask)
    by = f"fenchel_young_loss (relaxation={relaxation})"
    f = structure.require_relaxation(relaxation, by=by, regularized=True).regularizer
    assert f is not None
    target = _check(structure, scores, target, mask, by).double()
    exists = structure.parts(scores, mask)
    # In float64. Otherwise a constant that the scores share, times the rounding of a mean, would
    # dominate the loss.
    near = brought_near(structure, scores, mask)
    finite = torch.where(exists, near.scores, 0.0).double()

    def maximiser(s: Tensor) -> Tensor:
        return torch.where(exists, structure.relax(relaxation, s, mask), 0.0)

    def value(best: Tensor) -> Tensor:
        # One difference for all parts: large scores times equal parts cancel before they are summed.
        apart = best - target
        return near.corrected(_sum(structure, finite.detach() * apart + f(target) - f(best), exists), apart)

    conjugate: Tensor = _Conjugate.apply(finite, maximiser, value)
    # Its value is 0; it has the gradient of -<s, y>.
    return (conjugate - _sum(structure, (finite - finite.detach()) * target, exists)).to(scores.dtype)


def sparsemap_loss(
    structure: Structure, scores: Tensor, target: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None
) -> Tensor:
    """``max_{m in conv(X)} [<s, m> - |m|^2 / 2] - <s, y> + |y|^2 / 2`` (Niculae et al. 2018,
    section 5).

    Equally, it is half the difference of the squared distances from the scores to y and to the
    projection. It is zero as soon as the projection is y, so examples with a margin have no
    gradient. Arguments, results and errors are those of :func:`fenchel_young_loss`.
    """
    mask = structure.mask_from(mask, lengths, scores)
    return fenchel_young_loss(structure, scores, target, mask, relaxation="euclidean")


def perturbed_loss(
    structure: Structure,
    scores: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    utility: UtilityName | Utility = "gaussian",
    sigma: float = 1.0,
    n_samples: int = 10,
    lengths: Tensor | None = None,
) -> Tensor:
    """``E max_x <x, s + sigma Z> - <s, y>`` by Monte Carlo: the perturbed Fenchel-Young loss.

    The source is Berthet et al. (2020), section 4. The loss is for every structure with an argmax.
    The regulariser's value at y has no closed form and does not depend on the scores. It is left
    out, so the least value is not 0. The gradient is the mean of ``n_samples`` perturbed argmaxes
    minus y, and unbiased. The second derivative is estimated from the same samples.

    Args:
        structure: must have an argmax.
        scores: ``[*batch, *parts]``.
        target: ``[*batch, *parts]``, the right vertices or other points of conv(X).
        mask: which parts exist.
        utility: noise Z: gumbel, gaussian or logistic.
        sigma: scale of the noise.
        n_samples: number of argmaxes an example.
        lengths: in the place of a mask; see :meth:`Structure.length_mask`.

    Returns:
        ``[*batch]``.

    Raises:
        UnsupportedError: if the structure lacks an argmax.
        TypeError: if n_samples is not a whole number.
        ValueError: for options out of range or a target of another shape than the scores.
    """
    mask = structure.mask_from(mask, lengths, scores)
    noise = _check_perturbed(structure, utility, sigma, n_samples)
    target = _check(structure, scores, target, mask, "perturbed_loss")
    exists = structure.parts(scores, mask)
    # In float64, where large scores leave something of the noise.
    near = brought_near(structure, scores, mask, margin=100 * sigma)
    finite = torch.where(exists, near.scores, 0.0).double()
    drawn = noise.sample(torch.zeros_like(scores), n_samples).double()
    vertices = structure.argmax(finite.detach() + sigma * drawn, mask)

    def maximiser(s: Tensor) -> Tensor:
        return torch.where(exists, mean_argmax(s, vertices, drawn, noise, exists, sigma), 0.0)

    def value(best: Tensor) -> Tensor:
        noisy = _sum(structure, vertices * (sigma * drawn), exists).mean(0)
        apart = best - target
        return near.corrected(_sum(structure, finite.detach() * apart, exists), apart) + noisy

    conjugate: Tensor = _Conjugate.apply(finite, maximiser, value)
    return (conjugate - _sum(structure, (finite - finite.detach()) * target, exists)).to(scores.dtype)


def _check_perturbed(structure: Structure, utility: UtilityName | Utility, sigma: float, n_samples: int) -> Utility:
    structure.require("argmax", by="perturbed_loss")
    structure.require_linear(by="perturbed_loss")
    noise = make_utility(utility)
    if not noise.is_location_family:
        raise ValueError(f"perturbed_loss needs utilities that are scores plus noise; got {type(noise).__name__}")
    check_range("sigma", sigma, above=0, below=math.inf)
    check_count("n_samples", n_samples)
    return noise


def structured_hinge_loss(
    structure: Structure,
    scores: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    cost: float = 1.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """``max_x [<s, x> + cost |x - y|_1] - <s, y>``, the margin-rescaled hinge (Tsochantaridis et
    al. 2005).

    Args:
        structure: must have an argmax.
        scores: ``[*batch, *parts]``.
        target: ``[*batch, *parts]``, the right vertices.
        mask: which parts exist.
        cost: cost of every part that differs from the target; 0 is the loss of the structured
            perceptron.
        lengths: in the place of a mask; see :meth:`Structure.length_mask`.

    Returns:
        ``[*batch]``, at least 0. It is piecewise linear, so its second derivative is 0.

    Raises:
        UnsupportedError: if the structure lacks an argmax.
        ValueError: for a negative cost or a target of another shape than the scores.
    """
    mask = structure.mask_from(mask, lengths, scores)
    _check_hinge(structure, cost)
    target = _check(structure, scores, target, mask, "structured_hinge_loss")
    exists = structure.parts(scores, mask)
    # In float64, where large scores leave something of the cost.
    near = brought_near(structure, scores, mask, margin=cost)
    finite = torch.where(exists, near.scores, 0.0).double()
    # On 0/1 vertices |x - y| is linear in x.
    worst = structure.argmax(finite.detach() + cost * (1 - 2 * target), mask)
    difference = worst - target
    loss = _sum(structure, finite * difference + cost * difference.abs(), exists)
    return near.corrected(loss, difference).to(scores.dtype)


def _check_hinge(structure: Structure, cost: float) -> None:
    structure.require("argmax", by="structured_hinge_loss")
    structure.require_linear(by="structured_hinge_loss")
    check_range("cost", cost, least=0, below=math.inf)


def _are_classes(scores: Tensor, target: Tensor) -> bool:
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return whole and target.shape == scores.shape[:-1]


def _ignoring(
    loss: Callable[[Tensor], Tensor], scores: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int | None
) -> Tensor:
    """``loss(target)``; 0, without a gradient, for examples whose class is ``ignore_index``."""
    if ignore_index is None or not _are_classes(scores, target):
        return loss(target)
    ignored = target == ignore_index
    # Any class that exists can replace the ignored one.
    return torch.where(ignored, 0.0, loss(torch.where(ignored, OneHot().parts(scores, mask).int().argmax(-1), target)))


def _counted(scores: Tensor, target: Tensor, ignore_index: int | None) -> Tensor | None:
    """The number of examples that are not ignored; None if all count."""
    if ignore_index is None or not _are_classes(scores, target):
        return None
    return (target != ignore_index).sum()


def _as_distribution(scores: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Class indices ``[*batch]`` as one-hot vectors; ``[*batch, K]`` is returned as it is."""
    if _are_classes(scores, target):
        target = target.long()
        outside = (target < 0) | (target >= scores.shape[-1])
        refuse(outside, f"has a target that is none of the {scores.shape[-1]} classes")
        if mask is not None:
            exists = OneHot().parts(scores, mask).gather(-1, target.clamp(0, scores.shape[-1] - 1)[..., None])
            refuse(~exists[..., 0], "has a missing class as its target")
        return nn.functional.one_hot(target, scores.shape[-1]).to(scores.dtype)
    return target


def sparsemax_loss(
    scores: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``max_{p in simplex} [<s, p> - |p|^2 / 2] - <s, y> + |y|^2 / 2`` (Martins and Astudillo 2016,
    section 3).

    Args:
        scores: ``[*batch, K]``.
        target: classes, int64 ``[*batch]``, or distributions over them ``[*batch, K]``.
        mask: which classes exist.
        ignore_index: a class whose examples have the loss 0, without a gradient.
        lengths: in the place of a mask; see :meth:`Structure.length_mask`.

    Returns:
        ``[*batch]``, at least 0.

    Raises:
        ValueError: in eager CPU code, for a class that does not exist.
    """
    mask = OneHot().mask_from(mask, lengths, scores)

    def loss(target: Tensor) -> Tensor:
        return sparsemap_loss(OneHot(), scores, _as_distribution(scores, target, mask), mask)

    return _ignoring(loss, scores, target, mask, ignore_index)


def entmax_loss(
    scores: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.5,
    ignore_index: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``max_{p in simplex} [<s, p> + H(p)] - <s, y> - H(y)`` with Tsallis' entropy (Peters et al.
    2019, section 3).

    ``H(p) = sum_i (p_i - p_i^alpha) / (alpha (alpha - 1))``; alpha = 1 is the cross-entropy, 2
    :func:`sparsemax_loss`.

    Args:
        scores: ``[*batch, K]``.
        target: classes, int64 ``[*batch]``, or distributions over them ``[*batch, K]``.
        mask: which classes exist.
        alpha: at least 1.
        ignore_index: a class whose examples have the loss 0, without a gradient.
        lengths: in the place of a mask; see :meth:`Structure.length_mask`.

    Returns:
        ``[*batch]``, at least 0.

    Raises:
        ValueError: for an alpha below 1; in eager CPU code, for a class that does not exist.
    """
    mask = OneHot().mask_from(mask, lengths, scores)
    if not 1 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 1; got {alpha}")
    return _ignoring(lambda t: _entmax_loss(scores, t, mask, alpha), scores, target, mask, ignore_index)


def _entmax_loss(scores: Tensor, target: Tensor, mask: Tensor | None, alpha: float) -> Tensor:
    structure = OneHot()
    y = _check(structure, scores, _as_distribution(scores, target, mask), mask, "entmax_loss").double()
    exists = structure.parts(scores, mask)
    finite = torch.where(exists, scores, 0.0).double()

    def negative_entropy(p: Tensor) -> Tensor:
        if alpha == 1:
            return torch.xlogy(p, p)
        return (p.pow(alpha) - p) / (alpha * (alpha - 1))

    def value(p: Tensor) -> Tensor:
        return _sum(structure, finite.detach() * (p - y) + negative_entropy(y) - negative_entropy(p), exists)

    conjugate: Tensor = _Conjugate.apply(finite, lambda s: structure.entmax(s, alpha, mask), value)
    return (conjugate - _sum(structure, (finite - finite.detach()) * y, exists)).to(scores.dtype)


class Loss(nn.Module):
    """A loss with its options, reduced over the batch.

    Args:
        reduction: ``mean``, ``sum``, or ``none`` for one loss an example.

    Raises:
        ValueError: for another reduction.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(Reduction))
        self.reduction = reduction

    def extra_repr(self) -> str:
        """The options, as in ``SparsemaxLoss(reduction='mean', ignore_index=None)``."""
        return options(self)

    def reduce(self, losses: Tensor, count: Tensor | None = None) -> Tensor:
        """``[*batch]`` -> a scalar, or ``[*batch]`` unchanged. A mean is over ``count`` examples,
        None for all.
        """
        if self.reduction == "none":
            return losses
        if self.reduction == "mean" and count is None:
            return losses.mean()
        return losses.sum() if count is None or self.reduction == "sum" else losses.sum() / count


class NegativeLogLikelihood(Loss):
    """:func:`negative_log_likelihood` over a structure."""

    def __init__(self, structure: Structure, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        structure.require("log_prob", by="NegativeLogLikelihood")
        self.structure = structure

    def forward(
        self, scores: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[*batch, *parts]``, ``[*batch, *parts]`` -> a scalar."""
        return self.reduce(negative_log_likelihood(self.structure, scores, target, mask, lengths=lengths))


class FenchelYoungLoss(Loss):
    """:func:`fenchel_young_loss` over a structure; with the default relaxation, :func:`sparsemap_loss`."""

    def __init__(self, structure: Structure, relaxation: str = "euclidean", reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        by = f"FenchelYoungLoss (relaxation={relaxation})"
        if relaxation == "exp_family":
            structure.require("log_prob", by=by)
        else:
            structure.require_relaxation(relaxation, by=by, regularized=True)
        self.structure, self.relaxation = structure, relaxation

    def forward(
        self, scores: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[*batch, *parts]``, ``[*batch, *parts]`` -> a scalar."""
        return self.reduce(
            fenchel_young_loss(self.structure, scores, target, mask, lengths=lengths, relaxation=self.relaxation)
        )


class SparseMAPLoss(FenchelYoungLoss):
    """:func:`sparsemap_loss` over a structure."""

    def __init__(self, structure: Structure, reduction: Reduction = "mean") -> None:
        super().__init__(structure, "euclidean", reduction)


class PerturbedLoss(Loss):
    """:func:`perturbed_loss` over a structure."""

    def __init__(
        self,
        structure: Structure,
        utility: UtilityName | Utility = "gaussian",
        sigma: float = 1.0,
        n_samples: int = 10,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        _check_perturbed(structure, utility, sigma, n_samples)
        self.structure, self.utility, self.sigma, self.n_samples = structure, utility, sigma, n_samples

    def forward(
        self, scores: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[*batch, *parts]``, ``[*batch, *parts]`` -> a scalar."""
        options = {"utility": self.utility, "sigma": self.sigma, "n_samples": self.n_samples}
        return self.reduce(perturbed_loss(self.structure, scores, target, mask, lengths=lengths, **options))  # type: ignore[arg-type]


class StructuredHingeLoss(Loss):
    """:func:`structured_hinge_loss` over a structure."""

    def __init__(self, structure: Structure, cost: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        _check_hinge(structure, cost)
        self.structure, self.cost = structure, cost

    def forward(
        self, scores: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[*batch, *parts]``, ``[*batch, *parts]`` -> a scalar."""
        return self.reduce(structured_hinge_loss(self.structure, scores, target, mask, lengths=lengths, cost=self.cost))


class SparsemaxLoss(Loss):
    """:func:`sparsemax_loss`; a mean is over the examples that are not ignored."""

    def __init__(self, reduction: Reduction = "mean", ignore_index: int | None = None) -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index

    def forward(
        self, scores: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[*batch, K]``, ``[*batch]`` or ``[*batch, K]`` -> a scalar."""
        losses = sparsemax_loss(scores, target, mask, lengths=lengths, ignore_index=self.ignore_index)
        return self.reduce(losses, _counted(scores, target, self.ignore_index))


class EntmaxLoss(Loss):
    """:func:`entmax_loss`; a mean is over the examples that are not ignored."""

    def __init__(self, alpha: float = 1.5, reduction: Reduction = "mean", ignore_index: int | None = None) -> None:
        super().__init__(reduction)
        if not 1 <= alpha < math.inf:
            raise ValueError(f"alpha must be at least 1; got {alpha}")
        self.alpha, self.ignore_index = alpha, ignore_index

    def forward(
        self, scores: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[*batch, K]``, ``[*batch]`` or ``[*batch, K]`` -> a scalar."""
        losses = entmax_loss(scores, target, mask, lengths=lengths, alpha=self.alpha, ignore_index=self.ignore_index)
        return self.reduce(losses, _counted(scores, target, self.ignore_index))
