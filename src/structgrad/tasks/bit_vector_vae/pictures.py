"""Pictures of the bit-vector VAE."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor


def draw_reconstructions(images: Tensor, means: Tensor, file: Path) -> Path:
    """Images above their reconstructions.

    Args:
        images: ``[n, pixels]``, square images row by row.
        means: ``[n, pixels]``, grey levels 0 to 255.
        file: where to.
    """
    side = math.isqrt(images.shape[1])
    grid = torch.stack([images.to(means), means]).reshape(2, -1, side, side)
    rows = grid.permute(0, 2, 1, 3).reshape(2 * side, -1).cpu().numpy()
    figure = Figure(figsize=(len(images), 2.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([side / 2, 3 * side / 2], ["image", "mean"])
    figure.savefig(file, dpi=100)
    return file
