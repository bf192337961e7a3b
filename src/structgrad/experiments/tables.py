"""Tables as data (``configs/table/<name>.yaml``): a paper's numbers and claims, and the runs that
repeat them.

No module here knows a model: a row is a list of overrides for ``train.py``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from omegaconf import OmegaConf
from yaml import YAMLError

from structgrad.common.text import nearest
from structgrad.experiments.selection import RULES, Cell
from structgrad.training.contract import NEUTRAL

Direction = Literal["maximize", "minimize"]
Draws = Literal["row", "table"]
Statistic = Literal["value", "best", "selected"]
Spread = Literal["standard_error", "standard_deviation", "unstated"]


#: File beside the results of a sweep without a table, which has one of its own.
OF_SWEEP = "table.yaml"


class TableError(ValueError):
    """A table's file is wrong or missing; the message is one line that says where and what."""


@dataclass(frozen=True)
class Column:
    """A metric in a table.

    Attributes:
        metric: name in the test's log.
        title: title of the column.
        direction: which values are better; None if neither is.
        scale: factor of the metric, e.g. 100 for percentages. Published numbers are scaled already.
        digits: number of digits after the point.
        statistic: ``value`` applies the table's rule to the runs, ``best`` takes the best run in
            this metric, and ``selected`` the run with the best validation metric.
        margin: margin of equivalence: a difference that does not matter, in the units of the
            column. ``not_worse`` needs it, and so does a match with a published number.
    """

    metric: str
    title: str
    direction: Direction | None = None
    scale: float = 1.0
    digits: int = 1
    statistic: Statistic = "value"
    margin: float | None = None


@dataclass(frozen=True)
class Selection:
    """The way from several runs of a row to its numbers.

    Attributes:
        rule: name of a function of :mod:`structgrad.experiments.selection`.
        metric: metric on validation data, by its name in the log. None: the one that selects the
            checkpoint of each run, so that rows may have tasks with different ones.
        direction: which values of it are better; given exactly with the metric.
        trials: number of runs of a row: draws of the hyper-parameters for ``best_trial``, seeds for
            the other rules.
        draws: ``row``: every row has draws of its own. ``table``: in trial i all rows have the same
            value of a hyper-parameter that has the same distribution. Differences between rows are
            then none of luck in the draws, which matters where trials are few.
    """

    rule: str = "mean_and_standard_error"
    metric: str | None = None
    direction: Direction | None = None
    trials: int = 3
    draws: Draws = "row"


@dataclass(frozen=True)
class Published:
    """The meaning of the published ``a ± b``.

    Attributes:
        error: the meaning of the number after the ±.
        seeds: the number of runs; None if the paper does not say.
    """

    error: Spread = "unstated"
    seeds: int | None = None

    def cell(self, value: float, error: float | None) -> Cell:
        """A published number. A standard deviation over an unknown number of runs counts as a
        standard error.
        """
        runs = self.seeds or 1
        standard_error = error if error is None or self.error != "standard_deviation" else error / math.sqrt(runs)
        return Cell(value, standard_error, error, self.seeds - 1 if self.seeds else math.inf)


