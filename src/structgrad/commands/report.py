"""Print tables of finished runs beside the published numbers, and put them into documents.

    structgrad-report                                      every table that has runs
    structgrad-report table=paulus_2 budget=quick          one table
    structgrad-report results/listops_quick --into README.md
    structgrad-report table=paulus_2 --html page.html      also as a page: curves, sensitivity, pictures

Runs are looked for where sweeps leave them: in results/<table>_<budget> and runs/tables/<table>_<budget> (without the
budget where it is the table's own), or in the folder that is given, whose name then says which table it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from structgrad.commands import CONFIGS
from structgrad.experiments import markdown, tables
from structgrad.experiments.report import Report, build
from structgrad.experiments.runs import load, of_sweeps
from structgrad.training.contract import BUDGETS

TABLES = CONFIGS / "table"
#: Where sweeps leave finished runs.
ROOTS = (Path("results"), Path("runs/tables"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="table=<name>, budget=<name>, or a folder of runs")
    parser.add_argument("--into", type=Path, help="replace the table in this document, between its markers")
    parser.add_argument("--latex", action="store_true", help="print LaTeX (booktabs)")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write one self-contained page of these tables")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where the page finds the runs' pictures (runs)"
    )
    arguments = parser.parse_args()
    try:
        reports = find(arguments.what)
        for report in reports:
            print(f"% {report.table.name}" if arguments.latex else f"## {markdown.heading(report)}\n")
            print(markdown.latex(report) if arguments.latex else markdown.document(report), end="\n\n")
            if arguments.into:
                text = markdown.document(report, with_missing=False)
                markdown.insert(arguments.into, _place(report, arguments.what), text)
        if arguments.html:
            from structgrad.experiments.html import page  # matplotlib takes a second to import

            arguments.html.write_text(page(reports, arguments.runs))
            print(f"page: {arguments.html}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def find(what: list[str]) -> list[Report]:
    """The reports that the arguments ask for.

    Raises:
        ValueError: unknown table, budget or key.
        FileNotFoundError: no run in a folder, or in none.
    """
    given = [item.split("=", 1) for item in what if "=" in item]
    settings = dict(given)
    if len(settings) < len(given):
        raise ValueError("table=... and budget=... can stand there once; without table=... it is every table with runs")
    if unknown := set(settings) - {"table", "budget"}:
        raise ValueError(f"{unknown.pop()}=...: there are table=... and budget=...")
    budget = settings.get("budget")
    if budget not in (None, *BUDGETS):
        raise ValueError(f"budget={budget}: there are {', '.join(BUDGETS)}")
    reports = []
    for folder in (Path(item) for item in what if "=" not in item):
        table = tables.load(settings.get("table") or _table_of(folder), TABLES)
        reports.append(build(table, load(folder), budget))
    if reports:
        return reports
    asked = settings.get("table")
    for table in [tables.load(name, TABLES) for name in ([asked] if asked else tables.names(TABLES))]:
        for choice in [budget] if budget else BUDGETS:
            summaries = [run for root in ROOTS for run in of_sweeps(root, table.folder(choice))]
            if summaries or (asked and choice == (budget or table.budget)):
                reports.append(build(table, summaries, choice))
    if not reports:
        raise FileNotFoundError("no table has finished runs in results/ or runs/tables/; python sweep.py makes them")
    return reports


def _table_of(folder: Path) -> str:
    name = folder.resolve().name.partition("-")[0]  # without what the sweep says of other overrides
    known = tables.names(TABLES)
    short = name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1] in BUDGETS else name
    return name if name in known or short not in known else short


def _place(report: Report, what: list[str]) -> str:
    folders = [Path(item).resolve().name for item in what if "=" not in item]
    return folders[0] if len(folders) == 1 else report.table.name
