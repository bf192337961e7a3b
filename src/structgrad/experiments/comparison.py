"""Compare any runs by any key of their configurations; no table is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structgrad.common.text import nearest
from structgrad.experiments import grids, runs
from structgrad.experiments.grids import Grid
from structgrad.experiments.runs import Summary
from structgrad.experiments.selection import Cell, mean_and_standard_error
from structgrad.experiments.statistics import (
    ENOUGH,
    Difference,
    Scores,
    bootstrap_interval,
    difference,
    half_width,
    improvement_interval,
    interquartile_mean,
    mean_over_tasks,
    probability_of_improvement,
)
from structgrad.experiments.tables import Direction
from structgrad.training.contract import HARDWARE, IRRELEVANT

#: Choices of a run. Runs are distinguished by these first.
CHOICES = ("task", "data", "experiment", "structure", "estimator", "budget", "device")
_IGNORED = {f"trainer.{key}" for key in HARDWARE}
#: With more groups than this, each is compared with the best one only.
_ALL_PAIRS = 6
#: The number of metrics that are shown if none is requested.
_COLUMNS = 5


@dataclass(frozen=True)
class Group:
    """Runs with the same values of the keys.

    Attributes:
        values: values of the keys that distinguish groups.
        runs: in the order of their seeds.
        cells: metric -> mean over the runs, for metrics that all of them have.
        settings: for settings in which groups differ, key -> value; None if it varies within the
            group.
    """

    values: tuple[str, ...]
    runs: tuple[Summary, ...]
    cells: dict[str, Cell]
    settings: dict[str, str | None]

    @property
    def title(self) -> str:
        """The values of the keys."""
        return ", ".join(self.values) or "all runs"

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Contrast:
    """The difference of two groups in a metric: the first minus the second.

    Runs are paired if the seeds are equal; otherwise the interval is Welch's.
    """

    first: str
    second: str
    metric: str
    difference: Difference
    paired: bool


@dataclass(frozen=True)
class Block:
    """The groups of a task.

    Attributes:
        task: its name.
        keys: the keys that distinguish its groups, beside the task.
        metrics: metrics that are shown, the main one first.
        directions: directions of the metrics that have one.
        groups: sorted by the main metric, the best first, if it has a direction.
        contrasts: differences in the main metric.
    """

    task: str
    keys: tuple[str, ...]
    metrics: tuple[str, ...]
    directions: dict[str, Direction]
    groups: tuple[Group, ...]
    contrasts: tuple[Contrast, ...]


def value_of(run: Summary, key: str) -> str:
    """The value of a choice (``estimator``) or of a dotted key of the configuration, as on a
    command line.

    It is ``-`` if the run has no such key.
    """
    if key in CHOICES or key == "seed":
        return str(run.content.get(key, "-"))
    value = run.settings.get(key, "-")
    return value if isinstance(value, str) else runs.as_text(value)


def matching(summaries: Iterable[Summary], where: Mapping[str, str]) -> list[Summary]:
    """The runs whose keys have these values, each run once.

    Raises:
        ValueError: one line, for a key that no run has.
    """
    every = once(summaries)
    _known(every, where)
    found = [run for run in every if all(value_of(run, key) == value for key, value in where.items())]
    if every and not found:
        wanted = " ".join(f"{key}={value}" for key, value in where.items())
        key = next((k for k, value in where.items() if value not in {value_of(run, k) for run in every}), None)
        if key is None:
            raise ValueError(f"no run has {wanted}; type fewer of them")
        values = nearest(where[key], sorted({value_of(run, key) for run in every}))
        raise ValueError(f"no run has {wanted}; type --where {key}={values.split(', ')[0]}, of {values}")
    return found


def once(summaries: Iterable[Summary]) -> list[Summary]:
    """The runs without copies, e.g. of a run's folder and of a folder of results.

    Raises:
        ValueError: if a run occurs twice with different results.
    """
    kept: dict[tuple[str, Any], Summary] = {}
    for position, run in enumerate(summaries):
        # The same run on another device counts as another run, although its summary has the same
        # name.
        key = (run.content.get("name") or str(position), run.content.get("device"))
        other = kept.setdefault(key, run)
        if other.metrics != run.metrics:
            raise ValueError(
                f"{key[0]} is there twice, with different results (commits {other.commit} and {run.commit}); "
                "type fewer folders, or none for the tables"
            )
        if run.sweep and not other.sweep:
            kept[key] = run  # this copy has its curve
    return list(kept.values())


def compare(
    summaries: Iterable[Summary],
    by: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    directions: Mapping[str, Direction] | None = None,
) -> list[Block]:
    """Group runs, and take means and differences of their metrics.

    Args:
        summaries: those of finished runs; copies count once.
        by: keys that distinguish groups: choices such as ``estimator``, or dotted keys of the
            configuration. None: the keys in which the runs differ, except for seeds and what a
            sweep has drawn.
        metrics: metrics to show, the main one first. If empty: the test's counterpart of the metric
            that selects checkpoints, and others.
        directions: metric -> which values are better, for metrics whose direction the runs do not
            say.

    Returns:
        One block for each task, because numbers of different tasks have no common mean.

    Raises:
        ValueError: one line, for a key or a metric that no run has, or without runs.
    """
    every = once(summaries)
    if not every:
        raise ValueError("no finished run to compare")
    _known(every, by or ())
    logged = sorted({name for run in every for name in run.metrics})
    for metric in metrics:
        if metric not in logged:
            raise ValueError(f"metric {metric}: no run has it; nearest: {nearest(metric, logged)}")
    blocks = []
    for task in dict.fromkeys(run.task for run in every):
        mine = [run for run in every if run.task == task]
        keys = [key for key in by if key != "task"] if by is not None else what_differs(mine)
        blocks.append(_block(task, mine, tuple(keys), tuple(metrics), directions or {}))
    return blocks


def _known(every: Sequence[Summary], keys: Iterable[str]) -> None:
    for key in keys:
        if all(value_of(run, key) == "-" for run in every):
            known = {*CHOICES, "seed", *(k for run in every for k in run.settings)}
            raise ValueError(f"{key}: no run has such a key; nearest: {nearest(key, sorted(known)).split(', ')[0]}")


def what_differs(every: Sequence[Summary]) -> list[str]:
    """The keys that distinguish the runs.

    Choices come first, then settings that still differ between runs of equal choices. Seeds,
    hardware and what a sweep has drawn do not count.
    """
    keys = [key for key in CHOICES if len({value_of(run, key) for run in every}) > 1]
    while True:
        groups = _grouped(every, keys)
        varying = _varying([run for runs in groups.values() for run in runs])
        inside = [key for key in varying if any(len({value_of(r, key) for r in g}) > 1 for g in groups.values())]
        if not inside:
            return keys
        keys.append(min(inside, key=lambda key: (len({value_of(run, key) for run in every}), len(key))))


def _grouped(every: Sequence[Summary], keys: Sequence[str]) -> dict[tuple[str, ...], list[Summary]]:
    groups: dict[tuple[str, ...], list[Summary]] = {}
    for run in every:
        groups.setdefault(tuple(value_of(run, key) for key in keys), []).append(run)
    return groups


def _varying(every: Sequence[Summary]) -> list[str]:
    """Settings that differ between runs, except for seeds, settings that follow them, drawn
    settings and hardware.
    """
    drawn = {key for run in every for key in run.sweep.get("parameters", {})}
    values: dict[str, set[str]] = {}
    seeds = {key for run in every for key in run.settings if key.split(".")[-1] == "seed"}
    for run in every:
        for key in run.settings:
            values.setdefault(key, set()).add(value_of(run, key))
    found = []
    for key, seen in values.items():
        everywhere = all(key in run.settings for run in every) if len(seen) == 1 else False
        ignored = key in _IGNORED | seeds | drawn or key.split(".")[0] in (*IRRELEVANT, "budget")
        ignored |= key.endswith("_target_") or key in CHOICES  # the choices say this already
        if not everywhere and not ignored:
            found.append(key)
    followed = _with_seed(every, found)
    return [key for key in found if key not in followed]


def _with_seed(every: Sequence[Summary], keys: Iterable[str]) -> set[str]:
    """The settings whose value is always that of the seed."""
    return {key for key in keys if all(str(run.seed) == value_of(run, key) for run in every)}


def _block(
    task: str,
    every: Sequence[Summary],
    keys: tuple[str, ...],
    metrics: tuple[str, ...],
    directions: Mapping[str, Direction],
) -> Block:
    logged = {name for run in every for name in run.metrics}
    main = [f"test/{run.monitor.removeprefix('val/')}" for run in every]
    shown = [name for name in metrics if name in logged] or [name for name in dict.fromkeys(main) if name in logged]
    if not metrics:
        rest = sorted(name for name in logged if name.startswith("test/") and name not in (*shown, "test/loss"))
        shown = (shown + rest)[:_COLUMNS]
    found = dict(directions)
    for run in every:
        if mode := run.content.get("mode"):
            for name in (run.monitor, f"test/{run.monitor.removeprefix('val/')}"):
                found[name] = "maximize" if mode == "max" else "minimize"
    different = [key for key in _varying(every) if key not in keys]
    groups = [_group(values, runs, shown, different) for values, runs in _grouped(every, keys).items()]
    sign = {"maximize": -1.0, "minimize": 1.0}.get(found.get(shown[0], "") if shown else "", 0.0)
    groups.sort(key=lambda g: sign * g.cells[shown[0]].value if shown and shown[0] in g.cells else math.inf)
    # Only settings in which groups differ. Of several that always vary together, only one is kept.
    between: dict[tuple[str | None, ...], str] = {}
    for key in different:
        column = tuple(group.settings[key] for group in groups)
        if len(set(column) - {"-"}) > 1 or None in column:  # not if some groups merely lack the setting
            between.setdefault(column, key)
    kept = set(between.values())
    groups = [
        Group(g.values, g.runs, g.cells, {key: value for key, value in g.settings.items() if key in kept})
        for g in groups
    ]
    pairs = [(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]] if len(groups) <= _ALL_PAIRS else []
    pairs = pairs or [(groups[0], other) for other in groups[1:]]
    contrasts = [contrast(a, b, shown[0]) for a, b in pairs if shown and shown[0] in a.cells and shown[0] in b.cells]
    named = {name: found[name] for name in shown if name in found}
    return Block(task, keys, tuple(shown), named, tuple(groups), tuple(contrasts))


def _group(values: tuple[str, ...], mine: Sequence[Summary], metrics: Sequence[str], keys: Sequence[str]) -> Group:
    ordered = sorted(mine, key=lambda run: run.seed)
    cells = {}
    for metric in metrics:
        if all(metric in run.metrics for run in ordered):
            numbers = [run.metrics[metric] for run in ordered]
            cells[metric] = mean_and_standard_error(numbers, numbers)
    settings = {}
    for key in keys:
        seen = {value_of(run, key) for run in ordered}
        settings[key] = seen.pop() if len(seen) == 1 else None
    return Group(values, tuple(ordered), cells, settings)


def contrast(first: Group, second: Group, metric: str) -> Contrast:
    """The difference of two groups; it is paired if both have the same seeds, each once."""
    seeds = first.seeds
    # Each trial of a search has a seed, but shares nothing with the trial of that seed in another
    # group.
    searched = any(run.sweep.get("parameters") for run in (*first.runs, *second.runs))
    # Run folders do not say that they belong to a search, but a setting varies within the group.
    searched = searched or any(value is None for group in (first, second) for value in group.settings.values())
    if seeds == second.seeds and len(set(seeds)) == len(seeds) > 1 and not searched:
        gaps = [a.metrics[metric] - b.metrics[metric] for a, b in zip(first.runs, second.runs, strict=True)]
        cell = mean_and_standard_error(gaps, gaps)
        return Contrast(first.title, second.title, metric, Difference(cell.value, half_width(cell)), True)
    gap = difference(first.cells[metric], second.cells[metric])
    return Contrast(first.title, second.title, metric, gap, False)


# --- over tasks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregate:
    """Groups that occur in all tasks, over those tasks.

    Attributes:
        tasks: their names.
        scores: group -> normalised scores, one array of runs a task: 0 is the mean of the worst
            group, 1 of the best.
        few: whether some group has too few runs of a task for a bootstrap.
    """

    tasks: tuple[str, ...]
    scores: dict[str, Scores]
    few: bool

    @cached_property
    def ranking(self) -> list[tuple[str, float, Difference]]:
        """Groups, best first, each with its interquartile mean and bootstrap interval.

        With few runs it is the mean with Student's t.
        """
        found = []
        for title, scores in self.scores.items():
            if self.few:
                cell = mean_over_tasks(scores)
                found.append((title, cell.value, Difference(cell.value, half_width(cell))))
            else:
                low, high = bootstrap_interval(interquartile_mean, scores)
                found.append((title, interquartile_mean(scores), Difference((low + high) / 2, (high - low) / 2)))
        return sorted(found, key=lambda item: -item[1])

    @cached_property
    def improvements(self) -> list[tuple[str, str, float, tuple[float, float] | None]]:
        """The best group against each other: the probability that a run of it is better, and its
        interval.
        """
        best, *others = [title for title, _, _ in self.ranking]
        found = []
        for other in others:
            ours, theirs = self.scores[best], self.scores[other]
            ends = None if self.few else improvement_interval(ours, theirs)
            found.append((best, other, probability_of_improvement(ours, theirs), ends))
        return found


def aggregate(blocks: Sequence[Block]) -> Aggregate | None:
    """The groups with the same title in several tasks; None unless two tasks have two such groups.

    Tasks in which the main metric has no direction, or all groups are equal, are left out.
    """
    used = []
    for block in blocks:
        main = block.metrics[0] if block.metrics else ""
        values = [group.cells[main].value for group in block.groups if main in group.cells]
        if main in block.directions and len(set(values)) > 1 and all(map(math.isfinite, values)):
            used.append(block)
    titles = [{g.title for g in block.groups if block.metrics[0] in g.cells} for block in used]
    common = [g.title for g in used[0].groups if all(g.title in names for names in titles)] if used else []
    if len(used) < 2 or len(common) < 2:
        return None
    scores: dict[str, list[NDArray[np.float64]]] = {title: [] for title in common}
    for block in used:
        main, sign = block.metrics[0], 1.0 if block.directions[block.metrics[0]] == "maximize" else -1.0
        groups = {group.title: group for group in block.groups}
        means = [sign * groups[title].cells[main].value for title in common]
        worst, span = min(means), (max(means) - min(means)) or 1.0
        for title in common:
            found = np.array([sign * run.metrics[main] for run in groups[title].runs])
            scores[title].append((found - worst) / span)
    few = min(len(task) for tasks in scores.values() for task in tasks) < ENOUGH
    return Aggregate(tuple(block.task for block in used), dict(scores), few)


def aggregate_grid(found: Aggregate) -> Grid:
    """A grid of all groups, best first."""
    rows = []
    for title, value, ends in found.ranking:
        shown = f"{value:.2f}" + ("" if ends.half_width is None else f" [{ends.low:.2f}, {ends.high:.2f}]")
        rows.append(grids.Row((title, str(sum(len(task) for task in found.scores[title])), shown)))
    what = "mean" if found.few else "interquartile mean"
    how = (
        f"fewer than {ENOUGH} runs of a task, too few for a bootstrap: means with 95 % intervals of Student's t"
        if found.few
        else "interquartile means with 95 % intervals of the stratified bootstrap (Agarwal et al. 2021)"
    )
    caption = (
        f"over {', '.join(found.tasks)}; scores are normalised: 0 is the mean of the worst group of a task, 1 of the "
        f"best; {how}."
    )
    return Grid(("", "runs", f"normalised score, {what}"), tuple(rows), caption)


def improvements(found: Aggregate) -> list[str]:
    """One line for each pair of groups."""
    lines = []
    for best, other, value, ends in found.improvements:
        lines.append(f"{best} over {other}: {value:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"))
    return lines


# --- as text ----------------------------------------------------------------------------------------------------------


def grid(block: Block) -> Grid:
    """Means with their intervals, and numbers of runs."""
    titles = (*(block.keys or ("",)), "runs", *block.metrics)
    digits = {metric: digits_for(block, metric) for metric in block.metrics}
    best = {metric: _best(block, metric) for metric in block.metrics}
    rows = []
    for index, group in enumerate(block.groups):
        cells = [*(group.values or ("all runs",)), str(len(group.runs))]
        start = len(cells)
        cells += [show(group.cells.get(metric), digits[metric]) for metric in block.metrics]
        marked = frozenset(start + i for i, metric in enumerate(block.metrics) if best[metric] == index)
        rows.append(grids.Row(tuple(cells), marked))
    return Grid(titles, tuple(rows), caption(block))


def show(cell: Cell | None, digits: int) -> str:
    """``0.81 [0.79, 0.83]``; ``-`` if no run has the metric."""
    if cell is None:
        return "-"
    width, value = half_width(cell), f"{cell.value:.{digits}f}"
    return value if width is None else f"{value} [{cell.value - width:.{digits}f}, {cell.value + width:.{digits}f}]"


def digits_for(block: Block, metric: str) -> int:
    """The number of digits after the point: two of the typical standard error, or four of the
    number.
    """
    cells = [group.cells[metric] for group in block.groups if metric in group.cells]
    errors = sorted(cell.standard_error for cell in cells if cell.standard_error)
    scale = errors[len(errors) // 2] if errors else max((abs(cell.value) for cell in cells), default=0.0) / 100
    return min(6, max(0, 1 - math.floor(math.log10(scale)))) if 0 < scale < math.inf else 2


def _best(block: Block, metric: str) -> int | None:
    """The index of the group with the best mean; None if the metric has no direction, or two groups
    are best.
    """
    direction = block.directions.get(metric)
    values = [(group.cells[metric].value, i) for i, group in enumerate(block.groups) if metric in group.cells]
    values = sorted((value, i) for value, i in values if not math.isnan(value))
    if direction == "maximize":
        values.reverse()
    return values[0][1] if direction and len(values) > 1 and values[0][0] != values[1][0] else None


def caption(block: Block) -> str:
    """A description of the numbers."""
    parts = [f"task {block.task}: means over runs; in brackets 95 % intervals of Student's t"]
    better = {"maximize": "greater", "minimize": "smaller"}
    if block.metrics and block.metrics[0] in block.directions:
        parts.append(f"{block.metrics[0]}: {better[block.directions[block.metrics[0]]]} is better")
    every = [run for group in block.groups for run in group.runs]
    parts.append(f"budget {', '.join(sorted({run.budget for run in every}))}")
    parts.append(f"device {', '.join(sorted({str(run.content.get('device', 'unknown')) for run in every}))}")
    found = runs.precisions(every)
    parts += [f"precision {', '.join(found)}"] if found else []
    mixed = sorted({key for group in block.groups for key, value in group.settings.items() if value is None})
    parts += [f"{', '.join(mixed)} varies within a row"] if mixed else []
    drawn = sorted({key for run in every for key in run.sweep.get("parameters", {})} - set(block.keys))
    parts += [f"{', '.join(drawn)} drawn for each run by a search"] if drawn else []
    return "; ".join(parts) + "."


def differences(block: Block) -> list[str]:
    """One line for each pair of groups."""
    digits = digits_for(block, block.metrics[0]) if block.metrics else 0
    lines = []
    for found in block.contrasts:
        how = "" if found.difference.half_width is None else " (paired by seed)" if found.paired else " (Welch)"
        text = found.difference.show(digits)
        text += "" if found.difference.half_width is not None else ", without an interval: one run"
        lines.append(f"{found.first} − {found.second}: {text}{how}")
    return lines


def settings(block: Block) -> list[str]:
    """One line for each other setting in which the groups differ, with its value in every group."""
    lines = []
    for key in block.groups[0].settings if block.groups else ():
        values: dict[str, list[str]] = {}
        for group in block.groups:
            values.setdefault(group.settings[key] or "varies", []).append(group.title)
        lines.append(f"{key}: " + "; ".join(f"{value} ({' | '.join(titles)})" for value, titles in values.items()))
    return lines


def text(blocks: Sequence[Block]) -> str:
    """The text for a terminal."""
    parts = []
    for block in blocks:
        parts.append(f"{block.task}\n\n{grid(block).text()}")
        for title, lines in lists(block):
            parts.append("\n".join([f"{title}:", *(f"  {line}" for line in lines)]))
    if found := aggregate(blocks):
        parts.append(f"all tasks\n\n{aggregate_grid(found).text()}")
        parts.append("\n".join(["Probability of improvement:", *(f"  {line}" for line in improvements(found))]))
    return "\n\n".join(parts)


def lists(block: Block) -> list[tuple[str, list[str]]]:
    """The lists below a block's table, with titles."""
    main = block.metrics[0] if block.metrics else ""
    every = [(f"Differences in {main}", differences(block)), ("Settings in force where rows differ", settings(block))]
    return [(title, lines) for title, lines in every if lines]


