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
#: Columns of the table that the README shows.
SHOWN = 5


def rows(report: Report) -> str:
    """The table's rows that have runs, with runs, accuracy, the published one and the difference."""
    titles, lines = markdown.grid(report)
    kept = [grids.Row(tuple(cells[:SHOWN])) for _, cells in lines if cells[1] != "-"]
    return grids.Grid(tuple(titles[:SHOWN]), tuple(kept), "").markdown()


def main() -> None:
    """Into the README, between its markers."""
    markdown.insert(ROOT / "README.md", TABLE, rows(read(TABLE, ROOT / "results" / TABLE)))


if __name__ == "__main__":
    main()
