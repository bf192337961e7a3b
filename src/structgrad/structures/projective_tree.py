"""Rooted directed spanning trees without crossing edges."""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph
from structgrad.structures import reading as readings
from structgrad.structures.arborescence import Arborescence
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Directed


class ProjectiveTree(Derivations):
    """Arborescences over the positions of a sequence whose edges do not cross: projective
    dependency trees.

    Parts are the edges ``[i, j]``: i -> j of ``[n, n]``, off the diagonal and not into the root, as
    for :class:`~structgrad.structures.Arborescence`. In a vertex, all positions between the ends of
    an edge i -> j descend from i. The root may have several children, or one with
    ``single_root=True``. Absent positions are the last ones.

    Every oracle is O(n^3) an example, by the algorithm of Eisner (1996). The relaxation
    ``exp_family`` under perturbed scores is close to the latent tree of Corro and Titov (2019),
    differentiable Perturb-and-Parse. The difference is that they relax the steps of the algorithm
    one by one.

    Args:
        root: the position of the root, the same in every example.
        single_root: whether exactly one edge leaves the root (none, if the root is alone). The root
            is then the first or the last position of every example, because one child cannot have
            descendants on both sides of the root without a crossing.

    Raises:
        ValueError: for a negative root; from every oracle, if the root is not one of the n
            positions; or (eager CPU code) if an example has no projective tree.
    """

    constant_size: ClassVar[bool] = True

    def __init__(self, root: int = 0, single_root: bool = False) -> None:
        self.root, self.single_root = root, single_root
        self._arborescences = Arborescence(root, single_root)
        self.layout = Directed()

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; graphs that are too small to have the root are refused
        too.
        """
        self._arborescences.check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Edges off the diagonal and not into the root; no tree has the others."""
        return self._arborescences.parts(scores, mask)

    def read(self, vertex: Tensor) -> Tensor:
        """The head of every node: int64 ``[*batch, n]``, -1 for the root and for absent nodes."""
        return readings.heads(vertex)

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return reading.shape[-1:] * 2

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        return readings.entries_of_heads(reading)

    def covered(self, vertex: Tensor) -> Tensor:
        return readings.among_touched(vertex)

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(shape[0], self.root, self.single_root)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.any(-1) | exists.any(-2))

    def enumerate(self, *shape: int) -> Tensor:
        """All trees of ``shape = (n, n)``. The descendants of a node form an interval."""
        self.check_shape_listable(*shape)
        n = shape[-1]

        @functools.cache
        def trees(start: int, end: int) -> list[tuple[int, list[int]]]:
            """Root and edges (as ``i * n + j``) of every tree over the positions from start up to end."""
            return [
                (root, edges + more + [root * n + child for child in children + others])
                for root in range(start, end)
                for children, edges in forests(start, root)
                for others, more in forests(root + 1, end)
            ]

        @functools.cache
        def forests(start: int, end: int) -> list[tuple[list[int], list[int]]]:
            """Roots and edges of every sequence of trees over these positions."""
            if start == end:
                return [([], [])]
            return [
                ([root, *roots], edges + more)
                for middle in range(start + 1, end + 1)
                for root, edges in trees(start, middle)
                for roots, more in forests(middle, end)
            ]

        found = [edges for root, edges in trees(0, n) if root == self.root] if n else [[]]
        vertices = torch.zeros(len(found), n * n, dtype=torch.float64)
        index = torch.tensor(found, dtype=torch.int64).reshape(len(found), max(n - 1, 0))
        vertices = vertices.scatter_(1, index, 1.0).reshape(len(found), n, n)
        return vertices[vertices[:, self.root].sum(-1) == 1] if self.single_root and n > 1 else vertices


@functools.lru_cache(maxsize=64)
def _graph(n: int, root: int, single_root: bool) -> Hypergraph:
    """Eisner's items over positions i <= j. Size: positions of an example.

    ``rightward[i, j]`` holds all that descends from i up to j. ``leftward[i, j]`` holds all that
    descends from j down to i. ``apart[i, j]`` is one of each, side by side; an edge between i and j
    joins them.
    """
    builder = Builder()
    rightward, leftward, apart = (np.full((n, n), ZERO) for _ in range(3))
    np.fill_diagonal(rightward, ONE)
    np.fill_diagonal(leftward, ONE)
    for width in range(1, n):
        i = np.arange(n - width)[:, None]
        j, k = i + width, i + np.arange(width)
        apart[i[:, 0], j[:, 0]] = builder.level(rightward[i, k], leftward[k + 1, j])
        # An edge from i to k + 1 and the rest of the descendants of both; likewise an edge from j
        # to k.
        both = builder.level(
            np.concatenate([apart[i, k + 1], leftward[i, k]]),
            np.concatenate([rightward[k + 1, j], apart[k, j]]),
            np.concatenate([i * n + k + 1, j * n + k]),
        )
        rightward[i[:, 0], j[:, 0]], leftward[i[:, 0], j[:, 0]] = both[: n - width], both[n - width :]
    goals = np.full(n + 1, ONE)
    if n > 1 and single_root:
        # The one child has all others as descendants, on both sides: after a first root, before a last one.
        goals[2:] = ZERO
        for size in range(2, n + 1) if root == 0 else [root + 1] if root else []:
            child = np.arange(1, size) if root == 0 else np.arange(root)
            first, last = child[0], child[-1]
            goals[size : size + 1] = builder.level(
                leftward[first, child][None], rightward[child, last][None], (root * n + child)[None]
            )
    elif n > 1:
        large = np.arange(2, n + 1)
        found = builder.level(leftward[0, [[root]]], rightward[root, large - 1][:, None])
        goals[2:] = np.where(large > root, found, ZERO)
    return builder.build(goals)
