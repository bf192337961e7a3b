"""Make the runs of a table: every row, its trials, on as many workers as there are.

Usage: {command} table=<name> [option=value ...], then overrides for every run

Trial i of a row is always the same run, whatever the number of workers: finished ones are found, killed ones continue
from their checkpoint, and the same command goes on where it was stopped. A run that fails is recorded with its reason,
and the rest goes on.

== Options ==
  table=<name>          {tables}
  rows=a,b              some rows of it; all that can be run by default
  trials=20             draws of the hyper-parameters a row, for tables that select among trials
  seeds=0,1,2           for tables over seeds; trials and seeds are the table's own by default
  budget=paper          paper, quick (minutes a run), smoke (seconds); the table's own by default
  workers=1             processes on this machine; 0 only fills the queue
  workers_per_gpu=1     instead of workers=: so many on each GPU of this machine
  launcher=local        or slurm: workers are jobs, with slurm.<parameter>=<value> for submitit;
                        or submitit: the same without Slurm, on this machine
  storage=<url>         of the queue: SQLite beside the runs by default;
                        postgresql://user:password@host/name for several machines
  sampler=random        or any Optuna sampler by name, e.g. tpe; trials then depend on the ones before them
  results=runs/tables   finished runs leave their summary in <results>/<table>_<budget>
  folder=runs/sweeps    the queue and the output of the runs
  retry=false           true: try failed trials again
  heartbeat=30          seconds between signs of life of a worker
  grace=120             after so many without one its trial is given to another

== Examples ==
  {command} table=paulus_2 trials=20 workers=2 budget=quick     everything of a table on two processes
  {command} table=paulus_2 rows=lstm,arborescence trainer=cpu   some rows
  {command} table=struminsky_3 seeds=0,1,2 logger=wandb         with dashboards, see docs/comparing_runs.md
  {command} table=paulus_1 storage=postgresql://u:p@host/name   on every machine: they share it, see docs/sweeps.md

Exit codes: 0 all trials are finished or have failed, 1 an error or all trials failed, 75 stopped by SIGTERM or Ctrl-C:
the same command continues.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from structgrad.commands import CONFIGS
from structgrad.experiments import tables
from structgrad.experiments.queue import Plan, PlannedRow, Queue, SweepError, make_sampler
from structgrad.experiments.screen import Screen
from structgrad.experiments.space import Space, SpaceError, merged
from structgrad.experiments.tables import Row, Table, TableError
from structgrad.experiments.worker import AGAIN, Worker, die_with_parent
from structgrad.irrelevant import HARDWARE
from structgrad.training.errors import explain

OPTIONS: dict[str, str] = {
    "table": "",
    "rows": "",
    "trials": "",
    "seeds": "",
    "budget": "",
    "workers": "",
    "workers_per_gpu": "",
    "launcher": "local",
    "storage": "",
    "sampler": "random",
    "results": "runs/tables",
    "folder": "runs/sweeps",
    "retry": "false",
    "heartbeat": "30",
    "grace": "120",
}
BUDGETS = ("paper", "quick", "smoke")
LAUNCHERS = ("local", "slurm", "submitit")
#: Overrides that say where and on what, not what is computed, begin so.
_WHEREABOUTS = ("paths.", "logger", "hydra.", "trainer=", *(f"trainer.{key}=" for key in HARDWARE))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_help())
        return 0 if arguments else 2
    try:
        options, given = _split(arguments)
        table = tables.load(options["table"], CONFIGS / "table")
        plan = make_plan(table, options, given)
        return _run(table, plan, options, given)
    except (SweepError, SpaceError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _help() -> str:
    command = "python sweep.py" if Path(sys.argv[0]).name == "sweep.py" else "structgrad-sweep"
    names = ", ".join(tables.names(CONFIGS / "table"))
    assert __doc__ is not None
    return __doc__.replace("{command}", command).replace("{tables}", _wrapped(names, 24, 110))


def _wrapped(text: str, indent: int, width: int) -> str:
    return ("\n" + " " * indent).join(textwrap.wrap(text, width - indent))


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options of the command, and the overrides for runs (with those of submitit)."""
    options, given = dict(OPTIONS), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise SweepError(f"{argument}: expected key=value; --help lists the options")
        if key in OPTIONS:
            options[key] = value
        elif "." not in key and (near := difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.8)):
            raise SweepError(f"{argument}: did you mean {near[0]}={value}?")
        else:
            given.append(argument)
    if not options["table"]:
        raise SweepError(f"table=... is missing; there are {', '.join(tables.names(CONFIGS / 'table'))}")
    return options, given


