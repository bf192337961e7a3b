"""The state of the reproduction: every published row, its state, its number of trials, and its
command.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from structgrad.common import pictures
from structgrad.common.text import duration
from structgrad.experiments.report import Line, Report, against_published
from structgrad.experiments.runs import precisions
from structgrad.experiments.statistics import half_width, simultaneous
from structgrad.experiments.tables import Row, Table


@dataclass(frozen=True)
class Entry:
    """A row to make: the table, the row, and the hours of all its trials on one CPU core, if
    known.
    """

    table: Table
    row: Row
    hours: float | None


def order(tables: Iterable[Table], limit: float | None = None) -> list[Entry]:
    """The rows at the paper's budget whose data are available, cheapest first; those of unknown
    cost come last.

    Args:
        tables: all tables; those of other budgets are ignored.
        limit: rows with more hours are left out, and so are those of unknown cost; None: no limit.
    """
    entries = []
    for table in tables:
        for row in table.rows if table.budget == "paper" and not table.unavailable else ():
            hours = None if row.hours is None else row.hours * row.trials(table.selection.trials)
            if not row.unavailable and (limit is None or (hours is not None and hours <= limit)):
                entries.append(Entry(table, row, hours))
    return sorted(entries, key=lambda entry: float("inf") if entry.hours is None else entry.hours)


@dataclass(frozen=True)
class State:
    """The state of a row: a word, and the numbers behind it."""

    word: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


def state(report: Report, line: Line | None, row: Row) -> State:
    """Whether the published numbers of a row are matched.

    ``matched``: the 95 % interval of every difference lies within the margin of its column.
    ``differs``: one is not within its margin, and its interval that holds for all differences of the
    row together excludes 0. ``open``: neither, so more runs are needed. A larger error, ours or the
    paper's, never makes a match.
    """
    if line is None:
        others = [f for f in report.lines if f.row == row and f.runs and f.runs[0].budget == report.budget]
        if others and report.is_reproduction:
            return State("not comparable", others[0].marks[0])
        return State("data not to be had" if row.unavailable or report.table.unavailable else "not run")
    if not row.published:
        return State("run (no published numbers)")
    if report.extra:
        return State("run (not compared)", f"with {' '.join(report.extra)}")
    apart, unsure, matched = [], [], False
    for key in row.published:
        column = report.table.columns[key]
        gap = against_published(report, line, key)
        wide = against_published(report, line, key, simultaneous(len(row.published)))
        if gap is None or wide is None:
            unsure.append(f"no {column.title}")
            continue
        within = -(column.margin or 0.0) <= gap.low and gap.high <= (column.margin or 0.0)
        shown = f"{column.title} {gap.show(column.digits)}"
        if not math.isfinite(gap.value) or (not within and (wide.low > 0 or wide.high < 0)):
            apart.append(shown)
        elif gap.half_width is None:
            error = row.published[key][1]
            unsure += [shown + (f" ({abs(gap.value) / error:.1f} published errors)" if error else "")] * bool(gap.value)
        elif not within:
            unsure.append(shown)
        matched |= within
    if apart or unsure:
        return State("differs" if apart else "open", ", ".join(apart or unsure))
    return State("matched" if matched else "open", "" if matched else "no interval")


def document(reports: Sequence[Report], picture: str = "") -> str:
    """The page, from one report at the paper's budget for each table.

    Tables with published numbers come first, then those without, then those on stand-in data. Those
    whose data are not to be had come last, with a line each.

    Args:
        reports: reports of all tables.
        picture: path of :func:`figure`, relative to the page; empty: none.
    """
    parts, states = [], []
    groups: dict[str, list[Report]] = {"": [], "## Without published numbers": [], "## Stand-in data": []}
    published, unpublished, stand_in = groups.values()
    closed: list[Report] = []
    for report in sorted(reports, key=lambda report: report.stand_in):
        if report.table.unavailable and not report.runs:
            closed.append(report)
            continue
        numbers = any(row.published for row in report.table.rows)
        (stand_in if report.stand_in else published if numbers else unpublished).append(report)
    for title, group in groups.items():
        parts += [title] if title and group else []
        for report in group:
            section, found = _section(report, "###" if title else "##")
            parts.append(section)
            states += found
    if closed:
        parts.append(_closed(closed))
        states += ["data not to be had" for report in closed for _ in report.table.rows]
    counts = "; ".join(f"{states.count(found)} {found}" for found in dict.fromkeys(sorted(states)))
    shown = [f"![Published numbers against ours]({picture})", _PICTURE] if picture else []
    return "\n\n".join(["# Reproduction", *shown, _HEAD, f"{len(states)} rows: {counts}.", *parts]) + "\n"


def _closed(reports: Sequence[Report]) -> str:
    """The section of tables whose data are not to be had: what is missing, and the command for its owners."""
    head = ["## Data not to be had", "", "| table | rows | missing | command |", "|---|---|---|---|"]
    rows = [
        f"| {_title(report)} | {len(report.table.rows)} | {report.table.unavailable} | `{report.command()}` |"
        for report in reports
    ]
    return "\n".join([*head, *rows])


def _title(report: Report) -> str:
    """The table's title, name and source."""
    where = ", ".join(part for part in (f"`{report.table.name}`", report.table.source) if part)
    return f"{report.table.title} ({where})"


