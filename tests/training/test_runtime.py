"""What a process says about its kernels, and how it keeps memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

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


#: The page faults of 20 tensors of 64 MiB, one after another. Until glibc has cached what alignment cuts off,
#: the first eight take new memory.
FAULTS = """
import resource, torch
from structgrad.training.runtime import tune_allocator
assert tune_allocator()
for _ in range(40):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_memory_of_large_tensors_is_used_again() -> None:
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000  # one tensor has 16,384 pages of 4 KiB
