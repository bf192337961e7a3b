"""The queue of a sweep: Optuna studies in a relational storage, one a row, one entry a trial.

A trial is known by its index in the row. Optuna deals trials out; what counts is decided here, by index:

- A worker that dies stops its heartbeat; any other worker then fails the entry and :func:`refill` queues the trial
again. The run of the
  trial has an identity and a lock, so that the next worker continues it, and two workers never write it.
- Whoever finds a trial twice (two processes may queue it at the same time) drops the later entry.

So a trial may be started more than once, but is finished and counted once.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from structgrad.common.files import write_json
from structgrad.common.private import beat, enqueued_parameters
from structgrad.common.text import first_line
from structgrad.experiments.space import Space, draw, sample
from structgrad.experiments.tables import Direction

_LIVE = (TrialState.WAITING, TrialState.RUNNING)


class SweepError(RuntimeError):
    """A sweep cannot go on; the message is one line."""


@dataclass(frozen=True)
class PlannedRow:
    """A row's trials.

    Attributes:
        name: of the row.
        overrides: for ``train.py``, of the table and the row.
        trials: their indices, each also the seed of its run.
        space: what is searched; empty for rows over seeds.
        given: values of the configuration on which conditions of the space depend.
        monitor: metric and direction that select among its trials, if they are not those of the plan.
    """

    name: str
    overrides: tuple[str, ...]
    trials: tuple[int, ...]
    space: Space = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    monitor: tuple[str, Direction] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a worker has to know; a JSON file, so that workers may be started anywhere.

    Attributes:
        name: of the sweep: table, budget, and a hash of further settings, if any.
        table: its name.
        rows: with their trials.
        metric, direction: by which a trial is selected, of rows without a monitor of their own.
        folder: where the sweep keeps its logs and its default storage.
        results: folder of the finished runs' summaries.
        storage: URL, as SQLAlchemy has them.
        command: what runs a trial, without overrides.
        common: overrides of every trial, e.g. the budget.
        extra: those of them that the user gave and that decide results.
        sampler: class in ``optuna.samplers``.
        heartbeat, grace: seconds between signs of life, and after how many without one a worker counts as dead.
        attempts: how often a run may be killed by a signal of its own before it counts as failed.
    """

    name: str
    table: str
    rows: tuple[PlannedRow, ...]
    metric: str
    direction: Direction
    folder: str
    results: str
    storage: str
    command: tuple[str, ...]
    common: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    sampler: str = "RandomSampler"
    heartbeat: int = 30
    grace: int = 120
    attempts: int = 3

    def save(self) -> Path:
        """Into its folder, whole or not at all; other plans of the same sweep, e.g. of other rows, stay as they are."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        file = Path(self.folder) / f"plan-{digest}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(self))
        return file

    def monitor(self, row: PlannedRow) -> tuple[str, Direction]:
        """Metric and direction that select among the trials of a row."""
        return row.monitor or (self.metric, self.direction)

    @classmethod
    def load(cls, file: Path) -> Plan:
        """What :meth:`save` wrote."""
        content = json.loads(file.read_text())
        rows = tuple(
            PlannedRow(
                r["name"],
                tuple(r["overrides"]),
                tuple(r["trials"]),
                r["space"],
                r["given"],
                tuple(r["monitor"]) if r.get("monitor") else None,
            )
            for r in content.pop("rows")
        )
        lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
        return cls(**content | lists, rows=rows)


class Queue:
    """The storage of a plan.

    Raises:
        SweepError: in one line, if the storage cannot be opened.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        url = plan.storage.replace("postgresql://", "postgresql+psycopg://", 1)
        local = url.startswith("sqlite:///")
        # SQLite lets two processes take one entry from the queue, and two that start at once on an empty PostgreSQL
        # database both create its tables: one process at a time opens, fills and takes from a queue.
        self._lock: AbstractContextManager[Any] = nullcontext()
        if local:
            self._lock = FileLock(url.removeprefix("sqlite:///") + ".lock")
        elif url.startswith("postgresql+psycopg://"):
            self._lock = _AdvisoryLock(url.replace("+psycopg", "", 1))
        if local:
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        # Optuna's heartbeat thread is part of `optimize`, which makes new trials up when the queue is empty; ours is
        # `alive`.
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        options: dict[str, Any] = {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
        try:
            with self._lock:
                self.storage = RDBStorage(url, options, heartbeat_interval=plan.heartbeat, grace_period=plan.grace)
                self.studies = {row.name: self._study(row) for row in plan.rows}
        except ModuleNotFoundError as error:
            raise SweepError(
                f"storage={plan.storage}: no package {error.name}; pip install structgrad[postgresql]"
            ) from error
        except ImportError as error:
            raise SweepError(f"storage={plan.storage}: {first_line(error.__cause__ or error)}") from error
        except Exception as error:  # every database has errors of its own
            if type(error).__module__.split(".")[0] not in ("sqlalchemy", "optuna", "psycopg", "alembic"):
                raise
            raise SweepError(f"storage={plan.storage}: {first_line(error.__cause__ or error)}") from error

    def _study(self, row: PlannedRow) -> optuna.Study:
        return optuna.create_study(
            storage=self.storage,
            study_name=f"{self.plan.name}/{row.name}",
            direction=self.plan.monitor(row)[1],
            sampler=make_sampler(self.plan.sampler),
            load_if_exists=True,
        )

    def trials(self, row: str) -> dict[int, FrozenTrial]:
        """Index -> the entry that counts: a live or finished one, else the latest that was not dropped as a copy."""
        chosen: dict[int, FrozenTrial] = {}
        for trial in self.studies[row].get_trials(deepcopy=False):
            index = trial.user_attrs.get("index")
            if index is None or "copy" in trial.user_attrs:
                continue
            best = chosen.get(index)
            if best is None or _precedence(trial) >= _precedence(best):
                chosen[index] = trial
        return chosen

    def refill(self, retry: bool = False) -> None:
        """Queue every trial of the plan that is not there, was given back, or has lost its worker.

        Args:
            retry: also those that failed.
        """
        with self._lock:
            for row in self.plan.rows:
                self._refill(row, retry)

    def _refill(self, row: PlannedRow, retry: bool = False) -> None:
        study = self.studies[row.name]
        optuna.storages.fail_stale_trials(study)
        found = self.trials(row.name)
        for trial in found.values():
            # Killed between being taken and the first heartbeat, which Optuna never calls stale.
            if (
                trial.state == TrialState.RUNNING
                and "worker" not in trial.user_attrs
                and _older(trial, self.plan.grace)
            ):
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        found = self.trials(row.name)
        for index in row.trials:
            known = found.get(index)
            lost = known is not None and known.state == TrialState.FAIL and (retry or "error" not in known.user_attrs)
            if known is None or lost:
                study.enqueue_trial(self._fixed(row, index), user_attrs={"index": index})

    def _fixed(self, row: PlannedRow, index: int) -> dict[str, Any]:
        return (
            draw(row.space, row.given, self.plan.table, row.name, index) if self.plan.sampler == "RandomSampler" else {}
        )

    def take(self) -> tuple[PlannedRow, Trial, dict[str, Any]] | None:
        """The next trial of the plan, whichever row it is of, with its hyper-parameters; None if none waits."""
        with self._lock:
            waiting = []
            for position, row in enumerate(self.plan.rows):
                self._refill(row)
                found = self.trials(row.name)
                mine = [i for i in row.trials if i in found and found[i].state == TrialState.WAITING]
                waiting += [(min(mine), position, row)] if mine else []
            if not waiting:
                return None
            row = min(waiting, key=lambda item: item[:2])[2]
            study = self.studies[row.name]
            for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                trial = study.ask()
                index = trial.user_attrs.get("index")
                if index is None or index in row.trials:
                    break
                # Of another plan, with more trials of this row: to the end of the queue, so that ours comes next.
                fixed = enqueued_parameters(self.storage, trial)
                study.enqueue_trial(fixed, user_attrs={"index": index})
                trial.set_user_attr("copy", True)
                study.tell(trial, state=TrialState.FAIL)
            else:
                return None
            if index is None:  # another process has taken the last one: Optuna has made a new one up
                study.tell(trial, state=TrialState.FAIL)
                return None
            beat(self.storage, trial)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        others = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.user_attrs.get("index") == index and t.number != trial.number
        ]
        if any(t.state == TrialState.COMPLETE or (t.state in _LIVE and t.number < trial.number) for t in others):
            trial.set_user_attr("copy", True)
            study.tell(trial, state=TrialState.FAIL)
            return None
        return row, trial, sample(row.space, row.given, _suggest(trial))

    def finish(self, row: PlannedRow, trial: Trial, content: dict[str, Any]) -> None:
        """Record a finished run: its file in the results, then its value in the storage."""
        export(self.plan, content)
        with _if_unfinished():
            trial.set_user_attr("summary", json.dumps(content))
        value = content["metrics"][self.plan.monitor(row)[0]]
        self.studies[row.name].tell(trial, value, skip_if_finished=True)

    def fail(self, row: PlannedRow, trial: Trial, error: str) -> None:
        """Record that a run failed, and why; it is not tried again."""
        with _if_unfinished():
            trial.set_user_attr("error", error)
        self.studies[row.name].tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def give_back(self, row: PlannedRow, trial: Trial, why: str) -> None:
        """Let any worker go on with it."""
        with _if_unfinished():
            trial.set_user_attr("given_back", why)
        self.studies[row.name].tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self.refill()

    def crashes(self, row: PlannedRow, index: int) -> int:
        """How often the run of a trial was killed by a signal that its worker did not send, since it last failed."""
        trials = self.studies[row.name].get_trials(deepcopy=False, states=(TrialState.FAIL,))
        mine = [t for t in trials if t.user_attrs.get("index") == index]
        failed = max((t.number for t in mine if "error" in t.user_attrs), default=-1)
        return sum(t.user_attrs.get("given_back") == "crash" for t in mine if t.number > failed)

    def settled(self) -> bool:
        """Whether every trial of the plan is finished or has failed."""
        return all(p.open == 0 for p in self.progress().values())

    def progress(self) -> dict[str, Progress]:
        """Row -> how far its trials are."""
        return {row.name: Progress.of(row, self.trials(row.name), self.plan) for row in self.plan.rows}

    def export_finished(self) -> None:
        """Write the files of all finished trials that are not there, e.g. of workers on machines with other disks."""
        for row in self.plan.rows:
            for index, trial in self.trials(row.name).items():
                if trial.state == TrialState.COMPLETE and not record_file(self.plan, row.name, index).exists():
                    export(self.plan, json.loads(trial.user_attrs["summary"]))

    @contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        """Show signs of life of a trial."""
        stop = threading.Event()

        def until_stopped() -> None:
            while not stop.wait(self.plan.heartbeat):
                # A busy or unreachable database: the next beat may arrive.
                with suppress(StorageInternalError):
                    beat(self.storage, trial)

        thread = threading.Thread(target=until_stopped, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class _AdvisoryLock:
    """Of a PostgreSQL server, which frees it when the connection ends, however it ends."""

    _KEY = int.from_bytes(hashlib.sha256(b"structgrad sweeps").digest()[:7])

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        import psycopg

        self._connection = psycopg.connect(self.url, autocommit=True)
        self._connection.execute("SELECT pg_advisory_lock(%s)", (self._KEY,))

    def __exit__(self, *arguments: object) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Progress:
    """Of a row: numbers of trials, the best validation metric so far, seconds a finished trial took, errors by
    index.
    """

    trials: int
    done: int
    running: int
    failed: int
    best: float | None
    seconds: float | None
    errors: dict[int, str]

    @property
    def open(self) -> int:
        """Trials that are neither finished nor failed."""
        return self.trials - self.done - self.failed

    @classmethod
    def of(cls, row: PlannedRow, trials: Mapping[int, FrozenTrial], plan: Plan) -> Progress:
        """From the entries that count."""
        mine = {index: trial for index, trial in trials.items() if index in row.trials}
        done = [t for t in mine.values() if t.state == TrialState.COMPLETE]
        errors = {
            i: t.user_attrs["error"] for i, t in mine.items() if t.state == TrialState.FAIL and "error" in t.user_attrs
        }
        values = [t.value for t in done if t.value is not None]
        best = (max if plan.monitor(row)[1] == "maximize" else min)(values) if values else None
        times = [t.duration.total_seconds() for t in done if t.duration]
        running = sum(t.state == TrialState.RUNNING for t in mine.values())
        seconds = sum(times) / len(times) if times else None
        return cls(len(row.trials), len(done), running, len(errors), best, seconds, errors)


def record(
    plan: Plan, row: PlannedRow, index: int, parameters: Mapping[str, Any], summary: dict[str, Any]
) -> dict[str, Any]:
    """A run's summary with the key ``sweep``: table, row, trial, hyper-parameters, and the user's own settings."""
    made = {
        "table": plan.table,
        "row": row.name,
        "trial": index,
        "parameters": dict(parameters),
        "extra": list(plan.extra),
    }
    return {**summary, "sweep": made}


def record_file(plan: Plan, row: str, index: int) -> Path:
    """Where the summary of a finished trial is kept."""
    return Path(plan.results) / f"{row}-{index}.json"


def export(plan: Plan, content: dict[str, Any]) -> None:
    """Write the file of a finished trial, whole or not at all."""
    file = record_file(plan, content["sweep"]["row"], content["sweep"]["trial"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def make_sampler(name: str) -> BaseSampler:
    """An Optuna sampler by the name of its class, with or without ``Sampler``.

    Raises:
        SweepError: if there is none, or it needs arguments or a package that is not there.
    """
    known = {
        n.lower().removesuffix("sampler"): n
        for n in optuna.samplers.__all__
        if n.endswith("Sampler") and n != "BaseSampler"
    }
    found = known.get(name.lower().removesuffix("sampler"))
    if found is None:
        raise SweepError(f"sampler={name}: Optuna has {', '.join(sorted(known))}")
    try:
        sampler: BaseSampler = getattr(optuna.samplers, found)()
    except (TypeError, ImportError) as error:
        raise SweepError(f"sampler={name}: {first_line(error)}") from error
    return sampler


def _suggest(trial: Trial) -> Any:
    def suggest(key: str, value: Mapping[str, Any]) -> Any:
        if value["distribution"] == "choice":
            return trial.suggest_categorical(key, value["values"])
        return trial.suggest_float(key, value["low"], value["high"], log=value["distribution"] == "log_uniform")

    return suggest


def _precedence(trial: FrozenTrial) -> int:
    order = {TrialState.COMPLETE: 3, TrialState.RUNNING: 2, TrialState.WAITING: 1}
    return order.get(trial.state, 0)


def _older(trial: FrozenTrial, seconds: float) -> bool:
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start > timedelta(seconds=seconds)


@contextmanager
def _if_unfinished() -> Iterator[None]:
    """An entry that others have meanwhile called dead cannot be written to, and need not be."""
    with suppress(UpdateFinishedTrialError):
        yield
