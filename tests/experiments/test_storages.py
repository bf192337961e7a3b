"""The queue on a PostgreSQL server that two groups of workers share, and workers as jobs of submitit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from benchmarks import postgresql

from structgrad.experiments.queue import Queue
from structgrad.experiments.worker import Worker
from tests.experiments.test_queue import children, make, results, row, start, wait_for

#: Password of the user ``keeper`` of the server; others need none.
SECRET = "ge/heim7nis"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A fresh server on a free port of this machine; its URL."""
    pytest.importorskip("psycopg", reason="needs psycopg")
    role = f"CREATE ROLE keeper SUPERUSER LOGIN PASSWORD '{SECRET}'"
    try:
        with postgresql.server(role, rules="host all keeper 127.0.0.1/32 scram-sha-256") as url:
            yield url
    except postgresql.NoServerError as error:
        pytest.skip(str(error))


def test_two_machines_share_a_sweep(tmp_path: Path, server: str) -> None:
    """Two groups of workers with folders of their own: each trial is run once, and both can write all results."""
    rows = (row("a", 6, "x", steps=3, step_s=0.05), row("b", 6, steps=3, step_s=0.05))
    plans = [make(tmp_path / machine, *rows, name="shared", storage=server) for machine in ("here", "there")]
    workers = [start(plan) for plan in plans for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    own = [results(plan) for plan in plans]
    assert not set(own[0]) & set(own[1])
    assert len(own[0]) + len(own[1]) == 12
    for plan in plans:
        Queue(plan).export_finished()
    assert results(plans[0]) == results(plans[1])
    assert len(results(plans[0])) == 12


def test_the_machine_that_dies_loses_nothing(tmp_path: Path, server: str) -> None:
    rows = (row("a", 3, "x", steps=10, step_s=0.1),)
    plans = [make(tmp_path / m, *rows, name="dying", storage=server, heartbeat=1, grace=2) for m in ("here", "there")]
    first = start(plans[0])
    wait_for(lambda: bool(list((tmp_path / "here").glob("**/starts.log"))))
    first.kill()
    first.wait(20)
    second = start(plans[1])
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert len(results(plans[1])) == 3


@pytest.mark.parametrize("launcher", ["local", "submitit"])
def test_the_password_is_in_no_file_and_no_line(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """Neither where all is well, nor in errors; workers and jobs have it by the environment, their runs have not."""
    pytest.importorskip("submitit", reason="needs submitit")
    from tests.experiments.test_sweep import command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STRUCTGRAD_STORAGE_PASSWORD", "wrong, and not what the URL says")
    storage = server.replace("sweeper@", f"keeper:{quote(SECRET, safe='')}@")
    own = f"task.dropout=0.{len(launcher)}"  # a sweep of its own in the same database
    rows = ("paulus_2", "rows=lstm", "trials=2", "budget=smoke", f"launcher={launcher}", own)
    printed = []
    wrong = (storage.replace("keeper", "nobody"), storage + "@x") if launcher == "local" else ()
    for given in (storage, *wrong):
        run = command(*rows, f"storage={given}")
        run[2] = run[2].replace('"steps=5"', '"steps=5", "environment=1"')  # stand-ins print theirs
        done = subprocess.run(run, capture_output=True, text=True, timeout=200)
        assert done.returncode == (given != storage), done.stderr
        printed.append(done.stdout + done.stderr)
    assert "2 trials done" in printed[0]
    logs = "".join(file.read_text() for file in tmp_path.glob("runs/sweeps/*/logs/*.log"))
    assert "OMP_NUM_THREADS" in logs  # so they have printed it
    left = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(left) > 10
    for secret in (SECRET, quote(SECRET, safe="")):
        assert not any(secret in text for text in printed)
        assert not [file for file, content in left.items() if secret.encode() in content]
    plans = [file.read_text() for file in tmp_path.glob("runs/sweeps/*/plan-*.json")]
    assert any("keeper@127.0.0.1" in plan for plan in plans)


def test_workers_as_jobs(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    plan = make(tmp_path, row("a", 3, "x"), row("b", 2))
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    jobs = [executor.submit(Worker(plan.save(), 0.2)) for _ in range(2)]
    assert [job.result() for job in jobs] == [0, 0]
    assert len(results(plan)) == 5


def test_a_preempted_job_gives_its_run_back(tmp_path: Path) -> None:
    """Submitit's signal ends the job: the run is saved, the trial given back, and the job comes again to continue."""
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    plan = make(tmp_path, row("a", 1, steps=30, step_s=0.1), grace=600)
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Worker(plan.save(), 0.2))
    wait_for(lambda: bool(list((tmp_path / "runs").glob("**/steps.log"))))
    (task,) = children(job._process)
    os.kill(task, submitit.JobEnvironment._usr_sig())
    wait_for(lambda: Queue(plan).settled(), 60)
    (steps,) = (f.read_text().split() for f in (tmp_path / "runs").glob("**/steps.log"))
    assert steps == [str(i) for i in range(1, 31)]
    (starts,) = (f.read_text().split() for f in (tmp_path / "runs").glob("**/starts.log"))
    assert len(starts) == 2
    assert len(results(plan)) == 1


def test_the_command_submits_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="needs submitit")
    from tests.experiments.test_sweep import command

    monkeypatch.chdir(tmp_path)
    run = command("paulus_2", "rows=lstm", "trials=2", "budget=smoke", "launcher=submitit", "slurm.timeout_min=5")
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "jobs: " in done.stdout
    assert "2 trials done, 0 failed" in done.stdout
    wrong = command("paulus_2", "rows=lstm", "trials=2", "budget=smoke", "launcher=submitit", "slurm.timeout=5")
    refused = subprocess.run(wrong, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: slurm: ")
    assert sys.executable in run[0]
