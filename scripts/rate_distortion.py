"""Draw the rate and distortion of finished runs of the bit-vector VAE, as Correia et al. (2020), figure 3.

    python scripts/rate_distortion.py results/bit_vector_vae_quick --output docs/images/rate_distortion.png

These are the defaults. One point a (structure, estimator): the mean over seeds of the test set's rate and distortion,
both in nats an image, with standard errors. Left and down is better; along a dashed line the ELBO is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from structgrad.experiments.runs import Cell, Summary, load

#: (structure, estimator) -> the paper's name; others are called by their configuration.
LABELS = {
    ("bit_vector", "sfe"): "SFE",
    ("bit_vector", "sfe_plus"): "SFE+",
    ("bit_vector", "nvil"): "NVIL",
    ("bit_vector", "gumbel_softmax"): "Gumbel-softmax",
    ("bit_vector", "st_gumbel"): "ST Gumbel-softmax",
    ("bit_vector", "topk_sparsemax"): "top-k sparsemax",
    ("bit_vector", "sparsemap"): "SparseMAP",
    ("budget_subset", "sparsemap"): "SparseMAP, budget",
}
MARKERS = "osD^vP*XhH<>"


def points(summaries: Iterable[Summary]) -> dict[tuple[str, str], tuple[Cell, Cell]]:
    """(structure, estimator) -> rate and distortion, in the order of :data:`LABELS`, then by name.

    Raises:
        ValueError: for summaries of another task, of several budgets or of several numbers of bits, a repeated seed,
            or none at all.
    """
    groups: dict[tuple[str, str], dict[int, Summary]] = {}
    settings = set()
    for summary in summaries:
        if summary.task != "bit_vector_vae":
            raise ValueError(f"a run of task {summary.task} has no rate and distortion")
        settings.add((summary.budget, summary.content["config"]["task"]["bits"]))
        seeds = groups.setdefault((summary.structure, summary.estimator), {})
        if summary.seed in seeds:
            raise ValueError(f"{summary.structure} {summary.estimator} repeats seed {summary.seed}")
        seeds[summary.seed] = summary
    if len(settings) != 1:
        raise ValueError(f"points are compared at one budget and number of bits; got {sorted(settings)}")
    order = list(LABELS)
    keys = sorted(groups, key=lambda key: (order.index(key) if key in LABELS else len(order), key))
    return {
        key: (
            Cell.of(s.metrics["test/rate"] for s in groups[key].values()),
            Cell.of(s.metrics["test/distortion"] for s in groups[key].values()),
        )
        for key in keys
    }


def draw(cells: dict[tuple[str, str], tuple[Cell, Cell]], file: Path) -> None:
    """One labelled point with error bars a (structure, estimator), written to ``file``."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (key, (rate, distortion)) in enumerate(cells.items()):
        label = LABELS.get(key, " ".join(key))
        axes.errorbar(
            rate.mean,
            distortion.mean,
            xerr=rate.error,
            yerr=distortion.error,
            fmt=MARKERS[index % len(MARKERS)],
            color=f"C{index}",
            capsize=3,
            label=label if rate.count == 1 else f"{label} ({rate.count} seeds)",
        )
    axes.margins(0.12)
    left, right, bottom, top = *axes.get_xlim(), *axes.get_ylim()
    for loss in np.linspace(left + bottom, right + top, 8)[1:-1]:
        axes.axline((left, loss - left), slope=-1, color="0.85", linestyle="--", linewidth=0.8, zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="rate (nats an image)", ylabel="distortion (nats an image)")
    figure.legend(loc="outside right upper", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Read summaries, draw."""
    parser = argparse.ArgumentParser(description="rate against distortion of finished runs of the bit-vector VAE")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("results/bit_vector_vae_quick"), help="of summaries"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/images/rate_distortion.png"))
    arguments = parser.parse_args()
    try:
        draw(points(load(arguments.folder)), arguments.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(arguments.output)


if __name__ == "__main__":
    main()
