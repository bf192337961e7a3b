"""Pictures of parses: arcs from operators to operands, recovered ones above an expression, true
ones below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from structgrad.common.pictures import BLUE, INK, RULE, VERMILION, save
from structgrad.tasks.listops.data import CLOSE, to_text

#: Kind of edge -> colour and dashes.
_KINDS = {
    "found": (BLUE, "-"),
    "found, but not there": (VERMILION, "--"),
    "found, at a closing bracket: not counted": (RULE, ":"),
    "true parse (below)": (INK, "-"),
}
_RIGHT, _WRONG, _UNCOUNTED, _TRUE = _KINDS


@dataclass
class Parse:
    """An expression with its true and its recovered parse.

    Attributes:
        tokens: int64 ``[n]``.
        parents: int64 ``[n]``, the true parse, with closing brackets.
        vertex: ``[n, n]``, the recovered parse, hard.
        value: the value of the expression.
        prediction: the model's answer.
    """

    tokens: Tensor
    parents: Tensor
    vertex: Tensor
    value: int
    prediction: int


def draw(parses: list[Parse], path: Path, *, directed: bool) -> Path:
    """Draw the recovered parse above and the true one below each expression, one expression a row.

    Edges that touch a closing bracket are not counted, because the metrics leave them out.

    Args:
        parses: the expressions.
        path: path of the picture; its folder is created.
        directed: whether edges have a direction.

    Returns:
        ``path``.
    """
    longest = max(len(to_text(p.tokens)) for p in parses)
    heights = [0.26 * len(to_text(p.tokens)) ** 0.75 + 0.6 for p in parses]  # of the longest arc, and the word
    size = (max(0.34 * longest + 0.6, 5.2), sum(0.72 * height + 0.3 for height in heights) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(parses), squeeze=False, height_ratios=heights)[:, 0]
    for axes, parse, height in zip(panels, parses, heights, strict=True):
        words = to_text(parse.tokens)
        n = len(words)
        truth = {(int(i), j) for j, i in enumerate(parse.parents[:n]) if i >= 0 and parse.tokens[j] != CLOSE}
        known = truth if directed else truth | {(j, i) for i, j in truth}
        recovered = [(i, j) for i, j in parse.vertex[:n, :n].nonzero().tolist() if directed or i < j]
        counted = [e for e in recovered if CLOSE not in parse.tokens[list(e)].tolist()]
        found = sum(e in known for e in counted)
        others = len(counted) - found
        _panel(
            axes,
            words,
            (longest, height),
            f"value {parse.value}, predicted {parse.prediction}; {found} of {len(truth)} edges found, "
            f"{others} other{'s' * (others != 1)}",
        )
        for edge in sorted(truth):
            _arc(axes, edge, _TRUE, directed=True, above=False)
        # Right edges are drawn last, on top.
        for kind in (_UNCOUNTED, _WRONG, _RIGHT):
            for edge in recovered:
                if kind == (_UNCOUNTED if edge not in counted else _RIGHT if edge in known else _WRONG):
                    _arc(axes, edge, kind, directed=directed, above=True)
    handles = [Line2D([], [], color=colour, linestyle=dashes, label=kind) for kind, (colour, dashes) in _KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return save(figure, path)


def _panel(axes: Any, words: list[str], size: tuple[int, float], title: str) -> None:
    longest, height = size
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_xlim(-0.7, longest - 0.3)
    axes.set_ylim(-height, height)
    axes.axis("off")
    for position, word in enumerate(words):
        weight = "bold" if word.startswith("[") else "normal"
        axes.text(position, 0, word, ha="center", va="center", fontsize=8, family="monospace", weight=weight)


def _arc(axes: Any, edge: tuple[int, int], kind: str, *, directed: bool, above: bool) -> None:
    head, operand = edge
    colour, dashes = _KINDS[kind]
    # The curve's height in data units divided by its width: flatter for long arcs, so that all of
    # them fit.
    width = abs(operand - head)
    bend = 0.52 * width**0.75 / width
    side = 1 if above else -1
    axes.add_patch(
        FancyArrowPatch(
            (head, 0.3 * side),
            (operand, 0.3 * side),
            connectionstyle=f"arc3,rad={side * (-bend if operand > head else bend)}",
            arrowstyle="-|>" if directed else "-",
            mutation_scale=7,
            shrinkA=1,
            shrinkB=1,
            linewidth=1.3,
            linestyle=dashes,
            color=colour,
        )
    )
