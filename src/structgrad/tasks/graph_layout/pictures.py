"""Pictures of graphs being laid out, after Figure 3 of Paulus et al. (2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from structgrad.common.pictures import BLUE, INK, RULE, VERMILION, save

_KINDS = {
    "true edge": (INK, "-"),
    "found": (BLUE, "-"),
    "found, but not there": (VERMILION, "--"),
    "there, but missed": (RULE, ":"),
}


def draw_layout(
    positions: Tensor, true: Tensor | None, found: Tensor | None, path: Path, recovered: str = "recovered"
) -> Path:
    """The layout of one graph over time, with its true edges above and the found edges below.

    At least one of both is known.

    Args:
        positions: ``[steps, n, features]``, of which the first two are drawn.
        true: ``[n, n]``, the true adjacency matrix; None draws the found edges only.
        found: ``[n, n]``; None draws the true edges only.
        path: path of the picture.
        recovered: what the found edges are called.

    Returns:
        ``path``.
    """
    steps = positions.shape[0]
    shown = sorted({round(i * (steps - 1) / 4) for i in range(5)})
    rows = 1 if found is None or true is None else 2
    figure = Figure(figsize=(1.9 * len(shown), 1.9 * rows + 0.6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(shown), squeeze=False)
    for column, step in enumerate(shown):
        frame = positions[step].cpu()
        axes[0][column].set_title(f"step {step + 1}", fontsize=9)
        if true is not None:
            _draw(axes[0][column], frame, {"true edge": true.cpu()})
        if found is not None:
            edges = {"found": found.cpu() > 0} if true is None else _compare(true.cpu(), found.cpu())
            _draw(axes[-1][column], frame, edges)
    axes[0][0].set_ylabel(recovered if true is None else "true", fontsize=9)
    if rows == 2:
        axes[1][0].set_ylabel(recovered, fontsize=9)
    kinds = ["found"] if true is None else ["true edge"] if found is None else list(_KINDS)
    _finish(figure, kinds, path)
    return path


def draw_graphs(positions: Tensor, true: Tensor, found: Tensor, path: Path, recovered: str = "recovered") -> Path:
    """The edges found in several graphs, at their last layout.

    Args:
        positions: ``[graphs, n, 2]``.
        true: ``[graphs, n, n]``.
        found: ``[graphs, n, n]``.
        path: path of the picture.
        recovered: what the found edges are called.

    Returns:
        ``path``.
    """
    columns = (len(positions) + 1) // 2
    figure = Figure(figsize=(1.9 * columns, 1.9 * 2 + 0.8), dpi=150)
    FigureCanvasAgg(figure)
    for axis, frame, t, f in zip(figure.subplots(2, columns).flat, positions, true, found, strict=False):
        _draw(axis, frame.cpu(), _compare(t.cpu(), f.cpu()))
        shared = int(((f > 0) & t.bool()).sum())
        axis.set_title(f"precision {shared / max(1, int((f > 0).sum())):.0%}", fontsize=8)
    figure.supylabel(recovered, fontsize=9)
    _finish(figure, list(_KINDS)[1:], path)
    return path


def _compare(true: Tensor, found: Tensor) -> dict[str, Tensor]:
    true, found = true.bool(), found > 0
    return {
        "there, but missed": true & ~found,
        "found, but not there": found & ~true,
        "found": found & true,
    }


def _draw(axis: Any, positions: Tensor, edges: dict[str, Tensor]) -> None:
    for kind, adjacency in edges.items():
        # An edge that was found in one direction only counts as found.
        ends = (adjacency | adjacency.T).triu(1).nonzero()
        color, style = _KINDS[kind]
        width = 1.0 if kind == "found, but not there" else 1.6
        axis.add_collection(
            LineCollection(list(positions[ends][..., :2].numpy()), colors=color, linestyles=style, linewidths=width)
        )
    axis.scatter(*positions[:, :2].T.numpy(), s=26, color="white", edgecolors="black", linewidths=1, zorder=3)
    axis.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[], aspect="equal")
    for spine in axis.spines.values():
        spine.set_color("#dddddd")


def _finish(figure: Figure, kinds: list[str], path: Path) -> None:
    handles = [Line2D([], [], color=_KINDS[k][0], linestyle=_KINDS[k][1], linewidth=1.6, label=k) for k in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=len(kinds), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, path)
