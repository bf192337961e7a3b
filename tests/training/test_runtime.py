"""The report of a process about its kernels."""

from __future__ import annotations

import subprocess
import sys

#: In a process of its own: whether something was compiled before depends on the tests before.
PROGRAMME = """
import numba
from structgrad.training.runtime import announce_compilation
announce_compilation()
announce_compilation()
numba.njit(lambda x: x + 1)(1)
numba.njit(lambda x: x + 2)(1)
"""


def test_compilation_is_announced_once() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAMME], capture_output=True, text=True, check=True)
    assert ran.stderr.count("compiling kernels") == 1
