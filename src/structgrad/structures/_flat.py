"""Structures that read their parts as one vector, whatever their layout."""

from __future__ import annotations

from torch import Tensor

from structgrad.structures.base import Structure


class Flat(Structure):
    """Reads scores as vectors ``[*batch, D]`` and shows vectors as parts."""

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked flat scores ``[*batch, D]``, 0 where a part is missing, and which parts exist."""
        self.check(scores, mask)
        exists = self.layout.flatten(self.parts(scores, mask))
        flat = self.layout.flatten(scores)
        whole = mask is None and not self.layout.is_graph
        return flat if whole else flat.masked_fill(~exists, 0.0), exists

    def _show(self, flat: Tensor, like: Tensor) -> Tensor:
        """``[*batch, D]`` -> ``[*batch, *parts]``."""
        return self.layout.unflatten(flat, like.shape[like.dim() - self.layout.ndim :])
