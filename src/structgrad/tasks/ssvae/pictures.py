"""Pictures of the semi-supervised VAE."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


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
    figure.savefig(file, dpi=100)
    return file


def draw_calls(history: list[float], file: Path) -> Path:
    """Mean number of decoder calls an example between one validation and the next.

    Args:
        history: one mean for each validation.
        file: path of the picture.
    """
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(history) + 1), history, marker="." if len(history) < 50 else None)
    axes.set_ylim(0, 1.1 * max(history))
    axes.set_xlabel("validation")
    axes.set_ylabel("decoder calls an example")
    figure.savefig(file, dpi=100)
    return file
