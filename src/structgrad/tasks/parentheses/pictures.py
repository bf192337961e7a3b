"""Pictures of generated trees: tokens from left to right, their depth downwards, and the order of
generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from structgrad.tasks.parentheses.data import NO_CHILD, to_text

_EDGE, _LABEL = "#9aa1ab", "#444444"


@dataclass
class Growth:
    """A generated tree.

    Attributes:
        places: int64 ``[p]``, in level order.
        positions: int64 ``[p]``, the position of a place's token in the sequence; -1 for "no
        child".
        tokens: int64 ``[p]``, the sequence, padded with 0.
    """

    places: Tensor
    positions: Tensor
    tokens: Tensor


def draw(growths: list[Growth], balanced: list[bool], types: int, path: Path) -> Path:
    """Draw trees, one a panel. The number at a node is its rank in the generation; its colour is
    the type of bracket.

    Args:
        growths: the trees.
        balanced: whether each sequence is balanced.
        types: number of types of brackets.
        path: path of the picture; its folder is created.

    Returns:
        ``path``.
    """
    longest = max(int((g.tokens != NO_CHILD).sum()) for g in growths)
    nodes = [_nodes(g) for g in growths]
    heights = [1 + max(depth for _, depth, _ in each) for each in nodes]
    columns = min(2, len(growths))
    rows = [heights[i : i + columns] for i in range(0, len(growths), columns)]
    size = (columns * (0.5 * longest + 0.5), sum(0.42 * max(row) + 0.6 for row in rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=[max(row) + 1 for row in rows])
    panels = list(grid.flat)
    for axes in panels:
        axes.axis("off")
    for axes, growth, each, right in zip(panels, growths, nodes, balanced, strict=False):
        words = to_text(growth.tokens, types)
        axes.set_title(
            f"{' '.join(words)}   {'balanced' if right else 'unbalanced'}", fontsize=9, loc="left", color=_LABEL
        )
        axes.set_xlim(-0.6, longest - 0.4)
        axes.set_ylim(-max(depth for _, depth, _ in each) - 0.55, 0.6)
        for order, (position, depth, parent) in enumerate(each):
            if parent >= 0:
                above, level, _ = each[parent]
                axes.plot([above, position], [-level, -depth], color=_EDGE, linewidth=1.1, zorder=1)
            _node(axes, position, -depth, words[position], order + 1, types)
    figure.supxlabel("the number at a node says when it came", fontsize=8, color=_LABEL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _nodes(growth: Growth) -> list[tuple[int, int, int]]:
    """Position, depth and parent (its number, -1 for the root) of every node, in the order of generation."""
    found: list[tuple[int, int, int]] = []
    for place, position in enumerate(growth.positions.tolist()):
        if position >= 0:
            parent = (place - 1) // 2 if place else -1
            found.append((position, found[parent][1] + 1 if place else 0, parent))
    return found


def _node(axes: Any, x: float, y: float, word: str, order: int, types: int) -> None:
    colour = colormaps["hsv"](int(word[1:]) / types)[:3]
    pale = [0.72 + 0.28 * c for c in colour]
    box = {"boxstyle": "round,pad=0.25", "facecolor": pale, "edgecolor": colour, "linewidth": 1.0}
    axes.text(x, y, word, ha="center", va="center", fontsize=8, family="monospace", bbox=box, zorder=2)
    axes.text(x + 0.42, y + 0.34, str(order), ha="center", va="center", fontsize=6, color=_LABEL, zorder=3)
