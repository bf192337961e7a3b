"""Oracles that follow from others: mixins for structures that have these and no closed form of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structgrad.algorithms import active_set
from structgrad.structures.base import SparseDistribution, Structure


def sparsemap(
    structure: Structure,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    max_iterations: int | None = None,
    tolerance: float = 1e-11,
) -> SparseDistribution:
    """A sparse distribution over vertices whose mean is the projection of the scores on conv(X).

    Args:
        structure: anything with an ``argmax`` that is linear in the scores.
        scores: ``[*batch, *parts]``.
        mask: which parts exist.
        max_iterations: stop after so many calls of the argmax, with the best distribution so far; None: at the
            solution.
        tolerance: the solution is reached when no vertex is further in the direction of the residual than the mean,
            up to this times the norm of the scores (or 1).

    Returns:
        at most (number of parts) + 1 vertices an example, affinely independent, in the dtype of the scores. The
        weights are differentiable; the gradient is exact where the active set stays the same, that is almost
        everywhere.

    Waits for the device in every iteration. Everything is computed in float64; see
    :mod:`structgrad.algorithms.active_set`.
    """
    target, argmax, show = _flat(structure, scores, mask)
    vertices, rows, weights = active_set.sparse_distribution(
        target, argmax, max_iterations=max_iterations, tolerance=tolerance
    )
    return SparseDistribution(show(vertices).to(scores.dtype), rows, weights.to(scores.dtype))


def project(
    structure: Structure,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    max_iterations: int | None = None,
    tolerance: float = 1e-11,
) -> Tensor:
    """The nearest point of conv(X), differentiable: ``[*batch, *parts]``; arguments as for :func:`sparsemap`."""
    target, argmax, show = _flat(structure, scores, mask)
    point = active_set.nearest_point(target, argmax, max_iterations=max_iterations, tolerance=tolerance)
    return show(point).to(scores.dtype).reshape(scores.shape)


def _flat(
    structure: Structure, scores: Tensor, mask: Tensor | None
) -> tuple[Tensor, active_set.Argmax, Callable[[Tensor], Tensor]]:
    """Scores as float64 vectors ``[B, P]``, the argmax over such vectors, and what shows them as parts."""
    structure.check(scores, mask)
    layout = structure.layout
    shape = scores.shape[-layout.ndim :]
    size = scores.shape[: -layout.ndim].numel()
    batched = scores.reshape(size, *shape)
    masks = None if mask is None else mask.expand(scores.shape).reshape(size, *shape)
    exists = layout.flatten(structure.parts(batched, masks))
    target = torch.where(exists, layout.flatten(batched), 0.0).double()

    def show(flat: Tensor) -> Tensor:
        return layout.unflatten(flat, shape)

    def argmax(directions: Tensor, rows: Tensor) -> Tensor:
        vertices = structure.argmax(show(directions), None if masks is None else masks[rows])
        return layout.flatten(vertices).double()

    return target, argmax, show


class ActiveSetProjection(Structure):
    """Gives a structure with an ``argmax`` its ``project`` and ``sparsemap`` by the active-set method.

    Sets with a closed-form projection need none of this.
    """

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Euclidean projection of the scores on conv(X), by the active-set method: ``[*batch, *parts]``, differentiable
        (see :mod:`structgrad.algorithms.active_set`).
        """
        return project(self, scores, mask)

    def sparsemap(self, scores: Tensor, mask: Tensor | None = None) -> SparseDistribution:
        """At most (number of parts) + 1 vertices an example whose mean is :meth:`project`, by the active-set method;
        ``*batch`` is flattened into rows.
        """
        return sparsemap(self, scores, mask)
