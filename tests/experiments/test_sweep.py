"""The command: options, plans, refusals, and a sweep of stand-in runs from beginning to end."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from structgrad.commands import CONFIGS, group, report, sweep
from structgrad.experiments import tables
from structgrad.experiments.launching import _conclude, places
from structgrad.experiments.queue import Plan, Progress
from structgrad.experiments.runs import folder_of
from structgrad.experiments.screen import Screen, time_left
from structgrad.training import contract

FAKE = Path(__file__).parent / "fake_run.py"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()


def plan_of(*arguments: str) -> Plan:
    options, given = sweep._split(arguments)
    return sweep.make_plan(tables.load(options["table"], CONFIGS / "table"), options, given, CONFIGS)


def test_a_plan_says_everything() -> None:
    plan = plan_of(
        "table=paulus_2", "rows=arborescence,lstm", "trials=5", "budget=quick", "trainer=cpu", "task.dropout=0.2"
    )
    assert plan.name.startswith("paulus_2_quick-")  # a setting of the user's is another sweep
    assert plan.extra == ("task.dropout=0.2",)
    assert plan.common == ("budget=quick", "trainer=cpu", "task.dropout=0.2")
    arborescence, lstm = plan.rows
    assert arborescence.trials == (0, 1, 2, 3, 4)
    assert set(arborescence.space) == {"task.optimizer.lr", "task.optimizer.weight_decay", "estimator.temperature"}
    assert set(lstm.space) == {"task.optimizer.lr", "task.optimizer.weight_decay"}
    assert lstm.overrides == ("task=listops", "structure=none", "estimator=none")
    file = plan.save()
    assert Plan.load(file) == plan
    others = plan_of("table=paulus_2", "rows=lstm", "budget=quick", "task.dropout=0.2")
    assert others.folder == plan.folder  # one sweep; who works on some of its rows leaves the others' plan alone
    assert Plan.load(others.save()) == others
    assert Plan.load(file) == plan


def test_the_plan_does_not_depend_on_where_and_with_whom() -> None:
    plain = plan_of("table=paulus_2", "budget=quick")
    elsewhere = ("trainer=cpu", "logger=csv", "paths.runs=elsewhere", "workers=9")
    hardware = [f"trainer.{key}=null" for key in contract.HARDWARE if key != "pause_at"]  # a sweep's own
    assert "trainer.compile=null" in hardware
    assert plan_of("table=paulus_2", "budget=quick", *elsewhere, *hardware).name == plain.name
    assert plain.name == "paulus_2_quick"
    assert {len(row.trials) for row in plain.rows} == {20}


def test_a_hyper_parameter_that_the_user_sets_is_not_searched() -> None:
    (row,) = plan_of("table=paulus_2", "rows=lstm", "budget=quick", "task.optimizer.lr=1e-3").rows
    assert set(row.space) == {"task.optimizer.weight_decay"}


def test_given_settings_take_the_place_of_the_search() -> None:
    lstm, tree, truth = plan_of("table=paulus_2", "rows=lstm,arborescence,ground_truth").rows
    assert (lstm.trials, lstm.space) == ((0,), {})
    assert lstm.overrides[-2:] == ("task.optimizer.lr=0.001", "task.optimizer.weight_decay=1e-05")
    assert (tree.trials, tree.space) == ((0,), {})
    assert tree.overrides[-2:] == ("estimator.temperature=1.22", "task.optimizer.weight_decay=4.06e-05")
    assert (len(truth.trials), set(truth.space)) == (20, {"task.optimizer.lr", "task.optimizer.weight_decay"})
    assert truth.space["task.optimizer.lr"]["high"] == 1.0e-3
    (own,) = plan_of("table=paulus_2", "rows=lstm", "task.optimizer.lr=0.1").rows
    assert own.overrides[-1] == "task.optimizer.weight_decay=1e-05"


def test_a_row_may_have_given_settings_beside_given_ranges(tmp_path: Path) -> None:
    content = (CONFIGS / "table" / "paulus_2.yaml").read_text()
    searched = "estimator.temperature: {distribution: log_uniform, low: 0.3, high: 1.0}"
    (tmp_path / "mixed.yaml").write_text(content.replace("estimator.temperature: 1.22", searched))
    options, given = sweep._split(["table=mixed", "rows=arborescence"])
    (tree,) = sweep.make_plan(tables.load("mixed", tmp_path), options, given, CONFIGS).rows
    assert (len(tree.trials), set(tree.space)) == (20, {"estimator.temperature"})
    assert tree.space["estimator.temperature"]["high"] == 1.0
    assert tree.overrides[-1] == "task.optimizer.weight_decay=4.06e-05"


OWN = """
title: Own
overrides: [task=listops, budget=quick]
rows: {a: {title: A}}
columns: {accuracy: {metric: test/accuracy, title: Accuracy}}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title: Own", "title: Own\nselection: {metric: val/loss, direction: minimize}"),
         "own, a: selection: val/loss (minimize) is not what selects the checkpoint of this task; it is val/accuracy"),
        (("title: Own", "title: Own\nselection: {metric: val/accuracy, direction: minimize}"),
         "own, a: selection: val/accuracy (minimize) is not what selects"),
        (("test/accuracy", "test/acuracy"), "no test is known to log test/acuracy; nearest: test/accuracy"),
    ],
)  # fmt: skip
def test_a_wrong_metric_of_a_table_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    """In a table of the user's, on Hydra's search path."""
    (tmp_path / "mine" / "table").mkdir(parents=True)
    (tmp_path / "mine" / "table" / "own.yaml").write_text(OWN.replace(*change))
    code = sweep.main(["table=own", f"hydra.searchpath=[file://{tmp_path / 'mine'}]", "workers=0"])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1, 1)
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_the_command_of_a_row_finds_a_table_of_the_user_s(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "own.yaml").write_text(OWN)
    searchpath = f"hydra.searchpath=[file://{tmp_path}]"
    (found,), _ = report.find(["table=own"], group("table", [searchpath]), searchpath)
    assert found.command(found.table.rows[0]).endswith(f" {searchpath}")
    (ours,), _ = report.find(["table=paulus_1"], group("table", [searchpath]), searchpath)
    assert "searchpath" not in ours.command(ours.table.rows[0])


