"""Features of images for the communication game:
``python scripts/image_features.py FOLDER OUT.npz``.

``FOLDER`` has one folder of images for each concept. The features are the activations of the last
hidden layer of a network of torchvision (VGG-16: 4,096), trained on ImageNet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from structgrad.common.installing import install


@torch.no_grad()
def image_features(folder: Path, network: nn.Module, transform: Any, batch_size: int = 32) -> dict[str, Any]:
    """``features`` float32 ``[n, size]``, ``concept`` int64 ``[n]`` and ``names`` of a folder of
    folders of images.

    Args:
        folder: one folder for each concept.
        network: images ``[n, 3, height, width]`` -> features ``[n, size]``.
        transform: an image -> ``[3, height, width]``.
        batch_size: images at once.
    """
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(folder), transform)
    features: list[Tensor] = []
    concepts: list[Tensor] = []
    for pixels, concept in torch.utils.data.DataLoader(images, batch_size):
        features.append(network.eval()(pixels))
        concepts.append(concept)
    return {
        "features": torch.cat(features).float().numpy(),
        "concept": torch.cat(concepts).numpy(),
        "names": np.array(images.classes),
    }


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, help="state dict of VGG-16, where it cannot be downloaded")
    arguments = parser.parse_args()
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except ImportError:
        sys.exit(f"error: this script needs torchvision: {install('torchvision')}")
    if arguments.out.suffix != ".npz":
        sys.exit(f"error: the second argument is the file to write and ends in .npz; got {arguments.out}")
    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        network = vgg16(weights=None if arguments.weights else weights)
        if arguments.weights:
            network.load_state_dict(torch.load(arguments.weights, map_location="cpu", weights_only=True))
        network.classifier = network.classifier[:-1]
        arrays = image_features(arguments.folder, network, weights.transforms())
    except URLError as error:
        sys.exit(f"error: the weights cannot be downloaded ({error.reason}); --weights reads them from a file")
    except OSError as error:  # no such folder, no images in it, no such file of weights
        sys.exit(f"error: {error}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.out, **arrays)
    print(f"{arguments.out}: {arrays['features'].shape[0]} images, {len(arrays['names'])} concepts")


if __name__ == "__main__":
    main()
