"""Trees laid out by forces: the generator and its cache (Paulus et al. 2020, D.4.1).

A maximum spanning tree over Gumbel weights pulls its vertices together, while all vertices push
each other away. A model sees the positions of the vertices after each of T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.data import cache
from structgrad.structures import SpanningTree

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]

SPLITS = ("train", "val", "test")
#: Part of the key of a cache. Raise it when the same configuration would give other data.
_GENERATOR_VERSION = 1
#: The number of graphs moved at once; their forces then fit into the processor's cache.
_CHUNK = 1000


def random_trees(rng: np.random.Generator, graphs: int, vertices: int) -> NDArray[np.bool_]:
    """Maximum spanning trees of complete graphs with Gumbel(0) weights; *not* uniform over trees.

    Returns:
        symmetric adjacency matrices ``[graphs, vertices, vertices]``.
    """
    weights = rng.gumbel(size=(graphs, vertices, vertices))
    return SpanningTree().argmax(torch.from_numpy(weights)).bool().numpy()


def force_step(positions: Floats, adjacency: NDArray[Any]) -> Floats:
    """One iteration of Fruchterman and Reingold's layout, as
    ``networkx.spring_layout(iterations=1)`` did it.

    Every vertex moves along the sum of its forces, by a tenth of the larger axis range. A force is
    ``k^2 / d^2 - A d / k`` times the difference vector, with ``k = sqrt(1 / n)``. Then the layout
    is centred and scaled to a largest absolute coordinate of 1. Distances count as at least 0.01. A
    summed force shorter than 0.01 counts as 0.1 long (networkx before its issue 8113; since then it
    counts as 0.01 long).

    Args:
        positions: ``[graphs, n, 2]``.
        adjacency: ``[graphs, n, n]``, symmetric.

    Returns:
        new positions ``[graphs, n, 2]``.
    """
    n = positions.shape[1]
    k = np.sqrt(1.0 / n)
    step = 0.1 * np.ptp(positions, axis=1).max(-1)
    difference = positions[:, :, None] - positions[:, None]
    distance = np.maximum(np.sqrt((difference**2).sum(-1)), 0.01)
    force = k * k / distance**2 - adjacency * (distance / k)
    move = (difference * force[..., None]).sum(2)
    length = np.sqrt((move**2).sum(-1))
    length = np.where(length < 0.01, 0.1, length)
    moved = positions + move * (step[:, None] / length)[..., None]
    moved -= moved.mean(1, keepdims=True)
    scaled: Floats = moved / np.abs(moved).max((1, 2), keepdims=True)
    return scaled


def simulate(rng: np.random.Generator, trees: NDArray[np.bool_], steps: int) -> Floats:
    """Lay out trees from standard normal positions. The initial frame is not part of the result.

    Returns:
        positions after each step, ``[graphs, steps, vertices, 2]``, computed in float64.
    """
    graphs, n, _ = trees.shape
    start = rng.standard_normal((graphs, n, 2))
    frames = np.empty((graphs, steps, n, 2))
    for first in range(0, graphs, _CHUNK):
        chunk = slice(first, first + _CHUNK)
        positions = start[chunk]
        for t in range(steps):
            positions = frames[chunk, t] = force_step(positions, trees[chunk])
    return frames


@dataclass
class GraphLayoutData:
    """The layouts of an experiment: generated once, then read from the cache.

    Args:
        cache: folder of generated data; each configuration gets a folder of its own in it.
        train: number of training graphs.
        val: number of validation graphs.
        test: number of test graphs.
        vertices: number of vertices of a graph.
        steps: T, the length of a trajectory.
        seed: seed of the generator.

    Raises:
        ValueError: for sizes that leave nothing to predict.
    """

    cache: str | Path
    train: int = 50_000
    val: int = 10_000
    test: int = 10_000
    vertices: int = 10
    steps: int = 10
    seed: int = 0
    #: Numbers of a vertex at a step: its position in the plane.
    features: ClassVar[int] = 2
    #: The trees are known.
    has_edges: ClassVar[bool] = True
    _loaded: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name, least in (("train", 1), ("val", 1), ("test", 1), ("vertices", 2), ("steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}; got {getattr(self, name)}")

    @property
    def key(self) -> dict[str, Any]:
        """Everything on which the data depend."""
        names = ("train", "val", "test", "vertices", "steps", "seed")
        return {name: getattr(self, name) for name in names} | {"generator": _GENERATOR_VERSION}

    @property
    def folder(self) -> Path:
        """The cache folder of this configuration."""
        return cache.folder_of(self.cache, "graph_layout", self.key)

    def prepare(self) -> None:
        """Generate and store the layouts unless an intact cache exists."""
        cache.ensure(self.folder, self.key, lambda: {name: _to_arrow(*s) for name, s in generate(self).items()})

    def split(self, name: str) -> dict[str, Tensor]:
        """The layouts of a split, from the cache (see :meth:`prepare`).

        Returns:
            ``positions`` float32 ``[n, steps, vertices, 2]`` in [-1, 1], and ``adjacency`` bool
            ``[n, vertices, vertices]``, the true trees.
        """
        if name not in self._loaded:
            table = cache.load(self.folder, name)
            positions = cache.array_of(table, "positions", (self.steps, self.vertices, 2))
            adjacency = cache.array_of(table, "adjacency", (self.vertices, self.vertices))
            self._loaded[name] = {
                "positions": torch.from_numpy(positions),
                "adjacency": torch.from_numpy(adjacency).bool(),
            }
        return self._loaded[name]


def generate(data: GraphLayoutData) -> dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Make all splits of a configuration, each from its own random stream.

    Positions are computed in float64, scaled to [-1, 1] by the least and the greatest coordinate of
    the training set, and kept in float32.

    Returns:
        split name -> positions ``[n, steps, vertices, 2]`` and adjacency matrices
        ``[n, vertices, vertices]``.
    """
    out = {}
    low = high = 0.0
    for name, stream in zip(SPLITS, np.random.SeedSequence(data.seed).spawn(len(SPLITS)), strict=True):
        rng = np.random.default_rng(stream)
        trees = random_trees(rng, getattr(data, name), data.vertices)
        frames = simulate(rng, trees, data.steps)
        if name == "train":
            low, high = frames.min(), frames.max()
        out[name] = ((2 * (frames - low) / (high - low) - 1).astype(np.float32), trees)
    return out


def _to_arrow(positions: NDArray[np.float32], adjacency: NDArray[np.bool_]) -> pa.Table:
    import pyarrow as pa

    return pa.table({"positions": cache.column_of(positions), "adjacency": cache.column_of(adjacency)})
