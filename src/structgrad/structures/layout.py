"""How the parts of a structure lie in a tensor: a vector, a matrix, the edges of a graph, or an
array of any shape.

A *part* is one entry of the score vector in which a structure is linear. An undirected edge is one
part, although an adjacency matrix shows it twice. The layout knows this, so that noise, inner
products, KL terms and gradients count each part once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

LayoutName = Literal["vector", "matrix", "directed", "undirected"]
#: Equal weights of both directions of an edge.
AVERAGE = (0.5, 0.5)


class Layout:
    """Where the parts lie.

    | class | shape of the parts | parts |
    |---|---|---|
    | :class:`Vector` | ``[n]`` | every entry |
    | :class:`Matrix` | ``[n, m]`` | every entry |
    | :class:`Directed` | ``[n, n]`` | the entries off the diagonal; ``[i, j]`` is the edge i -> j |
    | :class:`Undirected` | ``[n, n]`` | the entries above the diagonal; vertices are shown symmetric |
    | ``Layout(...)`` | ``dimensions`` | every entry |
    | your own subclass | ``dimensions`` | the entries that its ``parts`` returns |

    A structure whose parts fill an array of another shape brings a layout of its own, e.g.
    transitions of a sequence of labels::

        Layout("transitions", ("n - 1", "C", "C"))

    **How parts are counted.** ``structure.parts(scores, mask)`` says which entries are parts that
    exist, each once. Sums over parts (inner products, KL, log-densities, norms) use it. If only
    some entries of the array are parts, the structure overrides ``parts`` and intersects it with
    the layout's parts (``Arborescence``: no edge into the root).

    **How they are shown.** A vertex has the shape of the scores, and every part is shown in its own
    entry. A subclass that shows a part in several entries overrides :meth:`parts`, :meth:`mirror`,
    :meth:`flatten` and :meth:`unflatten` together, as :class:`Undirected` does. Its
    :meth:`pull_back` then follows from its :meth:`mirror`.

    Args:
        name: the name in messages.
        dimensions: a name for each dimension of the parts. Messages use them, and equal names must
            have equal sizes.
    """

    #: Whether parts are edges between nodes of one graph.
    is_graph: ClassVar[bool] = False

    def __init__(self, name: str, dimensions: Sequence[str]) -> None:
        self.name = name
        self.dimensions = tuple(dimensions)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.dimensions})"

    @property
    def ndim(self) -> int:
        """Number of trailing dimensions that hold the parts of one example."""
        return len(self.dimensions)

    @property
    def is_full(self) -> bool:
        """Whether every entry is a part."""
        return type(self).parts is Layout.parts

    @property
    def is_mirrored(self) -> bool:
        """Whether some part is shown in several entries."""
        return type(self).mirror is not Layout.mirror

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
        exist = torch.ones((), dtype=torch.bool, device=scores.device) if mask is None else mask
        return exist.expand(scores.shape)

    def mirror(self, parts: Tensor) -> Tensor:
        """Show ``parts`` as a vertex is shown, a linear map: ``[*batch, *parts]`` ->
        ``[*batch, *parts]``.

        It is differentiable. Entries that are no parts are not read. Here every part is shown where
        it lies.
        """
        return parts

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The transpose of :meth:`mirror`: turns a gradient for the shown entries into one for the
        parts.

        Args:
            gradient: ``[*batch, *parts]``, one number for each shown entry.

        Returns:
            ``[*batch, *parts]``: for every part the sum over the entries that show it.
        """
        if not self.is_mirrored:
            return gradient
        with torch.enable_grad():
            parts = torch.zeros_like(gradient, requires_grad=True)
            shown = self.mirror(parts)
        (out,) = torch.autograd.grad(shown, parts, gradient, create_graph=gradient.requires_grad)
        return out

    def symmetrize(self, scores: Tensor, weights: tuple[float, float] = AVERAGE) -> Tensor:
        """One score for both directions of every edge, if edges have no direction. Others do not
        change. It stands above the diagonal, where scores of edges without a direction are read.

        Args:
            scores: ``[*batch, *parts]``, directed.
            weights: of the scores of i -> j and of j -> i, where i < j. By default they are
                averaged.
        """
        return scores

    def flatten(self, parts: Tensor) -> Tensor:
        """``[*batch, *parts]`` -> ``[*batch, P]``, each part once."""
        return parts.flatten(-self.ndim)

    def unflatten(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`flatten`, in the form of a vertex: ``[*batch, P]`` -> ``[*batch,
        *parts]``.

        Args:
            flat: ``[*batch, P]``.
            shape: the trailing part shape, for instance ``scores.shape[-2:]``.
        """
        return flat.reshape(*flat.shape[:-1], *shape)


class _Named(Layout):
    """A layout of this module, which has no options."""

    _name: ClassVar[str]
    _dimensions: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__(self._name, self._dimensions)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Vector(_Named):
    """``[n]``; every entry is a part."""

    _name, _dimensions = "vector", ("n",)


class Matrix(_Named):
    """``[n, m]``; every entry is a part."""

    _name, _dimensions = "matrix", ("n", "m")


class Directed(_Named):
    """``[n, n]``; the parts are the entries off the diagonal, and ``[i, j]`` is the edge i -> j."""

    _name, _dimensions = "directed", ("n", "n")
    is_graph: ClassVar[bool] = True

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :class:`Layout`."""
        pairs = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).fill_diagonal_(False)
        return (pairs if mask is None else mask & pairs).expand(scores.shape)


