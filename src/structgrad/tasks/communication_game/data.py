"""Images as features, each with a concept, and the games that are drawn from them."""

from __future__ import annotations

import abc
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.common.installing import install
from structgrad.data import MissingDataError
from structgrad.tasks.base import Split
from structgrad.tasks.communication_game.labels import read_labels

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Concepts:
    """Images of one split, sorted by concept.

    Attributes:
        features: float32 ``[n, size]``, of length 1 (0 if an image has no features).
        concept: int64 ``[n]``, ascending, without gaps from 0.
        names: names of the concepts.
    """

    features: Tensor
    concept: Tensor
    names: list[str]


def draw_games(sizes: Tensor, games: int, candidates: int, generator: torch.Generator | None = None) -> Tensor:
    """Images of different concepts, uniformly: int64 ``[games, candidates]``, on the device of
    ``sizes``.

    Args:
        sizes: int64 ``[concepts]``: number of images of each concept, which lie side by side.
        games: number of games.
        candidates: number of images in a game, at most the number of concepts.
        generator: on the same device; None is the global one.
    """
    options = {"device": sizes.device, "generator": generator}
    # The largest of independent keys are a uniform set in uniform order, drawn for all games at
    # once.
    concepts = torch.rand(games, len(sizes), **options).topk(candidates, dim=1).indices  # type: ignore[arg-type]
    first = sizes.cumsum(0) - sizes
    within = torch.rand(games, candidates, dtype=torch.float64, **options) * sizes[concepts]  # type: ignore[arg-type]
    return first[concepts] + within.long()


class ConceptData(abc.ABC):
    """A data set of images with features and concepts.

    Attributes:
        features: number of features of an image.
    """

    features: int

    @abc.abstractmethod
    def prepare(self) -> None:
        """Raise an error if files are missing."""

    @abc.abstractmethod
    def split(self, split: Split) -> Concepts:
        """The images of a split."""

    def pixels(self, split: Split) -> Tensor | None:
        """The same images for display: uint8 ``[n, height, width]`` (dark on 0) or
        ``[n, height, width, 3]`` (RGB), if any.

        They are separate from :meth:`split`, because training does not use them.
        """
        return None


@dataclass
class Omniglot(ConceptData):
    """Handwritten characters (Lake et al. 2015). A concept is a character; the features are its
    pixels.

    Pixels are centred on the mean of the training drawings and scaled to length 1. The 20 drawers
    are divided: every split has every character, and no two splits have the same drawing.

    Args:
        file: ``.npz`` with ``images`` uint8 ``[n, 28, 28]``, ``character`` ``[n]`` and
            ``character_names``, sorted by character and drawer; absolute or within ``data``.
        data: folder of data sets, ``paths.data``.
        features: number of features of an image.
        train: number of drawers for training, the first ones.
        val: number of drawers for validation, the next ones.
        test: number of drawers for the test, the next ones.

    Raises:
        ValueError: unless every split has a drawer and all together at most 20; from :meth:`split`,
            for a file with other contents.
    """

    file: str
    data: str | Path
    features: int = 784
    train: int = 14
    val: int = 3
    test: int = 3

    def __post_init__(self) -> None:
        """Check the numbers."""
        numbers = (self.train, self.val, self.test)
        if min(numbers) < 1 or sum(numbers) > 20:
            raise ValueError(f"data.train, val and test share 20 drawers, at least one each; got {numbers}")

    def prepare(self) -> None:
        """Raise an error if the file is missing."""
        if not (Path(self.data) / self.file).is_file():
            raise MissingDataError(
                f"There is no {Path(self.data) / self.file}. Put there an .npz file with the arrays images (uint8 "
                "[n, 28, 28]), character ([n]) and character_names, sorted by character and drawer, made of the "
                "small background sets of https://github.com/brendenlake/omniglot; or name another data set (data=...)."
            )

    def split(self, split: Split) -> Concepts:
        """The images of a split."""
        images, character, names, drawer = self._read()
        chosen = self._chosen(split, drawer)
        # Subtract the common part of all drawings, an empty margin, which would make all features
        # nearly parallel.
        mean = images[drawer < self.train].flatten(1).float().mean(0)
        features = torch.nn.functional.normalize(images[chosen].flatten(1) - mean)
        return Concepts(features, character[chosen], names)

    def pixels(self, split: Split) -> Tensor:
        """The drawings."""
        images, _, _, drawer = self._read()
        return images[self._chosen(split, drawer)]

    def _chosen(self, split: Split, drawer: Tensor) -> Tensor:
        first, after = {
            "train": (0, self.train),
            "val": (self.train, self.train + self.val),
            "test": (self.train + self.val, self.train + self.val + self.test),
        }[split]
        return (first <= drawer) & (drawer < after)

    def _read(self) -> tuple[Tensor, Tensor, list[str], Tensor]:
        """All drawings, the character of each, the characters' names, and the drawer of each."""
        self.prepare()
        file = Path(self.data) / self.file
        arrays = _arrays(file, "images", "character", "character_names")
        names = [str(name) for name in arrays["character_names"].flat]
        character = _indices(file, arrays["character"], names)
        if arrays["images"].dtype != np.uint8 or arrays["images"].shape[:1] != character.shape:
            raise ValueError(
                f"{file}: images must be uint8 [{len(character)}, height, width], as many as characters; "
                f"got {arrays['images'].dtype} {list(arrays['images'].shape)}"
            )
        images, drawers = torch.from_numpy(arrays["images"]), character.bincount(minlength=len(names))
        if bool((character.diff() < 0).any()):
            raise ValueError(f"{file}: drawings must be sorted by character and drawer")
        if int(drawers.min()) < self.train + self.val + self.test:
            name = names[int(drawers.argmin())]
            raise ValueError(
                f"{file}: character {name} has {int(drawers.min())} drawings; data.train, val and test need "
                f"{self.train + self.val + self.test}"
            )
        return images, character, names, torch.arange(len(character)) - torch.searchsorted(character, character)