def make_plan(table: Table, options: dict[str, str], given: Sequence[str]) -> Plan:
    """Check the options, compose every row, and write down what is to be done; nothing is written to disk.

    Raises:
        SweepError, TableError, SpaceError: in one line.
    """
    budget = _one_of("budget", options["budget"] or table.budget, BUDGETS)
    _one_of("launcher", options["launcher"], LAUNCHERS)
    _one_of("retry", options["retry"], ("false", "true"))
    sampler = type(make_sampler(options["sampler"])).__name__
    heartbeat, grace = _number("heartbeat", options["heartbeat"], 1), _number("grace", options["grace"], 1)
    if grace < 2 * heartbeat:
        raise SweepError(f"grace={grace} must be at least twice heartbeat={heartbeat}: one late sign is no death")
    common = [argument for argument in given if not argument.startswith("slurm.")]
    _check_given(common)
    extra = tuple(sorted(argument for argument in common if not argument.startswith(_WHEREABOUTS)))
    if sampler != "RandomSampler":  # its trials are no independent draws, which selection by bootstrap takes them for
        if table.selection.rule != "best_trial":
            raise SweepError(f"sampler: {table.name} searches nothing and goes over seeds")
        extra += (f"sampler={sampler}",)
    suffix = f"-{hashlib.sha256(' '.join(extra).encode()).hexdigest()[:6]}" if extra else ""
    name = table.folder(budget) + suffix
    folder = Path(options["folder"]) / name
    trials = _trials(table, options)
    rows = _rows(table, options["rows"], budget)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        planned = tuple(_planned(table, row, trials, (f"budget={budget}", *common)) for row in rows)
    return Plan(
        name=name,
        table=table.name,
        rows=planned,
        metric=table.selection.metric,
        direction=table.selection.direction,
        folder=str(folder),
        results=str(Path(options["results"]) / name),
        storage=options["storage"] or f"sqlite:///{folder}/queue.db",
        command=(sys.executable, "-m", "structgrad.commands.train"),
        common=(f"budget={budget}", *common),
        extra=extra,
        sampler=sampler,
        heartbeat=heartbeat,
        grace=grace,
    )


def _check_given(common: Sequence[str]) -> None:
    """Refuse what would be ignored: every trial has a seed and a place of its own, and of two values the last one."""
    keys = [argument.partition("=")[0].lstrip("+") for argument in common]
    for key, instead in (("seed", "seeds= or trials="), ("paths.results", "results=")):
        if key in keys:
            raise SweepError(f"{key}=...: a sweep sets it for every run; use {instead}")
    for key in keys:
        if keys.count(key) > 1:
            raise SweepError(f"{key}=...: it stands there twice")


