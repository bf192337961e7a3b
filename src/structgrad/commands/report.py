"""Print tables of finished runs beside the published numbers, compare any runs, and show all of
them on a page.

    structgrad-report                                      every table that has runs
    structgrad-report table=paulus_2 budget=quick          one table
    structgrad-report results/listops_quick --into README.md
    structgrad-report table=paulus_2 --html page.html      also as a page: curves, sensitivity, pictures

    structgrad-report runs/listops --by estimator          compare whatever runs there are
    structgrad-report runs --by structure,estimator.temperature --metric test/precision --where budget=quick
    structgrad-report runs/listops runs/l2x --compare      by what differs between them

    structgrad-report runs --html overview.html            a page of all runs: finished, running, interrupted, failed

The command looks for runs of a table where sweeps leave them: in results/<table>_<budget> and
runs/tables/<table>_<budget>, without the budget if it is the table's own. If a folder is given, its
name says which table it is. Your own tables are found with hydra.searchpath=[pkg://mylab.configs].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

from structgrad.commands import group
from structgrad.experiments import comparison, markdown, tables
from structgrad.experiments.report import Report, build
from structgrad.experiments.runs import Summary, load, of_sweeps
from structgrad.experiments.tables import Direction
from structgrad.training.contract import BUDGETS

#: Folders in which sweeps leave finished runs.
ROOTS = (Path("results"), Path("runs/tables"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="table=<name>, budget=<name>, folders of runs; or the word runs")
    parser.add_argument("--by", metavar="KEY,...", help="compare runs by these keys: estimator, task.hidden, ...")
    parser.add_argument("--compare", action="store_true", help="compare runs by what differs between them")
    parser.add_argument("--metric", metavar="NAME,...", help="of a comparison, the main one first: test/accuracy")
    parser.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help="only such runs; repeatable")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--latex", action="store_true", help="print LaTeX (booktabs)")
    shape.add_argument("--markdown", action="store_true", help="print Markdown (of tables: as they are)")
    shape.add_argument("--csv", action="store_true", help="print CSV, with all digits")
    parser.add_argument("--into", type=Path, help="replace the table in this document, between its markers")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write one self-contained page")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where the page finds the runs' pictures (runs)"
    )
    arguments = parser.parse_args()
    try:
        folders = group("table", [item for item in arguments.what if item.startswith("hydra.searchpath=")])
        arguments.what = [item for item in arguments.what if not item.startswith("hydra.searchpath=")]
        if _compares(arguments, folders):
            _compare(arguments, folders)
        elif arguments.what == ["runs"]:
            _overview(arguments)
        else:
            _tables(arguments, folders)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _compares(arguments: argparse.Namespace, folders: Sequence[Traversable]) -> bool:
    """Whether to compare runs without a table: on request, or because the folders belong to no
    table.
    """
    if arguments.by is not None or arguments.compare or arguments.metric or arguments.where:
        return True
    paths = [Path(item) for item in arguments.what if "=" not in item]
    known = tables.names(*folders)
    return (
        bool(paths)
        and arguments.what != ["runs"]
        and len(paths) == len(arguments.what)
        and not any(_table_of(path, known) in known for path in paths)
    )


def _compare(arguments: argparse.Namespace, folders: Sequence[Traversable]) -> None:
    if given := [item for item in arguments.what if "=" in item]:
        raise ValueError(f"{given[0]}: a comparison takes folders of runs; say --where {given[0]}")
    if arguments.into:
        raise ValueError("--into: a comparison has no place in a document; --markdown prints it")
    paths = [Path(item) for item in arguments.what] or [
        path for path in (Path("runs"), Path("results")) if path.exists()
    ]
    where = {}
    for item in arguments.where:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--where {item}: expected key=value")
        where[key] = value
    found = [run for path in paths for run in load(path)]
    found = comparison.matching(found, where) if where else found
    by = arguments.by.split(",") if arguments.by else None
    metrics = arguments.metric.split(",") if arguments.metric else []
    blocks = comparison.compare(found, by, metrics, directions(folders, found))
    shapes = {"latex": comparison.latex, "markdown": comparison.markdown, "csv": comparison.comma_separated}
    show = next((shapes[name] for name in shapes if getattr(arguments, name)), comparison.text)
    print(show(blocks))
    if arguments.html:
        from structgrad.experiments.html import comparison_page  # matplotlib takes a second to import

        arguments.html.write_text(comparison_page(blocks, arguments.runs))
        print(f"page: {arguments.html}", file=sys.stderr)


def directions(folders: Sequence[Traversable], summaries: Iterable[Summary]) -> dict[str, Direction]:
    """The direction of improvement of the runs' metrics, as columns of tables define it."""
    logged = {metric for run in summaries for metric in run.metrics}
    found: dict[str, Direction] = {}
    for name in tables.names(*folders):
        text = next(folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()).read_text()
        if any(f"{metric}," in text or f"{metric}}}" in text for metric in logged - set(found)):  # parsing is slow
            for column in tables.load(name, *folders).columns.values():
                if column.direction:
                    found.setdefault(column.metric, column.direction)
    return found


def _overview(arguments: argparse.Namespace) -> None:
    from structgrad.experiments import overview

    found = overview.states(arguments.runs)
    print(overview.text(found))
    if arguments.html:
        arguments.html.write_text(overview.page(found, arguments.runs))
        print(f"page: {arguments.html}")


def _tables(arguments: argparse.Namespace, folders: Sequence[Traversable]) -> None:
    reports = find(arguments.what, folders)
    for report in reports:
        if arguments.csv:
            print(markdown.comma_separated(report), end="\n\n")
        elif arguments.latex:
            print(f"% {report.table.name}\n{markdown.latex(report)}", end="\n\n")
        else:
            print(f"## {markdown.heading(report)}\n\n{markdown.document(report)}", end="\n\n")
        if arguments.into:
            text = markdown.document(report, with_missing=False)
            markdown.insert(arguments.into, _place(report, arguments.what), text)
    if arguments.html:
        from structgrad.experiments.html import page  # matplotlib takes a second to import

        arguments.html.write_text(page(reports, arguments.runs))
        print(f"page: {arguments.html}")


def find(what: list[str], folders: Sequence[Traversable]) -> list[Report]:
    """The reports that the arguments request, of tables in some folders.

    Raises:
        ValueError: unknown table, budget or key.
        FileNotFoundError: if a folder, or every folder, has no run.
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
    known = tables.names(*folders)
    reports = []
    for folder in (Path(item) for item in what if "=" not in item):
        table = tables.load(settings.get("table") or _table_of(folder, known), *folders)
        reports.append(build(table, load(folder), budget))
    if reports:
        return reports
    asked = settings.get("table")
    for table in [tables.load(name, *folders) for name in ([asked] if asked else known)]:
        for choice in [budget] if budget else BUDGETS:
            summaries = [run for root in ROOTS for run in of_sweeps(root, table.folder(choice))]
            if summaries or (asked and choice == (budget or table.budget)):
                reports.append(build(table, summaries, choice))
    if not reports:
        raise FileNotFoundError("no table has finished runs in results/ or runs/tables/; python sweep.py makes them")
    return reports


def _table_of(folder: Path, known: Sequence[str]) -> str:
    name = folder.resolve().name.partition("-")[0]  # without the sweep's note about other overrides
    short = name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1] in BUDGETS else name
    return name if name in known or short not in known else short


def _place(report: Report, what: list[str]) -> str:
    folders = [Path(item).resolve().name for item in what if "=" not in item]
    return folders[0] if len(folders) == 1 else report.table.name
