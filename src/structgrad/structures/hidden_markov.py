"""Hidden Markov models: sequences of states with a start."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse
from structgrad.algorithms.hypergraph import Hypergraph, filled
from structgrad.algorithms.scan import chain_total
from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation, log_sum
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Layout
from structgrad.structures.semi_markov import segment_graph


class HiddenMarkov(Derivations):
    """Sequences of n hidden states out of C (Rabiner 1989).

    Parts are the transitions ``[n, C, C]``: ``[t, c, d]`` says that position t has state d and
    position t - 1 has state c. No state precedes position 0; its parts are the row ``[0, 0, :]``. A
    position that touches no existing part is absent. Absent positions are the last ones: for L
    positions the mask is True at ``t < L``.

    :meth:`scores` makes scores from initial, transition and emission log-probabilities. Then
    ``log_partition`` is the log-likelihood of the observations and ``argmax`` the most likely
    sequence of states. ``sample`` draws a sequence from the posterior. :meth:`smoothing` and
    :meth:`filtering` give the posteriors of single states. A
    :class:`~structgrad.structures.LinearChain` is the same without a start, for scores that are not
    probabilities.

    Every oracle is O(n C^2) an example.

    Args:
        states: C, at least 1.

    Raises:
        TypeError: if states is not a whole number.
        ValueError: if there is no state; from every oracle for scores of another shape, or (eager
            CPU code) if an example has no sequence.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self, states: int) -> None:
        check_count("states", states)
        self.states = states
        self.layout = Layout("states", ("n", "C", "C"))

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n positions."""
        return (n, self.states, self.states)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; C must also be that of the structure."""
        self.layout.check(scores)
        if scores.shape[-1] != self.states:
            shape = f"[..., n, {self.states}, {self.states}]"
            raise ValueError(f"scores over {self.states} states have shape {shape}; got {list(scores.shape)}")
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """All transitions, but only the first row of the first position."""
        n, states, _ = scores.shape[-3:]
        behind = torch.arange(n, device=scores.device)[:, None] > 0
        first = torch.arange(states, device=scores.device) == 0
        return super().parts(scores, mask) & (behind | first)[..., None]

    def scores(self, initial: Tensor, transition: Tensor, emission: Tensor) -> Tensor:
        """Scores of transitions from the log-probabilities of a model.

        Args:
            initial: the state of position 0, ``[*batch, C]`` or broadcastable to it.
            transition: ``[*batch, n - 1, C, C]`` or broadcastable to it, e.g. ``[C, C]``; ``[c,
                d]`` is from c to d.
            emission: the observation at a position given its state, ``[*batch, n, C]``, n at least
                1.

        Returns:
            ``[*batch, n, C, C]``.
        """
        later = emission[..., 1:, None, :] + transition
        start = (initial + emission[..., 0, :])[..., None, None, :]
        start = torch.nn.functional.pad(start, (0, 0, 0, self.states - 1))
        batch = torch.broadcast_shapes(start.shape[:-3], later.shape[:-3])
        return torch.cat([start.expand(*batch, *start.shape[-3:]), later.expand(*batch, *later.shape[-3:])], -3)

    def smoothing(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Posterior of every state given all observations, ``p(z_t | x_1 ... x_n)``: ``[*batch, n,
        C]``.

        Forward-backward computes it (Baum et al. 1970). It is differentiable, and 0 at absent
        positions.
        """
        return self.marginals(scores, mask).sum(-2)

    def filtering(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Posterior of every state given the observations so far, ``p(z_t | x_1 ... x_t)``:
        ``[*batch, n, C]``.

        It is the forward pass, one step for each position. It is differentiable, and 0 at absent
        positions.
        """
        self.check(scores, mask)
        exists = self.parts(scores, mask)
        wide = filled(scores, exists)
        start = torch.arange(self.states, device=scores.device) > 0
        forward = start.double().mul(IMPOSSIBLE).expand(*scores.shape[:-3], self.states)
        posteriors = [forward[..., None, :][..., :0, :]]
        for t in range(scores.shape[-3]):
            forward = log_sum(forward[..., :, None] + wide[..., t, :, :], -2)
            present = exists[..., t, :, :].flatten(-2).any(-1)
            refuse(
                present & (forward.amax(-1) < IMPOSSIBLE / 2), f"has no vertex: {self.name} finds none among its parts"
            )
            posteriors.append((forward.softmax(-1) * present[..., None])[..., None, :])
        return torch.cat(posteriors, -2).to(scores.dtype)

    def read(self, vertex: Tensor) -> Tensor:
        """The state of every position: int64 ``[*batch, n]``, -1 for absent positions."""
        on = vertex.detach() > 0
        return torch.where(on.any((-2, -1)), on.any(-2).int().argmax(-1), -1)

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return self.shape(reading.shape[-1])

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        readings.in_range(reading, self.states, "states")
        readings.without_gaps(reading, "states")
        before = torch.nn.functional.pad(reading, (1, 0))[..., :-1] if shape[0] else reading  # the first row at first
        return readings.transitions(before, reading, shape)

    def covered(self, vertex: Tensor) -> Tensor:
        return vertex.flatten(-2).any(-1)[..., None, None]

    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        return chain_total(scores, self._size(exists), plus)  # in fewer steps than the graph has levels

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return segment_graph(shape[0], 1, self.states)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.flatten(-2).any(-1))

    def enumerate(self, *shape: int) -> Tensor:
        """All ``C^n`` sequences: ``[V, n, C, C]``."""
        self.check_listable(self.states ** shape[0], *shape)
        every = torch.tensor(list(itertools.product(range(self.states), repeat=shape[0])), dtype=torch.int64)
        every = every.reshape(self.states ** shape[0], shape[0])
        before = torch.nn.functional.pad(every, (1, 0))[:, :-1] if shape[0] else every
        one_hot = torch.nn.functional.one_hot
        return (one_hot(before, self.states)[..., :, None] * one_hot(every, self.states)[..., None, :]).double()
