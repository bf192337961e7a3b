"""GPU kernels without a GPU: they run in Triton's interpreter and are compiled for a device that is not there.

``python -m tests.kernels CODE`` runs ``CODE``, which calls operators on CPU tensors. In place of a launch, each kernel
is compiled for an H100 (compute capability 9.0), down to machine code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from packaging.version import Version
from torch import Tensor

from structgrad.algorithms import gpu

ROOT = Path(__file__).resolve().parent.parent
#: Of an H100: bytes of shared memory that one program may have.
SHARED = 227 * 1024

needs_triton = pytest.mark.skipif(gpu.triton is None, reason="needs triton")
#: Lanes of a block that are masked out may overflow; NumPy, which interprets the kernels, says so.
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def by_operators(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` as on a GPU: on one if there is one, else on the CPU in Triton's interpreter.

    Tensors among the arguments and results are on the CPU, and stay connected for autograd.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (
        device == "cpu"
        and Version(gpu.triton.__version__) < Version("3.7")
        and Version(numpy.__version__) >= Version("2.4")
    ):
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    before = gpu.DEVICES
    gpu.DEVICES = {*before, device}
    try:
        results = function(*moved)
    finally:
        gpu.DEVICES = before
    return tuple(r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()


def compiled(code: str) -> str:
    """Run ``code`` as described above, in a process of its own; one line for each kernel compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _compile(kernel: Any, programs: int, *arguments: Tensor | float, warps: int, **constants: int) -> None:
    """In place of ``gpu.launch``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.int64: "*i64",
        torch.int32: "*i32",
        torch.uint8: "*u8",
        torch.bool: "*i1",
    }
    numbers: dict[str, Any] = dict(constants)
    signature = {}
    for name, a in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(a, Tensor):
            signature[name] = pointers[a.dtype]
        elif a == 1 and isinstance(a, int):  # as when it is launched
            signature[name], numbers[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(a, float) else "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=numbers)
    binary = gpu.triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert binary.asm["cubin"]
    assert binary.metadata.shared <= SHARED
    types = " ".join(signature.values())
    print(f"{kernel.__name__} {types} {constants} {warps} warps, {binary.metadata.shared} bytes shared")


if __name__ == "__main__":
    gpu.launch = _compile
    gpu.DEVICES = {*gpu.DEVICES, "cpu"}
    exec(sys.argv[1])