def _one_of(key: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise SweepError(f"{key}={value}: there are {', '.join(choices)}")
    return value


def _number(key: str, value: str, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise SweepError(f"{key}={value} must be a whole number, at least {least}")
    return number


def _trials(table: Table, options: dict[str, str]) -> tuple[int, ...]:
    searches = table.selection.rule == "best_trial"
    if options["seeds"] and searches:
        raise SweepError(f"seeds: {table.name} selects among trials, each with a seed of its own; use trials=")
    if options["trials"] and not searches:
        raise SweepError(f"trials: {table.name} searches nothing and goes over seeds; use seeds=0,1,2")
    if options["seeds"]:
        seeds = tuple(_number("seeds", seed, 0) for seed in options["seeds"].split(","))
        if len(set(seeds)) != len(seeds):
            raise SweepError(f"seeds={options['seeds']}: one stands there twice")
        return seeds
    return tuple(range(_number("trials", options["trials"] or str(table.selection.trials), 1)))


def _rows(table: Table, asked: str, budget: str) -> list[Row]:
    if asked:
        return [table.row(name) for name in dict.fromkeys(asked.split(","))]
    closed = [row for row in table.rows if budget == "paper" and (row.unavailable or table.unavailable)]
    rows = [row for row in table.rows if row not in closed]
    if not rows:
        raise SweepError(
            f"{table.name}: {table.unavailable or closed[0].unavailable}; rows=... runs them where the data are there"
        )
    for row in closed:
        print(f"left out: {row.name} ({row.unavailable or table.unavailable})")
    return rows


def _planned(table: Table, row: Row, trials: tuple[int, ...], common: tuple[str, ...]) -> PlannedRow:
    overrides = (*table.overrides, *row.overrides)
    config = _compose(table, row, [*overrides, *common])
    space: Space = {}
    given: dict[str, Any] = {}
    if table.selection.rule == "best_trial":
        own = OmegaConf.to_container(config.search)
        assert isinstance(own, dict)
        space = merged({str(key): value for key, value in own.items()}, table.search, row.search)
        fixed = {override.lstrip("+").split("=")[0] for override in common}
        space = {key: value for key, value in space.items() if key not in fixed}
        for key in [*space, *(k for value in space.values() for k in value.get("when", {}))]:
            if OmegaConf.select(config, key, default=_ABSENT) is _ABSENT:
                raise SpaceError(f"{table.name}, {row.name}: search.{key} is no key of the configuration")
        given = {k: OmegaConf.select(config, k) for v in space.values() for k in v.get("when", {}) if k not in space}
    return PlannedRow(row.name, overrides, trials, space, given)


_ABSENT = object()


def _compose(table: Table, row: Row, overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise SweepError(f"{table.name}, {row.name}: {explain(error, overrides)}") from error


def _run(table: Table, plan: Plan, options: dict[str, str], given: Sequence[str]) -> int:
    environments = _places(options)
    if not shutil.which(plan.command[0]):
        raise SweepError(f"no {plan.command[0]}")
    file = plan.save()
    queue = Queue(plan)
    queue.refill(retry=options["retry"] == "true")
    queue.export_finished()
    print(f"sweep {plan.name}: {plan.folder} (queue, output of the runs), {plan.results} (results)")
    if environments == [] and options["launcher"] == "local":
        Screen(table, 0, plan.metric).show(queue.progress())
        return 0
    if options["launcher"] == "local":
        code = _work_here(table, queue, file, environments)
    else:
        code = _work_in_jobs(table, queue, file, len(environments), options["launcher"], given)
    queue.export_finished()
    return _conclude(plan, queue, code)


def _places(options: dict[str, str]) -> list[dict[str, str]]:
    """What is added to the environment of each worker."""
    if options["workers"] and options["workers_per_gpu"]:
        raise SweepError("workers= and workers_per_gpu=: give one of them")
    if options["workers_per_gpu"]:
        each = _number("workers_per_gpu", options["workers_per_gpu"], 1)
        if options["launcher"] != "local":
            raise SweepError("workers_per_gpu= is for this machine; of jobs say slurm.gpus_per_node=")
        gpus = _gpus()
        if not gpus:
            raise SweepError("workers_per_gpu: this machine shows no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES)")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(each) for gpu in gpus]
    workers = _number("workers", options["workers"] or "1", 0)
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    return [{} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)} for _ in range(workers)]


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def _work_here(table: Table, queue: Queue, file: Path, environments: list[dict[str, str]]) -> int:
    """Start local workers, replace those that die, and wait until they have nothing left to do; 75 if we are asked
    to stop.
    """
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    logs = Path(queue.plan.folder) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    workers = {place: _start(file, logs, place, add) for place, add in enumerate(environments)}
    started, told, early = dict.fromkeys(workers, time.monotonic()), False, 0
    try:
        with Screen(table, len(environments), queue.plan.metric) as screen:
            while workers:
                screen.show(queue.progress())
                if asked and not told:
                    told = True
                    print("stopping: runs save themselves; the same command continues", file=sys.stderr)
                    for worker in workers.values():
                        worker.terminate()
                for place, worker in list(workers.items()):
                    code = worker.poll()
                    if code is None:
                        continue
                    if code in (0, AGAIN) or asked:
                        del workers[place]
                        continue
                    early = early + 1 if time.monotonic() - started[place] < 10 else 0
                    if early >= 3:
                        raise SweepError(f"workers end at once (exit code {code}); see {logs / f'worker-{place}.log'}")
                    workers[place] = _start(file, logs, place, environments[place])
                    started[place] = time.monotonic()
                time.sleep(0.5)
            screen.show(queue.progress())
    finally:
        for worker in workers.values():
            worker.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
    return AGAIN if asked else 0


