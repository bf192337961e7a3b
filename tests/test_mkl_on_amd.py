"""The library of docs/precision.md, by which MKL uses AVX-512 on processors by AMD."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.mkl_on_amd import SOURCE, build

PROGRAM = """
import ctypes, torch
x, y = (torch.randn(300, 200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
exact = x.double() @ y.double().mT
bound = 200 * 2**-24 * (x.abs() @ y.abs().mT)  # of a sum of 200 products, in any order
assert ((x @ y.mT - exact).abs() <= bound).all()
print(ctypes.CDLL(None).mkl_serv_intel_cpu_true())
"""


def test_the_page_and_the_benchmark_build_the_same_library(root: Path) -> None:
    assert f"echo '{SOURCE.strip()}' | cc" in (root / "docs" / "precision.md").read_text()


@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_products_stay_within_the_rounding_of_float32(tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(build(tmp_path))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
