"""Print tables of finished runs beside the published numbers, compare any runs, and show all of
them on a page.

    structgrad-report                                      every table that has runs
    structgrad-report table=paulus_2 budget=quick          one table
    structgrad-report results/listops_quick --into docs/results.md
    structgrad-report table=paulus_2 --html page.html      also as a page: curves, sensitivity, pictures

    structgrad-report runs/listops --by estimator          compare whatever runs there are
    structgrad-report runs --by structure,estimator.temperature --metric test/precision --where budget=quick
    structgrad-report runs/listops runs/l2x --compare      by what differs between them

    structgrad-report runs --html overview.html            a page of all runs: finished, running, interrupted, failed

The command looks for runs of a table where sweeps leave them: in results/<table>_<budget> and
runs/tables/<table>_<budget>, without the budget if it is the table's own. If a folder is given, its
name says which table it is; that of a sweep without a table has it in a file. Your own tables are
found with hydra.searchpath=[pkg://mylab.configs].
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException

from structgrad.commands import group
from structgrad.common.text import first_line, nearest
from structgrad.experiments import comparison, markdown, tables
from structgrad.experiments.report import Report, build
from structgrad.experiments.runs import Summary, load, of_sweeps
from structgrad.experiments.tables import Direction, Table
from structgrad.training.contract import BUDGETS

#: Folders in which sweeps leave finished runs.
ROOTS = (Path("results"), Path("runs/tables"))
_SEARCHPATH = "hydra.searchpath="
#: Keys of the command line, and names for its options, with an example each.
_KEYS = {"table": "paulus_2", "budget": "quick"}
_NAMES = {"by": "estimator", "metric": "test/accuracy"}


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, like all commands."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; type --help for the options")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    try:
        given = parser.parse_args(arguments)
        searchpath = [item for item in given.what if item.startswith(_SEARCHPATH)]
        folders = group("table", searchpath)
        given.what = [item for item in given.what if not item.startswith(_SEARCHPATH)]
        _check(given)
        if _compares(given, folders):
            _compare(given, folders)
        elif given.what == ["runs"]:
            _overview(given)
        else:
            _tables(given, folders, *searchpath[-1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except HydraException as error:
        print(f"error: {_SEARCHPATH}: {first_line(error)}; type '{_SEARCHPATH}[pkg://mylab.configs]'", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(given: argparse.Namespace) -> None:
    """Refuse impossible command lines before anything is read or printed.

    Raises:
        ValueError: one line that ends with what to type.
    """
    pairs = [item.partition("=") for item in given.what if "=" in item]
    for name, _, value in pairs:
        if name not in _KEYS:
            raise ValueError(
                f"{name}={value}: there are {' and '.join(f'{k}=' for k in _KEYS)}; type {_near(name)}=..."
            )
        if not value:
            raise ValueError(f"{name}=: a value is missing; type e.g. {name}={_KEYS[name]}, or leave it out")
    for name in _KEYS:
        if sum(name == key for key, *_ in pairs) > 1:
            raise ValueError(f"{name}=... is given twice; type it once, or leave it out for all")
    for name, values in (("by", given.by), ("metric", given.metric)):
        names = [] if values is None else values.split(",")
        if not all(names):
            raise ValueError(f"--{name} {values}: a name is missing; type e.g. --{name} {_NAMES[name]}")
        if repeated := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"--{name} {values}: {repeated} is given twice; type it once")
    wanted = [item.partition("=") for item in given.where]
    for key, equals, value in wanted:
        if not (key and equals and value):
            raise ValueError(f"--where {key}{equals}{value}: expected key=value; type e.g. --where estimator=sst")
        if sum(key == other for other, *_ in wanted) > 1:
            raise ValueError(f"--where {key}=... is given twice, and a run has one value; type it once")
    if given.by is not None and given.compare:
        raise ValueError("--by and --compare both say what is compared; type one of them")
    for item in (item for item in given.what if "=" not in item and item != "runs"):
        _must_be_folder(Path(item))
    if "runs" in given.what and len(given.what) > 1 and not _asks_to_compare(given) and not Path("runs").is_dir():
        raise ValueError("runs: the word stands alone; type structgrad-report runs, or add --by estimator to compare")
    if given.what == ["runs"] and not _asks_to_compare(given):
        if not given.runs.is_dir():
            raise ValueError(f"--runs {given.runs} is no folder; type --runs with the folder of the runs")
        ignored = [f"--{name}" for name in ("latex", "markdown", "csv", "into") if getattr(given, name)]
        if ignored:
            raise ValueError(f"{ignored[0]}: all runs are shown as text or a page; type --html page.html in its place")
    if given.html is not None:
        if given.html.suffix != ".html":
            raise ValueError(f"--html {given.html}: a page's name ends in .html; type --html {given.html.stem}.html")
        if given.html.is_dir() or not os.access(given.html.parent, os.W_OK):
            why = "cannot be written" if given.html.parent.is_dir() else f"has no folder {given.html.parent}"
            raise ValueError(f"--html {given.html} {why}; type --html with a file in a folder of yours")
    if given.into is not None and not given.into.is_file():
        raise ValueError(f"--into {given.into}: no such file; type a document that has a place for the table")


def _must_be_folder(path: Path) -> None:
    if path.is_dir():
        return
    beside = [p.name for p in sorted(path.parent.iterdir()) if p.is_dir()] if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, beside, n=1)
    advice = str(path.parent / alike[0]) if alike else "a folder of finished runs, e.g. results/listops_quick"
    raise ValueError(f"{path} is no folder; type {advice}")


def _near(name: str) -> str:
    return nearest(name, _KEYS).split(", ")[0]


def _asks_to_compare(given: argparse.Namespace) -> bool:
    return given.by is not None or given.compare or given.metric is not None or bool(given.where)


def _compares(arguments: argparse.Namespace, folders: Sequence[Traversable]) -> bool:
    """Whether to compare runs without a table: on request, or because the folders belong to no
    table.
    """
    if _asks_to_compare(arguments):
        return True
    paths = [Path(item) for item in arguments.what if "=" not in item]
    known = tables.names(*folders)
    return (
        bool(paths)
        and arguments.what != ["runs"]
        and len(paths) == len(arguments.what)
        and not any(_table_of(path, known) in known or (path / tables.OF_SWEEP).is_file() for path in paths)
    )


def _compare(arguments: argparse.Namespace, folders: Sequence[Traversable]) -> None:
    if given := [item for item in arguments.what if "=" in item]:
        raise ValueError(f"{given[0]}: a comparison takes folders of runs; say --where {given[0]}")
    if arguments.into:
        raise ValueError("--into: a comparison has no place in a document; --markdown prints it")
    paths = [Path(item) for item in arguments.what] or [
        path for path in (Path("runs"), Path("results")) if path.exists()
    ]
    where = dict(item.split("=", 1) for item in arguments.where)
    found = [run for path in paths for run in load(path)]
    if not _asks_to_compare(arguments):
        made = {run.sweep["table"] for run in found if "table" in run.sweep}
        for name in sorted(made.difference(tables.names(*folders))):
            print(f"table {name} is not found; {_SEARCHPATH}[pkg://mylab.configs] says where it is", file=sys.stderr)
    found = comparison.matching(found, where) if where else found
    by = arguments.by.split(",") if arguments.by else None
    metrics = arguments.metric.split(",") if arguments.metric else []
    blocks = comparison.compare(found, by, metrics, directions(folders, found))
    shapes = {"latex": comparison.latex, "markdown": comparison.markdown, "csv": comparison.comma_separated}
    show = next((shapes[name] for name in shapes if getattr(arguments, name)), comparison.text)
    print(show(blocks))
    if arguments.html:
        from structgrad.experiments.html import comparison_page  # matplotlib takes a second to import

        # The folder of a run lies in one of the runs of its task, and these in one of all runs.
        places = [place for path in paths for place in (path, path.parent, path.parent.parent)]
        arguments.html.write_text(comparison_page(blocks, [arguments.runs, *places]))
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


def _tables(arguments: argparse.Namespace, folders: Sequence[Traversable], searchpath: str = "") -> None:
    reports, failures = find(arguments.what, folders, searchpath)
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
    if failures:
        raise ValueError("; ".join(f"left out: {failure}" for failure in failures))


def find(
    what: list[str], folders: Sequence[Traversable], searchpath: str = ""
) -> tuple[list[Report], list[ValueError]]:
    """The reports that the arguments request, of tables in some folders; and why others cannot be made, if no table
    and no folder is named.

    Args:
        what: arguments of the command.
        folders: of tables, ours first.
        searchpath: the argument that names the other folders.

    Raises:
        ValueError: unknown table, budget or key; or the runs of a table or folder that is named make no report.
        FileNotFoundError: if a folder, or every folder, has no run.
    """
    settings = dict(item.split("=", 1) for item in what if "=" in item)
    budget = settings.get("budget")
    if budget not in (None, *BUDGETS):
        raise ValueError(f"budget={budget}: type {' or '.join(f'budget={name}' for name in BUDGETS)}")
    known = tables.names(*folders)
    reports: list[Report] = []
    failures: list[ValueError] = []
    for folder in (Path(item) for item in what if "=" not in item):
        if "table" not in settings and (folder / tables.OF_SWEEP).is_file():  # of a sweep without a table
            table = tables.read(folder / tables.OF_SWEEP, folder.resolve().name.partition("-")[0])
        else:
            table = _load(settings.get("table") or _table_of(folder, known), folders, searchpath)
        summaries = load(folder)
        _say_what_is_lost(table, summaries)
        reports.append(build(table, summaries, budget))
    if reports:
        return reports, failures
    asked = settings.get("table")
    for table in [_load(name, folders, searchpath) for name in ([asked] if asked else known)]:
        for choice in [budget] if budget else BUDGETS:
            summaries = [run for root in ROOTS for run in of_sweeps(root, table.folder(choice))]
            _say_what_is_lost(table, summaries)
            if summaries or (asked and choice == (budget or table.budget)):
                try:
                    reports.append(build(table, summaries, choice))
                except ValueError as error:
                    if asked:
                        raise
                    failures.append(error)
    if not reports and not failures:
        raise FileNotFoundError("no table has finished runs in results/ or runs/tables/; python sweep.py makes them")
    return reports, failures


def _say_what_is_lost(table: Table, summaries: Iterable[Summary]) -> None:
    named = {str(run.sweep["row"]) for run in summaries if run.sweep.get("table") == table.name}
    if lost := sorted(named - {row.name for row in table.rows}):
        print(f"warning: {table.name} has no row {', '.join(lost)}; runs of it are left out", file=sys.stderr)


def _load(name: str, folders: Sequence[Traversable], searchpath: str) -> Table:
    """A table, which knows how it is found if it is not in the first folder, ours."""
    table = tables.load(name, *folders)
    return table if (folders[0] / f"{name}.yaml").is_file() else replace(table, searchpath=searchpath)


def _table_of(folder: Path, known: Sequence[str]) -> str:
    name = folder.resolve().name.partition("-")[0]  # without the sweep's note about other overrides
    short = name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1] in BUDGETS else name
    return name if name in known or short not in known else short


def _place(report: Report, what: list[str]) -> str:
    folders = [Path(item).resolve().name.partition("-")[0] for item in what if "=" not in item]
    return folders[0] if len(folders) == 1 else report.table.name
