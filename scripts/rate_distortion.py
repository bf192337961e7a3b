"""Draw the rate and distortion of finished runs of the bit-vector VAE, as Correia et al. (2020), figure 3.

    python scripts/rate_distortion.py results/bit_vector_vae_quick --output docs/images/rate_distortion.png

These are the defaults. One point a row of the table: the mean over seeds of the test set's rate and distortion, both
in nats
an image, with standard errors. Left and down is better; along a dashed line the ELBO is the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from structgrad.experiments.report import Report, build
from structgrad.experiments.runs import load
from structgrad.experiments.selection import Cell, count
from structgrad.experiments.tables import load as load_table

TABLES = Path(__file__).resolve().parent.parent / "configs" / "table"
MARKERS = "osD^vP*XhH<>"


def points(report: Report) -> dict[str, tuple[Cell, Cell]]:
    """Label of a row -> its rate and distortion; in the order of the table, without rows that have not been run.

    Raises:
        ValueError: if runs of a row cannot be compared with the others, or there is none of any row.
    """
    if marked := [line for line in report.lines if line.marks]:
        raise ValueError(
            f"{marked[0].row.title}: runs with {', '.join(marked[0].marks)} cannot be compared with the others"
        )
    lines = report.main()
    if not lines:
        raise ValueError(f"no run belongs to a row of {report.table.name}")
    return {
        f"{line.row.title} ({count(line.runs)})": (line.cells["rate"], line.cells["distortion"])
        for line in lines.values()
    }


def draw(cells: dict[str, tuple[Cell, Cell]], file: Path) -> None:
    """One labelled point with error bars a row, written to ``file``."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (label, (rate, distortion)) in enumerate(cells.items()):
        axes.errorbar(
            rate.value,
            distortion.value,
            xerr=rate.standard_error,
            yerr=distortion.standard_error,
            fmt=MARKERS[index % len(MARKERS)],
            color=f"C{index}",
            capsize=3,
            label=label,
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
    parser.add_argument("--table", default="bit_vector_vae_quick", help="whose rows the runs are")
    parser.add_argument("--output", type=Path, default=Path("docs/images/rate_distortion.png"))
    arguments = parser.parse_args()
    try:
        table = load_table(arguments.table, TABLES)
        draw(points(build(table, load(arguments.folder))), arguments.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(arguments.output)


if __name__ == "__main__":
    main()
