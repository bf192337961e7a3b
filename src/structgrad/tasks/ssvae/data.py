"""Images with few labels: the published split of MNIST, or a random one. Pixels are drawn anew at
every access.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from structgrad.data import Batch
from structgrad.data.images import prepare_images, read_images
from structgrad.tasks.base import Split

#: The number of training images that the published split divides.
SPLIT_OF = 60_000


def published_split() -> dict[str, Tensor]:
    """``labelled`` ``[5000]``, ``unlabelled`` ``[45000]``, ``val`` ``[10000]``: int64 indices of training images."""
    folder = resources.files("structgrad.tasks.ssvae") / "mnist_split"
    split = {}
    for name, file in (("labelled", "labelled.npy"), ("val", "validation.npy")):
        with (folder / file).open("rb") as stream:
            split[name] = torch.from_numpy(np.load(stream, allow_pickle=False).astype(np.int64))
    rest = torch.ones(SPLIT_OF, dtype=torch.bool)
    rest[torch.cat(list(split.values()))] = False
    return {**split, "unlabelled": rest.nonzero()[:, 0]}


def resample(pixels: Tensor) -> Tensor:
    """Independent Bernoulli pixels, 1 with probability byte / 255 exactly: float32 of the shape of uint8 ``pixels``."""
    return (torch.randint_like(pixels, 255) < pixels).float()


@dataclass
class SemiSupervisedImages:
    """The published split of MNIST (or of a data set of the same size), or a random split.

    A random split is the same for all runs: labelled, validation and unlabelled images are drawn
    one after another.

    Args:
        source: see :func:`structgrad.data.images.prepare_images`.
        data: folder of data sets, ``paths.data``.
        cache: folder of decoded images, ``paths.cache``.
        labelled: number of labelled images used; in a random split the number drawn. Or their share
            of the training part without ``val``, between 0 and 1.
        unlabelled: likewise a number; None takes all others.
        val: number of images for validation, or their share of the training part.
        test: number of images of the test part, the first ones; None takes all.

    Raises:
        ValueError: for a size below 1 that is no share; from :meth:`split`, for a size beyond the
            split, or if there are too few images.
    """

    source: str
    data: str | Path
    cache: str | Path
    labelled: int | float = 5_000
    unlabelled: int | None = 45_000
    val: int | float = 10_000
    test: int | None = 10_000
    _loaded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("labelled", "unlabelled", "val", "test"):
            size = getattr(self, name)
            shares = isinstance(size, float) and name in ("labelled", "val")
            if size is not None and not (0 < size < 1 if shares else size >= 1):
                or_share = ", or a share between 0 and 1" if name in ("labelled", "val") else ""
                raise ValueError(f"data.{name} must be at least 1{or_share}; got {size}")

    def prepare(self) -> None:
        """Decode the images, unless they are cached."""
        prepare_images(self.source, self.data, self.cache)

    @property
    def pixels(self) -> int:
        """The number of pixels of an image, which is decoded for that."""
        return self.split("labelled")["images"].shape[1]

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label of any image."""
        return 1 + max(int(self.split(part)["labels"].max()) for part in ("labelled", "unlabelled", "val", "test"))

    def split(self, split: Split | str) -> Batch:
        """``images`` uint8 ``[n, pixels]`` and ``labels`` int64 ``[n]``.

        Args:
            split: ``labelled``, ``unlabelled``, ``val`` or ``test``.
        """
        if not self._loaded:
            folder = prepare_images(self.source, self.data, self.cache)
            train, test = (
                (torch.from_numpy(images.pixels).flatten(1), torch.from_numpy(images.labels))
                for images in (read_images(folder, name) for name in ("train", "test"))
            )
            if len(test[0]) < (self.test or 1):
                raise ValueError(f"{self.source} has {len(test[0])} test images; data.test={self.test} needs more")
            self._loaded["test"] = (test[0][: self.test], test[1][: self.test])
            sizes = self._sizes(len(train[0]))
            parts = published_split() if len(train[0]) == SPLIT_OF else self._random_split(len(train[0]), sizes)
            for name, indices in parts.items():
                if len(indices) < sizes[name]:
                    raise ValueError(
                        f"the split has {len(indices)} {name} images; got data.{name}={getattr(self, name)}"
                    )
                chosen = indices[: sizes[name]]
                self._loaded[name] = (train[0][chosen], train[1][chosen])
        images, labels = self._loaded[split]
        return {"images": images, "labels": labels}

    def _sizes(self, images: int) -> dict[str, int]:
        """The number of images of each part of a training part."""
        val = round(self.val * images) if isinstance(self.val, float) else self.val
        left = images - val
        labelled = round(self.labelled * left) if isinstance(self.labelled, float) else self.labelled
        unlabelled = left - labelled if self.unlabelled is None else self.unlabelled
        sizes = {"labelled": labelled, "val": val, "unlabelled": unlabelled}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(
                    f"{self.source} has {images} training images; data.{name}={getattr(self, name)} is none"
                )
        return sizes

    def _random_split(self, images: int, sizes: dict[str, int]) -> dict[str, Tensor]:
        if sum(sizes.values()) > images:
            asked = " + ".join(f"data.{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{self.source} has {images} training images, fewer than {asked}")
        order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
        parts = order[: sum(sizes.values())].split(list(sizes.values()))
        return dict(zip(sizes, parts, strict=True))
