"""Image files as a data set of the game: a folder of images for each concept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from structgrad.common.installing import install
from structgrad.common.ranges import check_choice
from structgrad.data import DamagedDataError, MissingDataError, cache
from structgrad.data.images import check_depth, image_files, label_folders
from structgrad.tasks.base import Split
from structgrad.tasks.communication_game.data import ConceptData, Concepts, divided, group

if TYPE_CHECKING:
    import PIL.Image

Network = Literal["vgg16"]

#: Part of the key of a cache. Raise it when the same files would give other arrays.
_VERSION = 1
#: Sides of the images that pictures show, and the number of images that go through a network at once.
_SHOWN, _AT_ONCE = 64, 32
#: The number of activations in the last hidden layer of the network.
_ACTIVATIONS = {"vgg16": 4096}


@dataclass
class ImageFolder(ConceptData):
    """Your own images: a folder that has one folder of image files for each concept.

    Images may have any size and colour. Their features are their pixels, or the activations of the
    last hidden layer of a network trained on ImageNet. Pixels are those of a square from the middle
    of the image, made small, in RGB; their mean over the training images is subtracted. Features
    are made once and cached. Every concept's images are divided in the order of their names.

    Args:
        folder: the folder, absolute or within ``data``.
        data: folder of data sets, ``paths.data``.
        cache: folder of the features, ``paths.cache``.
        network: None for pixels; or ``vgg16`` (Simonyan and Zisserman 2015), which needs
            torchvision.
        features: number of features of an image: 3 * side * side for pixels, 4096 for ``vgg16``.
        weights: file with the state of the network, where it cannot be downloaded.
        val: share of every concept's images for validation.
        test: share of every concept's images for the test. Each split has at least one image of
            every concept.

    Raises:
        ValueError: for another network or number of features, or shares out of range; from
            :meth:`split`, for a concept with fewer than three images.
        MissingDataError: from :meth:`prepare`, if there are no images, no torchvision or no weights.
        DamagedDataError: from :meth:`prepare`, for a file that is no image with 8 bits a channel.
    """

    folder: str
    data: str | Path
    cache: str | Path
    network: Network | None = None
    features: int = 768
    weights: str | None = None
    val: float = 0.15
    test: float = 0.15

    def __post_init__(self) -> None:
        """Check the options."""
        if not (self.val > 0 and self.test > 0 and self.val + self.test < 1):
            raise ValueError(f"data.val and data.test are shares that leave some; got {self.val} and {self.test}")
        if self.network is None:
            if self._side < 1 or 3 * self._side**2 != self.features:
                raise ValueError(f"data.features must be 3 x side x side, e.g. 768 = 3 x 16 x 16; got {self.features}")
            if self.weights is not None:
                raise ValueError("data.weights are those of a network; data.network=vgg16 takes one")
            return
        check_choice("data.network", self.network, get_args(Network))
        if self.features != _ACTIVATIONS[self.network]:
            raise ValueError(
                f"data.network={self.network} makes {_ACTIVATIONS[self.network]} features, which data.features must "
                f"say; got {self.features}"
            )

    @property
    def _side(self) -> int:
        return math.isqrt(self.features // 3)

    @property
    def _path(self) -> Path:
        return Path(self.data) / self.folder  # an absolute folder stays itself

    @property
    def _concepts(self) -> list[Path]:
        return [folder for folder in label_folders(self._path) if image_files(folder)]

    @property
    def key(self) -> dict[str, Any]:
        """Everything on which the features depend."""
        files = [file for concept in label_folders(self._path) for file in image_files(concept)]
        stamps = [[str(f.relative_to(self._path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        own = {"version": _VERSION, "files": stamps, "network": self.network, "features": self.features}
        if self.weights is not None:
            own["weights"] = str(Path(self.weights).resolve())
        return own

    def prepare(self) -> None:
        """Make the features, unless they are cached."""
        self._made()

    def _made(self) -> Path:
        """The folder of the cached features; the files are listed once for it."""
        key = self.key
        if not key["files"]:
            raise MissingDataError(
                f"There are no images in {self._path}. It needs one folder for each concept, with image files, e.g. "
                f"{self._path / 'owl' / '1.png'}."
            )
        folder = cache.folder_of(self.cache, "image_folder", key)
        cache.ensure(folder, key, self._make)
        return folder

    def split(self, split: Split) -> Concepts:
        """The images of a split."""
        features, _, concept, names = self._read()
        rows = divided(self._path, concept, names, split, self.val, self.test)
        if self.network is None:
            # As for Omniglot: what all images share would make all features nearly parallel.
            features = features.float()
            features -= features[divided(self._path, concept, names, "train", self.val, self.test)].mean(0)
        return group(features[rows], concept[rows].tolist(), names)

    def pixels(self, split: Split) -> Tensor:
        """The images."""
        _, shown, concept, names = self._read()
        return shown[divided(self._path, concept, names, split, self.val, self.test)]

    def _read(self) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Features ``[n, size]``, images ``[n, side, side, 3]``, concepts ``[n]`` and their names."""
        folder = self._made()
        table, names = cache.load(folder, "images"), cache.load(folder, "names")
        features, shown, concept = (
            torch.from_numpy(cache.array_of(table, name, shape))
            for name, shape in (("features", (self.features,)), ("shown", (_SHOWN, _SHOWN, 3)), ("concept", ()))
        )
        return features, shown, concept, names["name"].to_pylist()

    def _make(self) -> dict[str, Any]:
        import pyarrow as pa

        concepts = self._concepts
        files = [(label, file) for label, concept in enumerate(concepts) for file in image_files(concept)]
        features, shown = [], []
        make = None if self.network is None else _vgg16(self.weights)
        images = _opened([file for _, file in files])
        bar = tqdm(total=len(files), desc="Features of images", unit="image", disable=None)
        while batch := [image for _, image in zip(range(_AT_ONCE), images, strict=False)]:
            shown += [_small(image, _SHOWN) for image in batch]
            features.append(np.stack([_small(i, self._side) for i in batch]) if make is None else make(batch))
            bar.update(len(batch))
        bar.close()
        columns = {
            "features": np.concatenate(features).reshape(len(files), -1),
            "shown": np.stack(shown),
            "concept": np.array([[label] for label, _ in files]),
        }
        table = pa.table({name: cache.column_of(array) for name, array in columns.items()})
        return {"images": table, "names": pa.table({"name": [concept.name for concept in concepts]})}