def _section(report: Report, level: str) -> tuple[str, list[str]]:
    """The section of a table under a heading of this level, and the states of its rows."""
    lines = report.main() if report.is_reproduction else {}
    rows, states = [], []
    for row in report.table.rows:
        line = lines.get(row.name)
        found = state(report, line, row)
        states.append(found.word)
        trials = f"{len(line.runs) if line else 0} of {row.trials(report.table.selection.trials)}"
        trials += " (settings given)" if row.given else ""
        hours = "-" if row.hours is None else duration(row.hours * 3600)
        title = f"{row.group}: {row.title}" if row.group else row.title
        cells = (title.replace("|", r"\|"), str(found), trials, hours, f"`{report.command(row)}`")
        rows.append("| " + " | ".join(cells) + " |")
    title = _title(report)
    text = [f"{level} {report.stand_in}: {title}" if report.stand_in else f"{level} {title}", ""]
    if report.table.unavailable:
        text += [f"Data: {report.table.unavailable}.", ""]
    if report.runs:
        text += [f"{_made(report)}.", ""]
    head = ["| row | state | trials | a trial | command |", "|---|---|---|---|---|"]
    return "\n".join([*text, *head, *rows]), states


def _made(report: Report) -> str:
    """The facts that a reader needs to trust the numbers of a table."""
    parts = [f"Selection: {report.table.selection.rule.replace('_', ' ')}", f"device {report.device}"]
    found = precisions(report.runs)
    return "; ".join([*parts, f"precision {' and '.join(found)}"] if found else parts)


@dataclass(frozen=True)
class Point:
    """A row's number in a column, in units of its published error or margin, and the errors in the
    same units.
    """

    table: str
    title: str
    published: float
    ours: float
    published_error: float
    our_error: float


def points(reports: Sequence[Report]) -> list[Point]:
    """One point for each row at the paper's budget on the paper's data: its first published and
    measured column.
    """
    found = []
    for report in reports:
        for name, line in report.main().items() if report.is_reproduction and not report.stand_in else ():
            key = next((k for k in report.table.columns if k in line.row.published and k in line.cells), None)
            if key is None or report.extra:
                continue
            column = report.table.columns[key]
            theirs = report.table.published.cell(*line.row.published[key])
            ours = line.cells[key].scaled(column.scale)
            errors = [half_width(cell) or 0.0 for cell in (theirs, ours)]
            found.append(Point(report.table.name, f"{name}: {column.title}", theirs.value, ours.value, *errors))
    return found


def figure(reports: Sequence[Report]) -> Figure:
    """Published against ours: one point a row, both 95 % intervals, coloured by table, with the
    diagonal.

    Each kind of number (percentages, the rest) has its own panel, because they have no common axis.
    """
    every = points(reports)
    tables = list(dict.fromkeys(point.table for point in every))
    kinds = [("%", [p for p in every if "%" in p.title]), ("other units", [p for p in every if "%" not in p.title])]
    panels = [(name, group) for name, group in kinds if group] or [("%", [])]
    drawing = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axes, (name, group) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, table in enumerate(tables):
            mine = [point for point in group if point.table == table]
            if not mine:
                continue
            axes.errorbar(
                [p.published for p in mine],
                [p.ours for p in mine],
                xerr=[p.published_error for p in mine],
                yerr=[p.our_error for p in mine],
                label=table,
                linestyle="none",
                **pictures.mark(index),
                capsize=2,
                linewidth=1,
            )
        bars = [bar for p in group for bar in ((p.published, p.published_error), (p.ours, p.our_error))]
        ends = [end for value, error in bars for end in (value - error, value + error)] or [0.0, 100.0]
        pad = 0.08 * ((max(ends) - min(ends)) or 1.0)
        span = (min(ends) - pad, max(ends) + pad)
        axes.plot(span, span, color="0.6", linewidth=1, zorder=0)
        axes.set(xlabel=f"published ({name})", ylabel=f"ours ({name})", xlim=span, ylim=span, aspect="equal")
        pictures.grid(axes)
    pictures.legend(drawing, columns=3)
    return drawing


_PICTURE = """*One point for each row at the paper's budget and on the paper's data: its first published number
against ours. Bars are 95 % intervals of both; a point without an upright bar is one run. On the diagonal
the two agree. Tables without published numbers come [below](#without-published-numbers).*"""

_HEAD = """`make reproduce` writes this page. It works through the rows whose data are available, at the
paper's budget, cheapest first, and it continues where it was stopped. On a CPU it leaves out rows of more
than a day; on a GPU it does all (`python scripts/reproduce.py --help`).

A row is *matched* if the 95 % interval of every difference between our number and the published one lies
within the column's margin ([tables](tables.md)). It *differs* if a difference is not within its margin and
its interval excludes 0; that interval is wider, so that it holds for all columns of the row together.
Otherwise the row is *open*: more runs are needed. Standard deviations over an unknown number of
seeds count as standard errors. A trial's time is an estimate for one CPU core, from the time of a
training step and of a validation (`python -m benchmarks.hours`)."""