def _start(file: Path, logs: Path, place: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (logs / f"worker-{place}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "structgrad.experiments.worker", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C reaches workers through us, once
            preexec_fn=die_with_parent(),
        )


def _work_in_jobs(table: Table, queue: Queue, file: Path, workers: int, launcher: str, given: Sequence[str]) -> int:
    """Submit workers as jobs and watch until all trials are settled or no job is left; the jobs go on if we are
    stopped.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise SweepError("launcher: submitit is not installed; pip install structgrad[slurm]") from error
    slurm = OmegaConf.from_dotlist([item.removeprefix("slurm.") for item in given if item.startswith("slurm.")])
    parameters = {_slurm_key(str(key)): value for key, value in slurm.items()}
    try:
        executor = submitit.AutoExecutor(
            Path(queue.plan.folder) / "jobs", cluster="slurm" if launcher == "slurm" else "local"
        )
    except RuntimeError as error:
        raise SweepError("launcher=slurm: this machine has no srun; launcher=submitit works without Slurm") from error
    try:
        executor.update_parameters(**{"name": queue.plan.name, "timeout_min": 24 * 60} | parameters)
    except (NameError, TypeError, ValueError) as error:
        raise SweepError(f"slurm: {str(error).splitlines()[0]}") from error
    jobs = [executor.submit(Worker(file.resolve())) for _ in range(workers)]
    print("jobs: " + ", ".join(job.job_id for job in jobs) + f" (their output: {Path(queue.plan.folder) / 'jobs'})")
    try:
        with Screen(table, workers, queue.plan.metric) as screen:
            while not queue.settled() and not all(job.done() for job in jobs):
                screen.show(queue.progress())
                time.sleep(2)
            screen.show(queue.progress())
    except KeyboardInterrupt:
        print("the jobs go on; workers=0 shows how far they are", file=sys.stderr)
        return AGAIN
    return 0 if queue.settled() else AGAIN


def _slurm_key(key: str) -> str:
    return (
        key if key in ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb", "nodes", "name") else f"slurm_{key}"
    )


def _conclude(plan: Plan, queue: Queue, code: int) -> int:
    progress = queue.progress()
    for row, p in progress.items():
        for index, error in p.errors.items():
            print(f"failed: {row}-{index}: {error}", file=sys.stderr)
    done, failed = sum(p.done for p in progress.values()), sum(p.failed for p in progress.values())
    if code == AGAIN:
        print(f"stopped with {done} trials done; the same command continues", file=sys.stderr)
        return code
    if failed and not done:
        print(f"error: all {failed} trials failed; their output is in {Path(plan.folder) / 'logs'}", file=sys.stderr)
        return 1
    print(f"{done} trials done, {failed} failed; python report.py {plan.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