def _opened(files: list[Path]) -> Iterator[PIL.Image.Image]:
    """The images in RGB, upright."""
    import PIL.Image
    import PIL.ImageOps

    for file in files:
        try:
            with PIL.Image.open(file) as image:
                check_depth(image)
                yield PIL.ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # from Pillow
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DamagedDataError(f"{file} cannot be read: {reason}") from error


def _small(image: PIL.Image.Image, side: int) -> NDArray[np.uint8]:
    """A square from the middle: ``[side, side, 3]``."""
    import PIL.ImageOps

    return np.asarray(PIL.ImageOps.fit(image, (side, side)))


def _vgg16(weights: str | None) -> Any:
    """A function from images to the activations ``[n, 4096]`` of VGG-16."""
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except ImportError:
        raise MissingDataError(
            f"data.network=vgg16 needs torchvision: {install('torchvision')}; data.network=null task.data.features=768 "
            "takes the images' pixels"
        ) from None
    try:
        network: nn.Module = vgg16(weights=VGG16_Weights.IMAGENET1K_V1 if weights is None else None)
        if weights is not None:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except URLError as error:
        raise MissingDataError(
            f"the weights of VGG-16 cannot be downloaded ({error.reason}); task.data.weights=FILE reads them"
        ) from error
    except (OSError, RuntimeError) as error:
        raise MissingDataError(f"{weights} has no weights of VGG-16: {str(error).splitlines()[0]}") from error
    network.classifier = network.classifier[:-1]  # type: ignore[index]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.eval().to(device)
    transform = VGG16_Weights.IMAGENET1K_V1.transforms()

    @torch.no_grad()
    def activations(images: list[PIL.Image.Image]) -> NDArray[np.float32]:
        pixels = torch.stack([transform(image) for image in images]).to(device)
        made: NDArray[np.float32] = network(pixels).float().cpu().numpy()
        return made

    return activations
