"""Subsets: structures that read their parts as one vector in any layout, and those with a bound on
the size.
"""

from __future__ import annotations

import abc

from torch import Tensor

from structgrad.algorithms.counted_bits import Chain
from structgrad.structures.base import Structure
from structgrad.structures.derived import Gibbs


class Flat(Structure):
    """Reads scores as vectors ``[*batch, D]`` and shows vectors as parts."""

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked flat scores ``[*batch, D]``, 0 where a part is missing, and which parts exist."""
        self.check(scores, mask)
        exists = self.layout.flatten(self.parts(scores, mask))
        flat = self.layout.flatten(scores)
        whole = mask is None and self.layout.is_full
        return flat if whole else flat.masked_fill(~exists, 0.0), exists

    def _show(self, flat: Tensor, like: Tensor) -> Tensor:
        """``[*batch, D]`` -> ``[*batch, *parts]``."""
        return self.layout.unflatten(flat, like.shape[like.dim() - self.layout.ndim :])


class Counted(Flat, Gibbs, abc.ABC):
    """Subsets with a bounded number of parts. Their Gibbs distribution costs O(n k) for at most k
    of n parts.
    """

    @abc.abstractmethod
    def _chain(self, flat: Tensor, exists: Tensor) -> Chain:
        """The dynamic program that counts the subsets, in float64."""

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log of the sum of elementary symmetric polynomials of ``exp(scores)``, over the possible
        sizes.

        Returns:
            ``[*batch]``.
        """
        return self._chain(*self._read(scores, mask)).moments()[0].to(scores.dtype)

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Entropy of the Gibbs distribution in nats: ``[*batch]``, differentiable."""
        found = self._chain(*self._read(scores, mask)).entropy()
        return super().entropy(scores, mask) if found is None else found.to(scores.dtype)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact Gibbs sample an example, O(n k): ``[*batch, *parts]``."""
        flat, exists = self._read(scores.detach(), mask)
        return self._show(self._chain(flat, exists).sample(n).to(flat.dtype), scores)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        log_z, mean, _ = self._chain(*self._read(scores, mask)).moments()
        return log_z, self._show(mean, scores)
