"""Pictures of the semi-supervised VAE."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from structgrad.common.pictures import save


def draw_digits(means: Tensor, file: Path) -> Path:
    """Generated images, a row for each class, a column for each style.

    Args:
        means: ``[classes, styles, pixels]``, probabilities of ink; square images row by row.
        file: path of the picture.
    """
    classes, styles, pixels = means.shape
    side = math.isqrt(pixels)
    grid = means.reshape(classes, styles, side, side).permute(0, 2, 1, 3).reshape(classes * side, styles * side)
    figure = Figure(figsize=(0.5 * styles + 1, 0.5 * classes + 0.7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([side * (k + 0.5) for k in range(classes)], [str(k) for k in range(classes)])
    axes.set_xlabel("style")
    axes.set_ylabel("class")
    return save(figure, file)
