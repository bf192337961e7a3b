"""Subsets of at most a given number of parts."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from structgrad.algorithms.capped_simplex import decompose_by_size, project_budget
from structgrad.algorithms.counted_bits import Chain
from structgrad.algorithms.k_best import best_first, best_of_cardinality, largest
from structgrad.common.ranges import check_count
from structgrad.structures.base import SparseDistribution
from structgrad.structures.family_subsets import Counted
from structgrad.structures.layout import Layout, LayoutName, make_layout


class BudgetSubset(Counted):
    """All 0/1 vectors with at most B ones (Correia et al. 2020, section 4 and appendix C).

    :meth:`argmax` takes the largest positive scores. The relaxation ``exp_family`` is the mean of
    the Gibbs distribution (O(D B), as for k-subsets). The relaxation ``euclidean`` is the
    projection on ``0 <= x <= 1, sum x <= B`` (O(D log D)). :meth:`sparsemap` splits the projection
    in closed form.

    Args:
        budget: B, at least 1. A budget above the number of parts is no constraint.
        layout: how the parts lie.

    Raises:
        TypeError: for a budget that is not a whole number.
        ValueError: for a budget below 1.
    """

    def __init__(self, budget: int, layout: LayoutName | Layout = "vector") -> None:
        check_count("budget", budget)
        self.budget = budget
        self.layout = make_layout(layout)

    def __repr__(self) -> str:
        return f"BudgetSubset(budget={self.budget}, layout={self.layout.name!r})"

    def _chain(self, flat: Tensor, exists: Tensor) -> Chain:
        return Chain(flat.double(), None, exists, 0, min(self.budget, flat.shape[-1]))

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The B largest of the positive utilities; among ties the first: ``[*batch, *parts]``."""
        flat, _ = self._read(utility.detach(), mask)
        chosen = largest(flat, min(self.budget, flat.shape[-1])) & (flat > 0)
        return self._show(chosen.to(flat.dtype), utility)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best subsets, exact: see :func:`best_of_cardinality`."""
        flat, exists = self._read(scores, mask)
        most = min(self.budget, flat.shape[-1])
        size = (exists & (flat > 0)).sum(-1).clamp(max=most)
        vertices, real = best_of_cardinality(flat, exists, k, size, most, exact=False)
        vertices, values = best_first(vertices, real, flat)
        return self._show(vertices.to(flat.dtype), scores), values

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``argmin ||x - scores||^2`` over ``0 <= x <= 1, sum x <= B``, exact:
        ``[*batch, *parts]``.

        ``clip(scores, 0, 1)`` if that is within the budget, else the projection with sum B.
        """
        flat, exists = self._read(scores, mask)
        return self._show(project_budget(flat, exists, self.budget), scores)

    def sparsemap(
        self, scores: Tensor, mask: Tensor | None = None, method: Literal["systematic", "sorted"] = "systematic"
    ) -> SparseDistribution:
        """At most D + 1 subsets within the budget whose mean is :meth:`project`, in closed form,
        O(D log D).

        The level sets of :class:`Subset` may exceed the budget. Systematic sampling gives only the
        sizes floor(sum) and ceil(sum).

        Args:
            scores: ``[*batch, *parts]``.
            mask: which parts exist.
            method: ``systematic`` takes cumulative sums modulo 1 in the order of the parts,
                ``sorted`` with the largest first.
        """
        flat, exists = self._read(scores, mask)
        point = project_budget(flat, exists, self.budget).reshape(flat.shape[:-1].numel(), flat.shape[-1])
        vertices, rows, weights = decompose_by_size(point, 0, self.budget, method)
        return SparseDistribution(self._show(vertices, scores), rows, weights)

    def enumerate(self, *shape: int) -> Tensor:
        """All subsets within the budget: ``[V, *parts]``."""
        parts = self.parts(torch.empty(shape)).flatten().nonzero()[:, 0].tolist()
        sizes = range(min(self.budget, len(parts)) + 1)
        self.check_listable(sum(math.comb(len(parts), size) for size in sizes), *shape)
        every = [chosen for size in sizes for chosen in itertools.combinations(parts, size)]
        full = torch.zeros(len(every), math.prod(shape), dtype=torch.float64)
        for row, chosen in enumerate(every):
            full[row, list(chosen)] = 1
        return self.layout.mirror(full.reshape(len(every), *shape))