@dataclass
class FeatureFile(ConceptData):
    """Features of any images, from an ``.npz`` file. Every concept's images are divided in the
    order of the file.

    Args:
        file: an archive with ``features`` ``[n, size]``, ``concept`` ``[n]`` and ``names`` (or
            ``concept_names``), into which these are indices; absolute or within ``data``. Optional
            arrays are ``test``, bool ``[n]``, and ``images``, uint8 ``[n, height, width]`` or
            ``[n, height, width, 3]``, for display.
        data: folder of data sets, ``paths.data``.
        features: number of features of an image.
        val: fraction of every concept's images for validation.
        test: fraction of every concept's images for the test; null: the file's array ``test``
            decides. Each split has at least one image of every concept.
        images: folder of parquet files with the images for display, with ``test=null``; absolute or
            within ``data``. The columns are ``image`` and ``label``, the concept. The files are
            named after ``train`` and ``test``, with rows in the order of the features. null: the
            file's array ``images``, if it exists.

    Raises:
        ValueError: for fractions out of range; from :meth:`split` and :meth:`pixels`, for files
            with other contents.
    """

    file: str
    data: str | Path
    features: int
    val: float = 0.15
    test: float | None = 0.15
    images: str | None = None

    def __post_init__(self) -> None:
        """Check the fractions."""
        if not (self.val > 0 and (self.test is None or self.test > 0) and self.val + (self.test or 0.0) < 1):
            raise ValueError(f"data.val and data.test are shares that leave some; got {self.val} and {self.test}")
        if self.images is not None and self.test is not None:
            raise ValueError(
                "data.images has files of the train and the test images, which data.test=null takes from the file of "
                f"features; got data.test={self.test}"
            )

    def prepare(self) -> None:
        """Raise an error if files are missing."""
        if not (Path(self.data) / self.file).is_file():
            raise MissingDataError(
                f"There is no {Path(self.data) / self.file}. "
                "docs/tasks/communication_game.md says which arrays such a file has; data=image_folder needs no file, "
                "but a folder of images for each concept."
            )
        if self.images is not None and not (Path(self.data) / self.images).is_dir():
            raise MissingDataError(
                f"There is no folder {Path(self.data) / self.images} of the images to show; task.data.images=null does "
                "without."
            )

    def split(self, split: Split) -> Concepts:
        """The images of a split."""
        arrays, rows = self._read(split)
        names = [str(name) for name in arrays["names"].flat]
        return group(torch.from_numpy(arrays["features"])[rows], arrays["concept"][rows].tolist(), names)

    def pixels(self, split: Split) -> Tensor | None:
        """The images, if the file or a folder has them."""
        arrays, rows = self._read(split)
        file = Path(self.data) / self.file
        if self.images is None:
            if "images" not in arrays:
                return None
            images = arrays["images"]
            if images.dtype != np.uint8 or images.shape[:1] != arrays["concept"].shape or images.ndim not in (3, 4):
                raise ValueError(
                    f"{file}: images must be uint8 [{len(arrays['concept'])}, height, width] or [..., 3]; "
                    f"got {images.dtype} {list(images.shape)}"
                )
            return torch.from_numpy(images)[rows]
        part = "test" if split == "test" else "train"
        folder = Path(self.data) / self.images
        photographs, labels = _photographs(folder, part)
        apart = arrays["test"] == (part == "test")
        if labels != arrays["concept"][apart].tolist():
            raise ValueError(f"{folder}: the labels of its {part} images are not the concepts of {file}, in its order")
        place = torch.from_numpy(apart).cumsum(0) - 1  # within the part
        return photographs[place[rows]]

    def _read(self, split: Split) -> tuple[dict[str, NDArray[Any]], Tensor]:
        """The arrays of the file, and the indices of its images in a split: int64, concept by
        concept.
        """
        self.prepare()
        file = Path(self.data) / self.file
        needed = ["features", "concept"] + ["test"] * (self.test is None)
        arrays = _arrays(file, *needed, one_of=("names", "concept_names"), optional=("images",))
        arrays["names"] = arrays.pop("concept_names", arrays.get("names"))  # type: ignore[arg-type]
        concept = _indices(file, arrays["concept"], [str(name) for name in arrays["names"].flat])
        arrays["concept"] = concept.numpy()
        if arrays["features"].dtype.kind not in "fiub":
            raise ValueError(f"{file}: features must be real numbers; got {arrays['features'].dtype}")
        if arrays["features"].shape[:1] != arrays["concept"].shape:
            raise ValueError(
                f"{file}: {len(concept)} labels go with features [{len(concept)}, size]; "
                f"got {list(arrays['features'].shape)}"
            )
        test: float | Tensor | None = self.test
        if test is None:
            test = torch.from_numpy(arrays["test"])
            if test.dtype != torch.bool or test.shape != concept.shape:
                raise ValueError(f"{file}: test must be bool [{len(concept)}]; got {test.dtype} {list(test.shape)}")
        names = [str(name) for name in arrays["names"].flat]
        return arrays, divided(file, concept, names, split, self.val, test)


