"""Sources of images other than parquet files, which tests/tasks/test_bit_vector_vae.py has: IDX files, image files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from structgrad.data import DamagedDataError, MissingDataError
from structgrad.data.images import prepare_images, read_images


def idx(array: NDArray[np.uint8]) -> bytes:
    """The format of LeCun's page: magic, big-endian sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write(folder: Path, arrays: dict[str, NDArray[np.uint8]], zipped: bool) -> None:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        file = folder / (f"{name}.gz" if zipped else name)
        file.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


@pytest.fixture
def arrays() -> dict[str, NDArray[np.uint8]]:
    """A folder with the four files of MNIST, with 5 and 3 images of 4 x 6."""
    rng = np.random.default_rng(0)
    made = {}
    for part, n in (("train", 5), ("t10k", 3)):
        made[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 4, 6), dtype=np.uint8)
        made[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    return made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dotted", [True, False])
def test_a_folder_of_idx_files_is_a_source(
    zipped: bool, dotted: bool, arrays: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    named = {name.replace("-idx", ".idx") if dotted else name: array for name, array in arrays.items()}
    write(tmp_path / "raw", named, zipped)
    folder = prepare_images("raw", tmp_path, tmp_path / "cache")
    for split, part in (("train", "train"), ("test", "t10k")):
        images = read_images(folder, split)
        np.testing.assert_array_equal(images.pixels, arrays[f"{part}-images-idx3-ubyte"])
        np.testing.assert_array_equal(images.labels, arrays[f"{part}-labels-idx1-ubyte"])
    write(tmp_path / "raw", {name: 255 - array for name, array in named.items() if "images" in name}, zipped)
    changed = read_images(prepare_images("raw", tmp_path, tmp_path / "cache"), "train")
    np.testing.assert_array_equal(changed.pixels, 255 - arrays["train-images-idx3-ubyte"])


def test_damaged_idx_files_are_named(arrays: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    file = tmp_path / "raw" / "train-images-idx3-ubyte.gz"
    for content, reason in (
        (b"text", "cannot be read: .*gzipped"),
        (gzip.compress(b"text"), "train-images-idx3-ubyte.gz is no IDX file of bytes with 3 dimensions"),
        (gzip.compress(idx(arrays["train-images-idx3-ubyte"]))[:-9], "train-images-idx3-ubyte.gz: "),
        (
            gzip.compress(idx(arrays["train-images-idx3-ubyte"])[:-1]),
            r"has 135 bytes, which its sizes \[5, 4, 6\] do not",
        ),
        (gzip.compress(idx(arrays["train-images-idx3-ubyte"][:4])), "has 4 images, .* 5 labels"),
    ):
        write(tmp_path / "raw", arrays, zipped=True)
        file.write_bytes(content)
        with pytest.raises(DamagedDataError, match=reason) as caught:
            prepare_images("raw", tmp_path, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(MissingDataError, match=r"one of the two IDX files of the split 'train', train-labels"):
        prepare_images("raw", tmp_path, tmp_path / "cache")


def test_folders_of_image_files_are_a_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected: dict[str, list[tuple[int, Any]]] = {"train": [], "test": []}
    for split in expected:
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / "insects" / split / name).mkdir(parents=True)
            for k in range(3):
                pixels = rng.integers(0, 256, (5, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "insects" / split / name / f"{k}.PNG")
                expected[split].append((label, pixels))
            (tmp_path / "insects" / split / name / "readme.txt").write_text("no image")
    folder = prepare_images("insects", tmp_path, tmp_path / "cache", "refused")
    for split, rows in expected.items():
        images = read_images(folder, split)
        np.testing.assert_array_equal(images.pixels, np.stack([pixels for _, pixels in rows]))
        assert images.labels.tolist() == [label for label, _ in rows]
    for file in (tmp_path / "insects" / "test").glob("*/*.PNG"):
        file.unlink()
    with pytest.raises(MissingDataError, match="has no images of the split 'test'"):
        prepare_images("insects", tmp_path, tmp_path / "cache")


def test_colours_are_refused_made_grey_or_kept(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    for split in ("train", "test"):
        (tmp_path / "c" / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "c" / split / "a" / "1.png")
    with pytest.raises(DamagedDataError, match=r"in colour \(Pillow's mode RGB\), which task\.data\.colour refuses"):
        prepare_images("c", tmp_path, tmp_path / "cache", "refused")
    kept = read_images(prepare_images("c", tmp_path, tmp_path / "cache", "channels"), "train")
    np.testing.assert_array_equal(kept.pixels, pixels.reshape(1, 2, 9))
    grey = read_images(prepare_images("c", tmp_path, tmp_path / "cache", "grey"), "train")
    np.testing.assert_allclose(grey.pixels[0], pixels @ [0.299, 0.587, 0.114], atol=0.51)
    with pytest.raises(ValueError, match="one of refused, grey, channels"):
        prepare_images("c", tmp_path, tmp_path / "cache", "sepia")  # type: ignore[arg-type]


def test_fashion_mnist_is_that_of_the_published_files(shared_data: Path, tmp_path: Path) -> None:
    """Original order, by the hash of the IDX file that its authors distribute."""
    import hashlib

    test = read_images(prepare_images("FashionMNIST/parquet", shared_data, tmp_path / "cache", "refused"), "test")
    assert hashlib.md5(idx(test.pixels)).hexdigest() == "8181f5470baa50b63fa0f6fddb340f0a"
    assert hashlib.md5(idx(test.labels.astype(np.uint8))).hexdigest() == "15d484375f8d13e6eb1aabb0c3f46965"
