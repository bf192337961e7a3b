"""Tables of finished runs: mean and standard error over seeds, beside the published numbers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from structgrad.experiments.papers import TABLES, Column, Table
from structgrad.experiments.runs import Cell, Summary


def table(summaries: list[Summary]) -> str:
    """Markdown table of runs of one task and one budget, a row for each structure and estimator.

    The published column is shown only for the budget of the paper: a quick run is not a reproduction.

    Raises:
        ValueError: if the runs mix tasks or budgets, or one seed stands twice in a row of the table.
    """
    kinds = {(s.task, s.budget) for s in summaries}
    if len(kinds) != 1:
        raise ValueError(f"one table shows one task and one budget; got {sorted(kinds)}")
    ((task, budget),) = kinds
    layout = TABLES.get(task) or Table(_columns_of(summaries))
    groups: defaultdict[tuple[str, str], list[Summary]] = defaultdict(list)
    for summary in summaries:
        groups[summary.structure, summary.estimator].append(summary)
    known = list(layout.published)
    order = sorted(groups, key=lambda key: (known.index(key) if key in known else len(known), key))
    published = budget == "paper" and bool(layout.published)
    titles = ["Structure", "Estimator", "Seeds", *(column.title for column in layout.columns)]
    if published:
        titles += [f"{column.title}, published" for column in layout.columns]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for key in order:
        runs = groups[key]
        seeds = [run.seed for run in runs]
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"{key}: seeds {sorted(seeds)} repeat; runs with different settings are in one folder")
        cells = [*key, str(len(runs)), *(_cell(runs, column, layout.selected_by) for column in layout.columns)]
        if published:
            cells += [value or "-" for value in layout.published.get(key, (None,) * len(layout.columns))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def caption(summaries: list[Summary]) -> str:
    """One sentence: budget, devices, commits."""
    budgets = ", ".join(sorted({s.budget for s in summaries}))
    devices = ", ".join(sorted({s.content["device"] for s in summaries}))
    commits = ", ".join(sorted({(s.content["commit"] or "unknown")[:10] for s in summaries}))
    layout = TABLES.get(summaries[0].task)
    brackets = f"; in brackets the run with the best `{layout.selected_by}`" if layout and layout.selected_by else ""
    return f"Mean ± standard error over seeds{brackets}; budget `{budgets}`; device {devices}; commit {commits}."


def _cell(runs: list[Summary], column: Column, selected_by: str | None) -> str:
    values = [run.metrics[column.metric] for run in runs if column.metric in run.metrics]
    if len(values) < len(runs):
        return "-"
    shown = Cell.of(values).show(column.scale, column.digits)
    if selected_by is None:
        return shown
    selected = max(runs, key=lambda run: run.metrics[selected_by]).metrics[column.metric]
    return f"{shown} ({selected * column.scale:.{column.digits}f})"


def _columns_of(summaries: list[Summary]) -> tuple[Column, ...]:
    """For tasks without a published table: every test metric."""
    names = sorted({name for s in summaries for name in s.metrics if name.startswith("test/")})
    return tuple(Column(name, name.removeprefix("test/"), 1, 3) for name in names)


def insert(document: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in a document.

    Raises:
        ValueError: if the document has no such place.
    """
    content = document.read_text()
    start, end = f"<!-- table:{name} -->\n", "<!-- /table -->"
    if start not in content or end not in content.split(start, 1)[1]:
        raise ValueError(f"{document} has no place for the table: {start.strip()} ... {end}")
    before, rest = content.split(start, 1)
    document.write_text(before + start + text + "\n" + end + rest.split(end, 1)[1])
