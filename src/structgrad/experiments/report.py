"""A table filled with finished runs: cells, differences from the published numbers, claims. How it looks is up to
``markdown`` and ``html``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from structgrad.experiments import selection
from structgrad.experiments.runs import Summary, by_row
from structgrad.experiments.selection import Cell
from structgrad.experiments.tables import Claim, Column, Comparison, Row, Table
from structgrad.training.contract import HARDWARE

#: How many combined standard errors make a difference.
MARGIN = 2.0
_HARDWARE = {f"trainer.{key}" for key in HARDWARE}


@dataclass(frozen=True)
class Condition:
    """Under what a run was made: runs of a row are comparable where all of it is equal, those of different rows where
    all but the settings is.

    Attributes:
        budget: choice in that group.
        device: ``cpu`` or the GPU's name.
        extra: overrides that the user gave to the sweep.
        data: the settings of the data set, but for those in which the rows of the table differ.
        settings: the whole configuration, but for what differs between trials.
    """

    budget: str
    device: str
    extra: tuple[str, ...]
    data: frozenset[tuple[str, str]]
    settings: frozenset[tuple[str, str]]

    @property
    def shared(self) -> tuple[Any, ...]:
        """What rows have in common."""
        return self.budget, self.device, self.extra, self.data


@dataclass(frozen=True)
class Line:
    """Comparable runs of a row.

    Attributes:
        row: which.
        runs: by trial or seed; none if the row has not been run.
        cells: column -> number; a column is missing where the runs do not have its metric.
        marks: in what the runs differ from those of the table, e.g. ``budget quick``; empty for comparable ones.
        chosen: index in ``runs`` of the one with the best validation metric; None without runs.
    """

    row: Row
    runs: tuple[Summary, ...]
    cells: dict[str, Cell]
    marks: tuple[str, ...] = ()
    chosen: int | None = None

    @property
    def training_s(self) -> float:
        """Of all its runs."""
        return sum(float(run.content.get("training_s", 0.0)) for run in self.runs)


@dataclass(frozen=True)
class Outcome:
    """What runs say to a comparison.

    Attributes:
        holds: None where a row is missing.
        column: its title.
        text: the numbers.
        reverse: whether they show the opposite.
        absent: titles of the rows that are missing.
    """

    holds: bool | None
    column: str
    text: str
    reverse: bool = False
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What runs say to a claim."""

    claim: Claim
    outcomes: tuple[Outcome, ...]

    @property
    def word(self) -> str:
        """In three words."""
        if any(o.holds is False for o in self.outcomes):
            return (
                "the reverse is shown by these runs"
                if all(o.reverse for o in self.outcomes)
                else "not shown by these runs"
            )
        return "not checked" if any(o.holds is None for o in self.outcomes) else "shown by these runs"


@dataclass(frozen=True)
class Report:
    """A table, filled.

    Attributes:
        table: which.
        budget, device, extra: of the runs without marks; empty if there are no runs.
        lines: one a row; several for rows with runs that must not be mixed.
        verdicts: one a claim.
    """

    table: Table
    budget: str
    device: str
    extra: tuple[str, ...]
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...] = field(default_factory=tuple)

    @property
    def runs(self) -> list[Summary]:
        """All of them."""
        return [run for line in self.lines for run in line.runs]

    @property
    def is_reproduction(self) -> bool:
        """Whether the runs have the budget of the paper, so that published numbers may be compared."""
        return self.budget == "paper"

    def main(self) -> dict[str, Line]:
        """Row -> the line of comparable runs; without rows that have none."""
        return {line.row.name: line for line in self.lines if line.runs and not line.marks}

    def command(self, row: Row) -> str:
        """That makes a row's runs."""
        parts = [f"table={self.table.name}", f"rows={row.name}", f"budget={self.budget}", *self.extra]
        return " ".join(["python sweep.py", *parts])


