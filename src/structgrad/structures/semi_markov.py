"""Segmentations of a sequence into labelled segments."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse
from structgrad.algorithms.hypergraph import ONE, Builder, Hypergraph
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.family_dynamic_programs import Derivations
from structgrad.structures.layout import Layout
from structgrad.structures.lengths import checked


class SemiMarkov(Derivations):
    """Sequences of n positions cut into segments of bounded length, each with a label (Sarawagi and
    Cohen 2004).

    Parts are ``[n - 1, K, C, C]``. The part ``[i, k, c, d]`` is a segment of label d on the
    positions ``i + 1 .. i + 1 + k``. It follows a segment of label c that ends at position i. The
    first segment is position 0 alone. So with K = 1 these are the sequences of
    :class:`~structgrad.structures.LinearChain`, whose parts are transitions. A sequence of one
    position has no part. The caller adds up scores of labels, lengths and transitions.

    A segment that would end beyond the last position is not a part. The last position of an example
    is the last one at which an existing part ends. So for L positions the mask is True at ``i + 1 +
    k < L``. Every oracle is O(n K C^2) an example.

    Args:
        labels: C, at least 1.
        longest: K, the largest number of positions of a segment, at least 1.

    Raises:
        TypeError: for arguments that are not whole numbers.
        ValueError: for arguments below 1; from every oracle for scores of another shape, or (eager
            CPU code) if an example has no segmentation.
    """

    def __init__(self, labels: int, longest: int) -> None:
        check_count("labels", labels)
        check_count("longest", longest)
        self.labels, self.longest = labels, longest
        self.layout = Layout("segments", ("n - 1", "K", "C", "C"))

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n positions."""
        return (max(n - 1, 0), self.longest, self.labels, self.labels)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; K and C must also be those of the structure."""
        self.layout.check(scores)
        if scores.shape[-3:] != self.shape(2)[1:]:
            raise ValueError(
                f"scores over segments of {self.labels} labels, {self.longest} long at most, have shape "
                f"[..., n - 1, {self.longest}, {self.labels}, {self.labels}]; got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Segments that end within the sequence."""
        end = _ends(scores)
        return super().parts(scores, mask) & (end < scores.shape[-4])[:, :, None, None]

    def read(self, vertex: Tensor) -> Tensor:
        """The segments (first position, last position, label), in order: int64 ``[*batch, m, 3]``.

        They are -1 after the last one. A sequence of one position has no part that says its label,
        so it has no segment.
        """
        index = readings.members((vertex.detach() > 0).flatten(-4))
        at = readings.coordinates(index, vertex.shape[-4:])
        first, label = torch.zeros_like(at[..., :1, :3]), at[..., :1, 2]
        first = torch.where(label[..., None] < 0, -1, torch.cat([first[..., :2], label[..., None]], -1))
        start = at[..., 0] + 1
        later = torch.stack([start, start + at[..., 1], at[..., 3]], -1)
        return torch.cat([first, torch.where(index[..., None] < 0, -1, later)], -2)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        starts = torch.where(reading[..., 0] < 0, shape[0] + 1, reading[..., 0])
        start, end, label = reading.gather(-2, starts.argsort(-1)[..., None].expand(reading.shape)).unbind(-1)
        readings.in_range(label, self.labels, "labels")
        begins = (start[..., :1] < 0) | ((start[..., :1] == 0) & (end[..., :1] == 0))
        refuse(~begins.all(-1), "has a first segment that is not position 0 alone")
        follows = (start[..., 1:] < 0) | (start[..., 1:] == end[..., :-1] + 1)
        refuse(~follows.all(-1), "has segments that do not follow one another")
        at = torch.stack([start[..., 1:] - 1, (end - start)[..., 1:], label[..., :-1], label[..., 1:]], -1)
        return readings.entries(torch.where(start[..., 1:, None] < 0, -1, at), shape)

    def covered(self, vertex: Tensor) -> Tensor:
        end = _ends(vertex)
        last = torch.where(vertex.flatten(-2).any(-1), end, -1).flatten(-2)
        size = torch.nn.functional.pad(last, (1, 0), value=-1).amax(-1)
        return (end <= size[..., None, None])[..., None, None]

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """The segments that end within the first so many positions."""
        length = checked(lengths, scores.shape[-4] + 1, self.name)
        return (_ends(scores) + 1 < length[..., None, None])[..., None, None]

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return segment_graph(shape[0], self.longest, self.labels)

    def _size(self, exists: Tensor) -> Tensor:
        present = exists.flatten(-2).any(-1)
        end = _ends(exists)
        return torch.nn.functional.pad((present * (end + 1)).flatten(-2), (1, 0)).amax(-1)

    def enumerate(self, *shape: int) -> Tensor:
        """All segmentations: ``[V, n - 1, K, C, C]``."""
        self.check_shape_listable(*shape)
        steps = shape[0]
        found = []
        for size in range(steps + 1):
            for lengths in itertools.product(range(1, self.longest + 1), repeat=size):
                if sum(lengths) != steps:
                    continue
                for labels in itertools.product(range(self.labels), repeat=size + 1 if steps else 0):
                    vertex = torch.zeros(shape, dtype=torch.float64)
                    starts = itertools.accumulate((0, *lengths))
                    for start, length, before, label in zip(starts, lengths, labels, labels[1:], strict=False):
                        vertex[start, length - 1, before, label] = 1
                    found.append(vertex)
        return torch.stack(found) if found else torch.zeros(0, *shape, dtype=torch.float64)


def _ends(parts: Tensor) -> Tensor:
    """The position at which a segment ends, minus one: ``[n - 1, K]`` for ``[*batch, n - 1, K, C,
    C]``.
    """
    steps, longest = parts.shape[-4:-2]
    return torch.arange(steps, device=parts.device)[:, None] + torch.arange(longest, device=parts.device)


@functools.lru_cache(maxsize=64)
def segment_graph(steps: int, longest: int, labels: int) -> Hypergraph:
    """Built left to right. A node is a position and the label of the segment that ends there. Size:
    steps of an example.
    """
    builder, label = Builder(), np.arange(labels)
    ends = [builder.level(np.full((labels, 1), ONE))]
    for t in range(1, steps + 1):
        start = np.arange(max(t - longest, 0), t)
        before = np.stack([ends[i] for i in start])
        part = ((start[:, None] * longest + (t - 1 - start)[:, None]) * labels + label) * labels
        ends.append(builder.level(before.reshape(1, -1), ONE, part.reshape(1, -1) + label[:, None]))
    goals = builder.level(np.stack(ends))
    return builder.build([ONE, *goals[1:]])