def markdown(blocks: Sequence[Block]) -> str:
    """The text for documents."""
    parts = []
    for block in blocks:
        parts += [f"## {block.task}", grid(block).markdown()]
        for title, lines in lists(block):
            parts += [f"{title}:", "\n".join(f"- {line}" for line in lines)]
    if found := aggregate(blocks):
        parts += ["## All tasks", aggregate_grid(found).markdown()]
        parts += ["Probability of improvement:", "\n".join(f"- {line}" for line in improvements(found))]
    return "\n\n".join(parts)


def latex(blocks: Sequence[Block]) -> str:
    """One ``table`` for each task, and one over all tasks."""
    found = aggregate(blocks)
    every = [*(grid(block) for block in blocks), *([aggregate_grid(found)] if found else [])]
    return "\n\n".join(each.latex() for each in every)


def comma_separated(blocks: Sequence[Block]) -> str:
    """One line for each group and metric, with all digits."""
    keys = list(dict.fromkeys(key for block in blocks for key in block.keys))
    lines: list[list[object]] = []
    for block in blocks:
        for group in block.groups:
            values = dict(zip(block.keys, group.values, strict=True))
            for metric, cell in group.cells.items():
                width = half_width(cell)
                ends = ["", ""] if width is None else [cell.value - width, cell.value + width]
                error = "" if cell.standard_error is None else cell.standard_error
                known = [values.get(key, "") for key in keys]
                lines.append([block.task, *known, metric, len(group.runs), cell.value, error, *ends])
    return grids.comma_separated(["task", *keys, "metric", "runs", "mean", "standard_error", "low", "high"], lines)


def curves(group: Group, folders: Iterable[Path]) -> list[list[tuple[int, float]]]:
    """The selecting metric over the steps of every run that has it, from its sweep or from its
    folder in one of ``folders``.
    """
    places = list(folders)
    found = [
        run.sweep.get("curve")
        or next(filter(None, (runs.curve(place / run.folder, run.monitor) for place in places)), [])
        for run in group.runs
    ]
    return [curve for curve in found if len(curve) > 1]
