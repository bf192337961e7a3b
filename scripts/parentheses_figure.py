"""Draw the sequences that language models of parentheses generate, as Figure 2 of Struminsky et al.
(2021).

    python scripts/parentheses_figure.py results/parentheses_quick --output docs/images/parentheses.png

These are the defaults. Each order has a line: the mean over seeds of the fraction of generated
sequences, against the number of types of brackets, with standard errors.
"""

from __future__ import annotations

from collections import defaultdict

from figures import command, comparable, style
from matplotlib.figure import Figure

from structgrad.common import pictures
from structgrad.experiments.report import Report
from structgrad.experiments.selection import Cell

#: Column of the table -> title of its panel.
PANELS = {"new": "new and balanced", "old": "old: in the training set", "unbalanced": "unbalanced"}


def curves(report: Report) -> dict[str, dict[int, dict[str, Cell]]]:
    """Title of a row -> number of types -> column -> cell; without rows that have not been run."""
    found: dict[str, dict[int, dict[str, Cell]]] = defaultdict(dict)
    for line in comparable(report):
        found[line.row.title][line.runs[0].content["config"]["task"]["data"]["types"]] = line.cells
    return {title: dict(sorted(points.items())) for title, points in found.items()}


def draw(report: Report) -> Figure:
    """One panel for each fraction, one line with error bars for each order."""
    orders = curves(report)
    figure = Figure(figsize=(11, 3.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    types = sorted({t for points in orders.values() for t in points})
    for axes, (column, title) in zip(panels, PANELS.items(), strict=True):
        for index, (order, points) in enumerate(orders.items()):
            cells = [cells[column] for cells in points.values()]
            axes.errorbar(
                list(points),
                [100 * cell.value for cell in cells],
                yerr=[100 * (cell.standard_error or 0.0) for cell in cells],
                label=order,
                **style(index) | pictures.line(index),
            )
        axes.set(title=title, xlabel="types of brackets", xticks=types, ylim=(-2, 102))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of unique sequences (%)")
    pictures.legend(figure)
    return figure


if __name__ == "__main__":
    command(
        "shares of generated sequences against the number of types",
        table="parentheses_quick",
        output="docs/images/parentheses.png",
        draw=draw,
    )
