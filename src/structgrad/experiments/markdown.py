"""A report as Markdown and as LaTeX, for terminals and documents."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

from structgrad.common.text import duration
from structgrad.experiments import grids
from structgrad.experiments.report import Line, Report, Verdict, against_published
from structgrad.experiments.runs import precisions
from structgrad.experiments.selection import count
from structgrad.experiments.statistics import Decision
from structgrad.experiments.tables import Column

_ERRORS = {
    "best_trial": "numbers are of the trial with the best validation metric, ± the bootstrap error of the selection",
    "mean_and_standard_error": "numbers are means ± standard errors over runs with different seeds",
    "mean_and_standard_deviation": "numbers are means ± standard deviations over runs with different seeds",
}
_PUBLISHED = {
    "standard_error": "the published ± is a standard error",
    "standard_deviation": "the published ± is a standard deviation",
    "unstated": "the paper does not say what its ± is, so it counts as a standard error",
}


def heading(report: Report) -> str:
    """Title and source of the table."""
    return report.table.title + (f" ({report.table.source})" if report.table.source else "")


def settings_given(report: Report, line: Line) -> bool:
    """Whether the runs of a line have the settings that the table gives for its own budget."""
    return bool(line.row.given and line.runs) and not line.marks and report.budget == report.table.budget


def table(report: Report) -> str:
    """The table in Markdown.

    Published numbers, and the difference from them with its interval, are shown only beside runs at
    the paper's budget.
    """
    found = _grid(report)
    plain = tuple(replace(row, best=frozenset()) for row in found.rows)
    return replace(found, rows=plain, caption="").markdown()


def _grid(report: Report) -> grids.Grid:
    titles, lines = grid(report)
    best = best_lines(report)
    places = {key: place for place, (key, _) in enumerate(_heads(report))}
    rows = []
    for (heading, cells), line in zip(lines, report.lines, strict=True):
        found = {places[key] for key in best if line in best[key]}
        rows.append(grids.Row(tuple(cells), frozenset(found), heading))
    return grids.Grid(tuple(titles), tuple(rows), caption(report).replace("`", ""))


def best_lines(report: Report) -> dict[str, list[Line]]:
    """Column -> the comparable lines with the best value in it, up to the shown digits; empty if
    all are best.
    """
    found = {}
    for key, column in report.table.columns.items():
        values = {
            id(line): line.cells[key].scaled(column.scale).value for line in report.main().values() if key in line.cells
        }
        shown = {place: round(value, column.digits) for place, value in values.items() if not math.isnan(value)}
        if column.direction and len(set(shown.values())) > 1:
            best = (max if column.direction == "maximize" else min)(shown.values())
            found[key] = [line for line in report.lines if shown.get(id(line)) == best]
    return found


def _compared(report: Report) -> list[str]:
    """The columns beside which published numbers are shown."""
    published = {key for row in report.table.rows for key in row.published} if report.is_reproduction else set()
    return [key for key in report.table.columns if key in published]


def _heads(report: Report) -> list[tuple[str, str]]:
    """The key of the column whose values stand in each place, if any, and the title there."""
    heads, compared = [("", ""), ("", "Runs")], _compared(report)
    for key, column in report.table.columns.items():
        heads.append((key, column.title))
        heads += [("", "published"), ("", "difference")] if key in compared else []
    return heads


def grid(report: Report) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles of the columns, and for each line its heading (if a group begins there, else empty)
    and its cells.
    """
    columns, compared = report.table.columns, _compared(report)
    titles = [title for _, title in _heads(report)]
    lines, group = [], ""
    for line in report.lines:
        heading = line.row.group if line.row.group != group else ""
        group = line.row.group
        title = line.row.title + (", settings given" if settings_given(report, line) else "")
        title += f" ({'; '.join(line.marks)})" if line.marks else ""
        cells = [title, str(len(line.runs)) if line.runs else "-"]
        for key, column in columns.items():
            cells.append(line.cells[key].show(column.scale, column.digits) if key in line.cells else "-")
            if key in compared:
                number = line.row.published.get(key)
                cells.append("-" if number is None else published(number, column))
                cells.append("-" if line.marks else difference(report, line, key))
        lines.append((heading, cells))
    return titles, lines