def divided(where: Path, concept: Tensor, names: list[str], split: Split, val: float, test: float | Tensor) -> Tensor:
    """The images of a split: indices, int64, concept by concept.

    Every concept's images are divided in their order: for training, validation and the test.

    Args:
        where: the file or folder, for messages.
        concept: int64 ``[n]``.
        names: names of the concepts.
        split: the split.
        val: share of every concept's images for validation, at least one image.
        test: likewise for the test; or bool ``[n]``, which images are for the test.

    Raises:
        ValueError: if a concept has no image for one of the splits.
    """
    sizes = concept.bincount(minlength=len(names))
    if isinstance(test, Tensor):
        tested = concept[test].bincount(minlength=len(sizes))
        order = (2 * concept + test).argsort(stable=True)  # a concept's test images come after its others
    else:
        tested = (sizes * test).long().clamp_min(1)
        order = concept.argsort(stable=True)
    validated = (sizes * val).long().clamp_min(1)
    for index in ((sizes > 0) & ((tested < 1) | (sizes - validated - tested < 1))).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"{where}: concept {names[index]} has fewer than 3 images, one for each split: "
            f"{int(sizes[index])}, of which {int(tested[index])} are for the test"
        )
    start = {"train": 0 * sizes, "val": sizes - validated - tested, "test": sizes - tested}[split]
    end = {"train": sizes - validated - tested, "val": sizes - tested, "test": sizes}[split]
    grouped = concept[order]
    place = torch.arange(len(grouped)) - (sizes.cumsum(0) - sizes)[grouped]
    return order[(start[grouped] <= place) & (place < end[grouped])]


