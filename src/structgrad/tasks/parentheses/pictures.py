"""Pictures of generated trees: tokens from left to right, their depth downwards, and the order of
generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from structgrad.common.pictures import BLUE, INK, PALE, RULE, save
from structgrad.tasks.parentheses.data import NO_CHILD, to_text

_OPENING, _CLOSING = PALE, "white"


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
    """Draw trees, one below the other. The small number at a node is its rank in the generation.

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
    size = (max(0.42 * longest + 0.3, 4.6), sum(0.32 * height + 0.5 for height in heights) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(growths), squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
    for axes, growth, each, right in zip(panels, growths, nodes, balanced, strict=True):
        axes.axis("off")
        words = to_text(growth.tokens, types)
        title = f"{' '.join(words)}   {'balanced' if right else 'unbalanced'}"
        axes.set_title(title, fontsize=8, loc="left", color=INK)
        axes.set_xlim(-0.6, longest - 0.4)
        axes.set_ylim(-max(depth for _, depth, _ in each) - 0.55, 0.6)
        for order, (position, depth, parent) in enumerate(each):
            if parent >= 0:
                above, level, _ = each[parent]
                axes.plot([above, position], [-level, -depth], color=RULE, linewidth=1.1, zorder=1)
            _node(axes, position, -depth, words[position], order + 1)
    figure.supxlabel("small number: when the token came; blue ground: opening bracket", fontsize=8, color=INK)
    return save(figure, path)


def _nodes(growth: Growth) -> list[tuple[int, int, int]]:
    """Position, depth and parent (its number, -1 for the root) of every node, in the order of generation."""
    found: list[tuple[int, int, int]] = []
    for place, position in enumerate(growth.positions.tolist()):
        if position >= 0:
            parent = (place - 1) // 2 if place else -1
            found.append((position, found[parent][1] + 1 if place else 0, parent))
    return found


def _node(axes: Any, x: float, y: float, word: str, order: int) -> None:
    ground = _OPENING if word.startswith("(") else _CLOSING
    box = {"boxstyle": "round,pad=0.25", "facecolor": ground, "edgecolor": BLUE, "linewidth": 0.9}
    axes.text(x, y, word, ha="center", va="center", fontsize=8, family="monospace", color=INK, bbox=box, zorder=2)
    corner = (2.6 * len(word) + 3.0 + 1.9 * len(str(order)), 6.5)  # of the box, in points
    axes.annotate(
        str(order),
        (x, y),
        corner,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=6,
        color=INK,
        zorder=3,
    )
