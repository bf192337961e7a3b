"""The report of a process about its kernels."""

from __future__ import annotations

import numba
import pytest

from structgrad.training.runtime import announce_compilation


def test_compilation_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    announce_compilation()
    numba.njit(lambda x: x + 1)(1)
    numba.njit(lambda x: x + 2)(1)
    assert capsys.readouterr().err.count("compiling kernels") == 1
