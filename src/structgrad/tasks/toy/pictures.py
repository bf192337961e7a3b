"""The picture of a toy problem: how often samples have each part."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from structgrad.common.pictures import save


def draw_shares(before: Tensor, after: Tensor, objectives: tuple[float, float], file: Path) -> Path:
    """How often each part was in a sampled vertex, before and after training.

    Args:
        before: fractions in [0, 1], one for each part; the first dimension is drawn downwards.
        after: the same after training.
        objectives: the mean objective, before and after.
        file: path of the picture.
    """
    rows = 1 if before.ndim < 2 else before.shape[0]
    columns = before.numel() // rows
    side = 2.4 / max(rows, columns)
    size = (2 * max(1.6, side * columns) + 1.6, max(0.9, side * rows) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title, shares, objective in zip(panels, ("before", "after"), (before, after), objectives, strict=True):
        image = axes.imshow(shares.reshape(rows, columns).cpu().numpy(), cmap="cividis", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        if before.ndim > 1:
            axes.set(xlabel="second index", ylabel="first index")
        axes.set_title(f"{title}: objective {objective:.3g}", fontsize=9)
    figure.colorbar(image, ax=panels, label="share of samples")
    return save(figure, file)
