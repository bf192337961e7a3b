"""A table filled with finished runs: cells, differences from the published numbers, claims.

``markdown`` and ``html`` decide its appearance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from structgrad.experiments import selection
from structgrad.experiments.runs import Summary, as_text, by_row
from structgrad.experiments.selection import Cell
from structgrad.experiments.statistics import LEVEL, Decision, Difference, difference, half_width, simultaneous
from structgrad.experiments.tables import Claim, Column, Comparison, Direction, Row, Table
from structgrad.training.contract import HARDWARE

_HARDWARE = {f"trainer.{key}" for key in HARDWARE}


@dataclass(frozen=True)
class Condition:
    """The conditions under which a run was made.

    Runs of a row are comparable if all conditions are equal. Runs of different rows are comparable
    if all except the settings are.

    Attributes:
        budget: choice in that group.
        device: ``cpu`` or the GPU's name.
        extra: overrides that the user gave to the sweep.
        data: the settings of the data set, except those in which the rows of the table differ.
        settings: the whole configuration, except what differs between trials.
        given: whether the settings are those that the row gives, if it gives any.
    """

    budget: str
    device: str
    extra: tuple[str, ...]
    data: frozenset[tuple[str, str]]
    settings: frozenset[tuple[str, str]]
    given: bool = True

    @property
    def shared(self) -> tuple[Any, ...]:
        """The conditions that rows must share."""
        return self.budget, self.device, self.extra, self.data, self.given


@dataclass(frozen=True)
class Line:
    """Comparable runs of a row.

    Attributes:
        row: the row.
        runs: by trial or seed; empty if the row has not been run.
        cells: column -> number; a column is missing if the runs do not have its metric.
        marks: differences of the runs from those of the table, e.g. ``budget quick``; empty for
            comparable ones.
        chosen: index in ``runs`` of the run with the best validation metric; None without runs.
    """

    row: Row
    runs: tuple[Summary, ...]
    cells: dict[str, Cell]
    marks: tuple[str, ...] = ()
    chosen: int | None = None

    @property
    def halved(self) -> bool:
        """Whether trials were stopped at rungs. ``runs`` are the others."""
        return any(item.startswith("halving=") for run in self.runs for item in run.sweep.get("extra", ()))

    @property
    def halving(self) -> dict[str, Any]:
        """With halving: ``reduction``, ``rungs`` and ``trials`` of the row; empty if they were not
        kept.

        See :meth:`structgrad.experiments.queue.Queue.export_finished`.
        """
        found: dict[str, Any] = next((r.sweep["halving"] for r in self.runs if "halving" in r.sweep), {})
        return found if self.halved else {}

    @property
    def training_s(self) -> float:
        """Training time of all its runs, in seconds."""
        return sum(float(run.content.get("training_s", 0.0)) for run in self.runs)


@dataclass(frozen=True)
class Outcome:
    """The answer of runs to a comparison.

    Attributes:
        decision: ``open`` also if a row is missing.
        column: title of the column.
        text: the numbers.
        absent: titles of the missing rows.
        single: whether the numbers have no interval, as those of single runs.
    """

    decision: Decision
    column: str
    text: str
    absent: tuple[str, ...] = ()
    single: bool = False


@dataclass(frozen=True)
class Verdict:
    """The answer of numbers to a claim.

    Attributes:
        claim: the claim.
        outcomes: the answers of runs to its comparisons.
        published: the answers of the published numbers; empty if some are missing, and for runs that
            do not stand beside published numbers.
    """

    claim: Claim
    outcomes: tuple[Outcome, ...]
    published: tuple[Outcome, ...] = ()

    @property
    def decision(self) -> Decision:
        """Shown if runs show all comparisons, contradicted if they contradict one, otherwise open;
        see :func:`judge`.
        """
        return _all_of(self.outcomes)

    @property
    def published_decision(self) -> Decision | None:
        """The same by the published numbers and their errors; None without them."""
        return _all_of(self.published) if self.published else None


def _all_of(outcomes: Iterable[Outcome]) -> Decision:
    decisions = {outcome.decision for outcome in outcomes}
    return "contradicted" if "contradicted" in decisions else "shown" if decisions == {"shown"} else "open"


@dataclass(frozen=True)
class Report:
    """A table, filled.

    Attributes:
        table: the table.
        budget, device, extra: those of the runs without marks; empty if there are no runs.
        lines: one for each row; several for rows with runs that must not be mixed.
        verdicts: one for each claim.
    """

    table: Table
    budget: str
    device: str
    extra: tuple[str, ...]
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...] = field(default_factory=tuple)

    @property
    def runs(self) -> list[Summary]:
        """All runs."""
        return [run for line in self.lines for run in line.runs]

    @property
    def is_reproduction(self) -> bool:
        """Whether the runs have the budget of the paper, so that published numbers may be compared."""
        return self.budget == "paper"

    def main(self) -> dict[str, Line]:
        """Row -> the line of comparable runs; rows without such runs are missing."""
        return {line.row.name: line for line in self.lines if line.runs and not line.marks}

    @property
    def stand_in(self) -> str:
        """The data that replace those of the paper, as the table says, or the set that the user has
        chosen.
        """
        given = [item for item in self.extra if item.startswith("data=")]
        return self.table.stand_in or " ".join(given)

    def command(self, row: Row | None = None) -> str:
        """The command that makes a row's runs; without a row, those of the whole table."""
        if self.table.command is not None:
            return self.table.command
        parts = [f"table={self.table.name}", f"rows={row.name if row else 'all'}", f"budget={self.budget}", *self.extra]
        return " ".join(["python sweep.py", *parts, self.table.searchpath]).rstrip()