def test_rows_whose_data_are_not_to_be_had_run_if_they_are_asked_for() -> None:
    everything = plan_of("table=correia_1", "rows=all").rows
    assert [row.name for row in everything] == [row.name for row in tables.load("correia_1", CONFIGS / "table").rows]
    assert plan_of("table=correia_1", "rows=sfe_01").rows[0].name == "sfe_01"


def test_the_last_line_finds_a_table_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress = {"row": SimpleNamespace(done=2, failed=0, errors={})}
    queue: Any = SimpleNamespace(progress=lambda: progress)
    own = "hydra.searchpath=[pkg://mylab.configs]"
    for common, end in (("budget=smoke",), "r"), (("budget=smoke", own), f"r '{own}'"):
        plan: Any = SimpleNamespace(results="r", common=common, folder="f")
        assert _conclude(plan, queue, 0) == 0
        assert capsys.readouterr().out == f"2 trials done, 0 failed; python report.py {end}\n"


def test_another_sampler_makes_a_sweep_of_its_own() -> None:
    """Its trials must not be taken for independent ones: they learn from each other."""
    names = {plan_of("table=paulus_2", f"sampler={name}").name for name in ("tpe", "TPESampler", "qmc", "random")}
    assert len(names) == 3
    plan = plan_of("table=paulus_2", "sampler=tpe")
    assert plan.extra == ("sampler=TPESampler",)
    assert plan.common == ("budget=paper",)