def build(table: Table, summaries: Iterable[Summary], budget: str | None = None) -> Report:
    """Fill a table.

    Args:
        table: which.
        summaries: finished runs; those of other tables are left out.
        budget: the runs that are the table's; None: the budget of most of them.

    Raises:
        ValueError: in one line, if a run has no validation metric to select by, or is there twice with different
            results.
    """
    rows = by_row(table, summaries)
    groups = _grouped(table, rows)
    counts: Counter[tuple[Any, ...]] = Counter()
    for group in groups.values():
        for condition, runs in group.items():
            if budget in (None, condition.budget):
                counts[condition.shared] += len(runs)
    main = counts.most_common(1)[0][0] if counts else (budget or table.budget, "", (), frozenset())
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
    most, device, extra, _ = main
    report = Report(table, most, device, extra, tuple(lines))
    return replace(report, verdicts=tuple(judge(report, claim) for claim in table.claims))


def _grouped(table: Table, rows: Mapping[str, list[Summary]]) -> dict[str, dict[Condition, list[Summary]]]:
    """Row -> condition -> runs."""
    settings = {name: [_flat(run.content.get("config", {})) for run in runs] for name, runs in rows.items()}
    following = _following([s for found in settings.values() for s in found], {"seed"})
    of_rows = {override.lstrip("+").split("=")[0] for row in table.rows for override in row.overrides}
    searches = table.selection.rule == "best_trial"
    groups: dict[str, dict[Condition, list[Summary]]] = {}
    for name, runs in rows.items():
        drawn = {key for run in runs for key in run.sweep.get("parameters", {})}
        varied = _following(settings[name], {"seed", *drawn})
        # Which settings a search by hand has varied nobody knows.
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
            )
            groups[name].setdefault(condition, []).append(run)
    return groups


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Dotted key -> value as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = json.dumps(value)
    return flat


def _following(settings: Sequence[Mapping[str, str]], varied: set[str]) -> set[str]:
    """The keys that vary between runs, and those that always have the value of one of them."""
    keys = {key for found in settings for key in found}
    return varied | {
        key for key in keys if any(all(found.get(key) == found.get(v) for found in settings) for v in varied)
    }


def _changes(settings: frozenset[tuple[str, str]], others: frozenset[tuple[str, str]]) -> str:
    """What differs, as on a command line; the first few."""
    here = dict(settings)
    changed = sorted({key for key, _ in settings ^ others})
    texts = [f"{key}={here[key]}" if key in here else f"no {key}" for key in changed]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _check_once(table: Table, row: Row, runs: Sequence[Summary]) -> None:
    """A run that is there twice would count twice. Seeds may repeat where hyper-parameters are searched."""
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
    marks = [] if condition.budget == main[0] else [f"budget {condition.budget}"]
    marks += [] if condition.device == main[1] else [f"device {condition.device}"]
    marks += [] if condition.extra == main[2] else [f"with {' '.join(condition.extra) or 'no other settings'}"]
    # Budgets and settings of the user's own bring data with them.
    if (condition.budget, condition.extra) == (main[0], main[2]) and condition.data != main[3]:
        marks.append(f"other data: {_changes(condition.data, main[3])}")
    return marks


def _line(table: Table, row: Row, runs: list[Summary], marks: tuple[str, ...]) -> Line:
    sign = 1.0 if table.selection.direction == "maximize" else -1.0
    metric = table.selection.metric
    without = [run.content.get("name", "a run") for run in runs if math.isnan(run.metrics.get(metric, math.nan))]
    if without:
        raise ValueError(f"{table.name}, {row.name}: {without[0]} has no {metric} to select by")
    validation = [sign * run.metrics[metric] for run in runs]
    cells = {}
    for key, column in table.columns.items():
        if all(column.metric in run.metrics for run in runs):
            cells[key] = _cell(table, column, validation, [run.metrics[column.metric] for run in runs])
    return Line(row, tuple(runs), cells, marks, int(selection.ranking(validation)[0]))