def build(table: Table, summaries: Iterable[Summary], budget: str | None = None) -> Report:
    """Fill a table.

    Args:
        table: the table.
        summaries: finished runs; those of other tables are ignored.
        budget: the budget of the table's runs; None: the budget of most of them.

    Raises:
        ValueError: one line, if a run has no validation metric for the selection, or occurs twice
            with different results.
    """
    rows = by_row(table, summaries)
    groups = _grouped(table, rows)
    counts: Counter[tuple[Any, ...]] = Counter()
    others: Counter[tuple[Any, ...]] = Counter()
    for group in groups.values():
        for condition, runs in group.items():
            if budget in (None, condition.budget):
                # Runs with other settings than given are never the table's own, but they may show
                # its conditions.
                (counts if condition.given else others)[(*condition.shared[:-1], True)] += len(runs)
    common = (counts or others).most_common(1)
    main = common[0][0] if common else (budget or table.budget, "", (), frozenset(), True)
    lines = []
    for row in table.rows:
        found = sorted(groups[row.name].items(), key=lambda item: (-_alike(item[0], main), -len(item[1])))
        if not found or found[0][0].shared != main:
            lines.append(Line(row, (), {}))
        first: dict[tuple[Any, ...], Condition] = {}
        for condition, runs in found:
            marks = _marks(condition, main)
            if first.setdefault(condition.shared, condition) != condition:
                changes = _changes(condition.settings, first[condition.shared].settings)
                marks.append(f"other settings than above: {changes}")
            _check_once(table, row, runs)
            lines.append(_line(table, row, runs, tuple(marks)))
    most, device, extra, *_ = main
    report = Report(table, most, device, extra, tuple(lines))
    return replace(report, verdicts=tuple(judge(report, claim) for claim in table.claims))


def _grouped(table: Table, rows: Mapping[str, list[Summary]]) -> dict[str, dict[Condition, list[Summary]]]:
    """Row -> condition -> runs."""
    settings = {
        name: [{key: as_text(value) for key, value in run.settings.items()} for run in runs]
        for name, runs in rows.items()
    }
    following = _following([s for found in settings.values() for s in found], {"seed"})
    of_rows = {override.lstrip("+").split("=")[0] for row in table.rows for override in row.overrides}
    searches = table.selection.rule == "best_trial"
    groups: dict[str, dict[Condition, list[Summary]]] = {}
    for name, runs in rows.items():
        drawn = {key for run in runs for key in run.sweep.get("parameters", {})}
        varied = _following(settings[name], {"seed", *drawn})
        # Nobody knows which settings a search by hand has varied.
        unknown = searches and not all(run.sweep for run in runs)
        groups[name] = {}
        for run, found in zip(runs, settings[name], strict=True):
            data = {k: v for k, v in found.items() if k.startswith("task.data.") and k not in of_rows | following}
            rest = {} if unknown else {k: v for k, v in found.items() if k not in varied | _HARDWARE}
            extra = tuple(run.sweep.get("extra", ()))
            condition = Condition(
                run.budget,
                run.content.get("device", "unknown"),
                extra,
                frozenset({} if "data" in of_rows else data.items()),
                frozenset(rest.items()),
                run.budget != table.budget or table.row(name).admits(run.settings),
            )
            groups[name].setdefault(condition, []).append(run)
    return _by_task(groups) if len({run.task for found in rows.values() for run in found}) > 1 else groups