class Undirected(_Named):
    """``[n, n]``; the parts are the entries above the diagonal, and vertices are shown symmetric.

    Scores are read above the diagonal only (as LAPACK reads one triangle of a symmetric matrix).
    Entries below it are never read, so independent noise over the full matrix is right. A model
    with directed scores averages or weighs both directions first; see :meth:`symmetrize`.
    """

    _name, _dimensions = "undirected", ("n", "n")
    is_graph: ClassVar[bool] = True

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :class:`Layout`."""
        pairs = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return (pairs if mask is None else mask & pairs).expand(scores.shape)

    def mirror(self, parts: Tensor) -> Tensor:
        """Every edge in both triangles."""
        upper = parts.triu(1)
        return upper + upper.transpose(-1, -2)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The sum of the gradients of both entries of every edge."""
        return (gradient + gradient.transpose(-1, -2)).triu(1)

    def symmetrize(self, scores: Tensor, weights: tuple[float, float] = AVERAGE) -> Tensor:
        """See :class:`Layout` (Paulus et al. 2020, D.4.2, D.5.2)."""
        forward, backward = weights
        return forward * scores + backward * scores.transpose(-1, -2)

    def flatten(self, parts: Tensor) -> Tensor:
        """``[*batch, n, n]`` -> ``[*batch, n (n - 1) / 2]``."""
        row, column = torch.triu_indices(parts.shape[-2], parts.shape[-1], offset=1, device=parts.device)
        return parts[..., row, column]

    def unflatten(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """``[*batch, n (n - 1) / 2]`` -> ``[*batch, n, n]``, symmetric."""
        row, column = torch.triu_indices(shape[0], shape[1], offset=1, device=flat.device)
        full = flat.new_zeros(*flat.shape[:-1], *shape)
        full[..., row, column] = flat
        return self.mirror(full)


_LAYOUTS: dict[str, type[_Named]] = {kind._name: kind for kind in (Vector, Matrix, Directed, Undirected)}


def make_layout(layout: LayoutName | Layout) -> Layout:
    """The layout with this name; a Layout object is returned as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(layout, Layout):
        return layout
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, or a Layout; got {layout!r}")
    return _LAYOUTS[layout]()


__all__ = ["Directed", "Layout", "LayoutName", "Matrix", "Undirected", "Vector", "make_layout"]
