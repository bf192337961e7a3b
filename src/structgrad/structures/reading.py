"""Vertices as a few integers: the common code of :meth:`Structure.read` and
:meth:`Structure.write`.

Integers are int64. -1 means none: in the surplus columns of a batch, and for an absent item.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse

#: Two values among the entries of a vertex: no entry, and an entry that no vertex of that shape
#: has.
NOTHING, NO_PART = -1, -2


def members(on: Tensor) -> Tensor:
    """The indices of the True entries, ascending: bool ``[*batch, P]`` -> ``[*batch, m]``, m the
    most in an example.
    """
    size = on.shape[-1]
    most = int(on.sum(-1).max()) if on.numel() else 0
    index = torch.where(on, torch.arange(size, device=on.device), size).sort(-1).values[..., :most]
    return torch.where(index < size, index, NOTHING)


def coordinates(index: Tensor, shape: Sequence[int]) -> Tensor:
    """The coordinates of flat indices into ``shape``: ``[*batch, m]`` -> ``[*batch, m, ndim]``; all
    -1 for none.
    """
    if not index.numel():
        return index.unsqueeze(-1).expand(*index.shape, len(shape))
    at = torch.stack(torch.unravel_index(index.clamp_min(0), tuple(shape)), -1)
    return torch.where(index.unsqueeze(-1) < 0, NOTHING, at)


def entries(at: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`coordinates`; :data:`NO_PART` for coordinates outside the shape."""
    size = torch.tensor(tuple(shape), dtype=torch.int64, device=at.device)
    flat = torch.zeros_like(at[..., 0])
    for dimension, extent in enumerate(shape):
        flat = flat * extent + at[..., dimension]
    flat = torch.where(((at < 0) | (at >= size)).any(-1), NO_PART, flat)
    return torch.where((at == NOTHING).all(-1), NOTHING, flat)


def vertices(index: Tensor, size: int) -> Tensor:
    """Bool ``[*batch, size]`` with the entries ``[*batch, m]``; refuses invalid and repeated
    entries.
    """
    refuse(((index < NOTHING) | (index >= size)).any(-1), "names a part that does not exist")
    count = torch.zeros(*index.shape[:-1], size + 1, dtype=torch.int64, device=index.device)
    count = count.scatter_add(-1, torch.where(index < 0, size, index), torch.ones_like(index))[..., :size]
    refuse((count > 1).any(-1), "names a part twice")
    return count > 0


def numbers(reading: Tensor | Sequence[object]) -> Tensor:
    """A reading as int64.

    Raises:
        TypeError: for numbers that are not integers.
    """
    given = torch.as_tensor(reading)
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise TypeError(f"a reading must be integers; got {given.dtype}")
    return given.long()


def in_range(reading: Tensor, below: int, what: str) -> None:
    """Refuse numbers ``[*batch, n]`` that are neither -1 nor from 0 to ``below - 1``."""
    refuse(((reading < NOTHING) | (reading >= below)).any(-1), f"has {what} outside 0 to {below - 1} (-1: none)")


def without_gaps(reading: Tensor, what: str) -> None:
    """Refuse ``[*batch, n]`` with a -1 before another number."""
    present = reading >= 0
    refuse((present[..., 1:] & ~present[..., :-1]).any(-1), f"has {what} after a -1; absent ones must be the last")


def spans_of(on: Tensor) -> Tensor:
    """The spans (i, j), both ends included, outer ones first: bool ``[*batch, n, n]`` ->
    ``[*batch, m, 2]``.
    """
    n = on.shape[-1]
    found = coordinates(members(on.flip(-1).flatten(-2)), (n, n))
    end = torch.where(found[..., 1] < 0, NOTHING, n - 1 - found[..., 1])
    return torch.stack([found[..., 0], end], -1)


def outer_first(spans: Tensor, n: int) -> Tensor:
    """``[*batch, m, 2 + more]`` in the order of :func:`spans_of`, where a left half comes right
    after its span.
    """
    key = spans[..., 0] * (n + 1) + n - spans[..., 1]
    key = torch.where(spans[..., 0] < 0, n * (n + 2), key)
    return spans.gather(-2, key.argsort(dim=-1, stable=True)[..., None].expand(spans.shape))