def _by_task(groups: dict[str, dict[Condition, list[Summary]]]) -> dict[str, dict[Condition, list[Summary]]]:
    """The same for rows of several tasks, each with data of its own: data are those that most runs
    of the task have, or others.
    """
    usual: dict[str, Counter[frozenset[tuple[str, str]]]] = {}
    for found in groups.values():
        for condition, runs in found.items():
            usual.setdefault(runs[0].task, Counter())[condition.data] += len(runs)
    return {
        name: {
            replace(condition, data=frozenset())
            if condition.data == usual[runs[0].task].most_common(1)[0][0]
            else condition: runs
            for condition, runs in found.items()
        }
        for name, found in groups.items()
    }


def _following(settings: Sequence[Mapping[str, str]], varied: set[str]) -> set[str]:
    """The keys that vary between runs, and those whose value always equals that of one of them."""
    keys = {key for found in settings for key in found}
    return varied | {
        key for key in keys if any(all(found.get(key) == found.get(v) for found in settings) for v in varied)
    }


def _changes(settings: frozenset[tuple[str, str]], others: frozenset[tuple[str, str]]) -> str:
    """The first few differences, as on a command line."""
    here = dict(settings)
    changed = sorted({key for key, _ in settings ^ others})
    texts = [f"{key}={here[key]}" if key in here else f"no {key}" for key in changed]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _check_once(table: Table, row: Row, runs: Sequence[Summary]) -> None:
    """Refuse a run that occurs twice, because it would count twice. With searched hyper-parameters,
    seeds may repeat.
    """
    seeds = [run.seed for run in runs]
    names = [run.content.get("name") or index for index, run in enumerate(runs)]
    if len(set(names)) < len(runs) or (table.selection.rule != "best_trial" and len(set(seeds)) < len(runs)):
        raise ValueError(
            f"{table.name}, {row.name}: seeds {seeds} repeat: a run is there twice, with different results; "
            "say which folder counts, e.g. python report.py results/<table>"
        )


def _alike(condition: Condition, main: tuple[Any, ...]) -> int:
    return sum(a == b for a, b in zip(condition.shared, main, strict=True))


def _marks(condition: Condition, main: tuple[Any, ...]) -> list[str]:
    marks = [] if condition.given else ["other settings than given"]
    marks += [] if condition.budget == main[0] else [f"budget {condition.budget}"]
    marks += [] if condition.device == main[1] else [f"device {condition.device}"]
    marks += [] if condition.extra == main[2] else [f"with {' '.join(condition.extra) or 'no other settings'}"]
    # The user's own budgets and settings bring data with them.
    if (condition.budget, condition.extra) == (main[0], main[2]) and condition.data != main[3]:
        marks.append(f"other data: {_changes(condition.data, main[3])}")
    return marks


def _line(table: Table, row: Row, runs: list[Summary], marks: tuple[str, ...]) -> Line:
    validation = [score(table, row, run) for run in runs]
    cells = {}
    for key, column in table.columns.items():
        if all(column.metric in run.metrics for run in runs):
            cells[key] = _cell(table, column, validation, [run.metrics[column.metric] for run in runs])
    line = Line(row, tuple(runs), cells, marks, int(selection.ranking(validation)[0]))
    if line.halved:  # stopped trials have no test metric for a resample to select
        return replace(line, cells={key: Cell(cell.value, None, None) for key, cell in cells.items()})
    return line


def score(table: Table, row: Row, run: Summary) -> float:
    """The validation metric that selects among runs, with a sign such that the greatest is the
    best.

    Raises:
        ValueError: if the run has none, or its direction is unknown.
    """
    metric = table.selection.metric or run.monitor
    value = run.metrics.get(metric, math.nan)
    if math.isnan(value):
        has = "a value of nan for" if metric in run.metrics else "no"
        raise ValueError(
            f"{table.name}, {row.name}: {run.content.get('name', 'a run')} has {has} {metric or 'metric'} to select by"
        )
    direction = table.selection.direction or direction_of(metric, run, table.columns.values())
    if direction is None:
        raise ValueError(f"{table.name}: nothing says which values of {metric} are better; write a selection")
    return value if direction == "maximize" else -value


def direction_of(metric: str, run: Summary, columns: Iterable[Column] = ()) -> Direction | None:
    """The direction of a metric: from its task, or from a column of the same metric on test data."""
    found = {"max": "maximize", "min": "minimize"}.get(run.content.get("mode", "")) if metric == run.monitor else None
    named = [c.direction for c in columns if c.metric.split("/")[-1] == metric.split("/")[-1]]
    return cast(Direction | None, found or next(iter(named), None))


def _cell(table: Table, column: Column, validation: list[float], test: list[float]) -> Cell:
    if column.statistic == "selected":
        return selection.best_trial(validation, test)
    if column.statistic == "best":
        if any(map(math.isnan, test)):  # then none of them is the best
            return Cell(math.nan, None, None)
        sign = -1.0 if column.direction == "minimize" else 1.0
        return selection.best_trial([sign * value for value in test], test)
    return selection.RULES[table.selection.rule](validation, test)


