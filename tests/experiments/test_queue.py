"""The queue and its workers, with a stand-in for train.py."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest

from structgrad.experiments import tables
from structgrad.experiments.queue import Plan, PlannedRow, Queue, SweepError, check_sampler, make_sampler
from structgrad.experiments.storage import PASSWORD, keep_password, without_password
from structgrad.experiments.tables import TableError
from structgrad.experiments.worker import Worker, explain
from structgrad.training.contract import EXIT_AGAIN

FAKE = Path(__file__).parent / "fake_run.py"


def make(tmp_path: Path, *rows: PlannedRow, name: str = "small", **changes: Any) -> Plan:
    rows = rows or (row("a", 3, "x"), row("b", 2))
    settings: dict[str, Any] = {
        "name": name, "table": "small", "rows": rows, "metric": "val/score", "direction": "maximize",
        "folder": str(tmp_path / name),
        "results": str(tmp_path / "results" / name), "storage": f"sqlite:///{tmp_path / name}/queue.db",
        "command": (sys.executable, str(FAKE)),
        "common": (f"paths.runs={tmp_path / 'runs' / name}",), "heartbeat": 1, "grace": 3,
    }  # fmt: skip
    return Plan(**settings | changes)


def row(name: str, trials: int, *searched: str, **settings: object) -> PlannedRow:
    space = {key: {"distribution": "uniform", "low": 0.0, "high": 1.0} for key in searched}
    overrides = (f"row={name}", *(f"{key}={value}" for key, value in settings.items()))
    return PlannedRow(name, overrides, tuple(range(trials)), space)


def start(plan: Plan, **keywords: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "structgrad.experiments.worker", str(plan.save()), "0.2"]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, start_new_session=True, **keywords)


def work(plan: Plan) -> Queue:
    """One worker in this process, until there is nothing left; the handlers of signals are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert Worker(plan.save(), pause=0.1)() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Queue(plan)


def results(plan: Plan) -> dict[str, Any]:
    """File -> what a table is made of."""
    contents = {file.name: json.loads(file.read_text()) for file in Path(plan.results).glob("*.json")}
    return {name: (c["sweep"]["trial"], c["sweep"]["parameters"], c["metrics"]) for name, c in sorted(contents.items())}


def test_every_trial_is_run_and_recorded(tmp_path: Path) -> None:
    plan = make(tmp_path)
    queue = work(plan)
    found = results(plan)
    assert list(found) == ["a-0.json", "a-1.json", "a-2.json", "b-0.json", "b-1.json"]
    index, parameters, metrics = found["a-1.json"]
    assert index == 1
    assert metrics["val/score"] == pytest.approx(parameters["x"] + 1)
    progress = queue.progress()
    assert [(p.done, p.failed, p.open) for p in progress.values()] == [(3, 0, 0), (2, 0, 0)]
    assert progress["b"].best == 1.0
    content = json.loads((Path(plan.results) / "a-0.json").read_text())
    assert content["sweep"]["table"] == "small"
    assert content["sweep"]["row"] == "a"
    assert str(tmp_path) not in json.dumps(content)  # results are read on other machines


def test_rows_may_share_their_draws(tmp_path: Path) -> None:
    """Trial i of every row then has the same value of a hyper-parameter; by default each row has its own."""
    for shared in (False, True):
        queue = Queue(make(tmp_path, row("a", 2, "x"), row("b", 2, "x", "y"), name=f"{shared}", shared_draws=shared))
        drawn = [queue.take() for _ in range(4)]
        x = {(taken.row.name, taken.index): taken.parameters["x"] for taken in drawn if taken is not None}
        assert len(x) == 4
        assert len(set(x.values())) == (2 if shared else 4)
        assert (x["a", 0] == x["b", 0]) == (x["a", 1] == x["b", 1]) == shared
    settings = {"title": "T", "rows": {"r": {"title": "R"}}, "columns": {"c": {"metric": "test/x", "title": "C"}}}
    with pytest.raises(TableError, match="draws"):
        tables.parse("t", settings | {"selection": {"draws": "trial"}})
    with pytest.raises(TableError, match="goes over seeds and draws nothing; leave draws out"):
        tables.parse("t", settings | {"selection": {"draws": "table"}})


