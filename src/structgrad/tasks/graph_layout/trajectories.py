"""Your own trajectories, from ``.npz`` files or from the ``.npy`` files of Kipf et al. (2018)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.data import DamagedDataError, MissingDataError

#: Our name of a split -> the name in the files of Kipf et al.
_NRI = {"train": "train", "val": "valid", "test": "test"}


@dataclass
class Trajectories:
    """Trajectories of the vertices of graphs, whose edges may be unknown.

    A folder has one of two formats:

    - ``train.npz``, ``val.npz`` and ``test.npz``, each with ``positions``
      ``[graphs, steps, n, features]`` and, if the edges are known, ``edges`` ``[graphs, n, n]``;
    - the files of Kipf et al. (2018): ``loc_train<suffix>.npy`` and ``vel_train<suffix>.npy``
      ``[graphs, steps, features, n]``, ``edges_train<suffix>.npy`` ``[graphs, n, n]``, and the same
      with ``valid`` and ``test``. ``vel`` and ``edges`` may be missing.

    The edge i -> j exists if the entry ``[i, j]`` is positive; the diagonal is ignored.

    Args:
        data: folder of data sets, ``paths.data``.
        folder: folder of the files, absolute or within ``data``.
        suffix: end of the names of ``.npy`` files, e.g. ``_springs5``.
        train: number of graphs for training, the first ones; None takes all.
        val: likewise for validation.
        test: likewise for the test.
        steps: number of steps of a trajectory, the first ones; None takes as many as the training
            files have.
        scale: whether values are scaled to [-1, 1] by the extremes of the training files. Positions
            and velocities (``loc``, ``vel``) are scaled separately.

    Raises:
        ValueError: for a size below 1 or beyond what the files have.
        MissingDataError: if the training files are missing.
        DamagedDataError: for files with other contents.
    """

    data: str | Path
    folder: str = "trajectories"
    suffix: str = ""
    train: int | None = None
    val: int | None = None
    test: int | None = None
    steps: int | None = None
    scale: bool = True
    _loaded: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes, and find the number of steps."""
        for name, least in (("train", 1), ("val", 1), ("test", 1), ("steps", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be at least {least}; got {value}")
        kinds = self._files("train")
        shapes = [_shape(file, key) for file, key in kinds]
        if any(len(shape) != 4 for shape in shapes):
            raise DamagedDataError(f"{kinds[0][0]}: trajectories have four axes; got the shape {shapes[0]}")
        nri = kinds[0][0].suffix == ".npy"
        #: Number of vertices of a graph, and of features of a vertex.
        self.vertices = shapes[0][3] if nri else shapes[0][2]
        self.features = sum(shape[2] if nri else shape[3] for shape in shapes)
        if self.steps is None:
            self.steps = shapes[0][1]
        if self.vertices < 2 or self.steps < 2:
            raise DamagedDataError(f"{kinds[0][0]}: there must be two vertices and two steps; got {shapes[0]}")

    @property
    def has_edges(self) -> bool:
        """Whether the edges of all splits are known."""
        return all(self._edges(name) is not None for name in _NRI)

    def prepare(self) -> None:
        """Raise an error if files are missing."""
        for name in _NRI:
            self._files(name)

    def split(self, name: str) -> dict[str, Tensor]:
        """The trajectories of a split.

        Returns:
            ``positions`` float32 ``[graphs, steps, n, features]``, and ``adjacency`` bool
            ``[graphs, n, n]`` if the edges are known.
        """
        if not self._loaded:
            self._load()
        return self._loaded[name]

    def _load(self) -> None:
        parts = {name: self._read(name) for name in _NRI}
        for k in range(len(parts["train"])):
            low, high = float(parts["train"][k].min()), float(parts["train"][k].max())
            if self.scale and high > low:
                for arrays in parts.values():
                    arrays[k] = 2 * (arrays[k] - low) / (high - low) - 1
        for name, arrays in parts.items():
            values = np.concatenate(arrays, axis=-1).astype(np.float32)
            self._loaded[name] = {"positions": torch.from_numpy(values)}
            if self.has_edges:
                self._loaded[name]["adjacency"] = self._adjacency(name, len(values))

    def _read(self, name: str) -> list[NDArray[np.float64]]:
        """Positions, and velocities if they have their own file."""
        arrays, wanted = [], getattr(self, name)
        for file, key in self._files(name):
            values = _array(file, key)
            if values.ndim != 4 or not np.issubdtype(values.dtype, np.number):
                raise DamagedDataError(
                    f"{file}: trajectories are numbers with four axes; got {values.dtype} {values.shape}"
                )
            values = values.transpose(0, 1, 3, 2) if file.suffix == ".npy" else values
            if values.shape[2] != self.vertices:
                raise DamagedDataError(
                    f"{file}: {values.shape[2]} vertices; those of the training have {self.vertices}"
                )
            for option, number, there in (("steps", self.steps, values.shape[1]), (name, wanted, len(values))):
                if number is not None and number > there:
                    what = "steps" if option == "steps" else "graphs"
                    raise ValueError(f"{file} has {there} {what}; got data.{option}={number}; null takes all")
            values = np.asarray(values[:wanted, : self.steps], dtype=np.float64)
            if not len(values):
                raise DamagedDataError(f"{file} has no graphs")
            if not np.isfinite(values).all():
                raise DamagedDataError(f"{file}: not all values are finite")
            arrays.append(values)
        if len({array.shape[:3] for array in arrays}) > 1 or sum(a.shape[3] for a in arrays) != self.features:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise DamagedDataError(
                f"{self._files(name)[0][0]}: its trajectories do not fit those of the training: {shapes}"
            )
        return arrays

    def _adjacency(self, name: str, graphs: int) -> Tensor:
        found = self._edges(name)
        assert found is not None
        edges = _array(*found)
        wanted = (self.vertices, self.vertices)
        if edges.shape[1:] != wanted or len(edges) < graphs:
            raise DamagedDataError(f"{found[0]}: edges are [{graphs}, {wanted[0]}, {wanted[1]}]; got {edges.shape}")
        there = torch.from_numpy(edges[:graphs] > 0)
        there.diagonal(dim1=1, dim2=2).fill_(False)
        return there

    def _files(self, name: str) -> list[tuple[Path, str]]:
        """Files of the trajectories of a split, each with the key of its array."""
        folder = Path(self.data) / self.folder
        archive, nri = folder / f"{name}.npz", folder / f"loc_{_NRI[name]}{self.suffix}.npy"
        if archive.is_file():
            return [(archive, "positions")]
        if nri.is_file():
            velocities = folder / f"vel_{_NRI[name]}{self.suffix}.npy"
            return [(nri, "")] + ([(velocities, "")] if velocities.is_file() else [])
        raise MissingDataError(
            f"There is neither {archive} nor {nri.name} beside it; docs/tasks/graph_layout.md says more."
        )

    def _edges(self, name: str) -> tuple[Path, str] | None:
        """The file of the true edges of a split, with the key of its array."""
        file, _ = self._files(name)[0]
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return (file, "edges") if "edges.npy" in archive.namelist() else None
        edges = file.with_name(f"edges_{_NRI[name]}{self.suffix}.npy")
        return (edges, "") if edges.is_file() else None


def _array(file: Path, key: str) -> NDArray[Any]:
    try:
        if not key:
            array: NDArray[Any] = np.load(file, allow_pickle=False)
            return array
        with np.load(file, allow_pickle=False) as archive:
            array = archive[key]
            return array
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise DamagedDataError(f"{file} has no array {key}: {error}" if key else f"{file}: {error}") from error


def _shape(file: Path, key: str) -> tuple[int, ...]:
    """The shape of an array, without reading its values."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        if not key:
            array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
            return array.shape
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
            shape: tuple[int, ...] = read_header[np.lib.format.read_magic(stream)](stream)[0]
            return shape
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise DamagedDataError(f"{file} has no array {key}: {error}" if key else f"{file}: {error}") from error