def published(number: tuple[float, float | None], column: Column) -> str:
    """``value ± error`` in the printed form."""
    value, error = number
    return f"{value:.{column.digits}f}" + ("" if error is None else f" ± {error:.{column.digits}f}")


def difference(report: Report, line: Line, key: str) -> str:
    """``+1.2 [-0.3, +2.7]``."""
    found = against_published(report, line, key)
    return "-" if found is None else found.show(report.table.columns[key].digits)


def caption(report: Report) -> str:
    """A description of the numbers and of how they were made; one paragraph."""
    runs, columns = report.runs, report.table.columns.values()
    metric = report.table.selection.metric
    halved = [line for line in report.lines if line.halved]
    parts = ["numbers are of the trial with the best validation metric"]
    if halved:
        parts.append("trials were stopped by asynchronous successive halving, so the selection has no bootstrap error")
        parts += [f"{line.row.title}: {reached(line)}" for line in halved if line.halving]
    else:
        parts = [_ERRORS[report.table.selection.rule]]
    parts.append(
        f"each run is tested at the checkpoint with the best {f'`{metric}`' if metric else 'validation metric'}"
    )
    if report.verdicts or report.is_reproduction:
        parts.append("brackets have 95 % intervals, by Student's t and for differences by Welch's")
        if any(len(verdict.outcomes) > 1 for verdict in report.verdicts):
            parts.append("only the wider intervals that hold for all comparisons of a claim together contradict it")
    if any(column.statistic == "selected" for column in columns):
        parts.append("the selected run is the one with the best validation metric")
    if any(column.statistic == "best" for column in columns):
        parts.append("“max” is the best run in that metric")
    if any(settings_given(report, line) for line in report.lines):
        parts.append("rows with “settings given” search only the ranges that are given with them")
    published = any(row.published for row in report.table.rows)
    quick = not report.is_reproduction and (published or report.table.source)
    parts.append(
        f"the budget is `{report.budget}`" + (", so this is no reproduction of the published numbers" if quick else "")
    )
    if report.stand_in and report.table.source:
        parts.append(f"stand-in data: {report.stand_in}")
    if report.extra:
        parts.append(f"all runs have `{' '.join(report.extra)}`")
    if runs:
        times = [float(run.content["training_s"]) for run in runs if "training_s" in run.content]
        commits = sorted({run.commit for run in runs})
        device = report.device or " and ".join(sorted({run.content.get("device", "?") for run in runs}))
        made = [f"device {device}", *[f"precision {' and '.join(found)}" for found in [precisions(runs)] if found]]
        spread = dict.fromkeys((duration(min(times)), duration(max(times)))) if times else ()
        made += [f"{' to '.join(spread)} of training a run"] if spread else []
        parts.append(", ".join([*made, f"commit {', '.join(commits)}"]))
    if report.is_reproduction and published:
        parts.append(_PUBLISHED[report.table.published.error])
        parts.append("differences are ours minus the published number")
    text = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)
    return f"{text} {report.table.notes}" if report.table.notes else text


def reached(line: Line) -> str:
    """The number of trials of a row with successive halving that reached each rung."""
    trials, steps = line.halving["trials"], line.halving["rungs"]
    counts = [sum(trial["rungs"] > place for trial in trials) for place in range(len(steps))]
    finished = sum(trial["finished"] for trial in trials)
    failed = sum("error" in trial for trial in trials)
    parts = [f"{count} to step {step:,}" for count, step in zip(counts, steps, strict=True)]
    text = f"of {len(trials)} trials {', '.join(parts)}, {finished} to the end"
    return text + (f", {failed} failed" if failed else "")


#: The words for a decision on a claim.
WORDS: dict[Decision, str] = {"shown": "Shown", "contradicted": "Contradicted", "open": "Open"}


def claims(report: Report) -> str:
    """One bullet for each claim: what the paper says, whether these runs show it, and the numbers
    with their intervals.
    """
    lines = []
    for verdict in report.verdicts:
        parts = [f"- Claim: *{verdict.claim.text}* **{WORDS[verdict.decision]}.** {numbers(verdict)}.", theirs(verdict)]
        lines.append(" ".join(part for part in parts if part))
    return "\n".join(lines)


