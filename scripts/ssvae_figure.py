"""Draw finished runs of the semi-supervised VAE as Correia et al. (2020), Figure 1: learning curves
and test results.

    python scripts/ssvae_figure.py results/correia_figure_1-50d668 --output docs/images/ssvae.png

These are the defaults. Left: ELBO of the validation images during training, mean over seeds within
the range of the seeds. Right: accuracy on the test images, with standard errors, and decoder calls
in training.
"""

from __future__ import annotations

import numpy as np
from figures import command, comparable, style
from matplotlib.figure import Figure

from structgrad.common import pictures
from structgrad.experiments.report import Report


def curves(report: Report) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Title of a row -> steps [n] and validation ELBO [seeds, n]; the rows that sweeps have run.

    Raises:
        ValueError: if runs of a row were not validated at the same steps.
    """
    found = {}
    for line in comparable(report):
        seeds = [np.array(run.sweep.get("curve", []), dtype=float).reshape(-1, 2) for run in line.runs]
        if any(not np.array_equal(curve[:, 0], seeds[0][:, 0]) for curve in seeds):
            raise ValueError(f"{line.row.title}: runs were validated at different steps")
        if len(seeds[0]):
            found[line.row.title] = seeds[0][:, 0], np.stack([curve[:, 1] for curve in seeds])
    return found


def draw(report: Report) -> Figure:
    """One colour for each row, in both panels."""
    lines = comparable(report)
    places = {line.row.title: index for index, line in enumerate(lines)}
    figure = Figure(figsize=(11, 3.8), dpi=130, layout="constrained")
    learning, tested = figure.subplots(1, 2)
    shown = []
    for title, (steps, values) in curves(report).items():
        look, mean = pictures.line(places[title]), values.mean(0)
        learning.plot(steps / 1000, mean, label=title, **look)
        learning.fill_between(steps / 1000, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0)
        shown.append(mean[len(mean) // 10 :])
    if shown:  # the first tenth of training is off the scale
        low, high = min(values.min() for values in shown), max(values.max() for values in shown)
        learning.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    learning.set(title="validation", xlabel="thousand steps", ylabel="ELBO (nats an image)")
    for place, line in enumerate(lines):
        accuracy = line.cells["accuracy"]
        tested.errorbar(
            100 * accuracy.value,
            place,
            xerr=None if accuracy.standard_error is None else 100 * accuracy.standard_error,
            **style(place),
        )
    calls = [f"{line.row.title}: {line.cells['calls'].value:.3g}" for line in lines]
    tested.set_yticks(range(len(lines)), labels=calls, fontsize=9)
    tested.invert_yaxis()
    tested.set(title="test", xlabel="accuracy (%)", ylabel="estimator: decoder calls in training")
    for axes in (learning, tested):
        pictures.grid(axes)
    pictures.legend(figure, columns=4)
    return figure


if __name__ == "__main__":
    command(
        "learning curves and test results of the semi-supervised VAE",
        table="correia_figure_1",
        folder="results/correia_figure_1-50d668",
        output="docs/images/ssvae.png",
        draw=draw,
    )
