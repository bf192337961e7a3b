"""The report of a process about its kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import pytest

from structgrad.training.runtime import announce_compilation, let_threads_sleep


def test_compilation_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    announce_compilation()
    numba.njit(lambda x: x + 1)(1)
    numba.njit(lambda x: x + 2)(1)
    assert capsys.readouterr().err.count("compiling kernels") == 1


def test_threads_sleep_under_the_commands() -> None:
    """They ask for it before they import torch, which reads the variable once."""
    code = (
        "import contextlib, os, sys; from structgrad.commands import evaluate, train; "
        "assert 'torch' not in sys.modules; sys.argv = ['train', 'task=none']\n"
        "with contextlib.suppress(SystemExit): train.main()\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "passive"


def test_threads_wait_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not let_threads_sleep(), "torch has been imported"
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
