"""Training steps on a processor by AMD, with and without MKL's kernels for AVX-512.

MKL multiplies torch's float32 matrices. It asks who made the processor, and gives those by AMD its
kernels for AVX2. The library of one function that docs/precision.md describes answers in its place.
Each row is measured by itself, in a process of its own with one thread, without the library and
with it in turn. Run from the root of the checkout; a C compiler is needed:

    RECORD=1 python -m benchmarks.mkl_on_amd
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmarks.harness import Row, Time, matmul_rate, report
from benchmarks.hours import overrides_of, prepared, training_seconds

from structgrad.commands import CONFIGS
from structgrad.experiments import tables
from structgrad.training.runtime import tune_allocator

SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
#: Tables and their rows.
ROWS = {
    "struminsky_3": ("sst", "t_reinforce_plus"),
    "paulus_1": ("spanning_tree_10",),
    "l2x_movies": ("complex_50_l2x",),
    "correia_figure_2": ("sfe_32", "sparsemap_32"),
    "struminsky_figure_2": ("left_to_right_50", "semi_supervised_50"),
}
#: The name of the product of two matrices among the rows.
PRODUCT = "product"
REPEATS = 3


def build(folder: Path) -> Path:
    """The library, compiled into a folder."""
    library = folder / "mkl_on_amd.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return library


def milliseconds(name: str, row: str) -> float:
    """Of processor time, a training step of a row, or a product of two 1024 x 1024 matrices."""
    torch.set_num_threads(1)
    tune_allocator()
    if name == PRODUCT:
        return 1e3 * 2 * 1024**3 / matmul_rate()
    table = tables.load(name, CONFIGS / "table")
    return 1e3 * training_seconds(prepared(overrides_of(table, table.row(row)))[0])


def in_a_process(name: str, row: str, library: Path | None) -> float:
    """:func:`milliseconds`, measured by a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": "" if library is None else str(library)}
    command = [sys.executable, "-m", "benchmarks.mkl_on_amd", "--one", name, row]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(json.loads(out.splitlines()[-1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("TABLE", "ROW"), help="measure this, without the others")
    one = parser.parse_args().one
    if one is not None:
        print(json.dumps(milliseconds(*one)))
        return
    torch.set_num_threads(1)  # as in the processes: the rows say how many threads were used
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for name, row in [(PRODUCT, "1024"), *((name, row) for name, some in ROWS.items() for row in some)]:
            times = [[in_a_process(name, row, each) for each in (None, library)] for _ in range(REPEATS)]
            without, with_library = (statistics.median(column) for column in zip(*times, strict=True))
            ours, theirs = Time(with_library, with_library), Time(without, without)
            rows.append(Row(f"{name}, {row}", "", ours, "MKL's own choice", theirs))
    report("mkl_on_amd", rows)


if __name__ == "__main__":
    main()