def against_published(report: Report, line: Line, key: str, level: float = LEVEL) -> Difference | None:
    """Ours minus published in the units of the column; None if nothing is published or measured."""
    if key not in line.row.published or key not in line.cells:
        return None
    published = report.table.published.cell(*line.row.published[key])
    return difference(line.cells[key].scaled(report.table.columns[key].scale), published, level)


def judge(report: Report, claim: Claim) -> Verdict:
    """Decide every comparison of a claim by the comparable runs of the table, and by the published
    numbers.

    A claim that is shown needs all its comparisons, so each has an interval of its own. One is enough
    to contradict it, so the intervals that may do so hold for all of them together.
    """
    table, lines = report.table, report.main()
    ours = {
        (row, key): cell.scaled(table.columns[key].scale)
        for row, line in lines.items()
        for key, cell in line.cells.items()
    }
    theirs = {(row.name, key): table.published.cell(*pair) for row in table.rows for key, pair in row.published.items()}
    published = _outcomes(table, claim, theirs) if report.is_reproduction else ()
    whole = not any(outcome.absent for outcome in published)
    return Verdict(claim, _outcomes(table, claim, ours), published if whole else ())


def _outcomes(table: Table, claim: Claim, cells: Mapping[tuple[str, str], Cell]) -> tuple[Outcome, ...]:
    """``cells``: (row, column) -> number in the units of the column."""
    together = simultaneous(sum(max(len(comparison.than), 1) for comparison in claim.shown_by))
    return tuple(outcome for comparison in claim.shown_by for outcome in _compare(table, comparison, cells, together))


def _compare(
    table: Table, comparison: Comparison, cells: Mapping[tuple[str, str], Cell], together: float
) -> list[Outcome]:
    column, key = table.columns[comparison.column], comparison.column
    subject = comparison.better or comparison.not_worse or comparison.row
    assert subject is not None
    absent = [row for row in (subject, *comparison.than) if (row, key) not in cells]
    if absent:
        return [Outcome("open", column.title, "", absent=tuple(full_title(table, row) for row in absent))]
    cell = cells[subject, key]
    name = full_title(table, subject)
    if comparison.row is not None:
        least = comparison.at_least is not None
        limit = comparison.at_least if least else comparison.at_most
        assert limit is not None
        gap, wide = (Difference(cell.value - limit, half_width(cell, level)) for level in (LEVEL, together))
        text = f"{name} {interval(cell, column.digits)}, claimed {'≥' if least else '≤'} {limit:g}"
        # The limit itself is allowed: numbers without any spread may lie on it.
        exact = gap.half_width == 0.0 and gap.value == 0.0
        decision = "shown" if exact else _decide(gap, wide, 0.0, 1.0 if least else -1.0)
        return [Outcome(decision, column.title, text, single=gap.half_width is None)]
    sign = 1.0 if column.direction == "maximize" else -1.0
    margin = 0.0 if comparison.better else column.margin
    assert margin is not None
    outcomes = []
    for other in comparison.than:
        gap, wide = (difference(cell, cells[other, key], level) for level in (LEVEL, together))
        text = f"{name} − {full_title(table, other)} = {gap.show(column.digits)}"
        text += f", margin {margin:g}" if margin else ""
        outcomes.append(Outcome(_decide(gap, wide, -margin, sign), column.title, text, single=gap.half_width is None))
    return outcomes


def _decide(alone: Difference, together: Difference, limit: float, sign: float) -> Decision:
    """Shown by the interval of one comparison; contradicted by the interval for all of the claim."""
    decision = alone.decide(limit, sign)
    return together.decide(limit, sign) if decision == "contradicted" else decision


def interval(cell: Cell, digits: int = 1) -> str:
    """``1.2 [0.3, 2.1]``."""
    width = half_width(cell)
    value = f"{cell.value:.{digits}f}"
    return value if width is None else f"{value} [{cell.value - width:.{digits}f}, {cell.value + width:.{digits}f}]"


def full_title(table: Table, name: str) -> str:
    """The title of a row, with its group if another row has the same title."""
    row = table.row(name)
    alone = sum(other.title == row.title for other in table.rows) == 1
    return row.title if alone or not row.group else f"{row.title} ({row.group})"


def searched(line: Line) -> dict[str, list[Any]]:
    """Hyper-parameter -> its value in every run of a line, for those that a sweep drew for all of
    them.
    """
    drawn = [run.sweep.get("parameters", {}) for run in line.runs]
    return {key: [d[key] for d in drawn] for key in (drawn[0] if drawn else ()) if all(key in d for d in drawn)}
