"""The images of the bit-vector VAE. Training uses the first images, validation the last ones of the
training part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from structgrad.data.images import Colour, prepare_images, read_images
from structgrad.tasks.base import Split


@dataclass
class ImageData:
    """A split of a data set of labelled images.

    Args:
        source: see :func:`structgrad.data.images.prepare_images`.
        data: folder of data sets, ``paths.data``.
        cache: folder of decoded images, ``paths.cache``.
        train: number of images for training, the first ones of the training part.
        val: number of images for validation, the last ones of the training part.
        test: number of images for the test, the first ones of the test part.
        colour: how images in colour are treated, see
            :func:`~structgrad.data.images.prepare_images`. With ``channels`` each of the three
            values of a pixel counts as one of ``pixels``.

    Raises:
        ValueError: for a size below 1; from :meth:`prepare`, if there are fewer images.
    """

    source: str
    data: str | Path
    cache: str | Path
    train: int = 55_000
    val: int = 5_000
    test: int = 10_000
    colour: Colour = "refused"
    _loaded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("train", "val", "test"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1; got {getattr(self, name)}")

    def prepare(self) -> None:
        """Decode the images, unless they are cached."""
        prepare_images(self.source, self.data, self.cache, self.colour)

    @property
    def pixels(self) -> int:
        """The number of values of an image, which is decoded for that."""
        return self.split("train").shape[1]

    def split(self, split: Split) -> Tensor:
        """Grey levels, uint8 ``[n, pixels]``."""
        if not self._loaded:
            folder = prepare_images(self.source, self.data, self.cache, self.colour)
            for name, size in (("train", self.train + self.val), ("test", self.test)):
                pixels = torch.from_numpy(read_images(folder, name).pixels).flatten(1)
                if len(pixels) < size:
                    raise ValueError(f"{self.source} has {len(pixels)} {name} images; the sizes need {size}")
                self._loaded[name] = pixels
        if split == "test":
            return self._loaded["test"][: self.test]
        return self._loaded["train"][: self.train] if split == "train" else self._loaded["train"][-self.val :]
