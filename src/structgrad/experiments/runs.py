"""Finished runs, as their summaries, and the rows of a table to which they belong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from structgrad.common import renamed
from structgrad.common.metrics import metric_rows
from structgrad.experiments.tables import Row, Table
from structgrad.training.contract import NEUTRAL

#: The summary's name for each group from which a row chooses.
_GROUPS = ("task", "structure", "estimator", "budget")


@dataclass(frozen=True)
class Summary:
    """One finished run.

    Attributes:
        task, structure, estimator, budget: the choices in the groups of that name.
        seed: seed of all random numbers.
        metrics: name -> value, as logged by the test, and the validation metric that selected the
            checkpoint.
        content: the whole summary file. For a sweep's run it has the key ``sweep``, see
            :func:`structgrad.experiments.queue.record`.
    """

    task: str
    structure: str
    estimator: str
    budget: str
    seed: int
    metrics: dict[str, float]
    content: dict[str, Any]

    @property
    def sweep(self) -> dict[str, Any]:
        """Table, row, trial, parameters and overrides, if a sweep made the run; otherwise empty."""
        made: dict[str, Any] = self.content.get("sweep", {})
        return made

    @property
    def commit(self) -> str:
        """Ten digits of the commit, and whether files differed from it: ``2a5cdb7610+changes``."""
        digits, plus, changes = (self.content.get("commit") or "unknown").partition("+")
        return f"{digits[:10]}{plus}{changes}"

    @property
    def monitor(self) -> str:
        """The validation metric that selected the checkpoint. A summary has no other."""
        return next((name for name in self.metrics if name.startswith("val/")), "")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, dotted key -> value."""
        return flat(self.content.get("config", {}))

    @property
    def folder(self) -> Path:
        """The folder of the run, within ``paths.runs`` of the machine that made it. Summaries name
        no absolute path.
        """
        return folder_of(self.content | {"task": self.task})


def as_text(value: Any) -> str:
    """A value of a configuration as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else _as_text(type(value).__name__, value)


@lru_cache(maxsize=100_000)
def _as_text(kind: str, value: Any) -> str:  # 1, 1.0 and True are equal, and are not the same
    return json.dumps(value)


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def folder_of(summary: Mapping[str, Any]) -> Path:
    """The folder of the run of a summary, within ``paths.runs``."""
    task = str(summary["task"])
    return Path(task) / str(summary.get("name", "")).removeprefix(f"{task}-")


def load(folder: Path) -> list[Summary]:
    """All summaries in a folder of ``results/``, or below a folder of runs, or the one of a single
    run.

    For a folder of such folders of results, the summaries of all of them.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: with the file, if it is not a summary.
    """
    own = folder / "summary.json"  # that of a single run, beside other files
    files = [own] if own.exists() else sorted(folder.glob("*.json")) or sorted(folder.glob("**/summary.json"))
    files = files or [file for file in sorted(folder.glob("*/*.json")) if '"metrics"' in file.read_text()]
    if not files:
        raise FileNotFoundError(f"no finished run in {folder}; type a folder that train.py or sweep.py has filled")
    return _with_rungs(folder, [read(file) for file in files])


def _with_rungs(folder: Path, summaries: list[Summary]) -> list[Summary]:
    """Add, as ``halving``, the file that a sweep by successive halving leaves beside the summaries."""
    rows: dict[str, Any] = {}
    for file in folder.glob("halving/*.json"):
        try:
            content = json.loads(file.read_text())
            rows[content["row"]] = {key: content[key] for key in ("reduction", "rungs", "trials")}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not say who got to which rung: {error!r}; delete it") from error
    for summary in summaries:
        if summary.sweep.get("row") in rows:
            summary.content["sweep"]["halving"] = rows[summary.sweep["row"]]
    return summaries


def of_sweeps(root: Path, name: str) -> list[Summary]:
    """The finished runs of the sweeps called ``name``, below a folder of results; empty if there
    are none.

    They are those of the table as it is, and those with the user's own overrides. The folder of the
    latter has a suffix.
    """
    folders = [root / name, *sorted(root.glob(f"{name}-*"))]
    return [summary for folder in folders if any(folder.glob("*.json")) for summary in load(folder)]


#: Strings that occur only in summaries from before a renaming.
_OLD = re.compile("|".join(rf': "{re.escape(name)}"' for name in (*renamed.CLASSES, *chain(*renamed.CHOICES.values()))))


def read(file: Path) -> Summary:
    """One summary.

    Raises:
        ValueError: with the file, if it is not a summary.
    """
    try:
        text = file.read_text()
        content = json.loads(text)
        summary = of_content(_with_new_names(content) if _OLD.search(text) else content)
        if not all(isinstance(value, int | float) for value in summary.metrics.values()):
            raise TypeError("a metric is no number")
        if not isinstance(summary.seed, int):
            raise TypeError("the seed is no whole number")
        for key in ("config", "sweep"):
            if not isinstance(content.get(key, {}), dict):
                raise TypeError(f"{key} is no mapping")
        return summary
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the summary of a run: {error!r}; delete it") from error


def _with_new_names(content: dict[str, Any]) -> dict[str, Any]:
    """A summary in which choices and classes have today's names."""
    groups = {key: names.get(content[key], content[key]) for key, names in renamed.CHOICES.items() if key in content}
    return content | groups | {"config": renamed.with_new_names(content.get("config", {}))}