def test_optunas_dashboard_has_names_curves_and_an_attribute_a_metric(tmp_path: Path) -> None:
    """Read back as the dashboard reads: by Optuna itself, from the database."""
    plan = make(tmp_path, row("a", 1, "x"))
    queue = Queue(plan)
    taken = queue.take()
    assert taken is not None
    queue.report(taken, [(1, 0.2), (3, 0.4)])
    metrics = {"val/score": 0.4, "test/score": 0.3, "test/loss": 1.5}
    sweep = {"table": "small", "row": "a", "trial": 0, "parameters": taken.parameters}
    queue.finish(taken, {"name": "a-0", "metrics": metrics, "sweep": sweep})
    study = optuna.load_study(study_name="small/a", storage=plan.storage)
    assert study.metric_names == ["val/score"]
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    (trial,) = study.trials
    assert (trial.params, trial.value) == (taken.parameters, 0.4)
    assert trial.intermediate_values == {1: 0.2, 3: 0.4}
    assert trial.user_attrs.items() >= metrics.items()


def test_all_rows_are_read_before_the_turn_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the workers of a large table start one after the other."""
    plan = make(tmp_path, *(row(name, 1) for name in "abcd"))
    queue, other = Queue(plan), Queue(plan)
    read: list[str] = []  # within the turn
    alone, trials = queue.storage.alone, queue.trials

    def turn(what: str) -> Any:
        read.clear()
        return alone(what)

    def reading(row: PlannedRow) -> Any:
        read.append(row.name)
        return trials(row)

    monkeypatch.setattr(queue.storage, "alone", turn)
    monkeypatch.setattr(queue, "trials", reading)
    look = queue._look

    def interrupted() -> None:
        look()
        taken = other.take()  # by another worker, between the look and the turn
        assert taken is not None
        assert taken.row.name == "a"

    monkeypatch.setattr(queue, "_look", interrupted)
    taken = queue.take()
    assert taken is not None
    assert taken.row.name == "b"  # nothing twice
    assert read == ["a", "b"]


def test_a_slow_server_is_not_read_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    queue = Queue(make(tmp_path, row("a", 9), row("b", 9)))
    looks, entries, look = [], queue.entries, queue._look

    def reading(row: PlannedRow) -> Any:
        clock[0] += 10
        return entries(row)

    def counted() -> None:
        monkeypatch.setattr(queue, "entries", reading)
        look()
        monkeypatch.setattr(queue, "entries", entries)
        looks.append(clock[0])

    monkeypatch.setattr(queue, "_look", counted)
    for at in (0, 100, 400, 421, 422):
        clock[0] = max(clock[0], at)
        assert queue.take() is not None
    assert looks == [20, 441]


def test_trials_do_not_depend_on_other_rows_or_their_number(tmp_path: Path) -> None:
    few, many = (
        make(tmp_path, row("a", 2, "x"), name="few"),
        make(tmp_path, row("b", 1, "x", "y"), row("a", 4, "y", "x"), name="many"),
    )
    work(few)
    work(many)
    first, second = results(few), results(many)
    for index in range(2):
        assert first[f"a-{index}.json"][1]["x"] == second[f"a-{index}.json"][1]["x"]
    assert len({str(p) for _, p, _ in second.values()}) == 5


def test_more_trials_later_and_nothing_twice(tmp_path: Path) -> None:
    plan = make(tmp_path, row("a", 2, "x"))
    work(plan)
    before = results(plan)
    longer = make(tmp_path, row("a", 4, "x"))
    work(longer)
    after = results(longer)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    starts = [f.read_text().splitlines() for f in (tmp_path / "runs").glob("**/starts.log")]
    assert sorted(map(len, starts)) == [1, 1, 1, 1]


def test_fewer_trials_than_wait_are_those_that_are_asked_for(tmp_path: Path) -> None:
    stopped = Queue(make(tmp_path, row("a", 4, "x")))
    taken = stopped.take()
    assert taken is not None
    stopped.give_back(taken, "stopped")
    few = make(tmp_path, PlannedRow("a", ("row=a",), (2, 1), row("a", 1, "x").space))
    work(few)
    assert list(results(few)) == ["a-1.json", "a-2.json"]
    queue = work(make(tmp_path, row("a", 4, "x")))
    assert queue.progress()["a"].done == 4
    starts = [f.read_text().splitlines() for f in (tmp_path / "runs").glob("**/starts.log")]
    assert sorted(map(len, starts)) == [1, 1, 1, 1]


def test_a_lost_result_file_is_written_again_from_the_storage(tmp_path: Path) -> None:
    plan = make(tmp_path)
    queue = work(plan)
    before = results(plan)
    (Path(plan.results) / "a-1.json").unlink()
    queue.export_finished()
    assert results(plan) == before


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    plan = make(tmp_path, row("bad", 2, fail=1), row("good", 1))
    queue = work(plan)
    assert queue.progress()["bad"].errors == {0: "it cannot work", 1: "it cannot work"}
    assert list(results(plan)) == ["good-0.json"]
    work(plan)  # does not try again ...
    assert Counter(map(len, (f.read_text().split() for f in (tmp_path / "runs").glob("**/starts.log")))) == {1: 3}
    queue.retry()  # ... unless asked to
    assert queue.progress()["bad"].open == 2


def test_a_run_that_keeps_dying_fails(tmp_path: Path) -> None:
    plan = make(tmp_path, row("a", 1, kill=1))
    for starts in (3, 6):  # a failed trial that is tried again has all its attempts again
        queue = work(plan)
        assert queue.progress()["a"].errors == {0: "killed by SIGKILL (out of memory?)"}
        assert [len(f.read_text().split()) for f in (tmp_path / "runs").glob("**/starts.log")] == [starts]
        queue.retry()


def test_a_stopped_worker_saves_its_run_and_gives_it_back(tmp_path: Path) -> None:
    plan = make(tmp_path, row("a", 1, steps=12, step_s=0.1), grace=600)
    worker = start(plan)
    wait_for(lambda: bool(list((tmp_path / "runs").glob("**/steps.log"))))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == EXIT_AGAIN
    assert results(plan) == {}
    queue = Queue(plan)
    assert (queue.progress()["a"].open, queue.progress()["a"].running) == (1, 0)
    work(plan)
    (steps,) = (f.read_text().split() for f in (tmp_path / "runs").glob("**/steps.log"))
    assert steps == [str(i) for i in range(1, 13)]  # each once


def test_the_run_of_a_killed_worker_stops_too(tmp_path: Path) -> None:
    plan = make(tmp_path, row("a", 1, steps=100, step_s=0.1))
    worker = start(plan)
    wait_for(lambda: bool(list((tmp_path / "runs").glob("**/starts.log"))))
    (log,) = (tmp_path / "runs").glob("**/starts.log")
    run = int(log.read_text())
    worker.kill()
    worker.wait(20)
    wait_for(lambda: not Path(f"/proc/{run}").exists())


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def children(worker: subprocess.Popen[Any]) -> list[int]:
    """Processes of a worker that are running."""
    try:
        return [int(pid) for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()]
    except OSError:
        return []


def kill(worker: subprocess.Popen[str], run_too: bool) -> None:
    """Kill like the out-of-memory killer: the worker, or the worker and its run."""
    runs = children(worker)
    os.kill(worker.pid, signal.SIGKILL)
    for run in runs if run_too else ():
        with suppress(ProcessLookupError):
            os.kill(run, signal.SIGKILL)


def test_workers_killed_ten_times_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    """SIGKILL at random moments, heartbeats of a second: the same table as without kills."""
    gate = tmp_path / "gate"
    rows = (
        row("last", 1, gate=gate, step_s=0.1),
        row("a", 6, "x", steps=8, step_s=0.05),
        row("b", 6, steps=8, step_s=0.05),
    )
    plan = make(tmp_path, *rows, name="wild", heartbeat=1, grace=2)
    generator = random.Random(0)
    workers = [start(plan), start(plan)]
    queue = Queue(plan)
    kills, end = 0, time.monotonic() + 150
    while not queue.settled():
        assert time.monotonic() < end, queue.progress()
        victim, moment = generator.randrange(2), time.monotonic() + generator.uniform(0.3, 2.0)
        # Seven of ten in the middle of a run, the others at any moment: while it starts, looks for a trial, records
        # one.
        while time.monotonic() < moment or (0 < kills < 8 and not children(workers[victim]) and not queue.settled()):
            time.sleep(0.05)
            if workers[victim].poll() is not None:
                workers[victim] = start(plan)
        time.sleep(generator.uniform(0.0, 0.3))
        if kills < 10 and workers[victim].poll() is None:
            kill(workers[victim], run_too=generator.random() < 0.5)
            kills += 1
        if kills == 10:
            gate.touch()  # the last run could not finish before
        for place, worker in enumerate(workers):
            if worker.poll() is not None:
                workers[place] = start(plan)
    for worker in workers:
        assert worker.wait(30) == 0
    assert kills == 10

    calm = make(tmp_path, *(PlannedRow(r.name, (f"row={r.name}",), r.trials, r.space) for r in rows), name="calm")
    work(calm)
    assert results(plan) == results(calm)
    assert len(results(plan)) == 13
    for planned in rows:
        complete = [t for t in queue.entries(planned) if t.state.name == "COMPLETE"]
        assert sorted(t.user_attrs["index"] for t in complete) == list(planned.trials)
    folders = list((tmp_path / "runs" / "wild" / "fake").iterdir())
    steps = [(f / "steps.log").read_text().split() for f in folders]
    assert all(len(set(done)) == len(done) for done in steps)  # continued, never repeated
    assert sum(len((f / "starts.log").read_text().split()) for f in folders) > 13  # and runs were hit


def test_unknown_samplers_and_storages_are_one_line(tmp_path: Path) -> None:
    assert type(make_sampler("tpe")).__name__ == "TPESampler"
    with pytest.raises(SweepError, match="sampler=best: Optuna has"):
        make_sampler("best")
    with pytest.raises(SweepError, match="sampler=grid: "):
        make_sampler("grid")
    for storage in (
        "postgresql://nobody@localhost:1/none",
        "mysql://x@localhost/y",
        "nonsense",
        f"sqlite:///{tmp_path}",
    ):
        with pytest.raises(SweepError, match="storage=") as error:
            Queue(make(tmp_path, storage=storage))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "kept", "password"),
    [
        ("sqlite:///a/b:c@d.db", "sqlite:///a/b:c@d.db", None),
        ("postgresql://me@host/x", "postgresql://me@host/x", None),
        (
            "postgresql://me:a%40b%2Fc@host:5433/x?sslmode=require",
            "postgresql://me@host:5433/x?sslmode=require",
            "a@b/c",
        ),
        ("postgresql://me@host/x?password=abc", "postgresql://me@host/x", "abc"),
        ("mysql+pymysql://me:abc@host/x", "mysql+pymysql://me@host/x", "abc"),
    ],
)
def test_the_password_is_taken_out_of_a_url(url: str, kept: str, password: str | None) -> None:
    environment: dict[str, str] = {}
    assert keep_password(url, environment) == kept
    assert environment.get(PASSWORD) == password


@pytest.mark.parametrize("url", ["postgresql://me:abc@def@host/x", "postgresql://me:abc/x", "abc"])
def test_what_is_no_url_is_not_shown(url: str) -> None:
    """A part of it may be a password."""
    with pytest.raises(SweepError, match=r"^storage=\.\.\.: ") as error:
        keep_password(url, {})
    assert "abc" not in str(error.value)
    assert "abc" not in without_password(f"storag={url}") or "@" not in url


def test_a_sampler_is_tried_on_the_space_before_anything_starts() -> None:
    choices = {"a": {"distribution": "choice", "values": [1, 2]}, "b": {"distribution": "choice", "values": [1, 2]}}
    check_sampler("bruteforce", [PlannedRow("x", (), tuple(range(4)), choices)])
    with pytest.raises(SweepError, match="the search space of x has only 4 points; type trials=4"):
        check_sampler("bruteforce", [PlannedRow("x", (), tuple(range(5)), choices)])
    with pytest.raises(SweepError, match=r"sampler=bruteforce cannot search x: .*; type sampler=tpe or sampler=random"):
        check_sampler("bruteforce", [row("x", 1, "lr")])
    for name in ("tpe", "qmc", "nsgaii"):
        check_sampler(name, [row("x", 20, "lr", "momentum")])


def test_all_points_are_tried_by_brute_force(tmp_path: Path) -> None:
    values = {"x": {"distribution": "choice", "values": [1, 2, 3]}}
    plan = make(tmp_path, PlannedRow("a", ("row=a",), (0, 1, 2), values), sampler="BruteForceSampler")
    work(plan)
    assert {entry[1]["x"] for entry in results(plan).values()} == {1, 2, 3}


def test_an_error_of_the_worker_itself_is_an_attempt(tmp_path: Path) -> None:
    """Results that cannot be written, as on a full disk: it does not train the same trial for ever."""
    plan = make(tmp_path, row("a", 1))
    Path(plan.results).parent.mkdir(parents=True)
    Path(plan.results).write_text("no folder")
    for attempt in range(3):
        assert Queue(plan).progress()["a"].open == 1
        worker = start(plan)
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 1
        assert errors.startswith("error: [Errno 17] File exists: "), (attempt, errors)
        assert errors.count("\n") == 1
    reason = Queue(plan).progress()["a"].errors[0]
    assert reason.startswith("its worker ended: [Errno 17] File exists: ")
    Path(plan.results).unlink()
    queue = Queue(plan)
    queue.retry()
    assert work(plan).progress()["a"].done == 1


def test_other_samplers_learn_from_the_trials(tmp_path: Path) -> None:
    plan = make(tmp_path, row("a", 4, "x"), sampler="TPESampler")
    work(plan)
    assert len({entry[1]["x"] for entry in results(plan).values()}) == 4


def test_why_a_run_failed(tmp_path: Path) -> None:
    file = tmp_path / "x.err"
    file.write_text("warning\nerror: first\nerror: the reason\nlast words\n")
    assert explain(1, file) == "the reason"
    file.write_text("Traceback\n  line\nKeyError: 'x'\n")
    assert explain(1, file) == "KeyError: 'x'"
    file.write_text("")
    assert explain(3, file) == "exit code 3"
