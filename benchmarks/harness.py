"""Timing: medians of repeats, opponents in the same run, ratios against them."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


@dataclass
class Row:
    """One line of a benchmark: ours against an opponent measured in the same run, and the bound we set ourselves.

    Times are milliseconds, medians. ``published`` is a figure quoted from elsewhere, not measured here.
    """

    what: str
    size: str
    ours: float
    opponent: str = ""
    theirs: float | None = None
    bound: float | None = None
    published: float | None = None


def training_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """What a training step does with the loss of a batch, to be measured."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure(fn: Callable[[], Any], *, repeats: int = 15, warmup: int = 3) -> float:
    """Median wall-clock seconds of ``fn()``; waits for the GPU if there is one."""

    def once() -> float:
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(warmup):
        once()
    gc.collect()
    gc.disable()
    try:
        return statistics.median(once() for _ in range(repeats))
    finally:
        gc.enable()


def milliseconds(fn: Callable[[], Any], **options: int) -> float:
    """:func:`measure` in milliseconds."""
    return 1e3 * measure(fn, **options)


def matmul_rate(n: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square matrix product on this machine, the yardstick for training steps."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / measure(lambda: a @ b, repeats=9)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(name: str, **content: Any) -> None:
    """Write ``results/benchmarks/<name>.json`` if the environment says so (``RECORD=1``), else say that it was not."""
    if os.environ.get("RECORD", "") in ("", "0"):
        print(f"not recorded; with RECORD=1 it is, in results/benchmarks/{name}.json")
        return
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")


def report(name: str, rows: list[Row], **extra: Any) -> None:
    """Print the rows as a table and :func:`record` them."""
    print(f"{'what':48} {'size':22} {'ours ms':>9} {'theirs ms':>10} {'ratio':>7} {'bound':>7}  opponent")
    for row in rows:
        theirs = f"{row.theirs:10.3f}" if row.theirs is not None else " " * 10
        ratio = f"{row.theirs / row.ours:6.1f}x" if row.theirs is not None else " " * 7
        bound = f"{row.bound:7.2f}" if row.bound is not None else " " * 7
        miss = "  MISSED" if row.bound is not None and row.ours > row.bound else ""
        print(f"{row.what:48} {row.size:22} {row.ours:9.3f} {theirs} {ratio} {bound}  {row.opponent}{miss}")
    for key, value in extra.items():
        print(f"{key}: {value}")
    record(name, rows=[asdict(row) for row in rows], **extra)
