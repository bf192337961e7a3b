"""Pictures of the bit-vector VAE."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from structgrad.common.pictures import save


def draw_reconstructions(images: Tensor, means: Tensor, channels: int, file: Path) -> Path:
    """Images above their reconstructions.

    Args:
        images: ``[n, pixels]``, square images row by row, the channels of a pixel side by side.
        means: ``[n, pixels]``, levels 0 to 255.
        channels: 1 or 3.
        file: path of the picture.
    """
    side = math.isqrt(images.shape[1] // channels)
    grid = torch.stack([images.to(means), means]).reshape(2, -1, side, side, channels) / 255
    rows = grid.permute(0, 2, 1, 3, 4).reshape(2 * side, -1, channels).cpu().numpy()
    figure = Figure(figsize=(len(images), 2.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows, cmap="gray", vmin=0, vmax=1)  # the colour map applies to one channel
    axes.set_xticks([])
    axes.set_yticks([side / 2, 3 * side / 2], ["image", "reconstruction"], fontsize=9)
    axes.tick_params(length=0)
    axes.axhline(side - 0.5, color="white", linewidth=3)
    for place in range(1, len(images)):
        axes.axvline(place * side - 0.5, color="white", linewidth=3)
    axes.spines[:].set_visible(False)
    axes.set_title("test images, and what the decoder expects given their sampled bits", fontsize=9, loc="left")
    return save(figure, file)