@dataclass
class PublishedFeatures(ConceptData):
    """The features of Correia et al. (2020) and Bouchacourt and Baroni (2018): 463 concepts, 100
    ImageNet images each.

    Each folder has two files. ``ours_images_single_sm0.h5`` is one data set ``[n, 4096]`` of
    activations of a VGG network. ``ours_images_single_sm0.objects`` holds the pickled labels; only
    lists, strings and numbers are read from it. As in the released code, validation games are drawn
    from the training images.

    Args:
        folder: folder with ``train`` and ``test``; absolute or within ``data``.
        data: folder of data sets, ``paths.data``.
        features: number of features of an image.
    """

    folder: str
    data: str | Path
    features: int = 4096

    def prepare(self) -> None:
        """Raise an error if files are missing."""
        for split in ("train", "test"):
            for ending in ("h5", "objects"):
                file = self._file(split, ending)
                if not file.is_file():
                    raise MissingDataError(
                        f"There is no {file}. The features are linked from "
                        "https://github.com/DianeBouchacourt/SignalingGame; put its folders train and test into "
                        f"{Path(self.data) / self.folder}, or name another data set (data=omniglot)."
                    )

    def split(self, split: Split) -> Concepts:
        """The images of a split."""
        self.prepare()
        try:
            import h5py
        except ImportError:
            raise MissingDataError(f"Features in .h5 files need h5py: {install('features')}") from None
        folder = "test" if split == "test" else "train"
        file = self._file(folder, "h5")
        try:
            with h5py.File(file, "r") as content:
                (name,) = content.keys()
                features = torch.from_numpy(np.asarray(content[name], dtype=np.float32))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{file} is no file with one array of features: {error}") from error
        labels = read_labels(self._file(folder, "objects"))
        return group(features, labels, None)

    def _file(self, split: str, ending: str) -> Path:
        return Path(self.data) / self.folder / split / f"ours_images_single_sm0.{ending}"


def _photographs(folder: Path, part: str) -> tuple[Tensor, list[int]]:
    """The images ``[n, height, width, 3]`` and labels of the parquet files of a part."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    files = sorted(folder.glob(f"*{part}*.parquet"))
    if not files:
        raise MissingDataError(f"{folder} has no parquet file of the split {part!r}; task.data.images=null needs none")
    try:
        table = pa.concat_tables([pq.read_table(file, columns=["image", "label"]) for file in files])
        images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
        return torch.from_numpy(np.stack(images)), table["label"].to_pylist()
    except (OSError, ValueError, TypeError, KeyError) as error:  # from pyarrow, Pillow and numpy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: the {part} images cannot be read: {reason}") from error


def _arrays(
    file: Path, *names: str, one_of: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file, with one of ``one_of``, and those of ``optional`` that exist.

    If the file is no archive or lacks an array, the error is one line.
    """
    wanted = ", ".join((*names, *([" or ".join(one_of)] if one_of else [])))
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive")
        with np.load(file, allow_pickle=False) as content:
            missing = sorted(set(names) - set(content))
            if one_of and not set(one_of) & set(content):
                missing.append(one_of[0])
            if missing:
                raise ValueError(f"it lacks the arrays {', '.join(missing)}")
            return {name: content[name] for name in (*names, *one_of, *optional) if name in content}
    except (OSError, EOFError, ValueError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is no .npz file with the arrays {wanted}: {error}") from error


def _indices(file: Path, array: NDArray[Any], names: list[str]) -> Tensor:
    """int64 ``[n]``, n > 0: the concept of each image, as an index into the names."""
    if array.dtype.kind not in "iu" or array.ndim != 1 or not len(array):
        raise ValueError(f"{file}: the concept of each image is a whole number; got {array.dtype} {list(array.shape)}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= len(names):
        raise ValueError(
            f"{file}: concepts are numbered from 0 to {len(names) - 1}, one name each; got {low} to {high}"
        )
    return torch.from_numpy(array.astype(np.int64))


def group(features: Tensor, labels: list[str | int], names: list[str] | None) -> Concepts:
    """Features sorted by label and of length 1.

    Args:
        features: ``[n, size]``.
        labels: labels of the n images.
        names: names into which the labels are indices, if they are.

    Raises:
        ValueError: one line, if features or their lengths are not finite in float32, if features
            are no matrix, or if there are not as many as labels.
    """
    if features.dim() != 2 or len(features) != len(labels):
        raise ValueError(f"{len(labels)} labels go with features [{len(labels)}, size]; got {list(features.shape)}")
    features = features.float()
    if not bool(features.norm(dim=1).isfinite().all()):
        raise ValueError("features must be finite numbers, and so must the length of each image's, in float32")
    known = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    index = {label: position for position, label in enumerate(known)}
    concept = torch.tensor([index[label] for label in labels], dtype=torch.int64)
    concept, order = concept.sort(stable=True)
    shown = [names[label] if names is not None and isinstance(label, int) else str(label) for label in known]
    return Concepts(torch.nn.functional.normalize(features[order]), concept, shown)