def halves(spans: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the halves of spans among the spans.

    The spans are ``[*batch, m, 2 + more]``, outer ones first. The results are indices of the left
    and the right halves, ``[*batch, m]`` each. Both are -1 for a single position, and
    :data:`NO_PART` if the spans are no binary tree.
    """
    start, end = spans[..., 0], spans[..., 1]
    count = spans.shape[-2]
    own = torch.arange(count, device=spans.device)
    left = (own + 1).expand(start.shape)
    middle = end.gather(-1, left.clamp_max(max(count - 1, 0)))
    right = own + 2 * (middle - start + 1)  # after the 2 k - 1 spans of a left half of k positions
    inside = (left < count) & (right > left) & (right < count)
    safe = torch.where(inside, right, 0)
    meets = (start.gather(-1, left.clamp_max(max(count - 1, 0))) == start) & (start.gather(-1, safe) == middle + 1)
    fits = inside & meets & (end.gather(-1, safe) == end)
    several = end > start
    left = torch.where(several, torch.where(fits, left, NO_PART), NOTHING)
    return left, torch.where(several, torch.where(fits, right, NO_PART), NOTHING)


def heads(vertex: Tensor) -> Tensor:
    """The row of the entry in every column: ``[*batch, n, n]`` -> ``[*batch, n]``, -1 for none."""
    on = vertex.detach() > 0
    if not on.numel():
        return torch.full(on.shape[:-1], NOTHING, device=on.device)
    return torch.where(on.any(-2), on.int().argmax(-2), NOTHING)


def entries_of_heads(reading: Tensor) -> Tensor:
    """The entries of ``[n, n]`` for the heads ``[*batch, n]`` that :func:`heads` returns."""
    n = reading.shape[-1]
    column = torch.arange(n, device=reading.device).expand(reading.shape)
    return entries(torch.stack([reading, torch.where(reading < 0, reading, column)], -1), (n, n))


def among_touched(vertex: Tensor) -> Tensor:
    """The pairs of touched nodes: ``[*batch, n, n]``, bool."""
    touched = (vertex > 0).any(-1) | (vertex > 0).any(-2)
    return touched[..., :, None] & touched[..., None, :]


def transitions(before: Tensor, after: Tensor, shape: Sequence[int]) -> Tensor:
    """Entries of ``[steps, C, C]`` for the labels before and after every step, ``[*batch, steps]``.

    There is no entry if a label is missing.
    """
    step = torch.arange(after.shape[-1], device=after.device).expand(after.shape)
    missing = (before < 0) | (after < 0)
    return entries(torch.where(missing[..., None], NOTHING, torch.stack([step, before, after], -1)), shape)


def at_spans(values: Tensor, spans: Tensor) -> Tensor:
    """The values ``[*batch, n, n]`` at the spans ``[*batch, m, 2]``: ``[*batch, m]``, -1 for no
    span.
    """
    n = values.shape[-1]
    index = spans[..., 0] * n + spans[..., 1]
    return torch.where(index < 0, NOTHING, values.flatten(-2).gather(-1, index.clamp_min(0)))


def labelled_spans(on: Tensor) -> Tensor:
    """Spans and their labels: bool ``[*batch, n, n, C]`` -> ``[*batch, m, 3]``, outer ones first."""
    spans = spans_of(on.any(-1))
    return torch.cat([spans, at_spans(on.int().argmax(-1), spans)[..., None]], -1)


def covered_words(vertex: Tensor) -> Tensor:
    """The spans that end at or before the last word of a tree ``[*batch, n, n, R]``: bool
    ``[*batch, 1, n, 1]``.
    """
    return (vertex > 0).any(-1).any(-2)[..., None, :, None]


def brackets(spans: Tensor | Sequence[Sequence[int]], names: Sequence[str] | None = None) -> str:
    """One tree in brackets, e.g. ``(0 (1 0) (0 (1 1) (1 2)))``.

    Every span has its label, followed by its halves or its word.

    Args:
        spans: ``[m, 3 or more]``, from ``read`` of grammars and constituency trees.
        names: names of the labels; None: their numbers.
    """
    rows = [tuple(map(int, row[:3])) for row in spans if int(row[0]) >= 0]
    text, open_ = "", []
    for i, j, label in rows:
        text += f"{' ' if text else ''}({label if names is None else names[label]}"
        open_.append(j)
        if i == j:
            text += f" {i}"
            while open_ and open_[-1] == j:
                text += ")"
                open_.pop()
    return text
