"""The objectives of the toy problems: functions of one vertex.

:data:`RELEASED` holds the objectives of the code that Struminsky et al. (2021) released.
:data:`OURS` holds our own; each has a known best value. If a relaxed vertex exists, they are
defined on it and agree with the expectation under independent parts. :class:`Quadratic` works with
any structure.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from structgrad.data import DamagedDataError, MissingDataError
from structgrad.structures import (
    Alignment,
    Arborescence,
    BinaryTree,
    Constituency,
    DagPath,
    LinearChain,
    Matching,
    Permutation,
    ProjectiveTree,
    SemiMarkov,
    SpanningTree,
)
from structgrad.structures.base import Structure


def childless_root(vertices: Tensor) -> Tensor:
    """Fraction of the nodes that are not children of the root, node 0: ``[N, n, n] -> [N]``, 0 at
    best.
    """
    return 1 - vertices[:, 0].sum(-1) / (vertices.shape[-1] - 1)


def height(vertices: Tensor) -> Tensor:
    """Number of edges on the longest path from the root of a tree: ``[N, n, n] -> [N]``.

    The best value is ``floor(log2 n)``. It is defined on hard vertices only.
    """
    reached, total = torch.ones_like(vertices[:, 0]), vertices.new_zeros(len(vertices))
    for _ in range(vertices.shape[-1] - 1):
        # After k rounds, the nodes that have an ancestor k edges above.
        reached = ((reached.unsqueeze(1) @ vertices).squeeze(1) > 0).to(vertices.dtype)
        total = total + reached.amax(-1)
    return total


def far_from_star(vertices: Tensor) -> Tensor:
    """``1 - sum of degree^2 / (n (n - 1))`` of a spanning tree: ``[N, n, n] -> [N]``.

    It is 0 for each of the n stars.
    """
    n = vertices.shape[-1]
    return 1 - vertices.sum(-1).square().sum(-1) / (n * (n - 1))


def unevenness(vertices: Tensor) -> Tensor:
    """Mean distance of the columns matched with neighbouring rows: ``[N, n, n] -> [N]``.

    It is 1 for the identity and its reverse.
    """
    n = vertices.shape[-1]
    column = torch.arange(n, device=vertices.device, dtype=vertices.dtype)
    distance = (column[:, None] - column).abs()
    return ((vertices[:, :-1] @ distance) * vertices[:, 1:]).flatten(1).sum(-1) / (n - 1)


def changes(vertices: Tensor) -> Tensor:
    """Fraction of the neighbouring positions with different labels: ``[N, n - 1, C, C] -> [N]``, 0
    at best.
    """
    return 1 - vertices.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / vertices.shape[1]


def number(vertices: Tensor) -> Tensor:
    """Number of parts, divided by the largest possible number along the first dimension of the
    parts: ``[N]``.

    For segments with labels ``[N, n - 1, K, C, C]`` the best value is that at which the longest
    segments cover everything.
    """
    return vertices.flatten(1).sum(1) / vertices.shape[1]


def detour(vertices: Tensor) -> Tensor:
    """Cells of a path beyond the least number, divided by the largest number: ``[N, n, n] -> [N]``,
    0 for the diagonal.
    """
    n = vertices.shape[-1]
    return (vertices.sum((-2, -1)) - n) / (n - 1)


def left_branches(vertices: Tensor) -> Tensor:
    """Fraction of the spans of several positions that do not end with the sequence:
    ``[N, n, n, C] -> [N]``.

    It is 0 for the tree that branches to the right only, and ``(n - 2) / (n - 1)`` for its mirror
    image.
    """
    n = vertices.shape[-2]
    spans = vertices.sum(-1).triu(1)
    return 1 - spans[..., -1].sum(-1) / (n - 1)


def fewer_children(vertices: Tensor) -> Tensor:
    """Minus the largest out-degree of any node: ``[N, n, n] -> [N]``, ``1 - n`` for a star out of the root."""
    return -vertices.sum(-1).amax(-1)


def levels(vertices: Tensor) -> Tensor:
    """Minus the number of levels of a tree: ``[N, n, n] -> [N]``, ``-n`` for a list. Hard vertices only."""
    return -height(vertices) - 1


def away_from_first(vertices: Tensor) -> Tensor:
    """Fraction of the ends of edges of a spanning tree that are not node 0: ``[N, n, n] -> [N]``,
    1/2 for its star.
    """
    return 1 - vertices[:, 0].sum(-1) / (2 * (vertices.shape[-1] - 1))


def off_diagonal(vertices: Tensor) -> Tensor:
    """Minus the number of fixed points of a permutation: ``[N, n, n] -> [N]``, ``-n`` for the identity."""
    return -vertices.diagonal(dim1=-2, dim2=-1).sum(-1)


class Quadratic(nn.Module):
    """``<a, x> + |B x|^2 / r`` of a vertex, with a number in a and a column of B for each entry.

    Without a file a is standard normal and so is B, which has r = 4 rows. The sum is then divided
    by the square root of the number of entries. They are the same for all runs.

    Args:
        shape: shape of a vertex.
        file: ``.npz`` with ``linear`` ``[*shape]`` and, optional, ``square`` ``[r, *shape]``, which
            are a and B.

    Raises:
        MissingDataError: if there is no such file.
        DamagedDataError: if it has no such arrays, of finite real numbers.
    """

    linear: Tensor
    square: Tensor

    def __init__(self, shape: tuple[int, ...], file: str | Path | None = None) -> None:
        super().__init__()
        if file is None:
            generator = torch.Generator().manual_seed(23)
            size = torch.Size(shape).numel()
            linear = torch.randn(size, generator=generator) / size**0.5
            square = torch.randn(size, 4, generator=generator) / size**0.25
        else:
            linear, square = _coefficients(Path(file), shape)
        self.register_buffer("linear", linear, persistent=False)
        self.register_buffer("square", square, persistent=False)

    def forward(self, vertices: Tensor) -> Tensor:
        """``[N, *shape] -> [N]``."""
        flat = vertices.flatten(1)
        return flat @ self.linear + (flat @ self.square).square().mean(-1)


def _coefficients(file: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``[P]`` and ``[P, r]``, r > 0, of the P entries of a vertex."""
    if not file.is_file():
        raise MissingDataError(f"There is no {file}. docs/tasks/toy.md says which arrays it has.")
    try:
        with np.load(file, allow_pickle=False) as content:
            linear = np.asarray(content["linear"])
            square = np.asarray(content["square"]) if "square" in content else np.zeros((1, *shape))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DamagedDataError(f"{file} is no .npz file with the array linear: {error}") from error
    for name, array, wanted in (("linear", linear, shape), ("square", square, (*square.shape[:1], *shape))):
        if array.shape != wanted or not array.size:
            raise DamagedDataError(f"{file}: {name} must be {list(wanted)} like a vertex; got {list(array.shape)}")
        if array.dtype.kind not in "fiub" or not np.isfinite(array.astype(np.float32)).all():
            raise DamagedDataError(f"{file}: {name} must be finite real numbers in float32")
    flat = torch.from_numpy(square.astype(np.float32)).reshape(len(square), -1)
    return torch.from_numpy(linear.astype(np.float32)).flatten(), flat.T.contiguous()


#: Objectives that are not defined on relaxed vertices.
HARD_ONLY = (height, levels)

#: Structure -> objective of the released code.
RELEASED: dict[type[Structure], Callable[[Tensor], Tensor]] = {
    Arborescence: fewer_children,
    BinaryTree: levels,
    SpanningTree: away_from_first,
    Matching: off_diagonal,
    Permutation: off_diagonal,
}

#: Structure -> our own objective.
OURS: dict[type[Structure], Callable[[Tensor], Tensor]] = {
    Arborescence: childless_root,
    BinaryTree: height,
    SpanningTree: far_from_star,
    Matching: unevenness,
    ProjectiveTree: childless_root,
    LinearChain: changes,
    SemiMarkov: number,
    Alignment: detour,
    Constituency: left_branches,
    DagPath: number,
}
