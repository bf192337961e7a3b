"""Timing: medians of repeats, opponents in the same run, ratios against them.

Processor time is shown beside wall time. Ratios, bounds and rates use processor time, because
others may use the machine as well. It counts all threads of this process, so two threads that share
the work perfectly take as much as one.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


#: torch's numbers of threads that are measured.
THREADS = tuple(range(1, 1 + min(2, os.cpu_count() or 1)))


@dataclass(frozen=True)
class Time:
    """Median milliseconds of a call, by the clock on the wall and of the processor, all threads together."""

    wall: float
    processor: float

    def __mul__(self, calls: float) -> Time:
        return Time(self.wall * calls, self.processor * calls)

    def __truediv__(self, parts: float) -> Time:
        return self * (1 / parts)

    def rate(self, operations: float) -> float:
        """Operations a second of one core."""
        return 1e3 * operations / self.processor


@dataclass
class Row:
    """One line of a benchmark: ours against an opponent measured in the same run, and the bound we
    set ourselves.

    ``bound`` is in milliseconds of the processor; ``share`` is that of :func:`matmul_rate`.
    ``published`` is a figure quoted from elsewhere, in milliseconds on the wall, not measured here.
    How many ``threads`` torch uses and the ``precision`` of its products are read when the row is
    made.
    """

    what: str
    size: str
    ours: Time
    opponent: str = ""
    theirs: Time | None = None
    bound: float | None = None
    published: float | None = None
    share: float | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)


def settings(threads: Sequence[int] = THREADS, precisions: Sequence[str] = ("highest",)) -> Iterator[None]:
    """Set every number of threads with every precision of products, one after another; restore them at the end."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        for count in threads:
            for precision in precisions:
                torch.set_num_threads(count)
                torch.set_float32_matmul_precision(precision)
                yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def training_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step with the loss of a batch, for measurement."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure(fn: Callable[[], Any], *, repeats: int = 15, warmup: int = 3) -> Time:
    """Time of ``fn()``; waits for the GPU if there is one."""

    def once() -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - processor

    for _ in range(warmup):
        once()
    gc.collect()
    gc.disable()
    try:
        walls, processors = zip(*(once() for _ in range(repeats)), strict=True)
    finally:
        gc.enable()
    return Time(1e3 * statistics.median(walls), 1e3 * statistics.median(processors))


def matmul_rate(n: int = 1024) -> float:
    """FLOP/s of one core in a square matrix product, the yardstick for training steps.

    In the precision that torch is set to: with ``medium``, which allows products of bfloat16
    numbers, that of a product of such numbers, if it is the faster one.
    """
    types = [torch.float32, *([torch.bfloat16] if torch.get_float32_matmul_precision() == "medium" else [])]
    rates = []
    for dtype in types:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        rates.append(measure(lambda a=a, b=b: a @ b, repeats=9).rate(2 * n**3))  # type: ignore[misc]
    return max(rates)


def processor() -> str:
    """The model of the processor if Linux names it, else its architecture."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def machine() -> dict[str, Any]:
    """The machine on which the numbers were measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "device": device,
        "cores": os.cpu_count(),
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


def report(name: str, rows: list[Row], *, of_wall: bool = False, **extra: Any) -> None:
    """Print the rows as a table and :func:`record` them.

    Milliseconds: on the wall, of the processor. Ratios are of the latter, or ``of_wall``, for what
    runs on a GPU.
    """
    head = f"{'what':48} {'size':22} {'threads':>7} {'products':8} {'ours: wall':>10} {'cpu':>9} {'theirs: wall':>12}"
    print(f"{head} {'cpu':>10} {'ratio':>7} {'share':>5} {'bound':>8}  opponent")
    for row in rows:
        ours, theirs, bound = row.ours, row.theirs, row.bound
        line = f"{row.what:48} {row.size:22} {row.threads:7} {row.precision:8} {ours.wall:10.3f} {ours.processor:9.3f}"
        line += f" {theirs.wall:12.3f} {theirs.processor:10.3f}" if theirs else " " * 24
        ratio = theirs and (theirs.wall / ours.wall if of_wall else theirs.processor / ours.processor)
        line += f" {ratio:6.1f}x" if ratio else " " * 8
        line += f" {row.share:5.2f}" if row.share is not None else " " * 6
        line += f" {bound:8.2f}" if bound is not None else " " * 9
        print(f"{line}  {row.opponent}{'  MISSED' if bound is not None and ours.processor > bound else ''}")
    for key, value in extra.items():
        print(f"{key}: {value}")
    record(name, rows=[asdict(row) for row in rows], load_average=round(os.getloadavg()[0], 2), **extra)
