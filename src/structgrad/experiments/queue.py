"""The queue of a sweep: Optuna studies in a relational database.

There is one study for each row, and one entry each time a trial is started. A trial is identified
by its index in the row. Its state follows from its entries:

- It is finished if an entry is complete. It has failed if the last entry says why. It is in work if
  an entry is running. Otherwise any worker may start it by a further entry; no entry waits in the
  database.
- A worker that dies stops its heartbeat. Any other worker then fails the entry, so the trial is
  open again. Its run has an identity and a lock. So the next worker continues the run, and two
  workers never write it.
- With successive halving an entry goes to a rung and is pruned there, in Optuna's words. If the
  trial continues from there, it gets one more entry, with the next rung.

So a trial may be started more than once, but it is finished and counted once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from structgrad.common.files import write_json
from structgrad.common.text import first_line
from structgrad.experiments.halving import promoted
from structgrad.experiments.space import Space, draw, sample
from structgrad.experiments.storage import Storage, SweepError
from structgrad.experiments.tables import Direction

__all__ = ["Plan", "PlannedRow", "Progress", "Queue", "SweepError", "Taken", "make_sampler", "record"]


#: A worker that has read all rows does not do it again for this many times as long as it took. Many workers would
#: otherwise keep a slow server busy with nothing else.
REST = 20


@dataclass(frozen=True)
class PlannedRow:
    """A row's trials.

    Attributes:
        name: name of the row.
        overrides: the table's and the row's overrides for ``train.py``.
        trials: their indices; each index is also the seed of its run.
        space: the search space; empty for rows over seeds.
        given: values of configuration keys on which conditions of the space depend.
        monitor: metric and direction that select among its trials, if they are not those of the
            plan.
        rungs: steps at which its trials pause, ascending, see
            :mod:`structgrad.experiments.halving`; may be empty.
    """

    name: str
    overrides: tuple[str, ...]
    trials: tuple[int, ...]
    space: Space = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    monitor: tuple[str, Direction] | None = None
    rungs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a worker needs to know. It is a JSON file, so workers may be started
    anywhere.

    Attributes:
        name: name of the sweep: table, budget, and a hash of further settings, if any.
        table: name of the table.
        rows: rows with their trials.
        metric, direction: by which trials are selected, for rows without a monitor of their own.
        folder: the folder of the sweep's logs and default storage.
        results: folder of the finished runs' summaries.
        storage: URL in the form of SQLAlchemy, without a password.
        command: the command that runs a trial, without overrides.
        common: overrides of every trial, e.g. the budget.
        extra: those of them that the user gave and that decide results.
        sampler: class in ``optuna.samplers``.
        heartbeat, grace: seconds between signs of life, and seconds without one after which a
            worker counts as dead.
        attempts: a run counts as failed after it was killed by a signal, or ended its worker by an
            error, this often.
        reduction: one in this many trials continues from a rung; 0: there are no rungs.
        shared_draws: whether trial i of all rows has the same draws.
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
    reduction: int = 0
    shared_draws: bool = False

    def save(self) -> Path:
        """Write the plan to its folder, completely or not at all. Other plans of the same sweep do
        not change.

        Raises:
            SweepError: if the folder cannot be written to.
        """
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        file = Path(self.folder) / f"plan-{digest}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(self))
        except OSError as error:
            raise SweepError(
                f"cannot write to {file.parent}: {error.strerror}; folder=<folder> names another"
            ) from error
        return file

    def monitor(self, row: PlannedRow) -> tuple[str, Direction]:
        """Metric and direction that select among the trials of a row."""
        return row.monitor or (self.metric, self.direction)

    def best(self, row: PlannedRow, values: Iterable[float]) -> float | None:
        """The best value in that direction; None without values."""
        return (max if self.monitor(row)[1] == "maximize" else min)(values, default=None)

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read a plan that :meth:`save` wrote."""

        def listed(mapping: dict[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}

        content = json.loads(file.read_text())
        rows = tuple(PlannedRow(**listed(row)) for row in content.pop("rows"))
        return cls(**listed(content), rows=rows)


@dataclass(frozen=True)
class Taken:
    """A trial in work.

    Attributes:
        row: the row of the trial.
        index: its index in the row.
        until: the step at which it pauses; None: it runs to the end.
        parameters: hyper-parameter -> value.
        entry: its entry in the database.
    """

    row: PlannedRow
    index: int
    until: int | None
    parameters: dict[str, Any]
    entry: int


class Queue:
    """The state of a plan: what is done and what is left.

    Raises:
        SweepError: in one line, if the storage cannot be opened.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.storage = Storage(plan.storage, plan.heartbeat, plan.grace)
        self._studies = self.storage.studies
        self._ids = {row.name: self._id(row) for row in plan.rows}
        #: The trials that could be started at the last look, by row; others may have started them
        #: since.
        self._open: dict[str, list[tuple[int, int | None]]] = {}
        self._look_again = -math.inf
        self._loaded: dict[str, optuna.Study] = {}

    def _id(self, row: PlannedRow) -> int:
        with suppress(KeyError):
            return self._studies.get_study_id_from_name(self.name(row))
        with self.storage.alone("opening"):
            metric, direction = self.plan.monitor(row)
            study = optuna.create_study(
                storage=self._studies, study_name=self.name(row), direction=direction, load_if_exists=True
            )
            study.set_metric_names([metric])
        return self._studies.get_study_id_from_name(self.name(row))

    def _study(self, row: PlannedRow) -> optuna.Study:
        """The study of a row, loaded once."""
        if row.name not in self._loaded:
            self._loaded[row.name] = optuna.load_study(study_name=self.name(row), storage=self._studies)
        return self._loaded[row.name]

    def name(self, row: PlannedRow) -> str:
        """The name of the study of a row."""
        return f"{self.plan.name}/{row.name}"

    def entries(self, row: PlannedRow) -> list[FrozenTrial]:
        """All entries ever made, in this order."""
        return self._studies.get_all_trials(self._ids[row.name], deepcopy=False)

    def trials(self, row: PlannedRow) -> dict[int, FrozenTrial]:
        """Index -> the entry that counts.

        It is the complete one. Otherwise it is among the entries for the last rung: a running one,
        else the latest.
        """
        return _counting(self.entries(row))

    def take(self) -> Taken | None:
        """Start the next trial of the plan, in any row; None if there is none to start now."""
        # All rows are read before this worker's turn, so others need not wait. Its turn reads the chosen row again.
        if time.monotonic() > self._look_again or not any(self._open.values()):
            self._look()
        with self.storage.alone(self.plan.name):
            found = self._choose()
            if found is None:
                return None
            row, index, until, known = found
            template = self._template(row, index, until, known)
            entry = self._studies.create_new_trial(self._ids[row.name], template)
        self.storage.record_heartbeat(entry)
        self._studies.set_trial_user_attr(entry, "worker", f"{socket.gethostname()}:{os.getpid()}")
        if not self.storage.is_exclusive and self._is_copy(row, index, entry):
            self._studies.set_trial_user_attr(entry, "copy", True)
            self._end(entry, TrialState.FAIL)
            return None
        return Taken(row, index, until, self._parameters(row, template, entry), entry)

    def _choose(self) -> tuple[PlannedRow, int, int | None, FrozenTrial | None] | None:
        """The trial to start next: the lowest rung first, then the lowest index, then the first
        row.

        The row is read from the database again, because others start trials too.
        """
        while True:
            waiting = [
                (_rung(self._open[row.name][0][1]), self._open[row.name][0][0], position)
                for position, row in enumerate(self.plan.rows)
                if self._open[row.name]
            ]
            if not waiting:
                return self._promote()
            row = self.plan.rows[min(waiting)[2]]
            trials = self.trials(row)
            self._open[row.name] = self._to_begin(row, trials)
            if self._open[row.name]:
                index, until = self._open[row.name].pop(0)
                return row, index, until, trials.get(index)

    def _look(self) -> None:
        """Mark the entries of dead workers as failed, and find the trials to start.

        Several workers may do this at once: an entry that another one has ended stays as it is.
        """
        began = time.monotonic()
        for row in self.plan.rows:
            optuna.storages.fail_stale_trials(self._study(row))
            entries = self.entries(row)
            # Its worker was killed before the first heartbeat, so Optuna never calls it stale.
            unheard = [
                trial.number
                for trial in entries
                if trial.state == TrialState.RUNNING
                and "worker" not in trial.user_attrs
                and _older(trial, self.plan.grace)
            ]
            for number in unheard:
                self._end(self._studies.get_trial_id_from_study_id_trial_number(self._ids[row.name], number))
            self._open[row.name] = self._to_begin(row, _counting(self.entries(row) if unheard else entries))
        ended = time.monotonic()
        self._look_again = ended + max(self.plan.heartbeat, REST * (ended - began))

    def _to_begin(self, row: PlannedRow, trials: Mapping[int, FrozenTrial]) -> list[tuple[int, int | None]]:
        """Index and rung of trials that were never started, were given back, or have lost their
        worker.
        """
        first = row.rungs[0] if row.rungs else None
        new = [(index, first) for index in row.trials if index not in trials]
        lost = [(i, _until(trials[i])) for i in row.trials if i in trials and _is_lost(trials[i])]
        return sorted(new + lost, key=lambda item: (_rung(item[1]), item[0]))

    def _promote(self) -> tuple[PlannedRow, int, int | None, FrozenTrial | None] | None:
        for row in self.plan.rows if self.plan.reduction else ():
            trials = self.trials(row)
            for index, rung in self._promoted(row, trials):
                return row, index, (*row.rungs, None)[rung + 1], trials[index]
        return None

    def _promoted(self, row: PlannedRow, trials: Mapping[int, FrozenTrial]) -> list[tuple[int, int]]:
        """Index and rung of pausing trials that may continue."""
        mine = {index: trial for index, trial in trials.items() if index in row.trials}
        sign = 1.0 if self.plan.monitor(row)[1] == "maximize" else -1.0
        values: list[dict[int, float]] = [
            {
                index: sign * best
                for index, trial in mine.items()
                if _has_reached(trial, step) and (best := self.plan.best(row, _until_step(trial, step))) is not None
            }
            for step in row.rungs
        ]
        finished = {index: 0.0 for index, trial in mine.items() if trial.state == TrialState.COMPLETE}
        places = {step: place for place, step in enumerate(row.rungs)}
        resting = {
            index: places[step]
            for index, trial in mine.items()
            if trial.state == TrialState.PRUNED and (step := _until(trial)) is not None and step in places
        }
        settled = all(
            i in mine and (i in resting or i in finished or "error" in mine[i].user_attrs) for i in row.trials
        )
        return promoted([*values, finished], resting, self.plan.reduction, settled)

    def _template(self, row: PlannedRow, index: int, until: int | None, known: FrozenTrial | None) -> FrozenTrial:
        """The entry of a trial that starts, or continues with its hyper-parameters and curve."""
        attributes: dict[str, Any] = {"index": index} | ({} if until is None else {"until": until})
        if self.plan.sampler == "RandomSampler":
            whose = (self.plan.table,) if self.plan.shared_draws else (self.plan.table, row.name)
            parameters = draw(row.space, row.given, *whose, index)
            distributions = {key: _distribution(row.space[key]) for key in parameters}
        else:
            parameters, distributions = (known.params, known.distributions) if known else ({}, {})
        return create_trial(
            state=TrialState.RUNNING,
            params=parameters,
            distributions=distributions,
            user_attrs=attributes,
            intermediate_values=known.intermediate_values if known else {},
        )

    def _parameters(self, row: PlannedRow, template: FrozenTrial, entry: int) -> dict[str, Any]:
        if self.plan.sampler == "RandomSampler":
            return dict(template.params)
        study = optuna.load_study(
            study_name=self.name(row), storage=self._studies, sampler=make_sampler(self.plan.sampler)
        )
        return sample(row.space, row.given, _suggest(Trial(study, entry)))

    def _is_copy(self, row: PlannedRow, index: int, entry: int) -> bool:
        number = self._studies.get_trial_number_from_id(entry)
        others = [t for t in self.entries(row) if t.user_attrs.get("index") == index and t.number != number]
        return any(
            t.state == TrialState.COMPLETE or (t.state == TrialState.RUNNING and t.number < number) for t in others
        )

    def report(self, taken: Taken, curve: Iterable[tuple[int, float]]) -> None:
        """Record the known values of the selecting metric by step."""
        with _if_unfinished():
            for step, value in curve:
                self._studies.set_trial_intermediate_value(taken.entry, int(step), float(value))

    def finish(self, taken: Taken, content: dict[str, Any]) -> None:
        """Record a finished run: its file in the results, its summary and its value in the storage."""
        export(self.plan, content)
        self.storage.keep(self.name(taken.row), taken.index, content)
        with _if_unfinished():
            for name, value in content["metrics"].items():
                self._studies.set_trial_user_attr(taken.entry, name, value)
        self._end(taken.entry, TrialState.COMPLETE, [content["metrics"][self.plan.monitor(taken.row)[0]]])
        self._export_rungs(taken.row)

    def rest(self, taken: Taken, curve: Sequence[tuple[int, float]]) -> None:
        """Record a run that has reached its rung."""
        self.report(taken, curve)
        best = self.plan.best(taken.row, (value for _, value in curve))
        self._end(taken.entry, TrialState.PRUNED, None if best is None else [best])
        self._export_rungs(taken.row)

    def fail(self, taken: Taken, error: str) -> None:
        """Record that a run failed, and why; it is not tried again."""
        with _if_unfinished():
            self._studies.set_trial_user_attr(taken.entry, "error", error)
        self._end(taken.entry)

    def give_back(self, taken: Taken, why: str) -> None:
        """Let any worker continue the trial."""
        with _if_unfinished():
            self._studies.set_trial_user_attr(taken.entry, "given_back", why)
        self._end(taken.entry)

    def _end(self, entry: int, state: TrialState = TrialState.FAIL, values: list[float] | None = None) -> None:
        with _if_unfinished():
            self._studies.set_trial_state_values(entry, state, values)

    def retry(self) -> None:
        """Let workers start failed trials again."""
        for row in self.plan.rows:
            for index, trial in self.trials(row).items():
                if index in row.trials and trial.state == TrialState.FAIL and "error" in trial.user_attrs:
                    attributes = {k: v for k, v in trial.user_attrs.items() if k in ("index", "until")}
                    again = create_trial(
                        state=TrialState.FAIL,
                        params=trial.params,
                        distributions=trial.distributions,
                        user_attrs={**attributes, "given_back": "retry"},
                        intermediate_values=trial.intermediate_values,
                    )
                    self._studies.create_new_trial(self._ids[row.name], again)
        self._open = {}

    def crashes(self, row: PlannedRow, index: int) -> int:
        """How often the run of a trial crashed since it was last started anew.

        A crash is a signal that the worker did not send, or an error that ended the worker.
        """
        mine = [t for t in self.entries(row) if t.user_attrs.get("index") == index]
        anew = max((t.number for t in mine if t.user_attrs.get("given_back") == "retry"), default=-1)
        return sum(t.user_attrs.get("given_back") == "crash" for t in mine if t.number > anew)

    def settled(self) -> bool:
        """Whether every trial of the plan is finished, has failed, or has stopped for good."""
        return all(p.open == 0 for p in self.progress().values())

    def progress(self) -> dict[str, Progress]:
        """Row -> progress of its trials."""
        found = {}
        for row in self.plan.rows:
            trials = self.trials(row)
            goes_on = len(self._promoted(row, trials)) if row.rungs else 0
            found[row.name] = Progress.of(row, trials, self.plan, goes_on)
        return found

    def export_finished(self) -> None:
        """Write the missing files of all finished trials, e.g. of workers on machines with other
        disks.
        """
        for row in self.plan.rows:
            for index, trial in self.trials(row).items():
                if trial.state == TrialState.COMPLETE and not record_file(self.plan, row.name, index).exists():
                    content = self.storage.kept(self.name(row), index)
                    if content is None and "summary" in trial.user_attrs:  # from an earlier version
                        content = json.loads(trial.user_attrs["summary"])
                    if content is not None:
                        export(self.plan, content)
            self._export_rungs(row)

    def _export_rungs(self, row: PlannedRow) -> None:
        """Write which trials reached which rung, for reports, because stopped trials have no
        summary.
        """
        if not row.rungs:
            return
        trials = self.trials(row)
        content = {
            "table": self.plan.table,
            "row": row.name,
            "reduction": self.plan.reduction,
            "rungs": list(row.rungs),
            "trials": [
                {
                    "trial": index,
                    "parameters": trials[index].params,
                    "curve": sorted(trials[index].intermediate_values.items()),
                    "rungs": sum(_has_reached(trials[index], step) for step in row.rungs),
                    "finished": trials[index].state == TrialState.COMPLETE,
                    **{key: trials[index].user_attrs[key] for key in ("error",) if key in trials[index].user_attrs},
                }
                for index in row.trials
                if index in trials
            ],
        }
        file = Path(self.plan.results) / "halving" / f"{row.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)

    @contextmanager
    def alive(self, taken: Taken) -> Iterator[None]:
        """Send a trial's signs of life while the block runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.plan.heartbeat):
                # The database is busy or unreachable; the next beat may arrive.
                with suppress(StorageInternalError):
                    self.storage.record_heartbeat(taken.entry)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@dataclass(frozen=True)
class Progress:
    """The progress of a row.

    It has numbers of trials, the best validation metric so far, and the seconds of a finished
    trial. It also has errors by index, the number of trials that pause, and the number at each
    rung.
    """

    trials: int
    done: int
    running: int
    failed: int
    best: float | None
    seconds: float | None
    errors: dict[int, str]
    resting: int = 0
    reached: dict[int, int] = field(default_factory=dict)

    @property
    def open(self) -> int:
        """The number of trials still to do: neither finished nor failed nor stopped."""
        return self.trials - self.done - self.failed - self.resting

    @classmethod
    def of(cls, row: PlannedRow, trials: Mapping[int, FrozenTrial], plan: Plan, going_on: int = 0) -> Progress:
        """From the entries that count; ``going_on`` of the pausing trials must only be started
        again.
        """
        mine = {index: trial for index, trial in trials.items() if index in row.trials}
        done = [t for t in mine.values() if t.state == TrialState.COMPLETE]
        errors = {
            i: t.user_attrs["error"] for i, t in mine.items() if t.state == TrialState.FAIL and "error" in t.user_attrs
        }
        values = [t.value for t in done if t.value is not None]
        best = plan.best(row, values)
        times = [t.duration.total_seconds() for t in done if t.duration]
        running = sum(t.state == TrialState.RUNNING for t in mine.values())
        seconds = sum(times) / len(times) if times else None
        resting = sum(t.state == TrialState.PRUNED for t in mine.values()) - going_on
        reached = {step: sum(_has_reached(t, step) for t in mine.values()) for step in row.rungs}
        return cls(len(row.trials), len(done), running, len(errors), best, seconds, errors, resting, reached)


def record(plan: Plan, taken: Taken, summary: dict[str, Any]) -> dict[str, Any]:
    """A run's summary with the key ``sweep``: table, row, trial, hyper-parameters, and the user's own settings."""
    made = {
        "table": plan.table,
        "row": taken.row.name,
        "trial": taken.index,
        "parameters": dict(taken.parameters),
        "extra": list(plan.extra),
    }
    return {**summary, "sweep": made}


def record_file(plan: Plan, row: str, index: int) -> Path:
    """The file for the summary of a finished trial."""
    return Path(plan.results) / f"{row}-{index}.json"


def export(plan: Plan, content: dict[str, Any]) -> None:
    """Write the file of a finished trial, completely or not at all."""
    file = record_file(plan, content["sweep"]["row"], content["sweep"]["trial"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def make_sampler(name: str) -> BaseSampler:
    """An Optuna sampler by the name of its class, with or without ``Sampler``.

    Raises:
        SweepError: if there is none, or if it needs arguments or a missing package.
    """
    known = {
        n.lower().removesuffix("sampler"): n
        for n in optuna.samplers.__all__
        if n.endswith("Sampler") and n != "BaseSampler"
    }
    found = known.get(name.lower().removesuffix("sampler"))
    if found is None:
        raise SweepError(f"sampler={name}: Optuna has no such sampler; type one of {', '.join(sorted(known))}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler: BaseSampler = getattr(optuna.samplers, found)()
    except TypeError as error:
        reason = f"Optuna's {found} needs arguments that a sweep cannot give"
        raise SweepError(f"sampler={name}: {reason}; type sampler=tpe or sampler=random") from error
    except ImportError as error:
        raise SweepError(f"sampler={name}: {first_line(error)}; type sampler=tpe or sampler=random") from error
    return sampler


def check_sampler(name: str, rows: Iterable[PlannedRow]) -> None:
    """Try a sampler on the spaces of some rows, in memory, with made-up values.

    Raises:
        SweepError: if it cannot search them, needs a missing package, or has fewer points than
            trials.
    """
    for row in rows:
        sampler = make_sampler(name)
        study = optuna.create_study(sampler=sampler)
        # Some samplers begin at random and show their needs only after ten trials.
        exhaustive = isinstance(sampler, optuna.samplers.BruteForceSampler)
        tried = len(row.trials) if exhaustive else 12
        for number in range(tried):
            trial = study.ask()
            try:
                sample(row.space, row.given, _suggest(trial))
            except ImportError as error:
                other = "type sampler=tpe or sampler=random"
                raise SweepError(
                    f"sampler={name}: no package {error.name}; pip install {error.name}, or {other}"
                ) from error
            except Exception as error:  # every sampler has its own errors
                reason = f"sampler={name} cannot search {row.name}: {first_line(error)}"
                raise SweepError(f"{reason.rstrip('.')}; type sampler=tpe or sampler=random") from error
            try:
                study.tell(trial, float(number))
            except RuntimeError:  # it has visited every point
                if number + 1 < tried:
                    only = f"the search space of {row.name} has only {number + 1} points"
                    raise SweepError(f"sampler={name}: {only}; type trials={number + 1}") from None


def _suggest(trial: Trial) -> Any:
    def suggest(key: str, value: Mapping[str, Any]) -> Any:
        if value["distribution"] == "choice":
            return trial.suggest_categorical(key, value["values"])
        return trial.suggest_float(key, value["low"], value["high"], log=value["distribution"] == "log_uniform")

    return suggest


def _distribution(value: Mapping[str, Any]) -> BaseDistribution:
    if value["distribution"] == "choice":
        return CategoricalDistribution(value["values"])
    return FloatDistribution(value["low"], value["high"], log=value["distribution"] == "log_uniform")


def _counting(entries: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    chosen: dict[int, FrozenTrial] = {}
    for trial in entries:
        index = trial.user_attrs.get("index")
        if index is None or "copy" in trial.user_attrs:
            continue
        best = chosen.get(index)
        if best is None or _precedence(trial) >= _precedence(best):
            chosen[index] = trial
    return chosen


def _precedence(trial: FrozenTrial) -> tuple[bool, float, bool]:
    return trial.state == TrialState.COMPLETE, _rung(_until(trial)), trial.state == TrialState.RUNNING


def _until(trial: FrozenTrial) -> int | None:
    return trial.user_attrs.get("until")


def _rung(until: int | None) -> float:
    """A number by which to sort."""
    return math.inf if until is None else until


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether no worker has the trial, although it has neither ended nor failed.

    Queues of earlier versions also have waiting entries.
    """
    failed = trial.state == TrialState.FAIL and "error" not in trial.user_attrs
    return failed or trial.state == TrialState.WAITING


def _has_reached(trial: FrozenTrial, step: int) -> bool:
    """Whether a trial that has not failed was validated after ``step`` steps. Curves number steps
    from 0.
    """
    return "error" not in trial.user_attrs and any(at >= step - 1 for at in trial.intermediate_values)


def _until_step(trial: FrozenTrial, step: int) -> list[float]:
    return [value for at, value in trial.intermediate_values.items() if at < step]


def _older(trial: FrozenTrial, seconds: float) -> bool:
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start > timedelta(seconds=seconds)


@contextmanager
def _if_unfinished() -> Iterator[None]:
    """A context for writing to an entry. If others have called it dead meanwhile, writing fails and
    is not needed.
    """
    with suppress(UpdateFinishedTrialError):
        yield