def _cell(table: Table, column: Column, validation: list[float], test: list[float]) -> Cell:
    if column.statistic == "selected":
        return selection.best_trial(validation, test)
    if column.statistic == "best":
        if any(map(math.isnan, test)):  # none of them is the best
            return Cell(math.nan, None, None)
        sign = -1.0 if column.direction == "minimize" else 1.0
        return selection.best_trial([sign * value for value in test], test)
    return selection.RULES[table.selection.rule](validation, test)


def against_published(report: Report, line: Line, key: str) -> tuple[float, float | None, float | None] | None:
    """Ours minus published in the units of the column, its standard error and their ratio; None where nothing is
    published or measured.
    """
    if key not in line.row.published or key not in line.cells:
        return None
    scale = report.table.columns[key].scale
    value, error = line.row.published[key]
    cell = _scaled(line.cells[key], scale)
    return selection.difference(cell, value, report.table.published.standard_error(error))


def _scaled(cell: Cell, scale: float) -> Cell:
    errors = [None if e is None else e * scale for e in (cell.standard_error, cell.shown)]
    return Cell(cell.value * scale, *errors)


def judge(report: Report, claim: Claim) -> Verdict:
    """Decide every comparison of a claim by the comparable runs of the table."""
    lines = report.main()
    return Verdict(claim, tuple(o for comparison in claim.shown_by for o in _outcomes(report.table, comparison, lines)))


def _outcomes(table: Table, comparison: Comparison, lines: Mapping[str, Line]) -> list[Outcome]:
    column = table.columns[comparison.column]
    subject = comparison.better or comparison.not_worse or comparison.row
    assert subject is not None
    names = {row.name: _full_title(row) for row in table.rows}
    absent = [r for r in (subject, *comparison.than) if r not in lines or comparison.column not in lines[r].cells]
    if absent:
        return [Outcome(None, column.title, "", absent=tuple(names[row] for row in absent))]
    cell = _scaled(lines[subject].cells[comparison.column], column.scale)
    if comparison.row is not None:
        limit, sign, symbol = (
            (comparison.at_least, 1.0, "≥") if comparison.at_least is not None else (comparison.at_most, -1.0, "≤")
        )
        assert limit is not None
        holds = sign * (cell.value - limit) >= 0
        text = f"{names[subject]} {cell.show(digits=column.digits)}, claimed {symbol} {limit:g}"
        return [Outcome(holds, column.title, text, reverse=sign * (cell.value - limit) < 0)]
    sign = 1.0 if column.direction == "maximize" else -1.0
    outcomes = []
    for other in comparison.than:
        theirs = _scaled(lines[other].cells[comparison.column], column.scale)
        gap, error, ratio = selection.difference(cell, theirs.value, theirs.standard_error)
        shown = f"{gap:+.{column.digits}f}" + ("" if error is None else f" ± {error:.{column.digits}f}")
        text = f"{names[subject]} − {names[other]} = {shown}"
        if error is None:
            outcomes.append(Outcome(False, column.title, f"{text}, without an error, for which more runs are needed"))
            continue
        distance = sign * (ratio if ratio is not None else math.copysign(math.inf, gap) if gap else 0.0)
        if math.isfinite(distance):
            text += f" ({abs(distance):.1f} s.e.{' the other way' if distance < 0 else ''})"
        holds = distance > MARGIN if comparison.better else distance > -MARGIN
        outcomes.append(Outcome(holds, column.title, text, reverse=distance < -MARGIN))
    return outcomes


def _full_title(row: Row) -> str:
    return f"{row.title} ({row.group})" if row.group else row.title


def searched(line: Line) -> dict[str, list[Any]]:
    """Hyper-parameter -> its value in every run of a line; only those that a sweep drew for all of them."""
    drawn = [run.sweep.get("parameters", {}) for run in line.runs]
    return {key: [d[key] for d in drawn] for key in (drawn[0] if drawn else ()) if all(key in d for d in drawn)}
