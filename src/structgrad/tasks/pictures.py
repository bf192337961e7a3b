"""Pictures that tasks share."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def draw_samples(images: Tensor, file: Path) -> Path:
    """A grid of square images that a model generated.

    Args:
        images: ``[rows, columns, pixels, channels]``, values 0 to 1, row by row; 1 or 3 channels.
        file: where to.
    """
    rows, columns, pixels, channels = images.shape
    side = math.isqrt(pixels)
    grid = images.reshape(rows, columns, side, side, channels).permute(0, 2, 1, 3, 4)
    figure = Figure(figsize=(0.5 * columns + 0.2, 0.5 * rows + 0.2), layout="constrained")
    axes = figure.subplots()
    # The colour map is for one channel.
    axes.imshow(grid.reshape(rows * side, columns * side, channels).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    figure.savefig(file, dpi=100)
    return file
