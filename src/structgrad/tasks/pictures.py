"""Pictures that several tasks use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from structgrad.common import pictures


def draw_samples(images: Tensor, file: Path) -> Path:
    """A grid of square images that a model generated.

    Args:
        images: ``[rows, columns, pixels, channels]``, values 0 to 1, row by row; 1 or 3 channels.
        file: path of the picture.
    """
    rows, columns, pixels, channels = images.shape
    side = math.isqrt(pixels)
    grid = images.reshape(rows, columns, side, side, channels).permute(0, 2, 1, 3, 4)
    figure = Figure(figsize=(0.5 * columns + 0.2, 0.5 * rows + 0.2), layout="constrained")
    axes = figure.subplots()
    # The colour map applies to one channel.
    axes.imshow(grid.reshape(rows * side, columns * side, channels).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    return pictures.save(figure, file)


def draw_history(history: Mapping[str, list[float]], titles: Mapping[str, str], file: Path) -> Path:
    """Curves over the validations of a run, one panel below the other.

    Args:
        history: metric -> its value at every validation.
        titles: metric -> title of its axis; each has a panel. Fractions are drawn from 0 to 1.
            Other numbers have a logarithmic axis if they span more than a factor of 5.
        file: path of the picture.
    """
    figure = Figure(figsize=(5, 0.5 + 1.9 * len(titles)), layout="constrained")
    panels = figure.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        values = history.get(name, [])
        few = {"marker": "o", "markersize": 4} if len(values) < 50 else {}
        axes.plot(range(1, len(values) + 1), values, color=pictures.BLUE, linewidth=1.4, **few)
        axes.set_ylabel(title)
        pictures.grid(axes)
        positive = [value for value in values if value > 0]
        if name == "success":
            axes.set_ylim(-0.03, 1.03)
        elif positive and max(positive) > 5 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, 1.1 * max([*values, 1e-9]))
    longest = max([1, *(len(history.get(name, [])) for name in titles)])
    panels[-1].set(xlabel="validation", xlim=(0.5, longest + 0.5))
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    return pictures.save(figure, file)