@dataclass(frozen=True)
class Row:
    """One row: runs that differ in searched hyper-parameters or seeds only.

    Attributes:
        name: key in the file.
        title: the displayed title.
        overrides: overrides for ``train.py``, beside those of the table.
        group: heading above the row.
        published: column -> value and the number after the ±, if any, in the units of the column.
        search: hyper-parameter -> distribution, beside those of the configuration; null removes
            one.
        given: hyper-parameter -> its value, or a distribution over a range: settings that somebody
            has published. They replace all searched ones. A row without a range has one trial, and
            only runs with these settings count.
        unavailable: the reason why the row cannot be run (missing data); empty if it can.
        hours: hours of training and validation of one run at the paper's budget on one CPU core
            (``benchmarks/hours.py`` measures them); None if unknown.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    group: str = ""
    published: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    unavailable: str = ""
    hours: float | None = None

    @property
    def fixed(self) -> dict[str, Any]:
        """The given hyper-parameters with one value."""
        return {key: value for key, value in self.given.items() if not isinstance(value, dict)}

    def trials(self, of_table: int) -> int:
        """The number of its runs in a table that selects among ``of_table``."""
        return 1 if self.given and self.fixed == self.given else of_table

    def admits(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration (dotted key -> value) has the given settings, if there are any."""
        for key, wanted in self.given.items():
            value = config.get(key, NEUTRAL.get(key))  # which is left out of configurations
            if not isinstance(wanted, dict):
                if value != wanted:
                    return False
            elif "values" in wanted:
                if value not in wanted["values"]:
                    return False
            elif not isinstance(value, int | float) or not wanted["low"] <= value <= wanted["high"]:
                return False
        return True


