"""Pictures of parses: arcs from operators to operands above the tokens of an expression."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from structgrad.tasks.listops.data import CLOSE, to_text

_RIGHT, _WRONG, _UNCOUNTED, _TRUE = "#1b7f4d", "#d1495b", "#c9ccd1", "#33415c"


@dataclass
class Parse:
    """An expression with its true and its recovered parse.

    Attributes:
        tokens: int64 ``[n]``.
        parents: int64 ``[n]``, the true parse.
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
    """Draw true (left) and recovered (right) parses, one expression a row.

    Recovered edges are green if the parse has them and red if not. They are grey if they touch a
    closing bracket, because no loss can teach those.

    Args:
        parses: the expressions.
        path: path of the picture; its folder is created.
        directed: whether edges have a direction.

    Returns:
        ``path``.
    """
    longest = max(len(to_text(p.tokens)) for p in parses)
    figure = Figure(figsize=(2 * (0.36 * longest + 0.6), 1.7 * len(parses) + 0.4), layout="constrained")
    axes = figure.subplots(len(parses), 2, squeeze=False)
    for (left, right), parse in zip(axes, parses, strict=True):
        words = to_text(parse.tokens)
        n = len(words)
        truth = {(int(i), j) for j, i in enumerate(parse.parents[:n]) if i >= 0}
        known = truth if directed else truth | {(j, i) for i, j in truth}
        recovered = [(i, j) for i, j in parse.vertex[:n, :n].nonzero().tolist() if directed or i < j]
        counted = [e for e in recovered if CLOSE not in parse.tokens[list(e)].tolist()]
        found = sum(e in known for e in counted)

        _panel(left, words, longest, f"true parse, value {parse.value}")
        for edge in sorted(truth):
            _arc(left, edge, _TRUE, directed=True)
        _panel(
            right,
            words,
            longest,
            f"recovered: {found} of {len(truth)} edges, {len(counted) - found} others; predicted {parse.prediction}",
        )
        # Right edges are drawn last, on top.
        for colour in (_UNCOUNTED, _WRONG, _RIGHT):
            for edge in recovered:
                uncounted = edge not in counted
                if colour == (_UNCOUNTED if uncounted else _RIGHT if edge in known else _WRONG):
                    _arc(right, edge, colour, directed=directed)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _panel(axes: Any, words: list[str], longest: int, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color="#444444")
    axes.set_xlim(-0.7, longest - 0.3)
    axes.set_ylim(-0.9, 0.29 * longest**0.75 + 0.3)
    axes.axis("off")
    for position, word in enumerate(words):
        weight = "bold" if word.startswith("[") else "normal"
        axes.text(position, -0.45, word, ha="center", va="center", fontsize=8, family="monospace", weight=weight)


def _arc(axes: Any, edge: tuple[int, int], colour: str, *, directed: bool) -> None:
    head, operand = edge
    # The curve's height in data units divided by its width: flatter for long arcs, so that all of
    # them fit.
    width = abs(operand - head)
    bend = 0.52 * width**0.75 / width
    axes.add_patch(
        FancyArrowPatch(
            (head, 0),
            (operand, 0),
            connectionstyle=f"arc3,rad={-bend if operand > head else bend}",
            arrowstyle="-|>" if directed else "-",
            mutation_scale=7,
            shrinkA=1,
            shrinkB=1,
            linewidth=1.2,
            color=colour,
        )
    )
