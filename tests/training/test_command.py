"""The command line itself, in processes of its own: exit codes and what is printed."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest

from structgrad.commands.train import command_of, next_steps, settings_in_force
from tests.training.in_process import composed

ROOT = Path(__file__).resolve().parents[2]
OWN = ["hydra.searchpath=[pkg://mylab.configs]", "task=find_window", "trainer=cpu", "logger=csv"]
SLOW = ["task._target_=tests.training.faulty.Faulty", "++task.pause=0.05"]


def environment() -> dict[str, str]:
    """Without what would reach a tracking service."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "examples/own_package", "."))
    others = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return others | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def launch(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *overrides, *OWN, f"paths.runs={folder}"]
    return subprocess.run(command, cwd=ROOT, env=environment() | variables, capture_output=True, text=True)


def test_the_command_of_a_run_finds_your_package_and_leaves_out_what_a_sweep_sets() -> None:
    own = "hydra.searchpath=[pkg://mylab.configs]"
    hydra = ["hydra.mode=RUN", own]
    assert command_of(["task=toy", "paths.results=r"], []) == "python train.py task=toy paths.results=r"
    made = command_of(["task=toy", "seed=1", "paths.results=x/finished", "paths.progress=x/progress"], hydra)
    assert made == f"python train.py task=toy seed=1 '{own}'"


def port() -> str:
    """A free port that the kernel gives to nobody who asks for any: tests beside this one cannot take it by chance."""
    for number in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", number)) != 0:
                return str(number)
    raise OSError("no free port between 20000 and 32000")


def test_what_a_run_prints_is_ours(tmp_path: Path) -> None:
    """No line of Lightning's about devices, advertisements or checkpoints, and no deprecation of other libraries."""
    result = launch(tmp_path, "trainer.max_steps=4", "trainer.val_every_n_steps=2")
    assert result.returncode == 0, result.stderr
    printed = result.stdout + result.stderr
    foreign = (
        "TPU",
        "GPU available",
        "Tip",
        "http",
        "Restoring",
        "Loaded model",
        "`max_steps",
        "Warning",
        "deprecated",
    )
    assert not [line for line in printed.splitlines() if any(word in line for word in foreign)], printed
    assert f"run:      {tmp_path}" in printed
    # The first command of a user says what to do next: the commands are right.
    page, seeds = re.findall(r"^(?:next: )? +\S*python (\S+\.py .*[^p])$", result.stdout, re.MULTILINE)
    assert page == f"report.py runs --runs {tmp_path} --html runs.html"
    assert seeds.startswith("train.py -m trainer.max_steps=4 trainer.val_every_n_steps=2 'hydra.searchpath=[")
    assert seeds.endswith(" seed=1,2,3")


def test_what_to_do_next_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder of runs, files that exist, and three seeds that are not yet there."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])
    monkeypatch.chdir(tmp_path)
    lines = next_steps(["task=toy", "seed=2", "paths.runs='a b'"], "a b", 2).splitlines()
    report, train = (shlex.split(lines[i].removeprefix("next:")) for i in (0, 2))
    for command in (report, train):
        assert shutil.which(command[0])
        assert Path(command[1]).is_file()
    assert report[2:] == ["runs", "--runs", "a b", "--html", "runs.html"]
    assert train[2:] == ["-m", "task=toy", "paths.runs='a b'", "seed=1,3,4"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (
            "[pkg://nowhere.configs]",
            "hydra.searchpath: no package nowhere for pkg://nowhere.configs; is it on PYTHONPATH?",
        ),
        ("(x", "hydra.searchpath=(x: extraneous input '(' expecting "),
    ],
)
def test_a_search_path_that_is_wrong(place: str, reason: str) -> None:
    command = [sys.executable, "train.py", "task=toy", f"hydra.searchpath={place}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {reason}")
    assert result.stderr.count("\n") == 1


def test_the_settings_in_force_are_named() -> None:
    """With the values that they have now: the command line may have changed them."""
    for given, line in {
        "estimator=sst": "settings: settings/listops/arborescence-sst.yaml sets estimator.clip_range=15.0",
        "estimator.clip_range=3": "settings: settings/listops/arborescence-sst.yaml sets estimator.clip_range=3",
        "structure=spanning_tree estimator=nvil": None,
    }.items():
        config, choices, _ = composed("task=listops", *given.split())
        assert settings_in_force(config, choices.get("settings"), None) == line, given


