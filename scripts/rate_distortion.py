"""Draw the rate and distortion of finished runs of the bit-vector VAE, as Correia et al. (2020),
figure 3.

    python scripts/rate_distortion.py results/bit_vector_vae_quick --output docs/images/rate_distortion.png

These are the defaults. Each row of the table is a point: the mean over seeds of the test set's rate
and distortion, both in nats an image, with standard errors. Left and down are better. Along a
dashed line the ELBO is constant.
"""

from __future__ import annotations

import numpy as np
from figures import command, comparable, style
from matplotlib.figure import Figure

from structgrad.common import pictures
from structgrad.experiments.report import Report
from structgrad.experiments.selection import Cell, count


def points(report: Report) -> dict[str, tuple[Cell, Cell]]:
    """Label of a row -> its rate and distortion; in the order of the table, without rows that have not been run."""
    return {
        f"{line.row.title} ({count(line.runs)})": (line.cells["rate"], line.cells["distortion"])
        for line in comparable(report)
    }


def draw(report: Report) -> Figure:
    """One labelled point with error bars for each row."""
    cells = points(report)
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, (rate, distortion)) in enumerate(cells.items()):
        axes.errorbar(
            rate.value,
            distortion.value,
            xerr=rate.standard_error,
            yerr=distortion.standard_error,
            label=label,
            **style(index),
        )
    axes.margins(0.12)
    left, right, bottom, top = *axes.get_xlim(), *axes.get_ylim()
    for loss in np.linspace(left + bottom, right + top, 8)[1:-1]:
        axes.axline((left, loss - left), slope=-1, color="0.85", linestyle="--", linewidth=0.8, zorder=0,
                    label="equal ELBO")  # fmt: skip
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="rate (nats an image)", ylabel="distortion (nats an image)")
    pictures.legend(figure, columns=3)
    return figure


if __name__ == "__main__":
    command(
        "rate against distortion of finished runs of the bit-vector VAE",
        table="bit_vector_vae_quick",
        output="docs/images/rate_distortion.png",
        draw=draw,
    )
