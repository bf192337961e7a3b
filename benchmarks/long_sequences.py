"""Long sequences and large trees in float32, log-partition with its gradient: processor time,
memory, error.

    python -m benchmarks.long_sequences            # prints the table
    RECORD=1 python -m benchmarks.long_sequences   # and writes it into docs/scaling.md

Every line is measured in its own process, so its peak of memory is its own; that of a process which
only imports is subtracted. Errors are against float64: relative for the log-partition, absolute for
its gradient.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from structgrad.experiments.markdown import insert
from structgrad.structures import Alignment, Arborescence, Ctc, LinearChain, SpanningTree, Structure

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"


def chain(n: int, extreme: bool = False) -> tuple[Structure, Tensor]:
    """A chain of 32 labels; scores are normal, or uniform in +-100."""
    shape = (1, n - 1, 32, 32)
    return LinearChain(32), 200 * torch.rand(shape) - 100 if extreme else torch.randn(shape)


LINES: dict[str, Callable[[], tuple[Structure, Tensor]]] = {
    "LinearChain(32), n 2,500": lambda: chain(2_500),
    "LinearChain(32), n 5,000": lambda: chain(5_000),
    "LinearChain(32), n 10,000": lambda: chain(10_000),
    "LinearChain(32), n 10,000, scores within 100": lambda: chain(10_000, extreme=True),
    "Ctc, 10,000 frames, 32 labels": lambda: (Ctc(), torch.randn(1, 10_000, 65, 3)),
    "Alignment, 1,000 x 1,000": lambda: (Alignment(), torch.randn(1, 1_000, 1_000)),
    "Alignment, 2,000 x 2,000": lambda: (Alignment(), torch.randn(1, 2_000, 2_000)),
    "Arborescence, n 500": lambda: (Arborescence(), torch.randn(1, 500, 500)),
    "Arborescence, n 500, scores within 100": lambda: (Arborescence(), 200 * torch.rand(1, 500, 500) - 100),
    "SpanningTree, n 500": lambda: (SpanningTree(), torch.randn(1, 500, 500)),
}


def peak() -> float:
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(name: str) -> str:
    """The cells of a line."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    structure, scores = LINES[name]()
    before = peak()
    leaf = scores.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        value = structure.log_partition(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    call()  # builds the graph
    memory, start = peak() - before, time.process_time()
    value, slope = call()
    seconds = time.process_time() - start
    wide = scores.double().requires_grad_()
    exact = structure.log_partition(wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    off = ((value - exact) / exact).abs().max().item()
    return f"{seconds:.2f} | {memory:.0f} | {off:.0e} | {(slope - exact_slope).abs().max().item():.0e}"


def main() -> None:
    """One line, or all of them."""
    if len(sys.argv) > 1:
        print(measured(sys.argv[1]))
        return
    lines = [
        "| log-partition with gradient, float32 | s | MiB | error of value | of gradient |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in LINES:
        done = subprocess.run([sys.executable, "-m", __spec__.name, name], check=True, capture_output=True, text=True)
        lines.append(f"| {name} | {done.stdout.strip()} |")
        print(lines[-1], flush=True)
    if os.environ.get("RECORD", "") not in ("", "0"):
        insert(PAGE, "long", "\n".join(lines))


if __name__ == "__main__":
    main()