def test_a_table_over_seeds_searches_nothing() -> None:
    (row,) = plan_of("table=struminsky_3", "rows=relax", "seeds=4,1").rows
    assert (row.trials, row.space) == ((4, 1), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel=paulus_2"], "tabel=paulus_2: did you mean table=paulus_2?"),
        (["table=paulus_9"], "no table paulus_9; nearest: paulus_"),
        (["workers=2"], "table=... is missing; there are"),
        (["table=paulus_2", "trails=5"], "trails=5: did you mean trials=5?"),
        (["table=paulus_2", "nonsense"], "nonsense: expected key=value"),
        (["table=paulus_2", "rows=lstn"], "table paulus_2 has no row lstn; nearest: lstm"),
        (["table=paulus_2", "trials=0"], "trials=0 must be a whole number, at least 1"),
        (["table=paulus_2", "trials=many"], "trials=many must be"),
        (["table=paulus_2", "seeds=0"], "seeds: paulus_2 selects among trials"),
        (["table=struminsky_3", "trials=5"], "trials: struminsky_3 searches nothing"),
        (["table=struminsky_3", "seeds=0,0"], "one is given twice"),
        (["table=struminsky_3", "seeds=-1"], "seeds=-1 must be"),
        (
            ["table=paulus_2", "budget=big"],
            "budget=big: no such choice; type budget=paper or budget=quick or budget=smoke",
        ),
        (["table=paulus_2", "launcher=ssh"], "launcher=ssh: no such choice; type launcher=local or"),
        (["table=paulus_2", "retry=yes"], "retry=yes: no such choice; type retry=false or retry=true"),
        (["table=paulus_2", "sampler=best"], "sampler=best: Optuna has"),
        (
            ["table=paulus_2", "rows=lstm", "budget=quick", "sampler=bruteforce"],
            "sampler=bruteforce cannot search lstm: FloatDistribut",
        ),
        (["table=paulus_2", "sampler=grid"], "GridSampler needs arguments that a sweep cannot give; type sampler=tpe"),
        (["table=struminsky_3", "sampler=tpe"], "sampler: struminsky_3 searches nothing"),
        (["table=l2x_movies", "sampler=tpe"], "sampler: the rows of l2x_movies share random draws"),
        (["table=paulus_2", "heartbeat=10", "grace=15"], "grace=15 must be at least twice heartbeat=10"),
        (["table=paulus_2", "workers=-1", "rows=lstm"], "workers=-1 must be"),
        (["table=paulus_2", "workers=1", "workers_per_gpu=1", "rows=lstm"], "type one of them"),
        (
            ["table=paulus_2", "rows=lstm", "task.dropuot=0.1"],
            "paulus_2, lstm: task.dropuot: no such option; nearest: dropout,",
        ),
        (["table=paulus_2", "rows=lstm", "storage=mysql://x@localhost/y"], "storage=mysql://x@localhost/y"),
        (["table=paulus_2", "++seed=3"], "seed=...: a sweep sets it for every run; type seeds=0,1,2 or trials=20"),
        (
            ["table=paulus_2", "paths.results=x"],
            "paths.results=...: a sweep sets it for every run; type results=<folder>",
        ),
        (["table=paulus_2", "task.dropout=0.1", "+task.dropout=0.2"], "task.dropout=...: it is given twice"),
        (["table=correia_1"], "says which files to put where; rows=all runs them where the data are there"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if arguments == ["table=correia_1"] and not (CONFIGS / "task" / "communication_game.yaml").exists():
        pytest.skip("there is no task communication_game yet")
    assert sweep.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("**/*.db"))


def test_a_sampler_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)  # an import of it fails
    assert sweep.main(["table=paulus_2", "rows=lstm", "budget=smoke", "sampler=cmaes"]) == 1
    line = "error: sampler=cmaes: no package cmaes; pip install cmaes, or type sampler=tpe or sampler=random\n"
    assert capsys.readouterr().err == line


@pytest.mark.skipif(shutil.which("srun") is not None, reason="Slurm is here")
def test_without_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    assert sweep.main(["table=paulus_2", "rows=lstm", "trials=1", "budget=smoke", "launcher=slurm"]) == 1
    assert capsys.readouterr().err.startswith("error: launcher=slurm: this machine has no srun; launcher=submitit")


