"""The look of every picture: one palette, marks besides colours, and files for papers.

The colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish. Lines and
points also differ in dashes and markers, for readers who see no colours.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, INK = "#CC79A7", "#56B4E9", "#3B4252"
#: Backgrounds and thin lines, and text beside data.
PALE, RULE, FAINT = "#DCEBF9", "#B8BDC6", "#6B7482"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
MARKERS = "os^Dv*PX<>"
LINES = ("-", "--", "-.", ":")
# A font within a PDF makes a hundred lines of logs, which Hydra's level would show.
logging.getLogger("fontTools").setLevel(logging.WARNING)

#: The largest number of series that are distinguishable in one panel.
MOST = 10


def colour(index: int) -> str:
    """The colour of the series with this index."""
    return COLOURS[index % len(COLOURS)]


def line(index: int) -> dict[str, Any]:
    """Colour and dashes of the curve with this index, as options of ``plot``."""
    return {"color": colour(index), "linestyle": LINES[index % len(LINES)], "linewidth": 1.4}


def mark(index: int) -> dict[str, Any]:
    """Colour and marker of the points with this index, as options of ``plot``."""
    return {"color": colour(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def legend(figure: Figure, columns: int = 0) -> None:
    """One legend for all panels, outside of the data; the figure's layout must be ``constrained``.

    Each entry occurs once.

    Args:
        figure: a figure whose artists have labels.
        columns: number of columns of entries below the panels, for which the figure grows; 0 puts
            the entries in one column, right of the panels.
    """
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    place: dict[str, Any] = {"loc": "outside right upper"}
    if columns:
        figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(entries) // columns))
        place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(list(entries.values()), list(entries), frameon=False, fontsize=8, **place)


def grid(axes: Axes) -> None:
    """Draw thin lines behind the data."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Write a picture and the same as PDF beside it, with fonts that editors of PDF can read;
    return ``path``.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    if path.suffix == ".png":
        with rc_context({"pdf.fonttype": 42}):
            figure.savefig(path.with_suffix(".pdf"), dpi=dpi, metadata={"CreationDate": None})
    return path
