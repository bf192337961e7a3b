"""Scores at the ends of the number format beside ordinary ones, as models mask with the lowest number.

Sums of such scores lose all digits of the others. If every vertex needs a part with the lowest
score (padding of a sequence, say), float64 no longer tells the vertices apart. The oracles are
therefore asked for scores that are nearer and give the same result. Vertices then rank by the
number of their far parts first, and a gap of that size has probability 0 in either case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from structgrad.algorithms.eager import magnitude, refuse, values_can_be_read

if TYPE_CHECKING:
    from structgrad.structures.base import Structure

_Method = TypeVar("_Method", bound=Callable[..., Any])

#: Scores beyond this are far. Nearer ones leave float64 at least six digits after the point.
_FAR = 1e10
#: Scores beyond this leave float64 less than one digit after the point.
_LOST = 1e15
#: Means of vertices are that far from a whole number of far parts by rounding.
_ROUNDING = 1e-6
#: Oracles of one score that are functions of it alone, and those whose result contains the value of vertices.
_ORACLES = frozenset({"argmax", "marginals", "sample", "entropy", "project", "sparsemap", "minimum_bayes_risk"})
_VALUED = frozenset({"log_partition", "log_prob", "top_k"})
#: Oracles of two scores.
_PAIRS = frozenset({"cross_entropy", "kl", "renyi"})


@dataclass(frozen=True)
class Near:
    """Scores in the place of others.

    Attributes:
        scores: ``[*batch, *parts]``, differentiable with the same derivatives.
        sign: float64 ``[*batch, *parts]``, -1 or 1 where a far score was moved and 0 elsewhere; None if none was.
        gap: float64 ``[*batch]``, how far it was moved; None if none was.
    """

    scores: Tensor
    sign: Tensor | None = None
    gap: Tensor | None = None

    def corrected(self, value: Tensor, vertex: Tensor) -> Tensor:
        """The value of vertices by the scores as they were, from their value by these.

        Args:
            value: ``[*batch]``, or ``[*batch, k]`` of k vertices.
            vertex: ``[*batch, *parts]`` or ``[*batch, k, *parts]``; also a difference of two, or a mean.
        """
        if self.sign is None or self.gap is None:
            return value
        ndim = self.scores.dim() - self.gap.dim()
        several = vertex.dim() > self.scores.dim()
        sign, gap = (self.sign.unsqueeze(-ndim - 1), self.gap[..., None]) if several else (self.sign, self.gap)
        count = (torch.where(sign != 0, vertex.double(), 0.0) * sign).flatten(-ndim).sum(-1)
        return (value.double() + torch.where(count.abs() < _ROUNDING, 0.0, count) * gap).to(value.dtype)


def keeping_digits(name: str, oracle: _Method) -> _Method:
    """The oracle with this name, right for scores at the ends of the number format (in eager CPU code).

    Raises (the oracle):
        ValueError: if far scores of different sizes leave float64 no digits of the others.
    """
    signature = inspect.signature(oracle)
    places = {key: place for place, key in enumerate(signature.parameters)}
    keys = [key for key in ("scores", "utility", "p_scores", "q_scores") if key in places]
    if name not in _ORACLES | _VALUED | _PAIRS | {"expected_hamming"} or not keys or "mask" not in places:
        return oracle

    @functools.wraps(oracle)
    def exact(*arguments: Any, **named: Any) -> Any:
        given: list[Any] = [arguments[places[k]] if places[k] < len(arguments) else named.get(k) for k in keys]
        if not any(map(_has_far, given)):
            return oracle(*arguments, **named)
        bound = signature.bind(*arguments, **named)
        structure, mask = arguments[0], bound.arguments.get("mask")
        if not structure.is_linear or "argmax" not in structure.oracles:
            return oracle(*arguments, **named)
        if name in _PAIRS:
            p, q = torch.broadcast_tensors(*given)
            near = _pair(structure, p, q, mask)
        else:
            near = [_bring(structure, scores, mask) for scores in given]
        bound.arguments.update(zip(keys, (n.scores for n in near), strict=True))
        result = oracle(*bound.args, **bound.kwargs)
        if name not in _VALUED:
            return result
        if name == "top_k":
            vertices, values = result
            return vertices, near[0].corrected(values, vertices)
        best = structure.argmax(near[0].scores, mask)
        return near[0].corrected(result, best if name == "log_partition" else bound.arguments["vertex"] - best)

    return exact  # type: ignore[return-value]


def brought_near(structure: Structure, scores: Tensor, mask: Tensor | None, margin: float = 0.0) -> Near:
    """The scores brought near, if reading values is free; as they are otherwise.

    Args:
        structure: a linear one with an argmax.
        scores: ``[*batch, *parts]``.
        mask: which parts exist.
        margin: what may be added to each score without making up for a far part.
    """
    return _bring(structure, scores, mask, margin=margin) if _has_far(scores) else Near(scores)


def near_scores(structure: Structure, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with the same vertices and projections, for code that waits for any device anyway."""
    return _bring(structure, scores, mask).scores if _is_far(scores) else scores


