"""Recursive algorithms over items whose trace and result determine one another: orderings and
trees.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse, values_can_be_read
from structgrad.algorithms.noise import wide_exponentials
from structgrad.structures.base import Noise, Structure, Trace, repeated


class ItemRecursion(Structure, abc.ABC):
    """A structure made by repeatedly choosing the smallest item and recursing on the rest.

    Scores are one number for each item, ``[*batch, n]``; vertices are ``[*batch, n, n]``
    (:attr:`vertex_layout`). So vertices are not linear in the scores, and there is no ``<x,
    scores>`` to maximise. ``argmax`` is the recursive algorithm applied to ``-utility``. Every
    vertex has one trace, so the distribution of the structure *is* that of its trace (Struminsky et
    al. 2021, Algorithm 3). ``sample`` and ``log_prob`` refer to this distribution instead of a
    Gibbs distribution.

    Let ``S(v)`` be the items among which v was the smallest, v included. Then, for rates
    ``exp(scores)``,

    - ``P(x) = prod_v rate_v / sum_{i in S(v)} rate_i``, and
    - given x, ``E_i = sum_{v: i in S(v)} D_v`` with independent ``D_v ~ Exp(sum_{i in S(v)}
      rate_i)``.
      D_v is the minimum of S(v) minus the minimum that was subtracted before.

    Every oracle takes O(n^2) time and memory an example. Items that the mask removes take no part.
    """

    is_ordinal: ClassVar[bool] = True

    @abc.abstractmethod
    def _recurse(self, keys: Tensor, exists: Tensor) -> Tensor:
        """The algorithm: choices ``[*batch, n]`` for finite ``keys`` ``[*batch, n]``, smallest
        first.

        Ties go to the earlier item.
        """

    @abc.abstractmethod
    def _show(self, choices: Tensor) -> Tensor:
        """The vertex of the choices: bool ``[*batch, n, n]``."""

    @abc.abstractmethod
    def _within(self, vertex: Tensor) -> Tensor:
        """Bool ``[*batch, n, n]``: ``[v, i]`` says that i is in S(v). Rows and columns of missing
        items are arbitrary.
        """

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return (reading.shape[-1],)

    def _shown(self, shape: torch.Size) -> torch.Size:
        return shape * 2

    def inner(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Always raises, because the value of a vertex is not linear in the scores."""
        raise self._lacks()

    def check_vertex(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> None:
        """Refuse a tensor that is not a vertex, where reading values is free.

        An item must be chosen in the order of the sets that contain it.
        """
        self._check_shown(vertex, scores.shape + scores.shape[-1:])
        if values_can_be_read(vertex):
            within = self._within(vertex.detach()) & self.parts(scores, mask).unsqueeze(-1)
            again = self.argmax(-within.sum(-2).to(scores.dtype), mask)
            refuse((again != vertex).flatten(-2).any(-1), f"is no vertex of {self.name}")

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The result of the recursive algorithm, largest utility first: ``[*batch, n, n]``, 0/1, no
        gradient.
        """
        self.check(utility, mask)
        exists = self.parts(utility, mask)
        keys = torch.where(exists, -utility.detach(), 0.0)
        return self._show(self._recurse(keys, exists)).to(utility.dtype)

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Run the recursive algorithm, smallest first, on ``exponentials`` ``[*batch, n]``.

        Returns:
            the vertex ``[*batch, n, n]`` and the choices ``[*batch, n]``.
        """
        self.check(exponentials, mask)
        exists = self.parts(exponentials, mask)
        choices = self._recurse(torch.where(exists, exponentials.detach(), 0.0), exists)
        return Trace(self._show(choices).to(exponentials.dtype), choices)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact sample of the trace's distribution for each example: ``[*batch, n, n]``, 0/1, no gradient."""
        scores = repeated(scores, n)
        self.check(scores, mask)
        # Gumbel noise, because exponential noise would overflow for scores below -600.
        utility = torch.where(self.parts(scores, mask), scores.detach(), 0.0) - wide_exponentials(scores).log()
        return self.argmax(utility, mask).to(scores.dtype)

    def log_prob(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probability of the one trace that gives ``vertex`` ``[*batch, n, n]``: ``[*batch]``,
        differentiable.
        """
        self.check(scores, mask)
        self.check_vertex(vertex, scores, mask)
        exists = self.parts(scores, mask)
        gain = torch.where(exists, scores, 0.0) - self._log_totals(self._within(vertex), scores, exists)
        return torch.where(exists, gain, 0.0).sum(-1)

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log P(T = trace)`` (Struminsky et al., Algorithm 3); it equals :meth:`log_prob` of the
        vertex.
        """
        return self.log_prob(trace.vertex, log_rates, mask)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """A fresh sample of ``E | T = trace``: ``[*batch, n]``, reparameterised in ``log_rates``; 1
        where missing.

        The step of an item is the one at which it is the smallest.
        """
        self.check(log_rates, mask)
        exists = self.parts(log_rates, mask)
        least, _ = noise or self.conditional_noise(trace, log_rates)
        within = self._within(trace.vertex) & exists.unsqueeze(-1)
        steps = least * (-self._log_totals(within, log_rates.double(), exists)).exp()
        total = torch.where(within, steps.unsqueeze(-1), 0.0).sum(-2)
        return torch.where(exists, total, 1.0)

    def _log_totals(self, within: Tensor, scores: Tensor, exists: Tensor) -> Tensor:
        """``log sum_{i in S(v)} exp(scores_i)`` for every v: ``[*batch, n]``; arbitrary for missing
        v.
        """
        finite = torch.where(exists, scores, 0.0).unsqueeze(-2)
        # A missing v has no items; a finite row keeps its gradient free of NaN.
        counted = within & exists.unsqueeze(-2) | ~exists.unsqueeze(-1)
        return torch.where(counted, finite, -torch.inf).logsumexp(-1)
