"""A matroid: one member out of each team."""

from typing import ClassVar

import torch
from torch import Tensor

from structgrad.structures import ActiveSetProjection, Gibbs, KBest, OneHot, Structure, Trace, Vector
from structgrad.structures.base import Noise


class Teams(Gibbs, KBest, ActiveSetProjection, Structure):
    """Vectors of ``teams * members`` entries with one 1 in every team: a partition matroid.

    The order of the utilities alone decides the argmax. ``is_ordinal`` says so, and estimators for matroids
    (Gumbel-Rao) take it from there. Every oracle is that of ``OneHot``, team by team. Every member exists.

    Args:
        teams: number of teams.
    """

    constant_size: ClassVar[bool] = True
    is_ordinal: ClassVar[bool] = True
    noise: ClassVar[str | None] = "gumbel"

    def __init__(self, teams: int) -> None:
        self.teams, self.layout, self.one = teams, Vector(), OneHot()

    def shape(self, n: int) -> tuple[int, ...]:
        """N members a team."""
        return (self.teams * n,)

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores and mask, team by team."""
        self.check(scores, mask)
        exists = self.parts(scores, mask)
        return scores.unflatten(-1, (self.teams, -1)), exists.unflatten(-1, (self.teams, -1))

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The best of each team."""
        return self.one.argmax(*self._read(utility, mask)).flatten(-2)

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Teams are independent."""
        return self.one.log_partition(*self._read(scores, mask)).sum(-1)

    def sample(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """One of each team."""
        return self.one.sample(*self._read(scores, mask)).flatten(-2)

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """The first of each team."""
        trace = self.one.trace(*self._read(exponentials, mask))
        return Trace(trace.vertex.flatten(-2), trace.choices.flatten(-2))

    def _each(self, trace: Trace) -> Trace:
        return Trace(trace.vertex.unflatten(-1, (self.teams, -1)), trace.choices[..., None])

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """The sum over the teams."""
        each, exists = self._read(log_rates, mask)
        return self.one.trace_log_prob(self._each(trace), each, exists).sum(-1)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """Team by team; the noise has one exponential a step and one a part."""
        each, exists = self._read(log_rates, mask)
        steps, parts = noise or self.conditional_noise(trace, log_rates)
        split = steps[..., None], parts.unflatten(-1, (self.teams, -1))
        return self.one.conditional(self._each(trace), each, exists, split).flatten(-2)

    def enumerate(self, *shape: int) -> Tensor:
        """Every combination of members."""
        members = shape[0] // self.teams
        every = torch.cartesian_prod(*[torch.arange(members)] * self.teams).reshape(-1, self.teams)
        return torch.nn.functional.one_hot(every, members).flatten(-2).double()
