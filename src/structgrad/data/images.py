"""Image data sets through Hugging Face ``datasets``, decoded once and cached as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from structgrad.data import cache
from structgrad.data.errors import DamagedDataError, MissingDataError

if TYPE_CHECKING:
    import datasets
    import PIL.Image
    import pyarrow as pa

SPLITS = ("train", "test")
#: Folders that budgets take -> the same images on the hub.
_ON_THE_HUB = {"MNIST/parquet": "ylecun/mnist"}
#: Part of the key of a cache; raise it when the same files would give other arrays.
_VERSION = 1


@dataclass(frozen=True)
class Images:
    """A set of labelled grey-level images.

    Attributes:
        pixels: uint8 ``[n, height, width]``.
        labels: int64 ``[n]``.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def prepare_images(source: str, data: str | Path, cache_folder: str | Path) -> Path:
    """Decode a data set unless that has been done.

    Args:
        source: a folder of parquet files (columns ``image`` and ``label``, files named after ``train`` and ``test``),
            absolute or within ``data``, or else a name on the Hugging Face hub, e.g.
            ``zalando-datasets/fashion_mnist``.
        data: ``paths.data``.
        cache_folder: ``paths.cache``.

    Returns:
        the folder of the decoded arrays, for :func:`read_images`.

    Raises:
        MissingDataError: if the source is neither here nor to be had.
        DamagedDataError: if it holds anything but 8-bit images of one size with whole numbers as labels.
    """
    local = Path(data) / source  # an absolute source stays itself
    key: dict[str, Any] = {"version": _VERSION, "source": source}
    if local.is_dir():
        files = sorted(local.glob("*.parquet"))
        key = {"version": _VERSION, "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]}
    folder = cache.folder_of(cache_folder, "images", key)
    cache.ensure(folder, key, lambda: {split: _decode_or_explain(source, local, split) for split in SPLITS})
    return folder


def read_images(folder: Path, split: str) -> Images:
    """The ``train`` or ``test`` part of what :func:`prepare_images` stored."""
    table = cache.load(folder, split)
    height, width = table["height"][0].as_py(), table["width"][0].as_py()
    return Images(cache.array_of(table, "pixels", (height, width)), np.array(table["label"].to_numpy(), dtype=np.int64))


def is_square(pixels: int) -> bool:
    """Whether an image of so many pixels, which is drawn without its height and width, can be a square."""
    return math.isqrt(pixels) ** 2 == pixels


def _fetch(source: str, local: Path, split: str) -> datasets.Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if local.is_dir():
        files = sorted(str(f) for f in local.glob(f"*{split}*.parquet"))
        if not files:
            raise MissingDataError(_advice(source, local, f"{local} has no parquet file of the split {split!r}"))
        # Read as it is: ``from_parquet`` would leave a copy in the cache of Hugging Face.
        return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(map(pq.read_table, files))))
    if Path(source).is_absolute():
        raise MissingDataError(_advice(source, local, f"there is no folder {local}"))
    try:
        if not HF_HUB_OFFLINE:
            # Asks once; loading itself would first try six times, for half a minute, on a machine without network.
            HfApi().dataset_info(source, timeout=10)
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub, its client and the network each raise errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingDataError(_advice(source, local, f"the Hugging Face hub does not give it: {reason}")) from error


def _advice(source: str, local: Path, reason: str) -> str:
    page = _ON_THE_HUB.get(source, source)
    other = (
        f"task.data.source={page} downloads them here"
        if page != source
        else "choose a data set that is here, e.g. task.data.source=MNIST/parquet"
    )
    return (
        f"The images {source!r} are not here and {reason}. "
        f"Download the parquet files of its splits train and test (columns image and label) on a machine with network "
        f"access, from the page https://huggingface.co/datasets/{page}, put them into {local}, "
        f"and repeat the command; or {other}."
    )


def _decode_or_explain(source: str, local: Path, split: str) -> pa.Table:
    try:
        return _decode(_fetch(source, local, split))
    except MissingDataError:
        raise
    except (OSError, ValueError, TypeError) as error:  # of pyarrow, Pillow and datasets
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedDataError(f"the {split} images of {source!r} cannot be read: {reason}") from error


def _decode(images: datasets.Dataset) -> pa.Table:
    import datasets
    import pyarrow as pa

    if missing := {"image", "label"} - set(images.column_names):
        have = ", ".join(images.column_names)
        raise ValueError(f"there is no column {' and no column '.join(sorted(missing))}; there are {have}")
    images = images.cast_column("image", datasets.Image())
    if not len(images):
        raise ValueError("there are none")
    grey = [_grey(image) for image in _column(images, "image")]
    if len(shapes := {image.shape for image in grey}) > 1:
        raise ValueError(f"they must be of one size; there are {', '.join(map(str, sorted(shapes)[:3]))}")
    pixels = np.stack(grey)
    labels = np.array([_whole(label) for label in _column(images, "label")], dtype=np.int64)
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


def _grey(image: PIL.Image.Image | None) -> NDArray[np.uint8]:
    if image is None:
        raise ValueError("an image is missing")
    if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
        raise ValueError(f"they must have 8 bits a channel; got Pillow's mode {image.mode}")
    return np.asarray(image.convert("L"), dtype=np.uint8)


def _whole(label: Any) -> int:
    if not isinstance(label, int):
        raise ValueError(f"labels must be whole numbers; got {label!r}")
    return label


def _column(images: datasets.Dataset, name: str) -> Iterable[Any]:
    return (row[name] for row in images.select_columns([name]))