def test_without_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.main(["table=paulus_2", "rows=lstm", "workers_per_gpu=2"]) == 1
    assert "shows no GPU" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    options = {"workers": "", "workers_per_gpu": "2", "launcher": "local"}
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(options)] == ["0", "3", "0", "3"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {option}=" in text for option in sweep.OPTIONS)
    assert all(name in text for name in tables.names(CONFIGS / "table"))


PROGRESS = {
    "lstm": Progress(5, 3, 1, 1, 0.8, 60.0, {4: "no"}),
    "arborescence": Progress(5, 0, 1, 0, None, None, {}),
}


def test_the_screen() -> None:
    table = tables.load("paulus_2", CONFIGS / "table")
    console = Console(record=True, width=150, file=io.StringIO())
    console.print(Screen(table, 2, "val/accuracy", console).grid(PROGRESS))
    text = console.export_text()
    assert [cell.strip() for cell in text.splitlines()[4].strip("│┃ ").split("│")] == [
        "LSTM",
        "3",
        "1",
        "1",
        "0",
        "0.8",
        "60 s",
    ]
    # LSTM: half a trial; arborescence: 4.5 trials; 60 s each, two workers.
    assert time_left(PROGRESS, 2) == 150.0
    assert "3 of 10 trials done, 2 running, 1 failed, about 2.5 min left" in text
    assert time_left({"a": PROGRESS["arborescence"]}, 2) is None


def command(table: str, *arguments: str) -> list[str]:
    """A sweep in which every run is a stand-in."""
    code = f"""
import dataclasses, sys
from structgrad.commands import sweep
whole = sweep.make_plan
def make_plan(*arguments):
    plan = whole(*arguments)
    common = (*plan.common, "row=x", "paths.runs=runs", "steps=5", "step_s=0.05")
    return dataclasses.replace(plan, command=(sys.executable, {str(FAKE)!r}), common=common, metric="val/score")
sweep.make_plan = make_plan
sys.exit(sweep.main({[f"table={table}", *arguments]!r}))
"""
    return [sys.executable, "-c", code]


def test_a_sweep_from_beginning_to_end(tmp_path: Path) -> None:
    run = command("paulus_2", "rows=lstm,arborescence", "trials=2", "budget=smoke", "workers=2")
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 trials done, 0 running, 0 failed" in done.stdout
    assert done.stdout.endswith("4 trials done, 0 failed; python report.py runs/tables/paulus_2_smoke\n")
    files = sorted(file.name for file in (tmp_path / "runs" / "tables" / "paulus_2_smoke").iterdir())
    assert files == ["arborescence-0.json", "arborescence-1.json", "lstm-0.json", "lstm-1.json"]
    content: dict[str, Any] = json.loads((tmp_path / "runs" / "tables" / "paulus_2_smoke" / "lstm-1.json").read_text())
    assert set(content["sweep"]["parameters"]) == {"task.optimizer.lr", "task.optimizer.weight_decay"}
    assert content["seed"] == 1
    again = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    starts = [len(f.read_text().split()) for f in (tmp_path / "runs" / "fake").glob("*/starts.log")]
    assert starts == [1, 1, 1, 1]


def test_a_sweep_in_which_all_fail_says_so(tmp_path: Path) -> None:
    run = command("paulus_2", "rows=lstm", "trials=2", "budget=smoke", "+fail=1")
    run[2] = run[2].replace('"row=x"', '"row=x", "fail=1"')
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "failed: lstm-0: it cannot work\nfailed: lstm-1: it cannot work\nerror: all 2 trials failed" in done.stderr


def test_results_that_cannot_be_written_are_found_before_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for option in ("results", "folder"):
        assert sweep.main(["table=paulus_2", "rows=lstm", "budget=smoke", f"{option}=file/x"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: cannot write to file/x/paulus_2_smoke: Not a directory; ")
        assert error.endswith(f"{option}=<folder> names another\n")


def test_what_ends_workers_three_times_ends_the_sweep_with_its_line(tmp_path: Path) -> None:
    run = command("paulus_2", "rows=lstm", "trials=2", "budget=smoke")
    # The results vanish when the sweep has begun.
    run[2] = run[2].replace(
        "sweep.make_plan = make_plan",
        "sweep.make_plan = make_plan\n"
        "from structgrad.experiments import launching\n"
        "begin = launching._start\n"
        "def spoiled(file, logs, place, add):\n"
        "    import pathlib, shutil\n"
        "    folder = pathlib.Path('runs/tables/paulus_2_smoke')\n"
        "    if folder.is_dir():\n"
        "        shutil.rmtree(folder); folder.touch()\n"
        "    return begin(file, logs, place, add)\n"
        "launching._start = spoiled\n",
    )
    done = subprocess.run(run, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    line = "[Errno 17] File exists: 'runs/tables/paulus_2_smoke'"
    assert f"worker 0 ended: {line}; it is started again" in done.stdout  # on the screen
    assert done.stderr.startswith(f"error: {line} (this ended workers 3 times; see ")
    assert done.stderr.count("\n") == 1


def test_a_stopped_sweep_says_again_and_goes_on(tmp_path: Path) -> None:
    run = command("paulus_2", "rows=lstm", "trials=2", "budget=smoke")
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("runs/fake/*/steps.log")):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the same command continues" in errors
    assert subprocess.run(run, capture_output=True, timeout=120).returncode == 0
    steps = [f.read_text().split() for f in tmp_path.glob("runs/fake/*/steps.log")]
    assert steps == [["1", "2", "3", "4", "5"]] * 2


def test_a_sweep_of_true_runs_finds_them_again(tmp_path: Path) -> None:
    """With train.py itself; a second sweep, of a queue of its own, trains nothing and has the same results."""
    arguments = [
        "table=struminsky_toy",
        "rows=matching_t_reinforce",
        "seeds=3",
        "budget=smoke",
        "trainer=cpu",
        "logger=csv",
    ]
    run = [sys.executable, "-m", "structgrad.commands.sweep", *arguments]
    first = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    (file,) = (tmp_path / "runs" / "tables" / "struminsky_toy_smoke").iterdir()
    content = json.loads(file.read_text())
    assert [step for step, _ in content["sweep"]["curve"]] == [9, 19]
    metrics = tmp_path / "runs" / folder_of(content) / "metrics.csv"
    before = metrics.stat().st_mtime_ns
    second = subprocess.run([*run, "folder=others", "results=others"], capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    again = json.loads((tmp_path / "others" / "struminsky_toy_smoke" / file.name).read_text())
    assert again == content
    assert metrics.stat().st_mtime_ns == before
