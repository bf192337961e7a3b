"""All runs of a folder on one page: their states, their progress, errors, and the commands that
continue them.

The page is one file without a server. A few lines of script within it sort and filter.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

import yaml

from structgrad.common.metrics import metric_rows
from structgrad.common.text import duration, first_line
from structgrad.experiments import figures, runs
from structgrad.experiments.grids import Grid, Row

State = Literal["running", "interrupted", "failed", "finished"]
#: The states, in the order of the page.
STATES: tuple[State, ...] = ("running", "failed", "interrupted", "finished")
#: Only this many runs, the latest, get sparklines and thumbnails, because a page of thousands would
#: not open.
_DRAWN = 400
#: A run on another machine counts as running if its files changed within this time.
_QUIET_S = 1800.0


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Attributes:
        folder: folder of the run, within the folder of all runs.
        state: its state.
        choices: task, structure, estimator, budget and seed, as far as they are known.
        step, steps: the number of finished steps, and of all steps.
        seconds: training time of a finished run; time left of a running one; None if unknown.
        metric, value: the metric that selects its checkpoint, and its best value so far.
        curve: the curve of that metric.
        picture: its first picture, or None.
        error: the line with which it failed.
        command: the command that continues or repeats it; empty if it was not recorded.
        changed: the last time at which one of its files changed, in seconds since 1970.
    """

    folder: str
    state: State
    choices: dict[str, str]
    step: int
    steps: int
    seconds: float | None
    metric: str
    value: float | None
    curve: list[tuple[int, float]]
    picture: Path | None
    error: str
    command: str
    changed: float

    @property
    def progress(self) -> str:
        """The progress in a few words."""
        if self.state == "failed":
            return self.error
        if self.state == "finished":
            return f"{self.steps} steps" + ("" if self.seconds is None else f" in {duration(self.seconds)}")
        left = f", about {duration(self.seconds)} left" if self.seconds is not None and self.state == "running" else ""
        return f"step {self.step} of {self.steps}{left}"


def states(folder: Path) -> list[Run]:
    """Every run below a folder. Runs that need attention come first, and the latest before others.

    Raises:
        FileNotFoundError: if there is no run.
    """
    found = [_readable(folder, place) for place in _places(folder)]
    if not found:
        raise FileNotFoundError(f"no run in {folder}; type --runs with the folder of the runs")
    return sorted(found, key=lambda run: (STATES.index(run.state), -run.changed))


def _places(folder: Path) -> list[Path]:
    """The folders of runs are those with a configuration. Nothing below one is searched."""
    found, waiting = [], [str(folder)]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                listed = list(entries)
        except NotADirectoryError:
            continue
        except FileNotFoundError:
            continue
        if any(entry.name == "config.yaml" for entry in listed):
            found.append(Path(here))
        else:
            waiting += [entry.path for entry in listed if entry.is_dir(follow_symlinks=False)]
    return found


def _readable(root: Path, place: Path) -> Run:
    """A run, also if one of its files is damaged or not ours. It must not hide the others."""
    try:
        return _run(root, place)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        said = f"a file of this folder is damaged or not of a run: {first_line(error)}"
        name, changed = str(place.relative_to(root)), _time(place / "config.yaml")
        return Run(name, "failed", _choices(place, {}, {}), 0, 0, None, "", None, [], None, said, "", changed)


