"""Image data sets from parquet files, IDX files, folders of images or the Hugging Face hub, decoded once and cached."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from structgrad.common.ranges import check_choice
from structgrad.data import cache
from structgrad.data.errors import DamagedDataError, MissingDataError

if TYPE_CHECKING:
    import datasets
    import PIL.Image
    import pyarrow as pa

Colour = Literal["refused", "grey", "channels"]

SPLITS = ("train", "test")
#: Folders that budgets use -> the same images on the hub, and other places that have them.
_ELSEWHERE = {
    "MNIST/parquet": ("ylecun/mnist", ""),
    "FashionMNIST/parquet": (
        "zalando-datasets/fashion_mnist",
        ", or from Debian's package dataset-fashion-mnist, whose folder of IDX files is a source as it is",
    ),
}
#: The first part of the names of the four IDX files of MNIST and its relatives, by split.
_IDX = {"train": "train", "test": "t10k"}
_IMAGE_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Part of the key of a cache. Raise it when the same files would give other arrays.
_VERSION = 1


@dataclass(frozen=True)
class Images:
    """A set of labelled images.

    Attributes:
        pixels: uint8 ``[n, height, width]``. With channels it is ``[n, height, 3 * width]``, with
            the three values of a pixel side by side.
        labels: int64 ``[n]``.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def prepare_images(source: str, data: str | Path, cache_folder: str | Path, colour: Colour = "grey") -> Path:
    """Decode a data set unless it is decoded already.

    Args:
        source: a folder, absolute or within ``data``, or else a name on the Hugging Face hub, e.g.
            ``zalando-datasets/fashion_mnist``. A folder has one of

            - parquet files (columns ``image`` and ``label``), named after ``train`` and ``test``;
            - the four IDX files of MNIST, gzipped or not: ``train-images-idx3-ubyte.gz``,
              ``train-labels-idx1-ubyte.gz``, and the same with ``t10k``;
            - folders ``train`` and ``test``, each with one folder of image files for each label;
              labels are numbered in the order of their names.
        data: ``paths.data``.
        cache_folder: ``paths.cache``.
        colour: how images in colour are treated. ``refused``: they are an error. ``grey``: their
            luma is taken (ITU-R 601-2). ``channels``: all images have three channels.

    Returns:
        the folder of the decoded arrays, for :func:`read_images`.

    Raises:
        MissingDataError: if the source is neither here nor on the hub.
        DamagedDataError: if it holds anything except 8-bit images of one size with whole numbers as
            labels, or images in colour that are refused.
        ValueError: for another ``colour``.
    """
    check_choice("colour", colour, get_args(Colour))
    local = Path(data) / source  # an absolute source stays itself
    key: dict[str, Any] = {"version": _VERSION, "source": source}
    if local.is_dir():
        files = [(str(f.relative_to(local)), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(local)]
        key = {"version": _VERSION, "files": [list(file) for file in files]}
    if colour != "grey":
        key["colour"] = colour
    folder = cache.folder_of(cache_folder, "images", key)
    cache.ensure(folder, key, lambda: {split: _decode_or_explain(source, local, split, colour) for split in SPLITS})
    return folder


def read_images(folder: Path, split: str) -> Images:
    """The ``train`` or ``test`` part of the arrays that :func:`prepare_images` stored."""
    table = cache.load(folder, split)
    height, width = table["height"][0].as_py(), table["width"][0].as_py()
    return Images(cache.array_of(table, "pixels", (height, width)), np.array(table["label"].to_numpy(), dtype=np.int64))


def is_square(pixels: int) -> bool:
    """Whether a flat image with this number of pixels can be a square."""
    return math.isqrt(pixels) ** 2 == pixels


def _files(local: Path) -> list[Path]:
    """The files of the one format of a folder: parquet before IDX before image files."""
    if found := sorted(local.glob("*.parquet")):
        return found
    if found := sorted(file for split in SPLITS for kind in ("images", "labels") for file in _idx(local, split, kind)):
        return found
    return sorted(file for split in SPLITS for _, file in _labelled_files(local / split))


def _idx(local: Path, split: str, kind: str) -> list[Path]:
    """IDX files under the usual names: ``train-images-idx3-ubyte``, ``train-images.idx3-ubyte``,
    and with ``.gz``.
    """
    return sorted(local.glob(f"{_IDX[split]}-{kind}?idx[13]-ubyte*"))


def label_folders(folder: Path) -> list[Path]:
    """The folders in a folder, one for each label, in the order of their names; none if it does not exist."""
    return sorted(f for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, in the order of their names."""
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _IMAGE_FILES]


def _labelled_files(folder: Path) -> list[tuple[int, Path]]:
    """The image files of a folder that has one folder for each label."""
    return [(label, file) for label, own in enumerate(label_folders(folder)) for file in image_files(own)]


def _fetch(source: str, local: Path, split: str) -> tuple[Iterable[PIL.Image.Image | None], Iterable[Any]]:
    """Images and labels."""
    if local.is_dir():
        files = _files(local)
        if files and files[0].suffix == ".parquet":
            return _columns(_read_parquet(source, local, split))
        images, labels = _idx(local, split, "images"), _idx(local, split, "labels")
        if images and labels:
            return _read_idx(images[0], labels[0])
        if images or labels:
            reason = f"{local} has one of the two IDX files of the split {split!r}, {(images or labels)[0].name}"
            raise MissingDataError(_advice(source, local, reason))
        if labelled := _labelled_files(local / split):
            return _opened(file for _, file in labelled), (label for label, _ in labelled)
        raise MissingDataError(_advice(source, local, f"{local} has no images of the split {split!r}"))
    if Path(source).is_absolute():
        raise MissingDataError(_advice(source, local, f"there is no folder {local}"))
    return _columns(_download(source, local, split))


def _read_parquet(source: str, local: Path, split: str) -> datasets.Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(str(f) for f in local.glob(f"*{split}*.parquet"))
    if not files:
        raise MissingDataError(_advice(source, local, f"{local} has no parquet file of the split {split!r}"))
    # Read it directly: ``from_parquet`` would leave a copy in the cache of Hugging Face.
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(map(pq.read_table, files))))


def _download(source: str, local: Path, split: str) -> datasets.Dataset:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if not HF_HUB_OFFLINE:
            # This asks once. Loading would first try six times, for half a minute, on a machine
            # without network.
            HfApi().dataset_info(source, timeout=10)
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub, its client and the network each raise their own errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingDataError(_advice(source, local, f"the Hugging Face hub does not give it: {reason}")) from error


def _advice(source: str, local: Path, reason: str) -> str:
    page, also = _ELSEWHERE.get(source, (source, ""))
    other = (
        f"task.data.source={page} downloads them here"
        if page != source
        else "choose a data set that is here, e.g. task.data.source=MNIST/parquet"
    )
    return (
        f"The images {source!r} are not here and {reason}. "
        f"Download the parquet files of its splits train and test (columns image and label) on a machine with network "
        f"access, from the page https://huggingface.co/datasets/{page}{also}, put them into {local}, "
        f"and repeat the command; or {other}."
    )


def _columns(images: datasets.Dataset) -> tuple[Iterable[PIL.Image.Image | None], Iterable[Any]]:
    import datasets

    if missing := {"image", "label"} - set(images.column_names):
        have = ", ".join(images.column_names)
        raise ValueError(f"there is no column {' and no column '.join(sorted(missing))}; there are {have}")
    images = images.cast_column("image", datasets.Image())
    return _column(images, "image"), _column(images, "label")


def _column(images: datasets.Dataset, name: str) -> Iterable[Any]:
    return (row[name] for row in images.select_columns([name]))


def _read_idx(images: Path, labels: Path) -> tuple[Iterable[PIL.Image.Image], Iterable[int]]:
    import PIL.Image

    pixels, found = _idx_array(images, 3), _idx_array(labels, 1)
    if len(pixels) != len(found):
        raise ValueError(f"{images.name} has {len(pixels)} images, {labels.name} {len(found)} labels")
    return (PIL.Image.fromarray(image) for image in pixels), found.tolist()


def _idx_array(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file: magic ``0 0 8 dimensions``, big-endian sizes, bytes."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read()
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{file.name}: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{file.name} is no IDX file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content[4:start], dtype=">u4")
    if len(shape) < dimensions or len(content) != start + math.prod(shape.tolist()):
        raise ValueError(f"{file.name} has {len(content)} bytes, which its sizes {shape.tolist()} do not fill")
    return np.frombuffer(content[start:], dtype=np.uint8).reshape(shape.tolist())


def _opened(files: Iterable[Path]) -> Iterator[PIL.Image.Image]:
    import PIL.Image

    for file in files:
        with PIL.Image.open(file) as image:
            yield image


def _decode_or_explain(source: str, local: Path, split: str, colour: Colour) -> pa.Table:
    try:
        return _decode(*_fetch(source, local, split), colour)
    except MissingDataError:
        raise
    except (OSError, ValueError, TypeError) as error:  # from pyarrow, Pillow and datasets
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedDataError(f"the {split} images of {source!r} cannot be read: {reason}") from error


def _decode(images: Iterable[PIL.Image.Image | None], given: Iterable[Any], colour: Colour) -> pa.Table:
    import pyarrow as pa

    decoded = [_array(image, colour) for image in images]
    if not decoded:
        raise ValueError("there are none")
    if len(shapes := {image.shape for image in decoded}) > 1:
        raise ValueError(f"they must be of one size; there are {', '.join(map(str, sorted(shapes)[:3]))}")
    pixels = np.stack(decoded)
    labels = np.array([_whole(label) for label in given], dtype=np.int64)
    height, width = pixels.shape[1:]
    ones = np.ones(len(pixels), dtype=np.int64)
    return pa.table(
        {
            "pixels": cache.column_of(pixels),
            "label": labels,
            "height": height * ones,
            "width": width * ones,
        }
    )


def _array(image: PIL.Image.Image | None, colour: Colour) -> NDArray[np.uint8]:
    if image is None:
        raise ValueError("an image is missing")
    check_depth(image)
    if colour == "channels":
        return np.asarray(image.convert("RGB"), dtype=np.uint8).reshape(image.height, -1)
    if colour == "refused" and image.mode not in ("1", "L", "LA"):
        raise ValueError(
            f"they are in colour (Pillow's mode {image.mode}), which task.data.colour refuses; grey takes their luma, "
            "channels all three values of a pixel"
        )
    return np.asarray(image.convert("L"), dtype=np.uint8)


def check_depth(image: PIL.Image.Image) -> None:
    """Refuse an image with more than 8 bits a channel, by a ValueError: Pillow would clip it at 255."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"they must have 8 bits a channel; got Pillow's mode {image.mode}")


def _whole(label: Any) -> int:
    if not isinstance(label, int):
        raise ValueError(f"labels must be whole numbers; got {label!r}")
    return label
