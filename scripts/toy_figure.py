"""Run the toy problems with the estimators of Struminsky et al. (2021) and draw all learning curves
in one figure.

    python scripts/toy_figure.py --budget quick

``--objective released`` takes the objectives of the released code, which has no SST. Runs that are
finished are not repeated. Every estimator takes three samples a step; the figure shows the mean
objective of fresh hard vertices (the less, the better).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import open_dict

from structgrad.common import pictures
from structgrad.training.run import ConfigurationError, Run, RunError, run

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


#: Titles of the objectives of the released code.
RELEASED = {
    "arborescence": "arborescence: minus the largest out-degree",
    "binary_tree": "binary tree: minus the levels",
    "spanning_tree": "spanning tree: ends that are not vertex 0",
    "matching": "permutation: minus the fixed points",
}


def curves_of(structure: str, size: int, objective: str) -> dict[str, list[str]]:
    """Label -> overrides of every run for that structure."""
    _, shape, sst = STRUCTURES[structure]
    curves = {label: [*overrides, SAMPLES] for label, overrides in SCORE_FUNCTIONS.items()}
    curves["RELAX"].append(f"+estimator.shape={shape.replace('n', str(size))}")
    if objective == "released":
        return {label: [*overrides, "task.objective=released"] for label, overrides in curves.items()}
    if sst:
        curves["SST"] = [*sst, SAMPLES]
    return curves


def train(overrides: list[str]) -> Path:
    """Do the run of ``python train.py task=toy <overrides>``, unless it is finished, and return its folder."""
    overrides = ["task=toy", *overrides]
    print("train.py", *overrides, flush=True)
    config = compose("config", overrides, return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)  # a group of which nothing is chosen stays None
    with open_dict(config):
        del config["hydra"]
    chosen = dict(o.split("=", 1) for o in overrides)
    try:
        run(config, choices, chosen)
    except (ConfigurationError, RunError) as error:
        sys.exit(f"error: {error}")
    return Run.compose(config, choices, chosen).folder


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and validation objective of a run."""
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = [(int(r["step"]), float(r["value"])) for r in csv.DictReader(stream) if r["metric"] == "val/objective"]
    return np.array([step for step, _ in rows]), np.array([value for _, value in rows])


def finals(folder: Path) -> Figure:
    """Test objectives of finished runs whose summaries are in a folder: a panel a structure, a point an estimator."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        found.setdefault(content["structure"], {})[content["estimator"]] = content["metrics"]["test/objective"]
    figure = Figure(
        figsize=(10, 1.2 + 0.28 * max(map(len, found.values())) * -(-len(found) // 2)), layout="constrained"
    )
    for panel, (structure, values) in zip(figure.subplots(-(-len(found) // 2), 2).flat, found.items(), strict=False):
        order = sorted(values, key=lambda estimator: -values[estimator])
        for place, estimator in enumerate(order):
            panel.plot([values[estimator]], [place], linestyle="none", **pictures.mark(0))
            panel.annotate(f"{values[estimator]:.4f}", (values[estimator], place), (7, 0), textcoords="offset points",
                           va="center", fontsize=8)  # fmt: skip
        panel.set_yticks(range(len(order)), order)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.margins(x=0.3, y=0.15)
        panel.set_title(STRUCTURES[structure][0], fontsize=9)
        pictures.grid(panel)
    figure.supxlabel("objective of fresh hard vertices after training", fontsize=9)
    return figure


def main() -> None:
    """Train the missing runs, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="quick", choices=["paper", "quick", "smoke"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the band shows the extremes over seeds")
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--objective", default="ours", choices=["ours", "released"])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "toy.png")
    parser.add_argument("--summaries", type=Path, help="train nothing: draw the final objectives of these summaries")
    parser.add_argument("overrides", nargs="*", help="passed to every run, e.g. trainer=cpu")
    options = parser.parse_args()

    if options.summaries:
        print(f"figure: {pictures.save(finals(options.summaries), options.output)}")
        return
    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    size = 5 if options.budget == "smoke" else 10
    columns = min(2, len(options.structures))
    rows = -(-len(options.structures) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(options.structures) :]:
        panel.axis("off")
    looks = {label: pictures.line(i) for i, label in enumerate([*SCORE_FUNCTIONS, "SST"])}
    initialize_config_dir(str(ROOT / "configs"), version_base="1.3")
    for structure, panel in zip(options.structures, panels.flat, strict=False):
        for label, overrides in curves_of(structure, size, options.objective).items():
            common = [f"structure={structure}", f"budget={options.budget}", *options.overrides]
            runs = [read(train([*common, *overrides, f"seed={seed}"])) for seed in options.seeds]
            steps, values = runs[0][0], np.stack([value for _, value in runs])
            panel.plot(steps, values.mean(0), label=label, **looks[label])
            panel.fill_between(steps, values.min(0), values.max(0), color=looks[label]["color"], alpha=0.2, linewidth=0)
        title = STRUCTURES[structure][0] if options.objective == "ours" else RELEASED[structure]
        panel.set(title=title, xlabel="step", ylabel="objective")
        pictures.grid(panel)
    pictures.legend(figure, columns=len(looks))
    pictures.save(figure, options.output)
    print(f"figure: {options.output}")


if __name__ == "__main__":
    main()