def _run(root: Path, place: Path) -> Run:
    summary, environment = _json(place / "summary.json"), _json(place / "environment.json")
    config: dict[str, Any] = summary.get("config", {})
    holder = _json(place / "running.json")
    if not summary:
        try:
            config = yaml.load((place / "config.yaml").read_text(), Loader=_LOADER) or {}
        except (OSError, yaml.YAMLError):
            config = {}
    logged = _metrics(place / "metrics.csv")
    metric = next((name for name in summary.get("metrics", {}) if name.startswith("val/")), "")
    # Runs of before do not say which metric selects.
    first = next((name for name in logged if name.startswith("val/") and name != "val/loss"), "")
    metric = metric or str(environment.get("monitor") or first)
    curve = logged.get(metric, [])
    step = max((values[-1][0] + 1 for values in logged.values()), default=0)
    steps = int(summary.get("steps") or config.get("trainer", {}).get("max_steps") or 0)
    changed = max(_time(place / name) for name in ("summary.json", "metrics.csv", "config.yaml", "running.json"))
    error = _text(place / "error.txt")
    state: State = "interrupted"
    if summary:
        state = "finished"
    elif holder and _alive(holder, changed):
        state = "running"
    elif error:
        state = "failed"
    seconds: float | None = summary.get("training_s")
    if state == "running" and environment.get("from_step") is not None:
        seconds = _left(step - int(environment["from_step"]), steps - step, holder)
    best = summary.get("metrics", {}).get(metric)
    if best is None and curve:
        values, mode = [value for _, value in curve], environment.get("mode")
        best = min(values) if mode == "min" else max(values) if mode == "max" else values[-1]
    return Run(
        folder=str(place.relative_to(root)),
        state=state,
        choices=_choices(place, summary, config),
        step=step,
        steps=steps,
        seconds=seconds,
        metric=metric,
        value=best,
        curve=curve,
        picture=next(iter(sorted((place / "pictures").glob("*.png"))), None),
        error=error,
        command=str(environment.get("command", "")),
        changed=changed,
    )


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _choices(place: Path, summary: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    if summary:
        return {key: str(summary.get(key, "")) for key in ("task", "structure", "estimator", "budget", "seed")}
    # <task>/<structure>-<estimator>-<budget>-s<seed>-<identity>
    parts = place.name.rsplit("-", 3)
    names = parts[0].partition("-") if len(parts) == 4 else (place.name, "", "")
    budget, seed = (parts[1], parts[2].removeprefix("s")) if len(parts) == 4 else ("", str(config.get("seed", "")))
    return {"task": place.parent.name, "structure": names[0], "estimator": names[2], "budget": budget, "seed": seed}


def _metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Validation metric -> its curve."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in metric_rows(file):
        found.setdefault(name, []).append((step, value))
    return found


def _alive(holder: dict[str, Any], changed: float) -> bool:
    """Whether the process of a run is alive. On another machine this is a guess."""
    if holder.get("machine") != socket.gethostname():
        return time.time() - changed < _QUIET_S
    try:
        os.kill(int(holder["process"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _left(done: int, left: int, holder: dict[str, Any]) -> float | None:
    try:
        since = datetime.fromisoformat(holder["since"]).timestamp()
    except (KeyError, ValueError):
        return None
    return (time.time() - since) * left / done if done > 0 else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def text(found: Sequence[Run]) -> str:
    """The text for a terminal: numbers by state, and all unfinished runs."""
    counts = Counter(run.state for run in found)
    head = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    rows = [
        Row((run.state, run.folder, "-" if run.value is None else f"{run.metric} {run.value:.4g}", run.progress))
        for run in found
        if run.state != "finished"
    ]
    return f"{len(found)} runs: {head}" + (
        f"\n\n{Grid(('state', 'run', 'metric', ''), tuple(rows)).text()}" if rows else ""
    )


def page(found: Sequence[Run], folder: Path) -> str:
    """One self-contained HTML file."""
    from structgrad.experiments.html import shell

    latest = {run.folder for run in sorted(found, key=lambda run: -run.changed)[:_DRAWN]}
    counts = Counter(run.state for run in found)
    boxes = "".join(
        f'<label class="state {state}"><input type=checkbox value={state} checked> {counts[state]} {state}</label>'
        for state in STATES
        if counts[state]
    )
    keys = ("task", "structure", "estimator", "budget", "seed")
    heads = ("state", "", *keys, "metric", "curve", "progress", "changed")
    head = "".join(
        f"<th>{f'<button data-sort={i}>{title}</button>' if title else ''}</th>" for i, title in enumerate(heads)
    )
    body = "".join(_line(run, keys, run.folder in latest) for run in found)
    return shell(
        f"Runs in {folder.name}",
        '<div class=tools><input id=find type=search placeholder="filter: words, all of them" aria-label="filter">'
        f"{boxes}<span id=shown>{len(found)} shown</span></div>"
        f"<table class=runs><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><script>{_SCRIPT}</script>",
        _STYLE,
    )


def _line(run: Run, keys: Sequence[str], drawn: bool) -> str:
    picture = ""
    if drawn and run.picture is not None:
        try:
            picture = f'<img alt="" src="{figures.thumbnail(run.picture)}">'
        except OSError:  # not complete: the run is drawing it
            picture = ""
    value = "" if run.value is None else f"<strong>{run.value:.4g}</strong><small>{escape(run.metric)}</small>"
    when = datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")
    command = f"<details><summary>command</summary><code>{escape(run.command)}</code></details>" if run.command else ""
    cells = [
        ("state", run.state, f'<span class="state {run.state}">{run.state}</span>'),
        ("", "", picture),
        *((key, run.choices[key], escape(run.choices[key])) for key in keys),
        ("metric", "" if run.value is None else repr(run.value), value),
        ("curve", "", figures.sparkline(runs.thinned(run.curve, 60)) if drawn else ""),
        ("progress", str(run.step), f"{escape(run.progress)}{command}<small>{escape(run.folder)}</small>"),
        ("changed", f"{run.changed:.0f}", when),
    ]
    content = "".join(
        f'<td data-title="{escape(title)}" data-value="{escape(value)}"{"" if shown else " class=empty"}>{shown}</td>'
        for title, value, shown in cells
    )
    return f"<tr data-state={run.state}>{content}</tr>"


_STYLE = """
body { max-width: 100rem }
.tools { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0 }
.tools input[type=search] { flex: 1 1 14rem; font: inherit; padding: .3rem .5rem }
.runs td, .runs th { text-align: left; overflow-wrap: normal }
.runs td:nth-child(10) { min-width: 13rem; overflow-wrap: anywhere }
.runs button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0; color: inherit }
.runs button { cursor: pointer }
.runs button[data-order]::after { content: " " attr(data-order) }
.runs img { display: block; max-width: 7rem; max-height: 4rem; background: #fff; border-radius: 3px }
.runs td small { white-space: normal }
.spark { display: block; width: 8rem; height: 2rem }
.state.running { color: #0969da } .state.finished { color: var(--good) }
.state.failed { color: var(--bad) } .state.interrupted { color: var(--open) }
@media (prefers-color-scheme: dark) { .state.running { color: #6cb6ff } }
@media (max-width: 82rem) {
  .runs td, .runs th { padding: .3rem .35rem }
  .runs td:nth-child(n+3):nth-child(-n+5) { min-width: 5rem; overflow-wrap: anywhere }
  .runs td:nth-child(10) { min-width: 11rem }
  .runs img { max-width: 5rem } .spark { width: 5rem }
}
@media (max-width: 640px) {
  .runs td:first-child { display: inline-block } .runs td:nth-child(2) { display: block }
  .runs td:nth-child(2)::before { content: none } .runs td:nth-child(10) { display: block }
  .runs td:nth-child(10)::before { content: none } .runs img { max-width: 100%; max-height: 10rem }
}
"""
_SCRIPT = """
const all = selector => [...document.querySelectorAll(selector)], find = document.getElementById('find')
const rows = all('.runs tbody tr'), boxes = all('.tools input[type=checkbox]'), body = all('.runs tbody')[0]
const words = new Map(rows.map(row => [row, row.textContent.toLowerCase()]))
function show() {
  const asked = find.value.toLowerCase().split(/\\s+/).filter(Boolean)
  const on = new Set(boxes.filter(b => b.checked).map(b => b.value))
  let shown = 0
  for (const row of rows) {
    const keep = on.has(row.dataset.state) && asked.every(word => words.get(row).includes(word))
    row.hidden = !keep
    shown += keep
  }
  document.getElementById('shown').textContent = shown + ' shown'
}
find.addEventListener('input', show)
boxes.forEach(box => box.addEventListener('change', show))
all('.runs button').forEach(button => button.addEventListener('click', () => {
  const up = button.dataset.order !== '↑', at = +button.dataset.sort
  all('.runs button').forEach(other => delete other.dataset.order)
  button.dataset.order = up ? '↑' : '↓'
  const value = row => row.cells[at].dataset.value
  rows.sort((a, b) => {
    const x = value(a), y = value(b), number = x !== '' && y !== '' && !isNaN(x) && !isNaN(y)
    if ((x === '') !== (y === '')) return x === '' ? 1 : -1
    return (number ? x - y : x.localeCompare(y)) * (up ? 1 : -1)
  })
  body.append(...rows)
}))
"""
