"""Progress on a terminal and elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from structgrad.training import callbacks
from structgrad.training.callbacks import ProgressBar, ProgressLines


def trainer(step: int) -> Any:
    return SimpleNamespace(
        global_step=step,
        max_steps=100,
        accumulate_grad_batches=1,
        is_global_zero=True,
        progress_bar_metrics={"train/loss": 1.5},
        loggers=[],
        current_epoch=0,
    )


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten seconds a step, a run resumed at step 40: a line at least every 30 seconds, with the time left."""
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    lines = ProgressLines(every=30)
    lines.on_train_start(trainer(40), None)  # type: ignore[arg-type]
    for step in range(41, 48):
        clock[0] += 10
        lines.on_train_batch_end(trainer(step), None, None, {}, 0)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [
        "step 43/100  loss 1.5  9.5 min left",
        "step 46/100  loss 1.5  9.0 min left",
    ]


def test_a_slow_first_step_says_nothing_about_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It compiles kernels: 100 seconds, and ten for each of the others."""
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    lines = ProgressLines(every=30)
    lines.on_train_start(trainer(0), None)  # type: ignore[arg-type]
    for step in range(1, 5):
        clock[0] += 100 if step == 1 else 10
        lines.on_train_batch_end(trainer(step), None, None, {}, 0)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == ["step 1/100  loss 1.5", "step 4/100  loss 1.5  16.0 min left"]


def test_the_bar_of_a_resumed_run_knows_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar._trainer = trainer(40)
    bar.on_train_start()
    bar.on_train_epoch_start(bar.trainer)
    assert (bar.train_progress_bar.total, bar.train_progress_bar.n, bar.train_progress_bar.initial) == (100, 40, 40)
    assert "40/100" in str(bar.train_progress_bar)
