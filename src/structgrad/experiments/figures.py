"""Pictures of runs, as SVG within a page: curves with bands, sensitivity, aggregates over tasks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from structgrad.common import pictures
from structgrad.experiments.statistics import ENOUGH, LEVEL, Scores, performance_profile, quantile, resampled

Curve = Sequence[tuple[int, float]]


def panel(x: str, y: str) -> tuple[Figure, Any]:
    """A figure of one panel, with its axes."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def steps(axes: Any) -> None:
    """Few ticks with a unit, ``20 k``, because long numbers of steps would overlap."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def learning(curves: Mapping[str, Sequence[Curve]], metric: str) -> Figure:
    """One line for each title: the mean over its runs, with a 95 % band (Student's t) if there are
    several.

    Args:
        curves: title -> curves of its runs, each ``(step, value)``.
        metric: the metric's name.
    """
    figure, axes = panel("step", metric)
    for index, (title, runs) in enumerate(curves.items()):
        at, mean, width = band(runs)
        look: dict[str, Any] = pictures.line(index)
        axes.plot(at, mean, label=f"{title} ({len(runs)})" if len(runs) > 1 else title, **look)
        if width is not None:
            axes.fill_between(at, mean - width, mean + width, color=look["color"], alpha=0.15, linewidth=0)
    means = np.concatenate([band(runs)[1] for runs in curves.values()]) if curves else np.zeros(1)
    finite = means[np.isfinite(means)]
    if len(finite):  # the band of two runs may be ten times as high as all curves together
        pad = 0.25 * (float(finite.max() - finite.min()) or 1.0)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, float(finite.min()) - pad), min(high, float(finite.max()) + pad))
    steps(axes)
    pictures.legend(figure, columns=2)
    return figure


def halving(curves: Sequence[Curve], rungs: Sequence[int], metric: str) -> Figure:
    """Curves of trials. A dot marks a trial that was stopped, a dashed line a rung."""
    figure, axes = panel("step", metric)
    for step in rungs:
        axes.axvline(step, color="0.6", linestyle="--", linewidth=0.9)
    last = max(curve[-1][0] for curve in curves)
    for curve in sorted(curves, key=len):
        colour, width = (pictures.BLUE, 1.5) if curve[-1][0] == last else (pictures.ORANGE, 0.9)
        dashes = "-" if curve[-1][0] == last else "--"
        at, values = zip(*curve, strict=True)
        axes.plot(at, values, color=colour, linewidth=width, linestyle=dashes)
        if curve[-1][0] < last:
            axes.plot(*curve[-1], "o", color=colour, markersize=3)
    steps(axes)
    return figure


def band(runs: Sequence[Curve]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Steps, mean over runs, and half the width of its interval (None for one run), at the steps
    common to all runs.
    """
    if len(runs) == 1:
        return np.array([s for s, _ in runs[0]]), np.array([v for _, v in runs[0]], dtype=float), None
    first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    at = np.array(sorted({step for run in runs for step, _ in run if first <= step <= last}) or [first])
    values = np.array([np.interp(at, [s for s, _ in run], [v for _, v in run]) for run in runs])
    width = quantile(len(runs) - 1) * values.std(axis=0, ddof=1) / len(runs) ** 0.5
    return at, values.mean(axis=0), width


def sensitivity(key: str, metric: str, rows: Sequence[tuple[str, Sequence[Any], Sequence[float], int]]) -> Figure:
    """Every trial's metric against a hyper-parameter. Rows differ in colour and shape; selected
    trials have a ring.

    Args:
        key: the hyper-parameter.
        metric: the metric's name.
        rows: title, values of the hyper-parameter and of the metric, and the index of the selected
            trial.
    """
    figure, axes = panel(key, metric)
    numbers = [value for _, values, _, _ in rows for value in values]
    words = not all(isinstance(value, int | float) for value in numbers)
    if not words and min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for index, (title, values, found, chosen) in enumerate(rows):
        places = [str(value) for value in values] if words else list(values)
        look: dict[str, Any] = pictures.mark(index)
        axes.plot(places, found, linestyle="none", alpha=0.75, label=title, **look)
        axes.plot([places[chosen]], [found[chosen]], linestyle="none", marker="o", markersize=12, fillstyle="none",
                  color=look["color"], markeredgewidth=1.5)  # fmt: skip
    pictures.legend(figure, columns=2)
    return figure


def points(rows: Sequence[tuple[str, float, tuple[float, float] | None]], label: str, line: float) -> Figure:
    """One number with its interval for each row, the first on top, and a reference line."""
    figure = Figure(figsize=(5.2, 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, (_, value, ends) in enumerate(reversed(rows)):
        if ends is not None:
            axes.plot(ends, [index, index], color=pictures.BLUE, linewidth=6, alpha=0.35, solid_capstyle="butt")
        axes.plot([value], [index], "o", color=pictures.BLUE)
    axes.axvline(line, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [title for title, _, _ in reversed(rows)])
    axes.set_xlabel(label)
    axes.grid(alpha=0.3, axis="x")
    return figure


def profiles(scores: Mapping[str, Scores]) -> Figure:
    """Fraction of runs above a normalised score, over that score; with a bootstrap band if there
    are enough runs.
    """
    figure, axes = panel("normalised score τ", "share of runs above τ")
    every = np.concatenate([task for tasks in scores.values() for task in tasks])
    at = np.linspace(float(every.min()) - 0.05, float(every.max()) + 0.05, 200)
    for index, (title, tasks) in enumerate(scores.items()):
        look: dict[str, Any] = pictures.line(index)
        axes.plot(at, performance_profile(tasks, at), label=title, **look)
        if min(map(len, tasks)) >= ENOUGH:
            generator = np.random.default_rng(0)
            draws = [performance_profile(resampled(tasks, generator), at) for _ in range(200)]
            low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    pictures.legend(figure, columns=2)
    return figure


def sparkline(curve: Curve) -> str:
    """A curve as a small SVG element, without axes."""
    values = [value for _, value in curve if value == value and abs(value) != float("inf")]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{22 - 20 * (v - low) / span:.1f}" for i, v in enumerate(values)
    )
    return (
        f'<svg class=spark viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label="{values[-1]:.4g}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" vector-effect="non-scaling-stroke"/></svg>'
    )


def svg(figure: Figure) -> str:
    """The figure as the address of a picture in a page."""
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "structgrad", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return uri("image/svg+xml", stream.getvalue().encode())


def uri(kind: str, content: bytes) -> str:
    """The content as an address within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(file: Path, width: int = 160) -> str:
    """A small version of a picture, as an address."""
    from PIL import Image

    with Image.open(file) as image:
        small = image.convert("RGB")
        small.thumbnail((width, width))
        stream = io.BytesIO()
        small.save(stream, format="JPEG", quality=70)
    return uri("image/jpeg", stream.getvalue())
