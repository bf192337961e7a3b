"""Reports over many runs: processor time and memory of a table, a comparison and the page of all
runs.

    python -m benchmarks.reports               # 20,000 summaries, made up in a folder that is removed afterwards
    python -m benchmarks.reports --runs 2000

Each command is a process of its own. Times are processor seconds and include the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STRUCTURES = ("arborescence", "spanning_tree", "independent_directed", "independent_undirected")
CURVE = 60


def make(folder: Path, number: int) -> None:
    """Runs of ListOps as sweeps leave them: a summary in ``results``, and a folder with metrics."""
    example = json.loads(next((ROOT / "results" / "listops_quick").glob("listops-arborescence-*.json")).read_text())
    generator = np.random.default_rng(0)
    results = folder / "results" / "paulus_2_quick"
    results.mkdir(parents=True)
    for index in range(number):
        structure, trial = STRUCTURES[index % len(STRUCTURES)], index // len(STRUCTURES)
        value, rate = float(generator.uniform(0.5, 0.9)), float(10 ** generator.uniform(-4, -2))
        content = json.loads(json.dumps(example))
        content |= {
            "name": f"listops-{structure}-sst-quick-s{trial}-{index:010x}",
            "structure": structure,
            "estimator": "sst",
            "seed": trial,
            "metrics": {
                "val/accuracy": value,
                "test/accuracy": value - 0.01,
                "test/precision": 0.5,
                "test/recall": 0.6,
            },
        }
        content["config"]["seed"] = content["config"]["task"]["seed"] = trial
        content["config"]["task"]["optimizer"]["lr"] = rate
        curve = [(100 * step, value * (1 - 0.9**step)) for step in range(1, CURVE)]
        made = {"table": "paulus_2", "row": structure, "trial": trial, "parameters": {"task.optimizer.lr": rate}}
        run = folder / "runs" / "listops" / content["name"].removeprefix("listops-")
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("seed: 0\n")
        (run / "summary.json").write_text(json.dumps(content))
        lines = [f"{step},val/accuracy,{number}" for step, number in curve]
        (run / "metrics.csv").write_text("\n".join(["step,metric,value", *lines, ""]))
        content["sweep"] = made | {"extra": [], "curve": curve}
        (results / f"{structure}-{trial}.json").write_text(json.dumps(content))


COMMANDS = {
    "table": ["results/paulus_2_quick", "budget=quick"],
    "table by hand": ["table=paulus_2", "budget=quick", "runs/listops"],
    "comparison": ["results/paulus_2_quick", "--by", "structure,estimator", "--metric", "test/accuracy"],
    "what differs": ["runs", "--compare"],
    "all runs": ["runs", "--html", "overview.html"],
}


def measure(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Processor seconds and peak memory in MB of the report command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "report.py"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.runs)
        print(f"{options.runs} runs")
        for title, arguments in COMMANDS.items():
            seconds, memory = measure(arguments, folder)
            print(f"{title:>14}: {seconds:6.1f} s of processor time, {memory:6.0f} MB")


if __name__ == "__main__":
    main()