@pytest.mark.parametrize(("signal_", "name", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_stopped_command_says_what_it_kept(tmp_path: Path, signal_: signal.Signals, name: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "train.py", *OWN, *SLOW, f"paths.runs={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would the child of a test that runs in one.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("**/last.ckpt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {name}; the same command continues from step" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_several_jobs_go_on_after_a_failure_and_end_with_a_list(tmp_path: Path) -> None:
    result = launch(tmp_path, "-m", "trainer.max_steps=2", "trainer.val_every_n_steps=1,3,2")
    assert result.returncode == 1
    assert len(list(tmp_path.glob("find_window/*/summary.json"))) == 2
    assert "1 without a result:" in result.stderr
    assert "2 runs:" in result.stdout  # beside each other
    assert "95 % intervals of Student's t" in result.stdout
    assert "trainer.val_every_n_steps=3" in result.stderr.splitlines()[-2]
    assert "Traceback" not in result.stderr


def test_jobs_leave_no_folder_named_after_the_home() -> None:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for given in ("~/x", "$HOME/x"):
            config = hydra.compose("config", ["task=toy", f"paths.runs='{given}'"], return_hydra_config=True)
            assert config.hydra.sweep.dir == str(Path.home() / "x")


def test_jobs_without_a_place_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = launch(tmp_path / "file" / "x", "-m", "trainer.max_steps=1,2")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot use ")
    assert "Traceback" not in result.stderr


def test_jobs_may_go_over_tasks(tmp_path: Path) -> None:
    """Also where the defaults of structure and estimator are those of the task."""
    command = ["train.py", "-m", "task=toy,listops", "estimator=sst,imle", "budget=smoke", "trainer.max_steps=0"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert "4 without a result:" in result.stderr
    for task in ("toy", "listops"):
        for estimator in ("sst", "imle"):
            assert f"  task={task} estimator={estimator} budget=smoke" in result.stderr
    assert result.stderr.count("    trainer.max_steps must be a whole number of at least 1; got 0") == 4


def test_a_killed_run_continues_to_the_same_metrics(tmp_path: Path) -> None:
    """Dropout makes the training random; killed in mid-epoch, it must still end the same, to the last digit."""
    short = ["trainer.max_steps=20", "trainer.val_every_n_steps=5", *SLOW]
    process = subprocess.Popen(
        [sys.executable, "train.py", *OWN, *short, f"paths.runs={tmp_path / 'killed'}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("**/last.ckpt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=60)
    assert not list(tmp_path.glob("**/summary.json")), "the run was too fast to be killed"
    result = launch(tmp_path / "killed", *short)
    assert result.returncode == 0, result.stderr
    assert "continuing from step" in result.stdout
    assert launch(tmp_path / "whole", *short).returncode == 0
    killed, whole = ((tmp_path / name).glob("find_window/*/metrics.csv") for name in ("killed", "whole"))
    assert next(killed).read_text() == next(whole).read_text()


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    short = ["trainer.max_steps=4", "trainer.val_every_n_steps=4"]
    result = launch(tmp_path, *short, "trainer.strategy=ddp", "trainer.devices=2", MASTER_PORT=port())
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("find_window/*/summary.json")
    assert json.loads(file.read_text())["metrics"]["test/overlap"] > 0


def test_help_lists_what_a_user_chooses_from() -> None:
    result = subprocess.run(
        [sys.executable, "train.py", "--help", "hydra.searchpath=[pkg://mylab.configs]"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for group, choice in {"task": "find_window", "structure": "window", "estimator": "sst", "budget": "quick"}.items():
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"{group}: "))
        assert choice in line.replace(",", " ").split()
    assert "budget=smoke                      the quick debug" in result.stdout
    for internal in ("budgets", "settings", "hydra/"):
        assert f"\n{internal}" not in result.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["task=listop"], "nearest: listops,"), (["task.hiden=3"], "nearest: hidden,"), (["seed=-1"], "seed must be")],
)
def test_an_error_is_one_line(tmp_path: Path, overrides: list[str], words: str) -> None:
    command = [sys.executable, "train.py", *OWN, f"paths.runs={tmp_path}", *overrides]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.iterdir())


def test_an_error_does_not_wait_for_what_only_training_needs() -> None:
    """Seconds of imports: Lightning, the compiler, data sets, plots."""
    code = (
        "import sys, structgrad.commands.train, structgrad.training.run\n"
        "import structgrad.data.cache, structgrad.data.images\n"
        "late = ('pytorch_lightning', 'torch._dynamo', 'sympy', 'datasets', 'matplotlib')\n"
        "print([m for m in late if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_a_tracking_service_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", *OWN, "logger=wandb", f"paths.runs={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "logger wandb: " in line
    assert "logger=default needs no account" in line
    assert "Traceback" not in result.stderr
