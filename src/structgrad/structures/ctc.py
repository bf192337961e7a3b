"""Labels with blanks against frames: connectionist temporal classification."""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse
from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph
from structgrad.structures import reading as readings
from structgrad.structures.base import UnsupportedError
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Layout
from structgrad.structures.lengths import checked

#: The move by which a path reaches its state: stay, go on from the previous state, or pass a blank.
_STAY, _STEP, _SKIP = range(3)
_MOVES = 3


class Ctc(Derivations):
    """Alignments of T frames with a sequence of U labels, with blanks between them (Graves et al.
    2006).

    The states of an alignment are the labels and the blanks around them: ``S = 2 U + 1`` states.
    State 2 u is the blank before label u, and state 2 u + 1 is label u. A path has one state for
    each frame. It starts in state 0 or 1 and ends in state S - 1 or S - 2. Between two frames there
    are three moves: it stays, it goes one state on, or it goes from a label to the next label past
    the blank between them. The third move needs two different labels.

    Parts are ``[T, S, 3]``. The part ``[t, s, m]`` says that frame t has state s, reached by move
    m: 0 stays, 1 goes one state on, 2 goes past a blank. In the first frame, state 0 counts as
    reached by move 0 and state 1 by move 1. The mask says which labels are equal (no move past the
    blank between them) and how long an example is. Absent frames and absent states are the last
    ones. :meth:`scores` makes scores and mask from log-probabilities of symbols.

    With these scores ``-log_partition`` is ``torch.nn.functional.ctc_loss``. The other oracles give
    the best alignment, the k best ones, samples, marginals and entropy. Every oracle is O(T U) an
    example.

    Raises:
        ValueError: from every oracle, for an even number of states; or (eager CPU code) if an
            example has no path because it has fewer frames than labels and forced blanks.
    """

    #: One part in every frame.
    constant_size: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layout = Layout("frames, states and moves", ("T", "S", "3"))

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n frames and n // 2 labels."""
        return (n, 2 * (n // 2) + 1, _MOVES)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; the number of states must be odd and that of moves 3."""
        self.layout.check(scores)
        if scores.shape[-2] % 2 == 0 or scores.shape[-1] != _MOVES:
            raise ValueError(
                f"scores of alignments with U labels have shape [..., T, 2 U + 1, {_MOVES}]; got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Parts that paths can use: no state lies before state 0, and only labels lie behind a
        blank.
        """
        state = torch.arange(scores.shape[-2], device=scores.device)
        moves = torch.stack([state >= 0, state >= 1, (state >= 3) & (state % 2 == 1)], -1)
        return super().parts(scores, mask) & moves

    def scores(
        self,
        log_probs: Tensor,
        targets: Tensor,
        frame_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        *,
        blank: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Scores and mask of the alignments of frames with labels.

        Args:
            log_probs: ``[*batch, T, V]``, scores of V symbols, one of which is the blank. They need
                not be normalised.
            targets: int64 ``[*batch, U]``, labels among the V symbols, without the blank. Entries
                beyond the length of an example may be anything, such as -1.
            frame_lengths: int64 ``[*batch]``; None: T.
            target_lengths: int64 ``[*batch]``; None: U.
            blank: the index of the blank.

        Returns:
            scores ``[*batch, T, S, 3]``, a view that the moves share, differentiable in
            ``log_probs``; and the mask, bool of the same shape.

        Raises:
            TypeError: unless lengths are integers.
            ValueError: in eager CPU code, for lengths out of range, or if an example has labels and
                no frame. Its mask would be that of an empty example, whose partition function is 1.
        """
        batch, frames = log_probs.shape[:-2], log_probs.shape[-2]
        heard, written = (
            torch.full(batch, most, device=log_probs.device) if lengths is None else checked(lengths, most, self.name)
            for lengths, most in ((frame_lengths, frames), (target_lengths, targets.shape[-1]))
        )
        refuse((heard == 0) & (written > 0), "has labels but no frame")
        states = 2 * targets.shape[-1] + 1
        if target_lengths is not None:
            position = torch.arange(targets.shape[-1], device=targets.device)
            targets = torch.where(position < written[..., None], targets, blank)
        symbols = targets.new_full((*targets.shape[:-1], states), blank)
        symbols[..., 1::2] = targets
        of_state = log_probs.gather(-1, symbols[..., None, :].expand(*log_probs.shape[:-1], states))
        everything = (*of_state.shape, _MOVES)
        mask = torch.ones(everything, dtype=torch.bool, device=log_probs.device)
        mask[..., 3::2, _SKIP] &= (targets[..., 1:] != targets[..., :-1])[..., None, :]
        if frame_lengths is not None:
            present = torch.arange(frames, device=log_probs.device) < frame_lengths[..., None]
            mask &= present[..., :, None, None]
        if target_lengths is not None:
            present = torch.arange(states, device=log_probs.device) < 2 * target_lengths[..., None] + 1
            mask &= present[..., None, :, None]
        return of_state[..., None].expand(everything), mask

    def read(self, vertex: Tensor) -> Tensor:
        """The state of every frame: int64 ``[*batch, T]``, -1 for absent frames.

        State 2 u is a blank, state 2 u + 1 is label u.
        """
        on = (vertex.detach() > 0).any(-1)
        return torch.where(on.any(-1), on.int().argmax(-1), -1)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        frames, states, _ = shape
        if reading.shape[-1] != frames:
            raise ValueError(f"the reading has {reading.shape[-1]} frames, and shape is {list(shape)}")
        readings.in_range(reading, states, "states")
        readings.without_gaps(reading, "states")
        before = torch.nn.functional.pad(reading, (1, 0))[..., :-1] if frames else reading
        frame = torch.arange(frames, device=reading.device).expand(reading.shape)
        at = torch.stack([frame, reading, reading - before], -1)
        return readings.entries(torch.where(reading[..., None] < 0, -1, at), shape)

    def covered(self, vertex: Tensor) -> Tensor:
        on = (vertex > 0).any(-1)
        frames, state = on.any(-1), torch.arange(on.shape[-1], device=on.device)
        states = 2 * (last(on.any(-2)) // 2) + 1  # includes the blank after the last label
        return frames[..., :, None, None] & (state < states[..., None])[..., None, :, None]

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """Refused: how long an example is leaves open which of its labels are equal; :meth:`scores` makes the mask."""
        raise UnsupportedError(
            "Ctc takes a mask, not lengths: the mask also says which labels are equal; "
            "Ctc().scores(..., frame_lengths, target_lengths) makes it"
        )

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(shape[0], shape[1])

    def _size(self, exists: Tensor) -> Tensor:
        stay, step, skip = exists.unbind(-1)
        shown = stay | step | skip
        frames, states = last(shown.any(-1)), last(shown.any(-2))
        return frames * (exists.shape[-2] // 2 + 1) + states // 2

    def enumerate(self, *shape: int) -> Tensor:
        """All alignments: ``[V, T, S, 3]``; without frames the empty one."""
        self.check_shape_listable(*shape)
        frames, states, _ = shape
        paths: list[list[tuple[int, int]]] = [[]]
        for t in range(frames):
            paths = [
                [*path, (s, move)]
                for path in paths
                for move in range(_MOVES)
                if (s := (path[-1][0] if t else 0) + move) < states and (move < _SKIP or (t > 0 and s % 2 == 1))
            ]
        paths = [path for path in paths if not frames or path[-1][0] >= states - 2]
        vertices = torch.zeros(len(paths), *shape, dtype=torch.float64)
        for vertex, path in zip(vertices, paths, strict=True):
            for t, (s, move) in enumerate(path):
                vertex[t, s, move] = 1
        return vertices


@functools.lru_cache(maxsize=64)
def _graph(frames: int, states: int) -> Hypergraph:
    """Built frame by frame. A node is the last state of a partial path. Size: ``frames * (U + 1) +
    labels``.
    """
    builder, labels = Builder(), states // 2
    state = np.arange(states)
    reached = np.full(states + 2, ZERO)  # with two states before the first
    ends = []
    for t in range(frames):
        if t:
            tails = np.stack([reached[2:], reached[1:-1], np.where(state % 2 == 1, reached[:-2], ZERO)], -1)
        else:
            tails = np.full((states, _MOVES), ZERO)
            tails[0, _STAY] = ONE
            tails[1:2, _STEP] = ONE
        parts = (t * states + state[:, None]) * _MOVES + np.arange(_MOVES)
        reached = np.concatenate([[ZERO, ZERO], builder.level(tails, ONE, parts)])
        ends.append(np.stack([reached[2::2], reached[1::2]], -1))  # a path ends in a blank or in the label before it
    goals = np.full((frames + 1, labels + 1), ZERO)
    goals[0, 0] = ONE
    if frames:
        goals[1:] = builder.level(np.concatenate(ends)).reshape(frames, labels + 1)
    return builder.build(goals.flatten())
