"""From a table and a command line to a plan: rows, trials and search spaces, all checked at once."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from structgrad.experiments.halving import rungs
from structgrad.experiments.queue import Plan, PlannedRow, SweepError, check_sampler, make_sampler
from structgrad.experiments.space import Space, SpaceError, merged
from structgrad.experiments.tables import Direction, Row, Table, TableError, as_overrides, check_metrics
from structgrad.training.contract import BUDGETS, HARDWARE
from structgrad.training.errors import explain

LAUNCHERS = ("local", "slurm", "submitit")
#: Overrides with these prefixes say where and on what a run computes, and not what it computes.
_WHEREABOUTS = ("paths.", "logger", "hydra.", "trainer=", *(f"trainer.{key}=" for key in HARDWARE))


def make_plan(table: Table, options: Mapping[str, str], given: Sequence[str], configs: Path) -> Plan:
    """Check the options, compose every row, and make the plan; nothing is written to disk.

    Args:
        table: the table whose rows are made.
        options: all options of the command.
        given: overrides for every run (and ``slurm.*``, which the launcher reads).
        configs: folder of the configurations.

    Raises:
        SweepError, TableError, SpaceError: in one line.
    """
    budget = _one_of("budget", options["budget"] or table.budget, BUDGETS)
    _one_of("launcher", options["launcher"], LAUNCHERS)
    _one_of("retry", options["retry"], ("false", "true"))
    sampler = type(make_sampler(options["sampler"])).__name__
    heartbeat, grace = whole_number("heartbeat", options["heartbeat"], 1), whole_number("grace", options["grace"], 1)
    if grace < 2 * heartbeat:
        raise SweepError(f"grace={grace} must be at least twice heartbeat={heartbeat}; type grace={2 * heartbeat}")
    common = [argument for argument in given if not argument.startswith("slurm.")]
    _check_given(common)
    extra = tuple(sorted(argument for argument in common if decides(argument)))
    if sampler != "RandomSampler":  # its trials are no independent draws, which selection by bootstrap takes them for
        if table.selection.rule != "best_trial":
            raise SweepError(f"sampler: {table.name} searches nothing and goes over seeds; leave sampler= out")
        if table.selection.draws == "table":
            raise SweepError(f"sampler: the rows of {table.name} share random draws; leave sampler= out")
        extra += (f"sampler={sampler}",)
    reduction = whole_number("halving", options["halving"], 2) if options.get("halving") else 0
    if reduction:
        if table.selection.rule != "best_trial":
            raise SweepError(f"halving: {table.name} searches nothing and goes over seeds; leave halving= out")
        extra += (f"halving={reduction}",)
    suffix = f"-{hashlib.sha256(' '.join(extra).encode()).hexdigest()[:6]}" if extra else ""
    name = table.folder(budget) + suffix
    folder = Path(options["folder"]) / name
    trials = _trials(table, options)
    rows = _rows(table, options["rows"], budget)
    with hydra.initialize_config_dir(str(configs), version_base="1.3"):
        planned, tasks = zip(*(_planned(table, row, trials, budget, common, reduction) for row in rows), strict=True)
    monitors = _monitors(table, planned, tasks)
    if len(set(monitors)) > 1:
        planned = tuple(replace(row, monitor=found) for row, found in zip(planned, monitors, strict=True))
    metric, direction = monitors[0]
    if sampler != "RandomSampler":
        if not any(row.space for row in planned):
            raise SweepError(f"sampler={options['sampler']}: nothing is searched on this budget; leave sampler= out")
        check_sampler(options["sampler"], [row for row in planned if row.space])
    if reduction and not any(row.rungs for row in planned):
        least = f"at least {reduction} trials, a search space, and a validation before the end"
        raise SweepError(f"halving={reduction}: no row has {least}; type trials={reduction**2}, or leave halving= out")
    return Plan(
        name=name,
        table=table.name,
        rows=planned,
        metric=metric,
        direction=direction,
        folder=str(folder),
        results=str(Path(options["results"]) / name),
        storage=options["storage"] or f"sqlite:///{folder}/queue.db",
        command=(sys.executable, "-m", "structgrad.commands.train"),
        common=(f"budget={budget}", *common),
        extra=extra,
        sampler=sampler,
        heartbeat=heartbeat,
        grace=grace,
        reduction=reduction,
        shared_draws=table.selection.draws == "table",
    )


def decides(argument: str) -> bool:
    """Whether an override decides what a run computes, and not only where and on what, or on which jobs."""
    return not argument.startswith((*_WHEREABOUTS, "slurm."))


def task_class(name: str) -> Any:
    """The class of a task, by the ``_target_`` of its configuration."""
    from hydra.utils import get_class  # slow, so errors that need no class come before

    return get_class(name)


def _check_given(common: Sequence[str]) -> None:
    """Refuse overrides that would be ignored: those that a sweep sets for every trial, and repeated
    ones.
    """
    keys = [argument.partition("=")[0].lstrip("+") for argument in common]
    for key, instead in (("seed", "seeds=0,1,2 or trials=20"), ("paths.results", "results=<folder>")):
        if key in keys:
            raise SweepError(f"{key}=...: a sweep sets it for every run; type {instead}")
    for key in ("trainer.pause_at", "paths.progress"):
        if key in keys:
            raise SweepError(f"{key}=...: a sweep sets it for every run; leave it out, or type halving=3")
    for key in keys:
        if keys.count(key) > 1:
            raise SweepError(f"{key}=...: it is given twice; type it once")


def _one_of(key: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise SweepError(f"{key}={value}: no such choice; type {' or '.join(f'{key}={c}' for c in choices)}")
    return value


def whole_number(key: str, value: str, least: int) -> int:
    """The value of an option that must be a whole number.

    Raises:
        SweepError: if it is not a whole number, or less than ``least``.
    """
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise SweepError(f"{key}={value} must be a whole number, at least {least}; type e.g. {key}={max(least, 3)}")
    return number


def _trials(table: Table, options: Mapping[str, str]) -> tuple[int, ...]:
    searches = table.selection.rule == "best_trial"
    if options["seeds"] and searches:
        raise SweepError(f"seeds: {table.name} selects among trials, each with a seed of its own; type trials=20")
    if options["trials"] and not searches:
        raise SweepError(f"trials: {table.name} searches nothing and goes over seeds; type seeds=0,1,2")
    if options["seeds"]:
        seeds = tuple(whole_number("seeds", seed, 0) for seed in options["seeds"].split(","))
        if len(set(seeds)) != len(seeds):
            raise SweepError(f"seeds={options['seeds']}: one is given twice; type seeds=0,1,2")
        return seeds
    return tuple(range(whole_number("trials", options["trials"] or str(table.selection.trials), 1)))


def _rows(table: Table, asked: str, budget: str) -> list[Row]:
    if asked == "all":
        return list(table.rows)
    if asked:
        return [table.row(name) for name in dict.fromkeys(asked.split(","))]
    closed = [row for row in table.rows if budget == "paper" and (row.unavailable or table.unavailable)]
    rows = [row for row in table.rows if row not in closed]
    if not rows:
        raise SweepError(
            f"{table.name}: {table.unavailable or closed[0].unavailable}; rows=all runs them where the data are there"
        )
    for row in closed:
        print(f"left out: {row.name} ({row.unavailable or table.unavailable})")
    return rows


def _planned(
    table: Table, row: Row, trials: tuple[int, ...], budget: str, user: Sequence[str], reduction: int
) -> tuple[PlannedRow, str]:
    """The planned row, together with the class of its task."""
    common = (f"budget={budget}", *user)
    fixed = {override.lstrip("+").split("=")[0] for override in common}
    settings = {key: value for key, value in table.settings(row, budget).items() if key not in fixed}
    overrides = (*table.overrides, *row.overrides, *as_overrides(settings))
    config = _compose(table, row, [*overrides, *common])
    space: Space = {}
    given: dict[str, Any] = {}
    if table.selection.rule == "best_trial":
        own = OmegaConf.to_container(config.search)
        assert isinstance(own, dict)
        space = merged({str(key): value for key, value in own.items()}, table.search, row.search)
        if row.given and budget == table.budget:
            space = merged({key: value for key, value in row.given.items() if key not in row.fixed})
            trials = trials if space else trials[:1]
        space = {key: value for key, value in space.items() if key not in fixed}
        for key in [*space, *(k for value in space.values() for k in value.get("when", {}))]:
            if OmegaConf.select(config, key, default=_ABSENT) is _ABSENT:
                raise SpaceError(f"{table.name}, {row.name}: search.{key} is no key of the configuration")
        given = {k: OmegaConf.select(config, k) for v in space.values() for k in v.get("when", {}) if k not in space}
    steps: tuple[int, ...] = ()
    if reduction and space:
        steps = rungs(config.trainer.max_steps, config.trainer.val_every_n_steps, len(trials), reduction)
    return PlannedRow(row.name, overrides, trials, space, given, rungs=steps), str(config.task._target_)


def _monitors(table: Table, rows: Sequence[PlannedRow], tasks: Sequence[str]) -> list[tuple[str, Direction]]:
    """The metric by which the trials of every row are selected: the one that selects the
    checkpoints of its task.

    The columns are also compared with the metrics that the tasks log, before anything is trained.

    Raises:
        TableError: one line.
    """
    monitors: list[tuple[str, Direction]] = []
    known: set[str] = set()
    declared = True
    for row, name in zip(rows, tasks, strict=True):
        task = task_class(name)
        wanted = (table.selection.metric, table.selection.direction)
        monitors.append((task.monitor, "maximize" if task.mode == "max" else "minimize"))
        if wanted not in ((None, None), monitors[-1]):
            raise TableError(
                f"{table.name}, {row.name}: selection: {wanted[0]} ({wanted[1]}) is not what selects the checkpoint of "
                f"this task; it is {' ('.join(monitors[-1])}), and no run has another validation metric"
            )
        declared &= bool(task.logged_by_test())
        known |= task.logged_by_test()
    every = {override for row in table.rows for override in (*table.overrides, *row.overrides)}
    existing = {override for override in every if override.startswith("task=")}
    planned = {override for row in rows for override in row.overrides if override.startswith("task=")}
    if declared and existing <= planned:  # otherwise a column may belong to a task that is not in the plan
        for warning in check_metrics(table, known):
            print(f"warning: {warning}", file=sys.stderr)
    return monitors


_ABSENT = object()


def _compose(table: Table, row: Row, overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise SweepError(f"{table.name}, {row.name}: {explain(error, overrides)}") from error