def of_content(content: dict[str, Any]) -> Summary:
    """From the content that a run writes into its summary."""
    return Summary(**{key: content[key] for key in (*_GROUPS, "seed", "metrics")}, content=content)


def by_row(table: Table, summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Row -> its runs, in the order of trials or seeds. Rows without runs have an empty list.

    A sweep's run names its row. Another run belongs to the row whose overrides all hold in its
    configuration. If several do, it belongs to the one with the most overrides. A row with given
    settings takes only runs with them. A summary that occurs twice counts once, e.g. if a sweep has
    found a finished run.
    """
    rows: dict[str, list[Summary]] = {row.name: [] for row in table.rows}
    for summary in summaries:
        name = summary.sweep["row"] if summary.sweep.get("table") == table.name else _row_of(table, summary)
        if name in rows:
            rows[name].append(summary)
    return {name: _once(sorted(runs, key=_order)) for name, runs in rows.items()}


def _once(runs: list[Summary]) -> list[Summary]:
    """The runs without copies. Of copies, the one that a sweep recorded is kept."""
    kept: dict[str, Summary] = {}
    for position, run in reversed(list(enumerate(runs))):  # sweeps' runs first
        content = {**run.content, "sweep": run.sweep.get("extra", [])}
        key = json.dumps(content, sort_keys=True) if "name" in content else str(position)
        kept.setdefault(key, run)
    return list(kept.values())[::-1]


def _order(run: Summary) -> tuple[int, int]:
    return run.sweep.get("trial", -1), run.seed


def _row_of(table: Table, summary: Summary) -> str | None:
    matching = [row for row in table.rows if _holds(table, row, summary)]
    return max(matching, key=lambda row: len(row.overrides)).name if matching else None


def _holds(table: Table, row: Row, summary: Summary) -> bool:
    keys = {o.lstrip("+").split("=")[0] for o in (*table.overrides, *row.overrides)}
    if "estimator" not in keys and "experiment" not in keys and summary.estimator != "none":
        return False
    if "experiment" not in keys and summary.content.get("experiment") is not None:  # it may set anything
        return False
    for override in (*table.overrides, *row.overrides):
        key, _, value = override.lstrip("+").partition("=")
        if key in _GROUPS or key in summary.content:  # a choice in a group, whichever groups summaries name
            if summary.content.get(key) != value:
                return False
        elif not _same(summary.content.get("config", {}), key, value):
            return False
    return summary.budget != table.budget or row.admits(summary.settings)


def _same(config: Mapping[str, Any], key: str, value: str) -> bool:
    found: Any = config
    for part in key.split("."):
        found = found.get(part, _ABSENT) if isinstance(found, Mapping) else _ABSENT
    if found is _ABSENT:
        found = NEUTRAL.get(key)  # which is left out of configurations
    return bool(found == _parsed(value))


_ABSENT = object()


@lru_cache(maxsize=10_000)
def _parsed(value: str) -> Any:
    """The value as on a command line. A value that no command line can have equals nothing."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"]))["x"]  # type: ignore[index, call-overload]
    except (OmegaConfBaseException, YAMLError):
        return object()


def precisions(runs: Sequence[Summary]) -> list[str]:
    """The precisions of the runs: ``32-true``, with that of matrix products if it is lower."""
    found = []
    for run in runs:
        products = run.content.get("products")
        name = str(run.settings.get("trainer.precision", ""))
        found.append(name + (f", products in {products}" if products else ""))
    return sorted(set(filter(None, found)))


def curve(folder: Path, metric: str, points: int = 200) -> list[tuple[int, float]]:
    """A metric over the steps of a run, from its ``metrics.csv``.

    There are at most ``points`` of them, evenly spaced, and the last one is included.
    """
    values = [(step, value) for step, name, value in metric_rows(folder / "metrics.csv") if name == metric]
    return thinned(values, points)


def thinned(values: Sequence[tuple[int, float]], points: int) -> list[tuple[int, float]]:
    """At most ``points`` of the values, evenly spaced, with the last one included."""
    stride = max(1, -(-len(values) // points))
    return list(values[::-1][::stride][::-1])
