"""Reports as one self-contained HTML page: no scripts, nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from structgrad.common import pictures
from structgrad.common.text import duration
from structgrad.experiments import comparison, figures, markdown
from structgrad.experiments.comparison import Aggregate, Block
from structgrad.experiments.figures import Curve
from structgrad.experiments.grids import Grid
from structgrad.experiments.report import Line, Report, Verdict, searched
from structgrad.experiments.statistics import Difference

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #b3261e; --open: #8a6d00 }
@media (prefers-color-scheme: dark) { :root { --good: #57c873; --bad: #ff8a80; --open: #e3b341 } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem }
body { overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; margin: 2.5rem 0 .2rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
.note, .source { color: #777; font-size: .875rem; margin: .3rem 0 }
code { font-size: .875em; background: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem }
th, td { overflow-wrap: normal }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th:first-child, td:first-child { text-align: left } td small { color: #777; display: block; white-space: nowrap }
tr.group th { text-align: left; padding-top: .9rem }
tr.marked td { background: var(--soft); font-style: italic }
.claims { padding-left: 1.1rem } .claims li { margin: .5rem 0 } .claims small { display: block; color: #777 }
.verdict { font-weight: 600 }
.shown { color: var(--good) } .contradicted { color: var(--bad) } .open { color: var(--open) }
.figures { display: grid; gap: 1rem; justify-items: center }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0; width: 100%; max-width: 44rem }
figure img { width: 100%; background: #fff; border-radius: 4px } figcaption { font-size: .875rem }
@media (max-width: 640px) {
  thead { display: none } tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0 }
  td, tr.group th { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0 }
  td:first-child { display: block; font-weight: 600; text-align: left } td:first-child::before { content: none }
  td:not(:first-child)::before { content: attr(data-title); color: #777; text-align: left }
  td.empty { display: none }
}
"""


def page(reports: Sequence[Report], runs: Path = Path("runs"), title: str = "structgrad: tables") -> str:
    """The whole page, with pictures of the selected runs if their folders are in ``runs``."""
    links = "".join(f'<li><a href="#{r.table.name}-{r.budget}">{escape(_heading(r))}</a></li>' for r in reports)
    return shell(title, f"<ul>{links}</ul>{''.join(_section(report, runs) for report in reports)}")


