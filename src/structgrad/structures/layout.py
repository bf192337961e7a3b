"""How the parts of a structure lie in a tensor: a vector, a matrix, the edges of a graph, or an array of any shape.

A *part* is one entry of the score vector that a structure is linear in. Undirected edges are one part each, although
an adjacency matrix shows them twice; the layout is what knows about that, so that noise, inner products, KL terms and
gradients count each part once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

LayoutName = Literal["vector", "matrix", "directed", "undirected"]

#: The dimensions of the layouts that have a name; equal names are equal sizes.
_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "vector": ("n",),
    "matrix": ("n", "m"),
    "directed": ("n", "n"),
    "undirected": ("n", "n"),
}


class Layout:
    """Where the parts lie.

    ==============  =====================  ==========================================================
    name            shape of the parts     parts
    ==============  =====================  ==========================================================
    ``vector``      ``[n]``                every entry
    ``matrix``      ``[n, m]``             every entry
    ``directed``    ``[n, n]``             the entries off the diagonal; ``[i, j]`` is the edge i -> j
    ``undirected``  ``[n, n]``             the entries above the diagonal; vertices are shown symmetric
    your own        ``dimensions``         every entry
    ==============  =====================  ==========================================================

    Scores of an ``undirected`` structure are read above the diagonal only (as LAPACK reads one triangle of a symmetric
    matrix); what lies below it is never looked at. A model with directed scores averages both directions first, see
    :meth:`symmetrize`.

    A structure whose parts have another shape brings a layout of its own, e.g. transitions of a sequence of labels::

        Layout("transitions", ("n - 1", "C", "C"))

    **How parts are counted.** ``structure.parts(scores, mask)`` says which entries are parts that exist, each once;
    sums over parts (inner products, KL, log-densities, norms) go through it. Where only some entries of the array are
    parts, the structure overrides ``parts`` and intersects what this layout says (``Arborescence``: no edge into the
    root).

    **How they are shown.** A vertex has the shape of the scores, and every part is shown in its own entry. A layout
    that shows a part in several entries overrides :meth:`parts`, :meth:`mirror`, :meth:`flatten` and :meth:`unflatten`
    together, as ``undirected`` does.

    Args:
        name: one of the above, or a new one.
        dimensions: of a new one, a name for each; used in messages, and equal names must have equal sizes.

    Raises:
        ValueError: for an unknown name without dimensions, or dimensions for a known one.
    """

    def __init__(self, name: LayoutName | str, dimensions: Sequence[str] | None = None) -> None:
        if (name in _DIMENSIONS) == (dimensions is not None):
            known = ", ".join(_DIMENSIONS)
            raise ValueError(f"layout must be one of {known}, or a new name with its dimensions; got {name!r}")
        self.name = name
        self.dimensions = _DIMENSIONS[name] if dimensions is None else tuple(dimensions)

    def __repr__(self) -> str:
        known = self.name in _DIMENSIONS
        return f"Layout({self.name!r})" if known else f"Layout({self.name!r}, {self.dimensions})"

    @property
    def ndim(self) -> int:
        """Number of trailing dimensions that hold the parts of one example."""
        return len(self.dimensions)

    @property
    def is_graph(self) -> bool:
        """Whether parts are edges between nodes of one graph."""
        return self.name in ("directed", "undirected")

    def check(self, scores: Tensor) -> None:
        """Raise ``ValueError`` unless the trailing dimensions of ``scores`` can hold such parts."""
        sizes: dict[str, int] = {}
        shape = scores.shape[scores.dim() - self.ndim :]
        if scores.dim() < self.ndim or any(
            sizes.setdefault(name, size) != size for name, size in zip(self.dimensions, shape, strict=True)
        ):
            expected = ", ".join(("...", *self.dimensions))
            raise ValueError(f"scores over {self.name} parts have shape [{expected}]; got {list(scores.shape)}")

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which entries are parts that exist, each counted once.

        Args:
            scores: ``[*batch, *parts]``; only shape and device are used.
            mask: bool, broadcastable to ``scores``, False where a part is missing.

        Returns:
            bool ``[*batch, *parts]``, an expanded view where that is enough.
        """
        if self.is_graph:
            pairs = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            pairs = pairs.triu(1) if self.name == "undirected" else pairs.fill_diagonal_(False)
            exist = pairs if mask is None else mask & pairs
        else:
            exist = torch.ones((), dtype=torch.bool, device=scores.device) if mask is None else mask
        return exist.expand(scores.shape)

    def mirror(self, parts: Tensor) -> Tensor:
        """Show ``parts`` as a vertex is shown: undirected edges in both triangles, everything else unchanged.

        Differentiable: the gradient of an undirected edge is the sum of the gradients of its two entries.
        """
        if self.name != "undirected":
            return parts
        upper = parts.triu(1)
        return upper + upper.transpose(-1, -2)

    def symmetrize(self, scores: Tensor) -> Tensor:
        """Average both directions of every edge for ``undirected`` layouts (Paulus et al. 2020, D.4.2, D.5.2)."""
        if self.name != "undirected":
            return scores
        return (scores + scores.transpose(-1, -2)) / 2

    def flatten(self, parts: Tensor) -> Tensor:
        """``[*batch, *parts]`` -> ``[*batch, P]``: ``n * (n - 1) / 2`` entries for undirected edges, all otherwise."""
        if self.name == "undirected":
            row, column = torch.triu_indices(parts.shape[-2], parts.shape[-1], offset=1, device=parts.device)
            return parts[..., row, column]
        return parts.flatten(-self.ndim)

    def unflatten(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`flatten`: ``[*batch, P]`` -> ``[*batch, *parts]``, mirrored.

        Args:
            flat: ``[*batch, P]``.
            shape: the trailing part shape, for instance ``scores.shape[-2:]``.
        """
        if self.name == "undirected":
            row, column = torch.triu_indices(shape[0], shape[1], offset=1, device=flat.device)
            full = flat.new_zeros(*flat.shape[:-1], *shape)
            full[..., row, column] = flat
            return self.mirror(full)
        return flat.reshape(*flat.shape[:-1], *shape)
