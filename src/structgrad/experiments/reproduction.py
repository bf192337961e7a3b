"""What is reproduced: every published row, its state, its number of trials, and the command that makes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from structgrad.common.text import duration
from structgrad.experiments.report import MARGIN, Line, Report, against_published
from structgrad.experiments.tables import Row, Table


@dataclass(frozen=True)
class Entry:
    """A row to be made: its table, itself, and the hours of all its trials on two CPU cores, if known."""

    table: Table
    row: Row
    hours: float | None


def order(tables: Iterable[Table], limit: float | None = None) -> list[Entry]:
    """The rows at the paper's budget whose data can be had, cheapest first; those of unknown cost last.

    Args:
        tables: all of them; those of other budgets are left out.
        limit: hours beyond which a row is left out, as is one of unknown cost; None: no limit.
    """
    entries = []
    for table in tables:
        for row in table.rows if table.budget == "paper" and not table.unavailable else ():
            hours = None if row.hours is None else row.hours * table.selection.trials
            if not row.unavailable and (limit is None or (hours is not None and hours <= limit)):
                entries.append(Entry(table, row, hours))
    return sorted(entries, key=lambda entry: float("inf") if entry.hours is None else entry.hours)


def state(report: Report, line: Line | None, row: Row) -> str:
    """In a few words.

    ``matched``: all published numbers lie within two combined standard errors; a column without an error on either
    side cannot tell, and is named.
    """
    if line is None:
        return "data not to be had" if row.unavailable or report.table.unavailable else "not run"
    if not row.published:
        return "run; no published numbers"
    if report.extra:
        return f"run; with {' '.join(report.extra)}, so not compared"
    apart, untold, told = [], [], False
    for key in row.published:
        found = against_published(report, line, key)
        column = report.table.columns[key]
        gap, error, ratio = found or (math.nan, None, None)
        if error is None:
            untold += [column.title] if gap != 0 else []
        elif ratio is None:  # no spread on either side
            apart += [f"{column.title} by {gap:+.{column.digits}f} without any spread"] if gap else []
        elif not abs(ratio) <= MARGIN:
            apart.append(f"{column.title} by {abs(ratio):.1f} s.e.")
        told |= error is not None
    unsure = f" (without an error: {', '.join(untold)})" if untold else ""
    if apart:
        return f"differs: {', '.join(apart)}{unsure}"
    return f"matched{unsure}" if told else f"run; too few runs for an error{unsure}"


def document(reports: Sequence[Report]) -> str:
    """The page, from one report at the paper's budget a table."""
    parts = [_HEAD]
    states = []
    for report in reports:
        lines = report.main() if report.is_reproduction else {}
        rows = []
        for row in report.table.rows:
            line = lines.get(row.name)
            found = state(report, line, row)
            states.append(found.split(":")[0].split(" (")[0].split(";")[0])
            trials = f"{len(line.runs) if line else 0} of {report.table.selection.trials}"
            hours = "-" if row.hours is None else duration(row.hours * 3600)
            title = f"{row.group}: {row.title}" if row.group else row.title
            cells = (title.replace("|", r"\|"), found, trials, hours, f"`{report.command(row)}`")
            rows.append("| " + " | ".join(cells) + " |")
        head = ["| row | state | trials | a trial | command |", "|---|---|---|---|---|"]
        reason = f"\n\nData: {report.table.unavailable}." if report.table.unavailable else ""
        title = f"## {report.table.title} (`{report.table.name}`, {report.table.source})"
        parts.append("\n".join([f"{title}{reason}\n", *head, *rows]))
    counts = "; ".join(f"{states.count(found)} {found}" for found in dict.fromkeys(sorted(states)))
    parts.insert(1, f"{len(states)} rows: {counts}.")
    return "\n\n".join(parts) + "\n"


_HEAD = """# Reproduction

Written by `make reproduce`, which works through the rows whose data can be had at the paper's budget, cheapest
first, and goes on where it was stopped. On a CPU it leaves out rows of more than a day; on a GPU it does all
(`python scripts/reproduce.py --help`).

A row is *matched* if every published number lies within two combined standard errors of ours, *differs* otherwise;
standard deviations over an unknown number of seeds count as standard errors. A trial's time is an estimate for two CPU
cores, from the time of a training step."""