def _has_far(scores: Any) -> bool:
    """Whether there may be a far score, if reading values is free."""
    return isinstance(scores, Tensor) and values_can_be_read(scores) and _is_far(scores)


def _is_far(scores: Tensor) -> bool:
    """Whether there may be a far score; NaN (in a missing part) says that there may."""
    return scores.dtype in (torch.float32, torch.float64) and not magnitude(scores) <= _FAR


def _bring(
    structure: Structure, scores: Tensor, mask: Tensor | None, among: Tensor | None = None, margin: float = 0.0
) -> Near:
    """Far scores of one size brought near, in every example (``among`` ``[*batch]``) that has them."""
    structure.check(scores, mask)
    over = tuple(range(-structure.layout.ndim, 0))
    exists = structure.parts(scores, mask)
    size = torch.where(exists, scores.detach().abs().double(), 0.0)
    far = size > _FAR
    most = size.amax(over, keepdim=True)
    ordinary = torch.where(far, 0.0, size).amax(over, keepdim=True)
    # The others cannot make up for one far part, and not in e^10000 ways.
    near = 4 * (ordinary + margin) * size[(0,) * (size.dim() - len(over))].numel() + 1e4
    movable = far.any(over, keepdim=True) & ~(far & (size < most)).any(over, keepdim=True) & (near < most)
    if among is not None:
        movable = movable & among.reshape(movable.shape)
    lost = (far.any(over, keepdim=True) & ~movable & (most > _LOST) & (ordinary > 0)).flatten(-len(over)).any(-1)
    if bool(lost.any()):
        of_far = torch.where(exists, scores.detach().double() / most.clamp_min(_LOST) * _FAR / 2, 0.0)
        needed = (far & (structure.argmax(of_far, mask) > 0)).flatten(-len(over)).any(-1)
        refuse(
            lost & needed,
            f"has scores of different sizes beyond {_LOST:.0e} that its best vertex needs, and no digits "
            "of the others are left: mask parts, or give all of them one number",
        )
    moved = far & movable
    sign = torch.where(moved, scores.detach().double().sign(), 0.0)
    # The difference is 0 and passes the derivative.
    brought = torch.where(moved, (sign * near).to(scores.dtype) + (scores - scores.detach()), scores)
    gap = torch.where(movable, most - near, 0.0).flatten(-len(over)).squeeze(-1)
    return Near(brought, sign, gap)


def _pair(structure: Structure, p: Tensor, q: Tensor, mask: Tensor | None) -> list[Near]:
    """Both scores brought near, in the examples whose far parts are the same in both."""
    one, other = (_bring(structure, scores, mask) for scores in (p, q))
    assert one.sign is not None
    assert other.sign is not None
    same = (one.sign == other.sign).flatten(-structure.layout.ndim).all(-1)
    return [_bring(structure, scores, mask, same) for scores in (p, q)]
