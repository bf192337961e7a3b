"""MNIST with few labels: the published split, and pixels that are drawn anew at every access."""

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

#: Training images that the published split divides.
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
    """The published split of MNIST, or of any data set of as many training images.

    Args:
        source: see :func:`structgrad.data.images.prepare_images`.
        data: folder of data sets, ``paths.data``.
        cache: folder of decoded images, ``paths.cache``.
        labelled: the first so many of the labelled images.
        unlabelled: the first so many of the unlabelled images.
        val: the first so many of the validation images.
        test: the first so many images of the test part.

    Raises:
        ValueError: for a size below 1 or beyond the split; from :meth:`split`, for a source of another size.
    """

    source: str
    data: str | Path
    cache: str | Path
    labelled: int = 5_000
    unlabelled: int = 45_000
    val: int = 10_000
    test: int = 10_000
    _loaded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name, most in (("labelled", 5_000), ("unlabelled", 45_000), ("val", 10_000), ("test", 10_000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"data.{name} must lie between 1 and {most}; got {getattr(self, name)}")

    def prepare(self) -> None:
        """Decode the images, unless they are cached."""
        prepare_images(self.source, self.data, self.cache)

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
            if len(train[0]) != SPLIT_OF:
                raise ValueError(
                    f"the published split divides {SPLIT_OF} training images; {self.source} has {len(train[0])}"
                )
            if len(test[0]) < self.test:
                raise ValueError(f"{self.source} has {len(test[0])} test images; data.test={self.test} needs more")
            self._loaded["test"] = (test[0][: self.test], test[1][: self.test])
            for name, indices in published_split().items():
                chosen = indices[: getattr(self, name)]
                self._loaded[name] = (train[0][chosen], train[1][chosen])
        images, labels = self._loaded[split]
        return {"images": images, "labels": labels}
