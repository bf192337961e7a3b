"""Generated data on disk: one folder for each configuration, with Hugging Face data sets and a
manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from structgrad.data.errors import MissingDataError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

Key = Mapping[str, Any]


class Damaged(Exception):  # noqa: N818 - never leaves this module
    """A cache folder does not hold what its manifest says."""


def folder_of(cache: str | Path, task: str, key: Key) -> Path:
    """``<cache>/<task>/<hash of key>``: the folder for the data of a configuration.

    Args:
        cache: ``paths.cache``.
        task: name of the task.
        key: everything on which the data depend, in a form that JSON can hold.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache) / task / digest[:16]


def ensure(folder: Path, key: Key, make: Callable[[], Mapping[str, pa.Table]]) -> None:
    """Make and store tables unless they exist and are intact. It is safe in several processes at
    once.

    The folder appears with all its content or not at all. Every file's hash is compared with the
    manifest, so a damaged cache is noticed and built again.

    Args:
        folder: see :func:`folder_of`.
        key: written into the manifest.
        make: returns the tables by name (of the split); called only if needed.

    Raises:
        MissingDataError: if the cache cannot be written.
    """
    lock = FileLock(f"{folder}.lock")
    with _naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if folder.exists():
            try:
                _verify(folder, key)
                return
            except Damaged as damage:
                log.warning("The cache %s is damaged (%s): rebuilding it.", folder, damage)
        else:
            log.info("making the data in %s, once", folder)
        tables = make()
        with _naming(folder):
            _store(tables, folder, key)
    finally:
        lock.release()


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into an error that names the cache."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MissingDataError(f"cannot write the data set to the cache {folder}: {reason}; set paths.cache") from error


def load(folder: Path, name: str) -> pa.Table:
    """The table ``name`` that :func:`ensure` stored, memory-mapped."""
    import datasets  # takes a second, so import it only when data are needed

    return datasets.load_from_disk(folder / name).data.table.combine_chunks()


def column_of(array: NDArray[Any]) -> pa.Array:
    """``[n, ...]`` as an Arrow column of ``n`` lists of equal size."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))


def array_of(table: pa.Table, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of :func:`column_of`: ``[n, *shape]``, a writable copy."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(flat).reshape(len(table), *shape)


def _store(tables: Mapping[str, pa.Table], folder: Path, key: Key) -> None:
    import datasets

    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        with _no_progress_bars():
            for name, table in tables.items():
                datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(work / name)
        files = {str(f.relative_to(work)): _fingerprint(f) for f in sorted(work.rglob("*")) if f.is_file()}
        (work / "manifest.json").write_text(json.dumps({"configuration": dict(key), "sha256": files}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the progress bar of each table, which takes moments."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def _verify(folder: Path, key: Key) -> None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, configuration = dict(manifest["sha256"]), manifest["configuration"]
    except FileNotFoundError:
        raise Damaged("no manifest") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged("unreadable manifest") from None
    if configuration != json.loads(json.dumps(dict(key))):
        raise Damaged("the manifest is of other data")
    if not files:
        raise Damaged("unreadable manifest")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
        if _fingerprint(folder / name) != expected:
            raise Damaged(f"{name} has changed")


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
