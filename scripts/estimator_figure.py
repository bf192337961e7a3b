"""Measures the estimators on one small problem and draws bias against variance. The area of a point
is its cost.

python scripts/estimator_figure.py

The problem is a choice of two of five parts with a nonlinear decoder. The gradient is that of the
scores. See structgrad.diagnose.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from structgrad import estimators as e
from structgrad.common import pictures
from structgrad.diagnose import Diagnosis, Problem, diagnose
from structgrad.estimators.base import Estimator
from structgrad.structures import KSubset

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "estimators.png"
#: The value that is drawn for 0, because a logarithmic axis has no 0.
NONE = 3e-3


def candidates() -> dict[str, list[Estimator]]:
    """Family -> estimators that begin a search, with their usual options."""
    two = KSubset(2)
    return {
        "sums": [e.Marginalize(two), e.Marginalize(two, "sparsemap")],
        "relaxed samples (temperature 0.2, 1, 5)": [e.SST(two, temperature=t) for t in (0.2, 1.0, 5.0)],
        "relaxed, straight-through (0.2, 1, 5)": [
            e.SST(two, temperature=t, straight_through=True) for t in (0.2, 1.0, 5.0)
        ],
        "score function (1, 2, 8 samples)": [
            e.Reinforce(two),
            *(e.Reinforce(two, baseline="loo", n_samples=n) for n in (2, 8)),
        ],
        "score function of the trace (1, 2, 8)": [
            e.Reinforce(two, action="T"),
            *(e.Reinforce(two, action="T", baseline="loo", n_samples=n) for n in (2, 8)),
        ],
    }


def measured(samples: int) -> dict[str, list[Diagnosis]]:
    """The diagnosis of each estimator, against the gradient that it targets."""
    problem = Problem.make(KSubset(2), (5,), batch=2, seed=0)
    found = {}
    for family, members in candidates().items():
        torch.manual_seed(0)
        found[family] = [diagnose(member.double(), problem, samples) for member in members]
    return found


def draw(found: dict[str, list[Diagnosis]]) -> Figure:
    """Draw a marker for each family, joined in the order of its option. A bias within chance is drawn as 0."""
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (family, members) in enumerate(found.items()):
        x = [max(m.scores.variance, NONE) for m in members]
        y = [m.scores.bias if m.scores.bias > 2 * m.scores.error + 1e-9 else NONE for m in members]
        look = pictures.mark(index)
        axes.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.5)
        sizes = [40 * m.decoder_calls for m in members]
        axes.scatter(x, y, s=sizes, color=look["color"], marker=look["marker"], alpha=0.75, label=family)
    axes.set(xscale="log", yscale="log", xlabel="relative variance", ylabel="relative bias")
    axes.set_xlim(left=NONE / 1.6)
    axes.set_ylim(bottom=NONE / 1.6)
    for axis in (axes.xaxis, axes.yaxis):
        ticks = [NONE, 0.01, 0.1, 1.0, 10.0, 100.0]
        low, high = axis.get_view_interval()
        shown = [t for t in ticks if low <= t <= high]
        axis.set_ticks(shown, ["none" if t == NONE else f"{t:g}" for t in shown])
        axis.set_ticks([], minor=True)
    pictures.grid(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, markerscale=0.7)
    return figure


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="gradient estimates of each")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    print(pictures.save(draw(measured(options.samples)), options.output))


if __name__ == "__main__":
    main()
