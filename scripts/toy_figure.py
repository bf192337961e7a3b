"""Run the toy problems with the estimators of Struminsky et al. (2021) and draw all learning curves in one
figure.

    python scripts/toy_figure.py --budget quick

Runs that are finished are not repeated. Every estimator takes three samples a step; the figure shows the mean
objective of fresh hard vertices (the less, the better).
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = "estimator.n_samples=3"

#: structure -> title, shape of the scores, the relaxation that SST takes there (none for binary trees).
STRUCTURES: dict[str, tuple[str, str, list[str]]] = {
    "arborescence": ("arborescence: nodes not under the root", "[n,n]", ["estimator=sst_neg_exponential"]),
    "binary_tree": ("binary tree: height", "[n]", []),
    "spanning_tree": ("spanning tree: 1 - normalised squared degrees", "[n,n]", ["estimator=sst"]),
    "matching": ("matching: distance of neighbours", "[n,n]", ["estimator=sst", "estimator.relaxation=sinkhorn"]),
}

#: label -> overrides.
SCORE_FUNCTIONS: dict[str, list[str]] = {
    "E-REINFORCE": ["estimator=e_reinforce"],
    "T-REINFORCE": ["estimator=t_reinforce"],
    "E-REINFORCE+": ["estimator=e_reinforce_plus"],
    "T-REINFORCE+": ["estimator=t_reinforce_plus"],
    "RELAX": ["estimator=relax", "estimator.critic=flat"],
}


def curves_of(structure: str, size: int) -> dict[str, list[str]]:
    """Label -> overrides of every run for that structure."""
    _, shape, sst = STRUCTURES[structure]
    curves = {label: [*overrides, SAMPLES] for label, overrides in SCORE_FUNCTIONS.items()}
    curves["RELAX"].append(f"+estimator.shape={shape.replace('n', str(size))}")
    if sst:
        curves["SST"] = [*sst, SAMPLES]
    return curves


def train(overrides: list[str]) -> Path:
    """Run ``train.py`` (or find the finished run) and return the run's folder."""
    command = [sys.executable, "train.py", "task=toy", *overrides]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    folders = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("run:")]
    if done.returncode or not folders:
        sys.exit(f"{done.stdout[-2000:]}\nerror: the run failed: {' '.join(command)}")
    return ROOT / folders[-1]


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and validation objective of a run."""
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = [(int(r["step"]), float(r["value"])) for r in csv.DictReader(stream) if r["metric"] == "val/objective"]
    return np.array([step for step, _ in rows]), np.array([value for _, value in rows])


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="quick", choices=["paper", "quick", "smoke"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the band shows the extremes over seeds")
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "toy.png")
    parser.add_argument("overrides", nargs="*", help="passed to every run, e.g. trainer=cpu")
    options = parser.parse_args()

    os.environ.setdefault("MPLBACKEND", "agg")
    from matplotlib import pyplot

    size = 5 if options.budget == "smoke" else 10
    columns = min(2, len(options.structures))
    rows = -(-len(options.structures) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False)
    for panel in panels.flat[len(options.structures) :]:
        panel.axis("off")
    colors = {label: f"C{i}" for i, label in enumerate([*SCORE_FUNCTIONS, "SST"])}
    for structure, panel in zip(options.structures, panels.flat, strict=False):
        for label, overrides in curves_of(structure, size).items():
            common = [f"structure={structure}", f"budget={options.budget}", *options.overrides]
            runs = [read(train([*common, *overrides, f"seed={seed}"])) for seed in options.seeds]
            steps, values = runs[0][0], np.stack([value for _, value in runs])
            panel.plot(steps, values.mean(0), label=label, color=colors[label])
            panel.fill_between(steps, values.min(0), values.max(0), color=colors[label], alpha=0.2, linewidth=0)
        panel.set(title=STRUCTURES[structure][0], xlabel="step", ylabel="objective")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)
    print(f"figure: {options.output}")


if __name__ == "__main__":
    main()
