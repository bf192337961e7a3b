"""Trains four tasks at their quick budgets, with the products of the model in float32 and in
bfloat16, and writes the table of both into docs/precision.md. Each has three to ten seeds.

    python scripts/matmul_precision.py            train what is missing, then write the table
    python scripts/matmul_precision.py --table    write the table only

Summaries are in results/matmul_precision. Torch rounds the factors of float32 products only on a
processor with AMX. On others this script rounds them to the nearest bfloat16 number itself, forward
and backward. It replaces torch's CPU kernels of matrix products by ones that round first, and adds
in float32 as AMX does. Structures, estimators and losses ask torch for full precision, so that
nothing rounds their products.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

from structgrad.commands import train
from structgrad.experiments import markdown
from structgrad.experiments.grids import Grid, Row
from structgrad.experiments.runs import Summary, read
from structgrad.experiments.selection import mean_and_standard_error
from structgrad.experiments.statistics import Difference, half_width

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "matmul_precision", ROOT / "docs" / "precision.md"
PRECISIONS = ("highest", "medium")
#: Torch's products of matrices, and the positions of their factors.
FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


@dataclass(frozen=True)
class Shown:
    """A metric of the table: its name, title, factor and digits."""

    metric: str
    title: str
    scale: float = 1.0
    digits: int = 1


ACCURACY, ELBO = Shown("test/accuracy", "accuracy (%)", 100), Shown("test/elbo", "ELBO")
BITS, VARYING = Shown("test/bits_per_dim", "bits/dim", digits=3), Shown("test/varying_bits", "bits that vary (%)", 100)
#: Row -> its title, what is trained, what is shown, the number of seeds. Where three seeds differ much, there are more.
ROWS: dict[str, tuple[str, str, tuple[Shown, ...], int]] = {
    "graph_layout": (
        "graph layout, spanning tree, SST",
        "task=graph_layout structure=spanning_tree estimator=sst",
        (ELBO, Shown("test/edge_precision", "edge precision (%)", 100)),
        3,
    ),
    "listops": (
        "ListOps, arborescence, SST",
        "task=listops structure=arborescence estimator=sst",
        (ACCURACY, Shown("test/precision", "edge precision (%)", 100)),
        6,
    ),
    "ssvae_sparsemax": ("SSVAE, sparsemax", "task=ssvae estimator=sparsemax", (ACCURACY, ELBO), 3),
    "ssvae_sfe": ("SSVAE, SFE", "task=ssvae estimator=sfe", (ACCURACY, ELBO), 3),
    "bit_vector_vae_sfe": ("bit vectors, SFE", "task=bit_vector_vae estimator=sfe", (BITS, ELBO), 3),
    "bit_vector_vae_sparsemap": (
        "bit vectors, SparseMAP",
        "task=bit_vector_vae estimator=sparsemap",
        (BITS, ELBO, VARYING),
        10,
    ),
}


def rounds_by_itself() -> bool:
    """Whether torch rounds the factors of a float32 product here under ``medium``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    left = torch.full((256, 256), 1 + 2.0**-10)  # bfloat16 keeps 8 bits: 1
    rounded = bool((left @ left)[0, 0] == 256)
    torch.set_float32_matmul_precision(before)
    return rounded


def round_factors() -> Library:
    """Let torch's CPU products round float32 factors under ``medium``, as long as the library that
    is returned exists.
    """
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, factors in FACTORS.items():
            for overload in (name, f"{name}.out"):
                kernel = get_kernel(f"aten::{overload}", "CPU")
                library.impl(overload, _rounding(kernel, factors), "CPU", with_keyset=True, allow_override=True)
    return library


def _rounding(kernel: Any, factors: tuple[int, ...]) -> Callable[..., Any]:
    def product(keys: Any, *arguments: Any, **options: Any) -> Any:
        if torch.get_float32_matmul_precision() == "medium":
            arguments = tuple(_rounded(a) if i in factors else a for i, a in enumerate(arguments))
        return kernel.call_boxed(keys, *arguments, **options)

    return product


def _rounded(factor: Tensor) -> Tensor:
    return factor.bfloat16().float() if factor.dtype == torch.float32 else factor


def run(row: str, precision: str, seed: int) -> None:
    """Train in a process of its own and keep the summary, unless it is there."""
    kept = RESULTS / f"{row}-{precision}-{seed}.json"
    if kept.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        options = [*ROWS[row][1].split(), "budget=quick", "trainer=cpu", "logger=csv", f"seed={seed}"]
        options += [f"trainer.matmul_precision={precision}", f"paths.runs={folder}"]
        print(*options, flush=True)
        subprocess.run([sys.executable, __file__, "--train", *options], cwd=ROOT, check=True)
        (found,) = Path(folder).glob("**/summary.json")
        summary = json.loads(found.read_text())
    if precision == "medium" and not rounds_by_itself():
        summary["products"] += ", rounded by scripts/matmul_precision.py"
    RESULTS.mkdir(exist_ok=True)
    kept.write_text(json.dumps(summary, indent=2) + "\n")


def table() -> str:
    """Means and standard errors over the seeds, and the mean of the differences of runs of one seed
    with its 95 % interval (Student's t).
    """
    lines = []
    for row, (title, _, every, seeds) in ROWS.items():
        highest, medium = ([_kept(row, precision, seed).metrics for seed in range(seeds)] for precision in PRECISIONS)
        for shown in every:
            before, after = ([shown.scale * metrics[shown.metric] for metrics in runs] for runs in (highest, medium))
            gaps = [a - b for a, b in zip(after, before, strict=True)]
            gap = mean_and_standard_error(gaps, gaps)
            lines.append(
                (
                    title,
                    str(seeds),
                    shown.title,
                    *(mean_and_standard_error(v, v).show(digits=shown.digits) for v in (before, after)),
                    Difference(gap.value, half_width(gap)).show(shown.digits),
                )
            )
    titles = ("quick budget", "seeds", "test metric", "`highest`", "`medium`", "difference")
    return Grid(titles, tuple(Row(line) for line in lines), "").markdown()


def _kept(row: str, precision: str, seed: int) -> Summary:
    return read(RESULTS / f"{row}-{precision}-{seed}.json")


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--train"]:  # in the process of one run; the rest is for train.py
        del sys.argv[1]
        library = None if rounds_by_itself() else round_factors()
        train.main()
        del library
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="train nothing")
    if not parser.parse_args().table:
        for row, (*_, seeds) in reversed(ROWS.items()):
            for seed in range(seeds):
                for precision in PRECISIONS:
                    run(row, precision, seed)
    markdown.insert(PAGE, "matmul_precision", table())


if __name__ == "__main__":
    main()
