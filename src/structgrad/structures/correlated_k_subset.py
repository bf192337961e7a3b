"""k-subsets of a sequence with scores for pairs of neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.counted_bits import Chain
from structgrad.algorithms.eager import refuse
from structgrad.algorithms.k_best import best_first
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.derived import Gibbs
from structgrad.structures.layout import Vector
from structgrad.structures.lengths import checked


class CorrelatedKSubset(Gibbs):
    """k-hot vectors of n items, with indicators of neighbouring pairs (Paulus et al. 2020, B.5, eq.
    44).

    The 2n - 1 parts are ``[x_1 .. x_n, x_1 x_2 .. x_{n-1} x_n]``. Vertices, scores and masks have
    that shape. The only relaxation is ``exp_family``, the mean of the Gibbs distribution, by
    dynamic programming (Mezuman et al. 2013): O(n k) forward and backward. A pair exists if its two
    items exist. The mask may also remove a pair alone; the pair then has no score and is shown as
    0. In the perturbation model only the scores of items are perturbed (:meth:`noisy_parts`).

    Args:
        k: number of items, at least 1.

    Raises:
        TypeError: if k is not a whole number.
        ValueError: for k < 1; for an even number of parts; or (from every oracle, in eager CPU
            code) for an example with fewer than k items.
    """

    has_neighbour_pairs: ClassVar[bool] = True

    def __init__(self, k: int) -> None:
        check_count("k", k)
        self.k = k
        self.layout = Vector()

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n items and their pairs."""
        return (max(2 * n - 1, 1),)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; the number of parts must be odd."""
        self.layout.check(scores)
        if scores.shape[-1] % 2 == 0:
            raise ValueError(f"scores over n items and n - 1 pairs have shape [..., 2n - 1]; got {list(scores.shape)}")
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Items that exist, and pairs of which both items exist."""
        parts = super().parts(scores, mask)
        n = (scores.shape[-1] + 1) // 2
        items = parts[..., :n]
        return torch.cat([items, parts[..., n:] & items[..., 1:] & items[..., :-1]], -1)

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """The first so many items and their pairs."""
        n = (scores.shape[-1] + 1) // 2
        length = checked(lengths, n, self.name)[..., None]
        item = torch.arange(n, device=scores.device)
        return torch.cat([item < length, item[1:] < length], -1)

    def noisy_parts(self, scores: Tensor) -> Tensor:
        """The items. Random utilities do not perturb the pairs (Paulus et al. 2020, B.5)."""
        return torch.arange(scores.shape[-1], device=scores.device) < (scores.shape[-1] + 1) // 2

    def restrict(self, vertices: Tensor, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The vertices whose items exist; missing pairs are shown as 0."""
        exists = self.parts(scores, mask).unsqueeze(-2)
        n = (scores.shape[-1] + 1) // 2
        return vertices * exists, ~((vertices[..., :n] > 0) & ~exists[..., :n]).any(-1)

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Chain, Tensor, Tensor]:
        """The chain, checked scores (0 where a part is missing) in float64, and which parts exist."""
        self.check(scores, mask)
        exists = self.parts(scores, mask)
        n = (scores.shape[-1] + 1) // 2
        if n < self.k:
            raise ValueError(f"k = {self.k} items must be chosen, but scores {list(scores.shape)} have {n}")
        refuse(exists[..., :n].sum(-1) < self.k, f"has fewer than k = {self.k} items")
        wide = scores.double() if mask is None else scores.masked_fill(~exists, 0.0).double()
        return Chain(wide[..., :n], wide[..., n:], exists[..., :n], self.k, self.k), wide, exists

    def _with_pairs(self, items: Tensor, like: Tensor, exists: Tensor) -> Tensor:
        """Append the pairs: ``[*batch, n]`` -> ``[*batch, 2n - 1]``."""
        return (torch.cat([items, items[..., 1:] * items[..., :-1]], -1) * exists).to(like.dtype)

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The best vertex by the max-sum dynamic program, O(n k): ``[*batch, 2n - 1]``."""
        chain, _, exists = self._read(utility.detach(), mask)
        return self._with_pairs(chain.argmax(), utility, exists)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best vertices, exact: ``[*batch, k, 2n - 1]`` and ``[*batch, k]``.

        The same program keeps lists of k, at O(n k) for each entry of a list.
        """
        check_count("k", k)
        chain, wide, exists = self._read(scores, mask)
        items, real = chain.top_k(k)
        vertices, values = best_first(self._with_pairs(items, items, exists.unsqueeze(-2)) > 0, real, wide)
        return vertices.to(scores.dtype), values.to(scores.dtype)

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[*batch]``, O(n k)."""
        return self._read(scores, mask)[0].moments()[0].to(scores.dtype)

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Entropy of the Gibbs distribution in nats: ``[*batch]``, differentiable."""
        found = self._read(scores, mask)[0].entropy()
        return super().entropy(scores, mask) if found is None else found.to(scores.dtype)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact Gibbs sample an example, O(n k): ``[*batch, 2n - 1]``."""
        self.check(scores, mask)
        chain, _, exists = self._read(self._wide(scores.detach(), mask), mask)
        return self._with_pairs(chain.sample(n), scores, exists)

    def _wide(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Scores in float64, those of items less their largest, because all vertices have k items."""
        n = (scores.shape[-1] + 1) // 2
        items, pairs = scores.double().split([n, n - 1], -1)
        largest = torch.where(self.parts(scores, mask)[..., :n], items.detach(), -torch.inf).amax(-1, keepdim=True)
        return torch.cat([items - torch.where(largest.isfinite(), largest, 0.0), pairs], -1)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        chain, _, exists = self._read(scores, mask)
        log_z, items, pairs = chain.moments()
        return log_z, torch.cat([items, pairs], -1) * exists

    def read(self, vertex: Tensor) -> Tensor:
        """The items, ascending: int64 ``[*batch, k]``."""
        return super().read(vertex[..., : (vertex.shape[-1] + 1) // 2])

    def write(
        self, reading: Tensor | Sequence[Any], shape: Sequence[int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The same as for every structure; pairs that the mask removes are 0."""
        vertex = super().write(reading, shape)
        if mask is None:
            return vertex
        exists = self.parts(vertex, mask)
        n = (vertex.shape[-1] + 1) // 2
        refuse((vertex[..., :n] * ~exists[..., :n] > 0).any(-1), f"has parts that {self.name} does not have here")
        return vertex * exists

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        n = (shape[0] + 1) // 2
        readings.in_range(reading, n, "items")
        items = reading.sort(-1).values
        first, second = items[..., :-1], items[..., 1:]
        pairs = torch.where((first >= 0) & (second == first + 1), n + first, -1)
        return torch.cat([items, pairs], -1)

    def enumerate(self, *shape: int) -> Tensor:
        """All ``n choose k`` vertices: ``[V, 2n - 1]``."""
        (size,) = shape
        n = (size + 1) // 2
        self.check_listable(math.comb(n, self.k), size)
        chosen = torch.tensor(list(itertools.combinations(range(n), self.k)), dtype=torch.int64).reshape(-1, self.k)
        items = torch.zeros(len(chosen), n, dtype=torch.float64).scatter(-1, chosen, 1.0)
        return torch.cat([items, items[:, 1:] * items[:, :-1]], -1)
