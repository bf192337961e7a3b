"""Pictures of the communication game."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from structgrad.common.pictures import save
from structgrad.tasks.communication_game.data import Concepts

#: The number of symbols that are shown, and of images of each.
SYMBOLS, IMAGES = 12, 10


def draw_symbols(used: Tensor, concepts: Concepts, pixels: Tensor | None, file: Path) -> Path:
    """A row for each of the most used symbols: one image of each concept that it names, most
    frequent first.

    Args:
        used: int64 ``[n]``: the symbol of each image.
        concepts: the n images with their concepts.
        pixels: the n images for display, see
            :meth:`~structgrad.tasks.communication_game.data.ConceptData.pixels`; without them the
            concepts' names are written.
        file: path of the picture.
    """
    counts = used.bincount()
    order = counts.argsort(descending=True, stable=True)[: min(SYMBOLS, int((counts > 0).sum()))]
    figure = Figure(figsize=(1.4 + 0.75 * IMAGES, 0.75 * len(order) + 0.5), layout="constrained")
    grid = figure.subplots(len(order), IMAGES, squeeze=False)
    for symbol, row in zip(order.tolist(), grid, strict=True):
        images = (used == symbol).nonzero()[:, 0]
        present, times = concepts.concept[images].unique(return_counts=True)
        for place, axes in enumerate(row):
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            if place >= len(present):
                continue
            concept = int(present[times.argsort(descending=True, stable=True)[place]])
            image = int(images[concepts.concept[images] == concept][0])
            if pixels is not None:
                axes.imshow(pixels[image].numpy(), cmap="gray_r")  # the colour map applies to images without colours
            else:
                name = concepts.names[concept][:14]
                axes.text(0.5, 0.5, name, ha="center", va="center", fontsize=6, parse_math=False)
        label = f"symbol {symbol}\n{len(images)} images,\n{len(present)} concepts"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    total = int(torch.unique(used).numel())
    figure.suptitle(f"one image of each concept that a symbol names; {total} symbols are in use", fontsize=9)
    return save(figure, file)
