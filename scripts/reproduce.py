"""Work through the published rows at the paper's budget, cheapest first, and keep
docs/reproduction.md up to date.

    python scripts/reproduce.py                     rows of a day or less on a CPU; everything on a GPU
    python scripts/reproduce.py --list              only prints the rows in their order
    python scripts/reproduce.py --only-page         writes only the page
    python scripts/reproduce.py workers=2 logger=csv ...    options and overrides for the sweeps

After a kill or a stop the same command continues.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from structgrad.commands import group, sweep
from structgrad.common.pictures import save
from structgrad.common.text import duration
from structgrad.experiments import reproduction, tables
from structgrad.experiments.report import build
from structgrad.experiments.runs import of_sweeps
from structgrad.training.contract import EXIT_AGAIN

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """The command. Returns the exit code: 0, 1 if a sweep failed as a whole, 75 if it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, help="leave out rows of more hours of one core (24 without a GPU)")
    parser.add_argument("--list", action="store_true", help="print the rows in their order, and stop")
    parser.add_argument("--only-page", action="store_true", help="write the page from the existing runs, and stop")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction.md")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the folder of summaries")
    parser.add_argument("overrides", nargs="*", help="for the sweeps")
    options = parser.parse_args()
    limit = options.hours if options.hours is not None or shutil.which("nvidia-smi") else 24.0
    folders = group("table", options.overrides)
    everything = [tables.load(name, *folders) for name in tables.names(*folders)]
    entries = reproduction.order(everything, limit)
    if options.list:
        for entry in entries:
            cost = "?" if entry.hours is None else duration(entry.hours * 3600)
            print(f"{cost:>8}  {entry.table.name} {entry.row.name}")
        return 0
    code = 0
    for entry in [] if options.only_page else entries:
        given = [f"table={entry.table.name}", f"rows={entry.row.name}", "budget=paper", f"results={options.results}"]
        ended = sweep.main([*given, *options.overrides])
        write(everything, options.results, options.page)
        if ended == EXIT_AGAIN:
            return ended
        code = max(code, ended)
    write(everything, options.results, options.page)
    print(f"page: {options.page}")
    return code


def write(everything: list[tables.Table], results: Path, page: Path) -> None:
    """Write the page and its picture from the existing summaries."""
    reports = []
    for table in everything:
        if table.budget == "paper":
            reports.append(build(table, of_sweeps(results, table.folder("paper")), "paper"))
    picture = page.parent / "images" / f"{page.stem}.png"
    drawn = bool(reproduction.points(reports))
    if drawn:
        picture.parent.mkdir(parents=True, exist_ok=True)
        save(reproduction.figure(reports), picture)
    page.write_text(reproduction.document(reports, picture.relative_to(page.parent).as_posix() if drawn else ""))


if __name__ == "__main__":
    sys.exit(main())