@dataclass(frozen=True)
class Comparison:
    """A statement about rows in one column that runs can decide. It has exactly one of the four
    forms.

    Attributes:
        column: key of the column.
        better: a row that is better ...
        not_worse: or a row that is at least as good, up to the column's margin, ...
        than: ... than each of these rows.
        row: a row whose value is ...
        at_least: ... at least this, in the units of the column,
        at_most: ... or at most this.
    """

    column: str
    better: str | None = None
    not_worse: str | None = None
    than: tuple[str, ...] = ()
    row: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and the comparisons that must all hold for runs to show it."""

    text: str
    shown_by: tuple[Comparison, ...]


@dataclass(frozen=True)
class Table:
    """A published table or figure, or a user's own.

    Attributes:
        name: name of its file.
        title: one line.
        columns: key -> column, left to right.
        rows: top to bottom.
        source: source of the published numbers; empty for a table without any.
        overrides: overrides of every row.
        selection: the way from runs to numbers.
        published: the meaning of the published errors.
        search: hyper-parameter -> distribution of every row, beside those of the configuration.
        budget: the budget for which it is made.
        unavailable: the reason why no row can be run; empty if some can.
        stand_in: the data that replace those of the source, in a few words; empty for those of the
            source.
        claims: claims of the paper.
        notes: facts that a reader of the table needs.
        command: of a sweep without a table, which makes its runs; None: ``sweep.py table=<name>``.
        searchpath: the argument with which the commands find it, ``hydra.searchpath=[...]``; empty for
            ours.
    """

    name: str
    title: str
    columns: dict[str, Column]
    rows: tuple[Row, ...]
    source: str = ""
    overrides: tuple[str, ...] = ()
    selection: Selection = field(default_factory=Selection)
    published: Published = field(default_factory=Published)
    search: dict[str, Any] = field(default_factory=dict)
    budget: str = "paper"
    unavailable: str = ""
    stand_in: str = ""
    claims: tuple[Claim, ...] = ()
    notes: str = ""
    command: str | None = None
    searchpath: str = ""

    def folder(self, budget: str) -> str:
        """Name of the folder of its runs on a budget; on its own budget it is the table's name."""
        return self.name if budget == self.budget else f"{self.name}_{budget}"

    def settings(self, row: Row, budget: str) -> dict[str, Any]:
        """A row's given hyper-parameters with one value. They are for the budget of the table."""
        return row.fixed if budget == self.budget else {}

    def row(self, name: str) -> Row:
        """The row with this name.

        Raises:
            TableError: with the nearest names.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise TableError(f"table {self.name} has no row {name}; nearest: {nearest(name, [r.name for r in self.rows])}")


def names(*folders: Traversable) -> list[str]:
    """Every table in some folders, e.g. in ``configs/table``."""
    found = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return sorted({name.removesuffix(".yaml") for name in found if name.endswith(".yaml")})


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Hyper-parameter -> value, as overrides for ``train.py``."""
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def load(name: str, *folders: Traversable) -> Table:
    """Read and check ``<name>.yaml`` in the first of some folders that has it.

    Raises:
        TableError: one line, for an unknown table; for an unknown or missing key; for a published
            number of an unknown column; or for a comparison between unknown rows.
    """
    file = next((folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None)
    if file is None:
        raise TableError(f"no table {name}; nearest: {nearest(name, names(*folders))}")
    return read(file, name)


def read(file: Traversable, name: str) -> Table:
    """Read and check a file.

    Raises:
        TableError: see :func:`load`.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(file.read_text()))  # refuses repeated keys
    except YAMLError as error:
        raise TableError(f"{file}: {' '.join(str(error).split())}") from error
    try:
        return parse(name, content)
    except TableError as error:
        raise TableError(f"{file}: {error}") from error


def check_metrics(table: Table, known: Iterable[str]) -> list[str]:
    """Check that a test logs the metrics of the columns, before anything is trained.

    Args:
        table: the table with the columns.
        known: metrics of all its tasks, without ``test/``.

    Returns:
        Lines of warning: columns of metrics that are not declared, e.g. of a user's own estimator.

    Raises:
        TableError: for a metric that is almost a known one, so that it is probably misspelt.
    """
    logged, warnings = sorted({f"test/{name}" for name in known}), []
    for key, column in table.columns.items():
        if column.metric not in logged:
            near = difflib.get_close_matches(column.metric, logged, n=1, cutoff=0.75)
            text = f"{table.name}: column {key}: no test is known to log {column.metric}"
            if near or not column.metric.startswith("test/"):
                hint = f"nearest: {nearest(column.metric, logged)}"
                raise TableError(f"{text}; {hint} (a task of your own declares it in `test_metrics`)")
            warnings.append(text)
    return warnings


def parse(name: str, content: Any) -> Table:
    """Check the content of a file.

    Raises:
        TableError: see :func:`load`.
    """
    settings = _keys(Table, content, "the table", given=("name",))
    columns = {str(key): _column(key, value) for key, value in _mapping(settings["columns"], "columns").items()}
    rows = tuple(_row(str(key), value, columns) for key, value in _mapping(settings["rows"], "rows").items())
    if len(rows) > 1 and "all" in [row.name for row in rows]:
        raise TableError("row all: this name stands for all rows in commands; take another")
    settings |= {
        "name": name,
        "overrides": _overrides(settings, "the table"),
        "search": _optional_mapping(settings, "search", "the table"),
        "selection": Selection(**_keys(Selection, settings.get("selection", {}), "selection")),
        "published": Published(**_keys(Published, settings.get("published", {}), "published")),
        "columns": columns,
        "rows": rows,
        "claims": tuple(_claim(value, columns, rows) for value in settings.get("claims", ())),
    }
    if settings["selection"].rule not in RULES:  # otherwise a sweep would silently search nothing
        raise TableError(f"selection: no rule {settings['selection'].rule}; there are {', '.join(RULES)}")
    selection = settings["selection"]
    _choice("selection.direction", selection.direction, (*get_args(Direction), None))
    _choice("selection.draws", selection.draws, get_args(Draws))
    if selection.draws == "table" and selection.rule != "best_trial":
        raise TableError(f"selection: rule {selection.rule} goes over seeds and draws nothing; leave draws out")
    if (selection.metric is None) != (selection.direction is None):
        raise TableError("selection: metric and direction go together")
    _choice("published.error", settings["published"].error, get_args(Spread))
    return Table(**settings)


def _column(key: Any, value: Any) -> Column:
    column = Column(**_keys(Column, value, f"column {key}"))
    _choice(f"column {key}: direction", column.direction, (*get_args(Direction), None))
    _choice(f"column {key}: statistic", column.statistic, get_args(Statistic))
    if column.margin is not None and not (isinstance(column.margin, int | float) and 0 < column.margin < math.inf):
        raise TableError(f"column {key}: margin {column.margin} is no positive number")
    return column


def _row(name: str, value: Any, columns: dict[str, Column]) -> Row:
    settings = _keys(Row, value, f"row {name}", given=("name",))
    published = {}
    where = f"row {name}"
    for key, number in _optional_mapping(settings, "published", where).items():
        _choice(f"{where}: published", key, tuple(columns))
        pair = number if isinstance(number, list) else [number, None]
        if len(pair) != 2 or not _is_number(pair[0]) or not (pair[1] is None or _is_number(pair[1])):
            raise TableError(f"{where}: published: {key} is {number!r}, neither a number nor [number, error]")
        published[str(key)] = (float(pair[0]), None if pair[1] is None else float(pair[1]))
    given = _optional_mapping(settings, "given", where)
    settings["search"] = _optional_mapping(settings, "search", where)
    for key, wanted in given.items():
        if isinstance(wanted, dict) and not ({"low", "high"} <= set(wanted) or "values" in wanted):
            raise TableError(f"row {name}: given: {key} is neither a value nor a distribution with its range")
    if given and settings.get("search"):
        raise TableError(f"row {name}: given settings take the place of a search; put its ranges there")
    return Row(**settings | {"name": name, "overrides": _overrides(settings, where), "published": published})


def _claim(value: Any, columns: dict[str, Column], rows: tuple[Row, ...]) -> Claim:
    settings = _keys(Claim, value, "a claim")
    where = f"claim {settings['text']!r}"
    known = tuple(row.name for row in rows)
    comparisons = []
    for item in settings["shown_by"]:
        keys = _keys(Comparison, item, where)
        than = keys.get("than", ())
        keys["than"] = (than,) if isinstance(than, str) else tuple(than)
        comparison = Comparison(**keys)
        _choice(where, comparison.column, tuple(columns))
        subjects = [r for r in (comparison.better, comparison.not_worse, comparison.row) if r is not None]
        for row in (*subjects, *comparison.than):
            _choice(where, row, known)
        limits = [x for x in (comparison.at_least, comparison.at_most) if x is not None]
        if (
            len(subjects) != 1
            or (comparison.row is None) == (not comparison.than)
            or len(limits) != bool(comparison.row)
        ):
            raise TableError(f"{where}: a comparison is `better, than`, `not_worse, than`, or `row, at_least/at_most`")
        if comparison.row is None and columns[comparison.column].direction is None:
            raise TableError(f"{where}: column {comparison.column} has no direction, so no row is better in it")
        if comparison.not_worse is not None and columns[comparison.column].margin is None:
            raise TableError(f"{where}: column {comparison.column} has no margin, below which a row is not worse")
        comparisons.append(comparison)
    if not comparisons:
        raise TableError(f"{where}: shown_by is empty")
    return Claim(settings["text"], tuple(comparisons))


def _overrides(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = settings.get("overrides", [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TableError(f"{where}: overrides are a list such as [task=listops, task.hidden=50]; got {value!r}")
    return tuple(value)


def _optional_mapping(settings: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = settings.get(key, {})
    if not isinstance(value, dict):
        raise TableError(f"{where}: {key} takes keys with values, not {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise TableError(f"{where}: expected keys with values, got {value!r}")
    return value


def _keys(cls: type, value: Any, where: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping ``value``, if it has the fields of a dataclass: all without a default, and no
    others.
    """
    if not isinstance(value, dict):
        raise TableError(f"{where}: expected keys with values, got {value!r}")
    known = {f.name: f for f in fields(cls) if f.name not in given}
    for key in value:
        if key not in known:
            raise TableError(f"{where} has no key {key}; nearest: {nearest(str(key), list(known))}")
    needed = [k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [key for key in needed if key not in value]
    if missing:
        raise TableError(f"{where} lacks {', '.join(missing)}")
    return dict(value)


def _choice(where: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise TableError(f"{where}: {value} is none of {', '.join(map(str, choices))}")
