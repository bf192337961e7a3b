"""The command line itself, in processes of its own: exit codes and what is printed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = ["hydra.searchpath=[pkg://mylab.configs]", "task=find_window", "trainer=cpu", "logger=csv"]
SLOW = ["task._target_=tests.training.faulty.Faulty", "++task.pause=0.05"]


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "examples/own_package", "."))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *overrides, *OWN, f"paths.runs={folder}"]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


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
    assert "trainer.val_every_n_steps=3" in result.stderr.splitlines()[-2]
    assert "Traceback" not in result.stderr
