"""The common code of scripts that draw the finished runs of a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from structgrad.common import pictures
from structgrad.experiments.report import Line, Report, build
from structgrad.experiments.runs import load
from structgrad.experiments.tables import load as load_table

TABLES = Path(__file__).resolve().parent.parent / "configs" / "table"


def read(table: str, folder: Path) -> Report:
    """A table, filled with the summaries in a folder."""
    return build(load_table(table, TABLES), load(folder))


def comparable(report: Report) -> list[Line]:
    """The rows that have been run, in the order of the table.

    Raises:
        ValueError: if runs of a row cannot be compared with the others, or no row has runs.
    """
    if marked := [line for line in report.lines if line.marks]:
        raise ValueError(
            f"{marked[0].row.title}: runs with {', '.join(marked[0].marks)} cannot be compared with the others"
        )
    lines = report.main()
    if not lines:
        raise ValueError(f"no run belongs to a row of {report.table.name}")
    return list(lines.values())


def style(index: int) -> dict[str, Any]:
    """Options of ``errorbar`` for the row with this index."""
    return pictures.mark(index) | {"linestyle": "none", "capsize": 3}


def command(
    description: str, table: str, output: str, draw: Callable[[Report], Figure], folder: str | None = None
) -> None:
    """Read summaries, draw them into a file and print its name; an error is one line.

    Args:
        description: for ``--help``.
        table: the table whose runs are drawn by default.
        output: the file that is written by default.
        draw: draws the filled table.
        folder: folder of these runs; by default ``results/<table>``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(folder or f"results/{table}"), help="of summaries")
    parser.add_argument("--table", default=table, help="whose rows the runs are")
    parser.add_argument("--output", type=Path, default=Path(output))
    arguments = parser.parse_args()
    try:
        figure = draw(read(arguments.table, arguments.folder))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(pictures.save(figure, arguments.output))
