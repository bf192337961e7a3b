"""``lengths=`` beside ``mask=``: masks of the first so many items of sequences and graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from structgrad.algorithms.eager import values_can_be_read
from structgrad.structures.layout import Layout

_Method = TypeVar("_Method", bound=Callable[..., Any])

#: What oracles call the argument that has the shape of the parts.
_SCORES = ("scores", "utility", "exponentials", "log_rates", "p_scores")


def taking_lengths(method: _Method) -> _Method:
    """A method ``(..., scores, ..., mask=None)`` of a structure that takes the keyword ``lengths`` as well."""
    signature = inspect.signature(method)
    places = {name: place for place, name in enumerate(signature.parameters)}
    found = [name for name in _SCORES if name in places]
    if not found or "mask" not in places or "lengths" in places:
        return method
    scores = found[0]

    @functools.wraps(method)
    def taking(*arguments: Any, **named: Any) -> Any:
        lengths = named.pop("lengths", None)
        if lengths is None:
            return method(*arguments, **named)
        positional = list(arguments)
        if len(positional) > places["mask"]:
            mask = positional[places["mask"]]
            positional[places["mask"]] = None
        else:
            mask = named.pop("mask", None)
        given = positional[places[scores]] if len(positional) > places[scores] else named[scores]
        mask = positional[0].mask_from(mask, lengths, given)
        if len(positional) > places["mask"]:
            positional[places["mask"]] = mask
        else:
            named["mask"] = mask
        return method(*positional, **named)

    keyword = inspect.Parameter("lengths", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    others = list(signature.parameters.values())
    behind = [p for p in others if p.kind is inspect.Parameter.VAR_KEYWORD]
    taking.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in others if p not in behind), keyword, *behind]
    )
    return taking  # type: ignore[return-value]


def checked(lengths: Tensor, most: int, name: str) -> Tensor:
    """Refuse what are no lengths up to ``most``.

    Raises:
        TypeError: unless they are integers.
        ValueError: for negative and too large ones, where values can be read.
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths are a tensor of integers; got {kind}")
    if values_can_be_read(lengths) and bool(((lengths < 0) | (lengths > most)).any()):
        worst = lengths[(lengths < 0) | (lengths > most)].flatten()[0]
        raise ValueError(f"lengths of {name} are from 0 to {most} for these scores; got {int(worst)}")
    return lengths


def mask_of(layout: Layout, lengths: Tensor, scores: Tensor, name: str) -> Tensor | None:
    """The mask of examples of the first so many items.

    A dimension ``n`` of the parts ends at the length, a dimension ``n - 1`` one earlier. Where there are dimensions
    ``n`` and ``m``, lengths are ``[*batch, 2]``.

    Args:
        layout: how the parts lie.
        lengths: int64 ``[*batch]``, or ``[*batch, 2]``.
        scores: ``[*batch, *parts]``; only shape and device are used.
        name: of the structure, for messages.

    Returns:
        bool ``[*batch, *parts]``, with 1 for dimensions without a length; None if no dimension has one.
    """
    kinds = [d.removesuffix(" - 1") for d in layout.dimensions]
    if "n" not in kinds:
        return None
    if "m" not in kinds:
        lengths = lengths[..., None]
    elif lengths.shape[-1:] != (2,):
        raise ValueError(f"lengths of {name} are [..., 2], for rows and columns; got {list(lengths.shape)}")
    mask = torch.ones((), dtype=torch.bool, device=scores.device)
    shape = scores.shape[scores.dim() - layout.ndim :]
    for at, (dimension, kind) in enumerate(zip(layout.dimensions, kinds, strict=True)):
        if kind not in ("n", "m"):
            continue
        less = int(dimension != kind)
        length = checked(lengths[..., "nm".index(kind)], shape[at] + less, name)
        below = torch.arange(shape[at], device=scores.device) < length[..., None] - less
        mask = mask & below.reshape(*below.shape[:-1], *[1] * at, -1, *[1] * (layout.ndim - 1 - at))
    return mask
