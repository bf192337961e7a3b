"""Paths through a directed acyclic graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph
from structgrad.structures import reading as readings
from structgrad.structures.base import UnsupportedError
from structgrad.structures.family_dynamic_programs import Derivations
from structgrad.structures.layout import Vector


def _node(value: Any) -> int:
    """A node, which may be an integer of another library."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"nodes must be whole numbers; got {value!r}") from None


class DagPath(Derivations):
    """Paths from a source to a target in a directed acyclic graph (Niculae et al. 2025, section
    2.3.3, algorithm 2).

    Parts are the edges of the graph, ``[E]``, in the given order. Every dynamic program without
    branching is such a path. Each example may lack edges, by the mask. An example without any edge
    has one vertex, the empty one. Every oracle is O(E) an example.

    Args:
        edges: pairs (u, v) of nodes; nodes are numbers from 0 on. A pair that occurs twice is two
            edges.
        source: the start of paths.
        target: the end of paths; None: the largest node.

    Raises:
        TypeError: for nodes that are not whole numbers.
        ValueError: if ``edges`` are not pairs of nodes or form a cycle, or if no path from the
            source reaches the target; from every oracle for scores of another shape, or (eager CPU
            code) if an example has no path.
    """

    def __init__(self, edges: Iterable[Sequence[int]], source: int = 0, target: int | None = None) -> None:
        pairs = tuple(tuple(map(_node, edge)) for edge in edges)
        if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise ValueError(f"edges must be pairs of nodes, numbers from 0 on, at least one; got {pairs}")
        self.edges = tuple((u, v) for u, v in pairs)
        self.source = _node(source)
        self.target = max(map(max, self.edges)) if target is None else _node(target)
        if min(self.source, self.target) < 0:
            raise ValueError(f"nodes are numbers from 0 on; got source {source}, target {target}")
        self.layout = Vector()
        if self.source == self.target or int(_graph(self.edges, self.source, self.target).goals[1]) == ZERO:
            raise ValueError(f"no path of edges leads from {self.source} to {self.target}")

    def __repr__(self) -> str:
        return f"DagPath({len(self.edges)} edges, source={self.source}, target={self.target})"

    def shape(self, n: int) -> tuple[int, ...]:
        """One score for each edge, for every n."""
        return (len(self.edges),)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; there must be as many parts as edges."""
        self.layout.check(scores)
        if scores.shape[-1] != len(self.edges):
            raise ValueError(
                f"scores over {len(self.edges)} edges have shape [..., {len(self.edges)}]; got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def read(self, vertex: Tensor) -> Tensor:
        """The edges of the path, in order: int64 ``[*batch, m]``, -1 after the last one."""
        order = torch.tensor(_in_order(self.edges), device=vertex.device)
        place = readings.members(vertex.detach()[..., order] > 0)
        return torch.where(place < 0, -1, order[place.clamp_min(0)])

    def covered(self, vertex: Tensor) -> Tensor:
        return (vertex > 0).any(-1, keepdim=True)

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """Refused: edges are in no order in which the first ones would be a graph."""
        raise UnsupportedError("DagPath takes a mask, not lengths: the first so many edges are no graph of their own")

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(self.edges, self.source, self.target)

    def _size(self, exists: Tensor) -> Tensor:
        return exists.any(-1).long()

    def enumerate(self, *shape: int) -> Tensor:
        """All paths: ``[V, E]``."""
        self.check_shape_listable(len(self.edges))
        partial: list[tuple[int, list[int]]] = [(self.source, [])]
        found = []
        while partial:
            node, path = partial.pop()
            if node == self.target:
                found.append(path)
                continue
            partial += [(v, [*path, e]) for e, (u, v) in enumerate(self.edges) if u == node]
        vertices = torch.zeros(len(found), len(self.edges), dtype=torch.float64)
        for vertex, path in zip(vertices, found, strict=True):
            vertex[path] = 1
        return vertices


@functools.lru_cache(maxsize=64)
def _in_order(edges: tuple[tuple[int, int], ...]) -> list[int]:
    """The edges sorted by their first nodes, in a topological order."""
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for u, v in edges:
        sorter.add(v, u)
    rank = {node: place for place, node in enumerate(sorter.static_order())}
    return sorted(range(len(edges)), key=lambda e: rank[edges[e][0]])


@functools.lru_cache(maxsize=64)
def _graph(edges: tuple[tuple[int, int], ...], source: int, target: int) -> Hypergraph:
    """A node of the hypergraph is a node of the graph, the end of a partial path.

    A level holds the nodes of equal longest distance from the source. Size: 1 for an example with
    an edge.
    """
    entering: dict[int, list[int]] = {}
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for e, (u, v) in enumerate(edges):
        entering.setdefault(v, []).append(e)
        sorter.add(v, u)
    try:
        order = list(sorter.static_order())
    except CycleError as error:
        raise ValueError(f"edges must not form a cycle; {error.args[1]} is one") from None
    depth = {source: 0}
    for v in order:
        reached = [depth[edges[e][0]] for e in entering.get(v, []) if edges[e][0] in depth]
        if v != source and reached:
            depth[v] = 1 + max(reached)
    builder, node = Builder(), np.full(1 + max(*order, source, target), ZERO)
    node[source] = ONE
    for distance in range(1, 1 + max(depth.values())):
        heads = [v for v in order if depth.get(v) == distance]
        into = [[e for e in entering[v] if edges[e][0] in depth] for v in heads]
        left = np.full((len(heads), max(map(len, into))), ZERO)
        part = np.full(left.shape, -1)
        for row, ids in enumerate(into):
            left[row, : len(ids)] = [node[edges[e][0]] for e in ids]
            part[row, : len(ids)] = ids
        node[heads] = builder.level(left, ONE, part)
    return builder.build([ONE, node[target]])