def shell(title: str, body: str, style: str = "") -> str:
    """A page around its content."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _heading(report: Report) -> str:
    return report.table.title + ("" if report.is_reproduction else f", budget {report.budget}")


def _section(report: Report, runs: Path) -> str:
    table = report.table
    parts = [
        f'<section id="{table.name}-{report.budget}"><h2>{escape(_heading(report))}</h2>',
        f'<p class="source">{escape(f"{table.source} · " if table.source else "")}<code>{table.name}</code></p>',
        _grid(report),
        f'<p class="note">{_code(markdown.caption(report))}</p>',
        _claims(report.verdicts),
        _missing(report),
        _figures(_curves_title(report), list(_curves(report))),
        _figures("Successive halving: learning curves of all trials, and the rungs", list(_rungs(report))),
        _figures("Sensitivity to the searched hyper-parameters", list(_sensitivity(report))),
        _figures("Pictures of the selected runs", list(_pictures(report, runs))),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _grid(report: Report) -> str:
    columns = report.table.columns
    head = "".join(
        f"<th>{escape(title)}</th>" for title in ("", *(c.title for c in columns.values()), "runs", "a run", "all runs")
    )
    rows, group = [], ""
    best = markdown.best_lines(report)
    for line in report.lines:
        if line.row.group != group:
            group = line.row.group
            rows.append(
                f'<tr class="group"><th colspan="{len(columns) + 4}">{escape(group)}</th></tr>' if group else ""
            )
        title = escape(line.row.title) + (
            "<small>settings given</small>" if markdown.settings_given(report, line) else ""
        )
        title += "".join(f"<small>{escape(mark)}</small>" for mark in line.marks)
        cells = [f"<td>{title}</td>", *(_cell(report, line, key, line in best.get(key, ())) for key in columns)]
        cells.append(_td("runs", str(len(line.runs)) if line.runs else ""))
        times = (line.training_s / max(1, len(line.runs)), line.training_s) if line.runs else ()
        cells += [_td(name, duration(s)) for name, s in zip(("a run", "all runs"), times, strict=False)]
        rows.append(f"<tr{' class=marked' if line.marks else ''}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(report: Report, line: Line, key: str, best: bool) -> str:
    column = report.table.columns[key]
    ours = line.cells[key].show(column.scale, column.digits) if key in line.cells else ""
    shown = f"<strong>{escape(ours)}</strong>" if best else escape(ours)
    number = line.row.published.get(key)
    if number is None:
        return _td(column.title, shown)
    text = f"{shown or '–'}<small>published {escape(markdown.published(number, column))}</small>"
    if report.is_reproduction and not line.marks and key in line.cells:
        text += f"<small>difference {escape(markdown.difference(report, line, key))}</small>"
    return _td(column.title, text)


def _interval(cell: str, best: bool) -> str:
    """``1.2 [0.3, 2.1]`` with the interval below the number."""
    value, bracket, rest = cell.partition(" [")
    shown = f"<strong>{escape(value)}</strong>" if best else escape(value)
    return f"{shown}<small>[{escape(rest)}</small>" if bracket else shown


def _td(title: str, content: str) -> str:
    return f'<td data-title="{escape(title)}"{"" if content else " class=empty"}><span>{content}</span></td>'


def _claims(verdicts: Iterable[Verdict]) -> str:
    items = [
        f"<li>{escape(v.claim.text)} "
        f'<span class="verdict {v.decision}">{markdown.WORDS[v.decision]}.</span>'
        f"<small>{escape(markdown.numbers(v))}</small>"
        f"<small>{escape(markdown.theirs(v))}</small></li>"
        for v in verdicts
    ]
    return f"<h3>Claims</h3><ul class=claims>{''.join(items)}</ul>" if items else ""


def _missing(report: Report) -> str:
    lines = markdown.missing(report).splitlines()[2:]
    items = "".join(f"<li>{_code(line.removeprefix('- '))}</li>" for line in lines)
    return (
        f"<details><summary>Rows without runs on this budget: {len(lines)}</summary><ul>{items}</ul></details>"
        if items
        else ""
    )


def _code(text: str) -> str:
    """The text, escaped, with `code` marked up."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _figures(title: str, figures: list[tuple[str, str]]) -> str:
    items = [
        f'<figure><img alt="{escape(text)}" src="{uri}"><figcaption>{escape(text)}</figcaption></figure>'
        for text, uri in figures
    ]
    return f"<h3>{title}</h3><div class=figures>{''.join(items)}</div>" if items else ""


def _curves(report: Report) -> Iterable[tuple[str, str]]:
    """Validation metric over steps, for the selected run of every row or for all its seeds; one
    figure a group of rows.
    """
    groups: dict[str, list[tuple[str, list[Curve]]]] = {}
    for line in report.main().values():
        assert line.chosen is not None
        searches = report.table.selection.rule == "best_trial"
        shown = [line.runs[line.chosen]] if searches else line.runs
        curves = [curve for run in shown if len(curve := run.sweep.get("curve", [])) > 1]
        if curves:
            groups.setdefault(line.row.group, []).append((line.row.title, curves))
    for group, lines in groups.items():
        for start in range(0, len(lines), pictures.MOST):
            figure = figures.learning(dict(lines[start : start + pictures.MOST]), _metric(report))
            yield group or report.table.title, figures.svg(figure)


def _curves_title(report: Report) -> str:
    searches = report.table.selection.rule == "best_trial"
    return "Learning curves of the selected runs" if searches else "Learning curves, means over runs with 95 % bands"


def _metric(report: Report) -> str:
    return report.table.selection.metric or "validation metric"


def _rungs(report: Report) -> Iterable[tuple[str, str]]:
    """Validation metric of every trial of a row with successive halving, and the steps at which
    trials paused.
    """
    for line in report.main().values():
        curves = [trial["curve"] for trial in line.halving.get("trials", []) if trial["curve"]]
        if not curves:
            continue
        figure = figures.halving(curves, line.halving["rungs"], line.runs[0].monitor or "validation metric")
        yield f"{line.row.title}: {markdown.reached(line)}; dots are trials that were stopped", figures.svg(figure)


