"""Monotone alignments of two sequences."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Matrix


class Alignment(Derivations):
    """Monotone paths through a grid from its first to its last cell: dynamic time warping (Sakoe
    and Chiba 1978).

    Parts are the cells ``[n, m]``: ``[i, j]`` aligns item i of one sequence with item j of another.
    From a cell a path continues to the next row, the next column, or both. Absent items are the
    last ones of a sequence: for lengths (L, M) the mask is True at ``i < L, j < M``. Any cell
    except the first and the last may be missing, as in a band around the diagonal. If moves rather
    than cells have scores (Needleman and Wunsch 1970), the parts must be the edges of the grid; use
    :class:`~structgrad.structures.DagPath`.

    ``marginals`` are those of soft-DTW (Cuturi and Blondel 2017; Mensch and Blondel 2018). Every
    oracle is O(n m) an example.

    Raises:
        ValueError: from every oracle (eager CPU code), if an example has no path.
    """

    def __init__(self) -> None:
        self.layout = Matrix()

    def read(self, vertex: Tensor) -> Tensor:
        """The cells (i, j) of the path, in order: int64 ``[*batch, m, 2]``, -1 after the last one."""
        return super().read(vertex)

    def covered(self, vertex: Tensor) -> Tensor:
        on = vertex > 0
        return on.any(-1, keepdim=True) & on.any(-2, keepdim=True)

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(*shape)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.any(-1)) * (exists.shape[-1] + 1) + last(exists.any(-2))

    def enumerate(self, *shape: int) -> Tensor:
        """All paths (there are as many as a Delannoy number): ``[V, n, m]``."""
        self.check_shape_listable(*shape)
        n, m = shape
        if not n or not m:
            return torch.zeros(1, n, m, dtype=torch.float64)
        paths = list(_paths(n - 1, m - 1))
        vertices = torch.zeros(len(paths), n, m, dtype=torch.float64)
        for vertex, path in zip(vertices, paths, strict=True):
            vertex[tuple(torch.tensor(path).T)] = 1
        return vertices


def _paths(i: int, j: int) -> Iterator[list[tuple[int, int]]]:
    """The cells of every path to (i, j)."""
    if i == j == 0:
        yield [(0, 0)]
    for before in ((i - 1, j), (i, j - 1), (i - 1, j - 1)):
        if min(before) >= 0:
            for path in _paths(*before):
                yield [*path, (i, j)]


@functools.lru_cache(maxsize=64)
def _graph(n: int, m: int) -> Hypergraph:
    """Built diagonal by diagonal. A node is the last cell of a partial path. Size: ``rows * (m + 1)
    + columns``.
    """
    builder = Builder()
    cell = np.full((n + 1, m + 1), ZERO)  # with a border before the first row and column
    for diagonal in range(n + m - 1 if n and m else 0):
        i = np.arange(max(diagonal - m + 1, 0), min(diagonal, n - 1) + 1)
        j = diagonal - i
        before = np.stack([cell[i, j + 1], cell[i + 1, j], cell[i, j]], -1) if diagonal else np.full((1, 1), ONE)
        cell[i + 1, j + 1] = builder.level(before, ONE, (i * m + j)[:, None])
    cell[0] = cell[:, 0] = ONE
    return builder.build(cell.flatten())