#: The most rows without runs that a verdict names; the table shows which have none.
_NAMED = 4


def numbers(verdict: Verdict) -> str:
    """The numbers that decided a claim, by column, and the missing rows."""
    texts: dict[str, list[str]] = {}
    for outcome in verdict.outcomes:
        if outcome.text:
            texts.setdefault(outcome.column, []).append(outcome.text)
    absent = list(dict.fromkeys(row for outcome in verdict.outcomes for row in outcome.absent))
    if len(absent) > _NAMED:
        absent = [f"{len(absent)} of the claim's rows"]
    parts = [f"{column}: {', '.join(found)}" for column, found in texts.items()]
    if any(outcome.single for outcome in verdict.outcomes):
        parts.append("numbers without an interval decide nothing")
    return "; ".join([*parts, f"No runs of {', '.join(absent)}"] if absent else parts)


def theirs(verdict: Verdict) -> str:
    """The decision of the published numbers on a claim; empty without published numbers."""
    if not verdict.published:
        return ""
    if verdict.published_decision == "shown":
        return "By the same test, the published numbers show it."
    counts = Counter(outcome.decision for outcome in verdict.published)
    parts = [f"show {counts['shown']} of {len(verdict.published)} comparisons"]
    parts += [f"contradict {counts['contradicted']}"] if counts["contradicted"] else []
    parts += [f"leave {counts['open']} open"] if counts["open"] else []
    return f"By the same test, the published numbers {', '.join(parts[:-1])} and {parts[-1]}."


def missing(report: Report) -> str:
    """The rows without runs, each with the command that makes them, or the reason why there is
    none.
    """
    lines = []
    for line in report.lines:
        if not line.runs:
            reason = line.row.unavailable or report.table.unavailable
            blocked = reason and report.is_reproduction
            lines.append(f"- {line.row.title}: " + (reason if blocked else f"`{report.command(line.row)}`"))
    return "\n".join(["Not run:", "", *lines]) if lines else ""


def document(report: Report, with_missing: bool = True) -> str:
    """Table, caption, claims, and the missing rows."""
    parts = [table(report), caption(report), claims(report), missing(report) if with_missing else ""]
    return "\n\n".join(part for part in parts if part)


def latex(report: Report) -> str:
    """A ``tabular`` in the style of booktabs, with the caption; the best value of a column is bold."""
    return _grid(report).latex()


def comma_separated(report: Report) -> str:
    """One line for each row and column, with all digits, in the units of the column."""
    lines: list[list[object]] = []
    for line in report.lines:
        for key, cell in line.cells.items():
            column = report.table.columns[key]
            scaled = cell.scaled(column.scale)
            numbers = [len(line.runs), scaled.value, "" if scaled.standard_error is None else scaled.standard_error]
            theirs = line.row.published.get(key, ("", "")) if report.is_reproduction else ("", "")
            known = ["" if number is None else number for number in theirs]
            lines.append([report.table.name, line.row.name, "; ".join(line.marks), key, *numbers, *known])
    titles = ["table", "row", "marks", "column", "runs", "value", "standard_error", "published", "published_error"]
    return grids.comma_separated(titles, lines)


def insert(document: Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in a document.

    Raises:
        ValueError: if the document has no such place.
    """
    content = document.read_text()
    start, end = f"<!-- table:{name} -->\n", "<!-- /table -->"
    if start not in content or end not in content.split(start, 1)[1]:
        raise ValueError(f"{document} has no place for the table; type there {start.strip()} and, below it, {end}")
    before, rest = content.split(start, 1)
    text = "\n".join(map(_wrapped, text.split("\n")))
    document.write_text(before + start + text + "\n" + end + rest.split(end, 1)[1])


def _wrapped(line: str) -> str:
    """A paragraph in lines of at most 100 columns; lines of a table and claims stay whole."""
    whole = line.startswith(("|", "- "))
    return line if whole else textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)


def counted(report: Report) -> str:
    """``table paulus_2: 12 runs``."""
    return f"table {report.table.name}: {count(report.runs)}"