def _sensitivity(report: Report) -> Iterable[tuple[str, str]]:
    """Validation metric of every trial against a hyper-parameter, one figure for each pair of them
    and group of rows.
    """
    found: dict[tuple[str, str], list[tuple[str, list[Any], list[float], int]]] = {}
    for line in report.main().values():
        assert line.chosen is not None
        validation = [run.metrics[report.table.selection.metric or run.monitor] for run in line.runs]
        for key, values in searched(line).items():
            found.setdefault((key, line.row.group), []).append((line.row.title, values, validation, line.chosen))
    for (key, group), rows in found.items():
        for start in range(0, len(rows), pictures.MOST):
            figure = figures.sensitivity(key, _metric(report), rows[start : start + pictures.MOST])
            yield f"{key}{f', {group}' if group else ''}; rings are selected", figures.svg(figure)


def _pictures(report: Report, runs: Path) -> Iterable[tuple[str, str]]:
    """The pictures of the selected run of every row, if its folder is in ``runs``."""
    for line in report.main().values():
        assert line.chosen is not None
        for file in sorted((runs / line.runs[line.chosen].folder / "pictures").glob("*.png")):
            yield f"{line.row.title}: {file.stem.replace('_', ' ')}", figures.uri("image/png", file.read_bytes())


def comparison_page(blocks: Sequence[Block], runs: Iterable[Path] = (Path("runs"),)) -> str:
    """The page of a comparison: a section for each task, with learning curves of the runs whose
    curves can be found in one of the folders ``runs``.
    """
    places = list(runs)
    sections = [_aggregate(found)] if (found := comparison.aggregate(blocks)) else []
    for block in blocks:
        grid = comparison.grid(block)
        curves = {group.title: comparison.curves(group, places) for group in block.groups}
        curves = {title: found for title, found in curves.items() if found}
        drawn = []
        for start in range(0, len(curves), pictures.MOST):
            part = dict(list(curves.items())[start : start + pictures.MOST])
            monitor = block.groups[0].runs[0].monitor
            drawn.append((f"{monitor}: means over runs, 95 % bands", figures.svg(figures.learning(part, monitor))))
        lists = "".join(
            f"<h3>{escape(title)}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
            for title, lines in comparison.lists(block)
        )
        sections.append(
            f"<section><h2>{escape(block.task)}</h2>{_table(grid)}{_figures('Learning curves', drawn)}{lists}</section>"
        )
    return shell("structgrad: comparison", "".join(sections))


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in grid.titles)
    lines = []
    for row in grid.rows:
        cells = zip(grid.titles, row.cells, strict=True)
        shown = [_td(title, _interval(cell, index in row.best)) for index, (title, cell) in enumerate(cells)]
        lines.append(f"<tr>{''.join(shown)}</tr>")
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'{body}<p class="note">{escape(grid.caption)}</p>'


def _aggregate(found: Aggregate) -> str:
    """The statistics over several tasks, each with its picture."""
    scored = [(title, value, _ends(ends)) for title, value, ends in found.ranking]
    titles = [title for title, _, _ in scored]
    won = [(f"over {other}", value, ends) for _, other, value, ends in found.improvements]
    what = "mean" if found.few else "interquartile mean"
    drawn = [
        (f"Normalised score, {what}", figures.svg(figures.points(scored, f"{what} of the normalised score", 1.0))),
        ("Performance profiles", figures.svg(figures.profiles({title: found.scores[title] for title in titles}))),
        (f"Probability that a run of {titles[0]} is better", figures.svg(figures.points(won, "probability", 0.5))),
    ]
    table = _table(comparison.aggregate_grid(found))
    return f"<section><h2>All tasks</h2>{table}{_figures('Over tasks', drawn)}</section>"


def _ends(found: Difference) -> tuple[float, float] | None:
    return None if found.half_width is None else (found.low, found.high)
