"""Writes the rows of the README that stand beside published numbers: ListOps at the paper's budget,
as far as it has been run.

python scripts/readme_rows.py
"""

from __future__ import annotations

from pathlib import Path

from figures import read

from structgrad.experiments import grids, markdown
from structgrad.experiments.report import Report

ROOT = Path(__file__).resolve().parent.parent
TABLE = "paulus_2"
#: The place in the README. Under the table's own name ``report.py --into`` would put the whole table there.
PLACE = f"{TABLE}_accuracy"


def rows(report: Report) -> str:
    """The table's rows that have runs, side by side, so that more of them take no more lines.

    Each has its accuracy with the number of runs, the published one and the difference.
    """
    _, lines = markdown.grid(report)
    made = {
        line.row.title: (f"{cells[2]} ({cells[1]})", *cells[3:5])
        for line, (_, cells) in zip(report.lines, lines, strict=True)
        if line.runs and not line.marks
    }
    ours, published, difference = zip(*made.values(), strict=True)
    titles = (report.table.columns["accuracy"].title, *made)
    named = {"ours (runs)": ours, "published": published, "difference": difference}
    return grids.Grid(titles, tuple(grids.Row((name, *cells)) for name, cells in named.items()), "").markdown()


def main() -> None:
    """Into the README, between its markers."""
    markdown.insert(ROOT / "README.md", PLACE, rows(read(TABLE, ROOT / "results" / TABLE)))


if __name__ == "__main__":
    main()
