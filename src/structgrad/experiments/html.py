"""Reports as one self-contained HTML page: no scripts, nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from structgrad.common.text import duration
from structgrad.experiments import markdown
from structgrad.experiments.report import Line, Report, Verdict, searched

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
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th:first-child, td:first-child { text-align: left } td small { color: #777; display: block; white-space: nowrap }
tr.group th { text-align: left; padding-top: .9rem }
tr.marked td { background: var(--soft); font-style: italic }
.claims { padding-left: 1.1rem } .claims li { margin: .5rem 0 } .claims small { display: block; color: #777 }
.verdict { font-weight: 600 }
.shown { color: var(--good) } .contradicted { color: var(--bad) } .open { color: var(--open) }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0 } figure img { width: 100%; background: #fff; border-radius: 4px } figcaption { font-size: .875rem }
@media (max-width: 640px) {
  thead { display: none } tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0 }
  td, tr.group th { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0 }
  td:first-child { display: block; font-weight: 600; text-align: left } td:first-child::before { content: none }
  td:not(:first-child)::before { content: attr(data-title); color: #777; text-align: left }
  td.empty { display: none }
}
"""
#: Lines of a figure, beside which more could not be told apart.
_LINES = 10


def page(reports: Sequence[Report], runs: Path = Path("runs"), title: str = "structgrad: tables") -> str:
    """The whole page, with pictures of the selected runs whose folders are in ``runs``."""
    links = "".join(f'<li><a href="#{r.table.name}-{r.budget}">{escape(_heading(r))}</a></li>' for r in reports)
    sections = "".join(_section(report, runs) for report in reports)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><ul>{links}</ul>{sections}</body></html>\n"
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
        _figures("Learning curves of the selected runs", list(_curves(report))),
        _figures("Sensitivity to the searched hyper-parameters", list(_sensitivity(report))),
        _figures("Pictures of the selected runs", list(_pictures(report, runs))),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _grid(report: Report) -> str:
    columns = report.table.columns
    head = "".join(f"<th>{escape(title)}</th>" for title in ("", *(c.title for c in columns.values()), "runs", "time"))
    rows, group = [], ""
    for line in report.lines:
        if line.row.group != group:
            group = line.row.group
            rows.append(
                f'<tr class="group"><th colspan="{len(columns) + 3}">{escape(group)}</th></tr>' if group else ""
            )
        title = escape(line.row.title) + (
            "<small>settings given</small>" if markdown.settings_given(report, line) else ""
        )
        title += "".join(f"<small>{escape(mark)}</small>" for mark in line.marks)
        cells = [f"<td>{title}</td>", *(_cell(report, line, key) for key in columns)]
        cells.append(_td("runs", str(len(line.runs)) if line.runs else ""))
        cells.append(_td("time", duration(line.training_s) if line.runs else ""))
        rows.append(f"<tr{' class=marked' if line.marks else ''}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(report: Report, line: Line, key: str) -> str:
    column = report.table.columns[key]
    ours = line.cells[key].show(column.scale, column.digits) if key in line.cells else ""
    number = line.row.published.get(key)
    if number is None:
        return _td(column.title, escape(ours))
    text = f"{escape(ours or '–')}<small>published {escape(markdown.published(number, column))}</small>"
    if report.is_reproduction and not line.marks and key in line.cells:
        text += f"<small>difference {escape(markdown.difference(report, line, key))}</small>"
    return _td(column.title, text)


def _td(title: str, content: str) -> str:
    return f'<td data-title="{escape(title)}"{"" if content else " class=empty"}><span>{content}</span></td>'


def _claims(verdicts: Iterable[Verdict]) -> str:
    items = [
        f"<li>{escape(v.claim.text)} "
        f'<span class="verdict {v.decision}">{markdown.WORDS[v.decision]}.</span>'
        f"<small>{escape(markdown.numbers(v))}</small></li>"
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
    """Escaped, with `code` marked up."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _figures(title: str, figures: list[tuple[str, str]]) -> str:
    items = [
        f'<figure><img alt="{escape(text)}" src="{uri}"><figcaption>{escape(text)}</figcaption></figure>'
        for text, uri in figures
    ]
    return f"<h3>{title}</h3><div class=figures>{''.join(items)}</div>" if items else ""


def _curves(report: Report) -> Iterable[tuple[str, str]]:
    """Validation metric over steps of the selected run of every row: a figure a group of rows."""
    groups: dict[str, list[tuple[str, list[tuple[int, float]]]]] = {}
    for line in report.main().values():
        assert line.chosen is not None
        curve = line.runs[line.chosen].sweep.get("curve", [])
        if len(curve) > 1:
            groups.setdefault(line.row.group, []).append((line.row.title, curve))
    for group, curves in groups.items():
        for start in range(0, len(curves), _LINES):
            figure, axes = _axes("step", report.table.selection.metric or "validation metric")
            for title, curve in curves[start : start + _LINES]:
                axes.plot([step for step, _ in curve], [value for _, value in curve], label=title, linewidth=1.3)
            axes.legend(fontsize=7)
            yield group or report.table.title, _svg(figure)


def _sensitivity(report: Report) -> Iterable[tuple[str, str]]:
    """Validation metric of every trial against a hyper-parameter: a figure a hyper-parameter and group of rows."""
    figures: dict[tuple[str, str], list[tuple[Line, list[Any]]]] = {}
    for line in report.main().values():
        for key, values in searched(line).items():
            figures.setdefault((key, line.row.group), []).append((line, values))
    for (key, group), lines in figures.items():
        for start in range(0, len(lines), _LINES):
            figure, axes = _axes(key, report.table.selection.metric or "validation metric")
            numbers = [v for _, values in lines for v in values]
            if not all(isinstance(v, int | float) for v in numbers):
                lines = [(line, list(map(str, values))) for line, values in lines]
            elif min(numbers) > 0 and max(numbers) > 20 * min(numbers):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            for index, (line, values) in enumerate(lines[start : start + _LINES]):
                validation = [run.metrics[report.table.selection.metric or run.monitor] for run in line.runs]
                axes.plot(values, validation, "o", color=f"C{index}", markersize=4, label=line.row.title, alpha=0.7)
                assert line.chosen is not None
                axes.plot(values[line.chosen], validation[line.chosen], "*", color=f"C{index}", markersize=12)
            axes.legend(fontsize=7)
            yield f"{key}{f', {group}' if group else ''}; stars are selected", _svg(figure)


def _pictures(report: Report, runs: Path) -> Iterable[tuple[str, str]]:
    """What the selected run of every row has drawn, where its folder is in ``runs``."""
    for line in report.main().values():
        assert line.chosen is not None
        for file in sorted((runs / line.runs[line.chosen].folder / "pictures").glob("*.png")):
            yield f"{line.row.title}: {file.stem.replace('_', ' ')}", _uri("image/png", file.read_bytes())


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.4, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "structgrad", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", stream.getvalue().encode())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
