"""Command lines for sweeps that cannot work: one line each that ends with what to type, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from structgrad.commands import sweep

LSTM = "table=paulus_2 rows=lstm budget=quick"

#: Arguments, and the end of the line that refuses them.
WRONG: list[tuple[str, str]] = [
    ("tabel=paulus_2", "did you mean table=paulus_2?"),
    ("table=", "a value is missing; type it, or leave table= out"),
    ("table=paulus_2 trails=5", "did you mean trials=5?"),
    ("table=paulus_2 worker=2", "did you mean workers=2?"),
    ("table=paulus_2 seed=0,1", "did you mean seeds=0,1?"),
    ("table=paulus_2 nonsense", "type --help for the options"),
    ("table=paulus_2 rows=", "type it, or leave rows= out"),
    ("table=paulus_2 storage=", "type it, or leave storage= out"),
    *((f"table=paulus_2 trials={value}", "type e.g. trials=3") for value in ("0", "-1", "1.5", "many")),
    *((f"table=struminsky_3 seeds={value}", "type e.g. seeds=3") for value in ("-1", "a", "0-4")),
    ("table=struminsky_3 seeds=0,0", "type seeds=0,1,2"),
    ("table=paulus_2 seeds=0", "type trials=20"),
    ("table=struminsky_3 trials=5", "type seeds=0,1,2"),
    *((f"table=paulus_2 budget={value}", "or budget=smoke") for value in ("big", "paper,quick")),
    ("table=paulus_2 launcher=ssh", "type launcher=local or launcher=slurm or launcher=submitit"),
    ("table=paulus_2 retry=yes", "type retry=false or retry=true"),
    ("table=paulus_2 sampler=best", "qmc, random, tpe"),
    *((f"table=paulus_2 sampler={value}", "type sampler=tpe or sampler=random") for value in ("grid", "partialfixed")),
    (f"{LSTM} sampler=bruteforce", "type sampler=tpe or sampler=random"),
    ("table=struminsky_3 sampler=tpe", "leave sampler= out"),
    ("table=paulus_2 heartbeat=10 grace=15", "type grace=20"),
    ("table=paulus_2 heartbeat=0", "type e.g. heartbeat=3"),
    ("table=paulus_2 grace=soon", "type e.g. grace=3"),
    (f"{LSTM} workers=-1", "type e.g. workers=3"),
    (f"{LSTM} workers=two", "type e.g. workers=3"),
    (f"{LSTM} workers=1 workers_per_gpu=1", "type one of them"),
    (f"{LSTM} workers_per_gpu=0", "type e.g. workers_per_gpu=3"),
    (f"{LSTM} storage=abc", "e.g. storage=postgresql://me@host/sweeps"),
    (f"{LSTM} storage=postgresql://me:a@b@host/x", "or use ~/.pgpass"),
    (f"{LSTM} storage=postgresql://me@localhost:1/x", "storage=postgresql://me@host/sweeps"),
    (f"{LSTM} storage=sqlite:////proc/nowhere/queue.db", "folder=<folder> names another place"),
    (f"{LSTM} results=/proc/nowhere", "results=<folder> names another"),
    (f"{LSTM} folder=/proc/nowhere", "folder=<folder> names another"),
    ("table=paulus_2 ++seed=3", "type seeds=0,1,2 or trials=20"),
    ("table=paulus_2 paths.results=x", "type results=<folder>"),
    ("table=paulus_2 trainer.pause_at=3", "leave it out, or type halving=3"),
    ("table=paulus_2 paths.progress=x", "leave it out, or type halving=3"),
    ("table=paulus_2 task.dropout=0.1 +task.dropout=0.2", "type it once"),
    ("table=paulus_2 halving=1", "type e.g. halving=3"),
    ("table=paulus_2 halving=yes", "type e.g. halving=3"),
    ("table=struminsky_3 halving=3", "leave halving= out"),
    (f"{LSTM} halving=3 trials=2", "type trials=9, or leave halving= out"),
]


@pytest.mark.parametrize(("given", "end"), WRONG, ids=[given for given, _ in WRONG])
def test_it_is_refused_in_one_line_that_ends_with_what_to_type(
    given: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    assert sweep.main(given.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith(f"{end}\n")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("**/*.db"))
    assert not list(tmp_path.glob("**/logs"))
