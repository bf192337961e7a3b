"""Runs that are stopped, killed, or already somebody's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from structgrad.training.errors import EXIT_AGAIN, EXIT_INTERRUPTED, Interrupted, Paused, RunHeldError
from structgrad.training.folder import held
from tests.training.in_process import ROOT, At, go, metrics, run_folder, summary


class KilledError(BaseException):
    """Stands for a SIGKILL."""


def kill() -> None:
    raise KilledError


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    go(folder)
    return folder


def same(folder: Path, undisturbed: Path) -> None:
    assert metrics(folder) == metrics(undisturbed)
    assert summary(folder)["metrics"] == summary(undisturbed)["metrics"]
    assert summary(folder)["best_step"] == summary(undisturbed)["best_step"]


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize("step", [0, 1, 4, 5, 8, 11])
def test_sigterm_saves_between_two_steps(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, validating: bool
) -> None:
    """In the middle, on a logged step, on a step that is validated, in the validation."""
    if validating and (step == 0 or step % 4):
        pytest.skip("nothing is validated there")
    before = signal.getsignal(signal.SIGTERM)
    At(monkeypatch, step, send(signal.SIGTERM), validating=validating)
    with pytest.raises(Interrupted, match=f"SIGTERM; the same command continues from step {step + (not validating)}"):
        go(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (run_folder(tmp_path) / "summary.json").exists()
    go(tmp_path)
    same(tmp_path, undisturbed)


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_run_pauses_and_is_continued_by_the_same_command(undisturbed: Path, tmp_path: Path, step: int) -> None:
    """The place of a pause is no part of its identity, and the run says how far it is."""
    progress = tmp_path / "elsewhere" / "progress.json"
    given = (f"trainer.pause_at={step}", f"paths.progress={progress}")
    for _ in range(2):  # the second time it has nothing left to do
        with pytest.raises(Paused, match=f"paused at step {step}; the same command without trainer.pause_at={step}"):
            go(tmp_path / "runs", *given)
        followed = json.loads(progress.read_text())
        assert followed["step"] == step // 4 * 4 or followed["step"] == step
        assert [at for at, _ in followed["curve"]] == list(range(3, step, 4))
    go(tmp_path / "runs", *given[1:])
    same(tmp_path / "runs", undisturbed)
    assert json.loads(progress.read_text())["step"] == 12
    go(tmp_path / "runs", *given)  # which is finished


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    At(monkeypatch, 5, lambda: [send(signal.SIGINT)() for _ in range(2)])
    with pytest.raises(Interrupted, match="Ctrl-C; the same command continues from the last checkpoint"):
        go(tmp_path)


def test_exit_codes_tell_again_from_interrupted() -> None:
    assert Interrupted(signal.SIGTERM).exit_code == EXIT_AGAIN == 75
    assert Interrupted(signal.SIGINT).exit_code == EXIT_INTERRUPTED == 130


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    """The second is told who has it and writes nothing."""
    go(tmp_path, "trainer.max_steps=4")
    folder = run_folder(tmp_path)
    (folder / "summary.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    code = (
        "import sys; from pathlib import Path; from structgrad.training.folder import held\n"
        f"with held(Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RunHeldError, match=f"process {other.pid} on .* has this run") as caught:
        go(tmp_path, "trainer.max_steps=4")
    assert caught.value.exit_code == EXIT_AGAIN
    for file, time in before.items():
        if file.is_file() and file.name != "lock":
            assert file.stat().st_mtime_ns == time, file
    other.kill()  # a lock dies with its process
    other.wait()
    go(tmp_path, "trainer.max_steps=4")
    assert summary(tmp_path)
    with held(folder):  # finished: nobody needs the lock to read it
        go(tmp_path, "trainer.max_steps=4")


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize("step", [3, 4, 6, 8])
def test_a_kill_leaves_no_line_twice(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, validating: bool
) -> None:
    """Before the first checkpoint, between two, in a validation."""
    if validating and step % 4:
        pytest.skip("nothing is validated there")
    At(monkeypatch, step, kill, validating=validating)
    with pytest.raises(KilledError):
        go(tmp_path)
    go(tmp_path)
    same(tmp_path, undisturbed)
