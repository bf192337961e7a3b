"""What a user may rely on: identity, resume, errors of one line that lose nothing.

The task is the one of ``examples/own_package``.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OWN = ["hydra.searchpath=[pkg://mylab.configs]", "task=find_window", "trainer=cpu"]
FAULTY = "task._target_=tests.training.faulty.Faulty"
SLOW = [FAULTY, "++task.pause=0.05"]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "train.py", *OWN, f"paths.runs={folder}", *overrides]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("src", "examples/own_package")),
        "OMP_NUM_THREADS": "1",
    }


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True)


def metrics(folder: Path) -> list[list[str]]:
    (file,) = folder.glob("**/metrics.csv")
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


def summary(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("**/summary.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs")
    result = launch(folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_a_run_leaves_everything_in_its_folder(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    (run,) = (folder / "find_window").iterdir()
    assert run.name.startswith("window-exact_sum-paper-s0-")
    assert str(run) in printed
    for name in ("config.yaml", "environment.json", "metrics.csv", "summary.json", "tensorboard"):
        assert (run / name).exists(), name
    for name in ("best", "last"):
        torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    content = summary(folder)
    assert content["metrics"]["test/overlap"] > 0.5
    assert content["config"]["task"]["length"] == 10
    assert content["training_s"] > 0
    steps = {int(row[0]) for row in metrics(folder)[1:] if row[1] == "val/loss"}
    assert len(steps) == 6


def test_a_finished_run_says_so_and_is_not_repeated(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = metrics(folder)
    # Where a run is kept and how it is logged do not decide its result.
    result = launch(folder, "logger=csv", "trainer=auto", f"paths.data={folder}")
    assert result.returncode == 0, result.stderr
    assert "this run is finished" in result.stdout + result.stderr
    assert metrics(folder) == before


def test_whatever_decides_the_result_makes_another_run(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    result = launch(folder, "task.hidden=17", "trainer.max_steps=20")
    assert result.returncode == 0, result.stderr
    assert len(list((folder / "find_window").iterdir())) == 2
    (other,) = (run for run in (folder / "find_window").iterdir() if "hidden: 17" in (run / "config.yaml").read_text())
    for file in other.rglob("*"):
        if file.is_file():
            file.unlink()
    for directory in sorted((d for d in other.rglob("*") if d.is_dir()), reverse=True):
        directory.rmdir()
    other.rmdir()


def test_a_killed_run_continues_to_the_same_metrics(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Dropout makes the training random; killed in mid-epoch, it must still end the same, to the last digit."""
    process = subprocess.Popen(
        [*command(tmp_path), *SLOW],
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
    result = launch(tmp_path, *SLOW)
    assert result.returncode == 0, result.stderr
    assert "continuing from step" in result.stdout + result.stderr
    assert metrics(tmp_path) == metrics(finished[0])
    assert summary(tmp_path)["metrics"] == summary(finished[0])["metrics"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    assert launch(tmp_path, "trainer.max_steps=20").returncode == 0
    (run,) = (tmp_path / "find_window").iterdir()
    (run / "summary.json").unlink()
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    result = launch(tmp_path, "trainer.max_steps=20")
    assert result.returncode == 1
    assert f"checkpoint {last} is damaged" in result.stderr
    assert "Traceback" not in result.stderr
    last.unlink()
    again = launch(tmp_path, "trainer.max_steps=20")
    assert again.returncode == 0, again.stderr
    assert "continuing from step" in again.stdout + again.stderr


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_best(tmp_path: Path) -> None:
    result = launch(tmp_path, FAULTY, "++task.break_at=15")
    assert result.returncode == 1
    assert "the training loss is not finite at step 15" in result.stderr
    (best,) = tmp_path.glob("**/best.ckpt")
    assert str(best) in result.stderr
    state = torch.load(best, weights_only=True)
    assert state["global_step"] == 10
    assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=listop"], ["listop", "listops"]),
        (["task.hiden=3"], ["hiden"]),
        (["estimator=sst", "estimator.temperature=0"], ["estimator", "temperature"]),
        (["trainer.max_steps=7"], ["trainer.max_steps=7", "trainer.val_every_n_steps=10"]),
        (["paths.test_file=x.tsv"], ["find_window reads no published test file"]),
        (["structure=none", "estimator=exact_sum"], ["no latent variable"]),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    result = launch(tmp_path, *overrides)
    assert result.returncode == 1
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = launch(tmp_path / "file")
    assert result.returncode == 1
    assert f"cannot write to {tmp_path / 'file'}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_disk_that_fills_up_is_reported(tmp_path: Path) -> None:
    """Checkpoints go to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    assert launch(tmp_path, "trainer.max_steps=20").returncode == 0
    (run,) = (tmp_path / "find_window").iterdir()
    (run / "summary.json").unlink()
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").symlink_to("/dev/full")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    result = launch(tmp_path, "trainer.max_steps=20")
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_tracking_service_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    result = launch(tmp_path, "logger=wandb")
    assert result.returncode == 1
    assert "logger wandb: " in result.stderr
    assert "logger=default needs no account" in result.stderr
    assert "Traceback" not in result.stderr


def test_wandb_offline_gets_the_whole_configuration(tmp_path: Path) -> None:
    result = launch(tmp_path, "logger=wandb", "logger.wandb.offline=true", "trainer.max_steps=20")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("**/wandb/offline-run-*/*.wandb"))


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    result = launch(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=20")
    assert result.returncode == 0, result.stderr
    assert summary(tmp_path)["metrics"]["test/overlap"] > 0


def test_help_lists_every_group() -> None:
    result = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0
    for group in ("task", "structure", "estimator", "budget", "trainer", "logger"):
        assert f"\n{group}: " in result.stdout, result.stdout


def test_a_finished_run_is_tested_on_a_published_file(tmp_path: Path) -> None:
    file = tmp_path / "published.tsv"
    file.write_text("5\t( ( ( [MAX 2 ) 5 ) ] )\n7\t[MIN 9 [MAX 7 1 ] ]\n")
    options = ["task=listops", "budget=smoke", "trainer=cpu", f"paths.runs={tmp_path}", f"paths.cache={tmp_path}"]

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", *options, *overrides]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)

    assert run().returncode == 0
    result = run(f"paths.test_file={file}")
    assert result.returncode == 0, result.stderr
    assert "this run is finished" in result.stdout + result.stderr
    (tested,) = tmp_path.glob("listops/*/test-published.json")
    assert json.loads(tested.read_text())["metrics"].keys() >= {"test/accuracy", "test/precision"}
    file.write_text("5\t[MAX 2 5 ]\n4\t[MAX 2 5 ]\n")
    result = run(f"paths.test_file={file}")
    assert result.returncode == 1
    assert "line 2" in result.stderr
    assert "Traceback" not in result.stderr
