"""The page of what is reproduced, and the order of the work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from structgrad.experiments import reproduction, tables
from structgrad.experiments.report import build
from structgrad.experiments.runs import Summary, of_sweeps
from structgrad.experiments.tables import Table
from tests.experiments.test_tables import FOLDER, ROOT, runs, small, summary

#: A published number that is known well enough for a match.
SURE = ("[80.0, 4.0]", "[80.0, 0.4]")


def said(table: Table, *runs: Summary) -> str:
    """The state of the row lstm."""
    report = build(table, runs, "paper")
    return str(reproduction.state(report, report.main().get("lstm"), table.row("lstm")))


def test_states(tmp_path: Path) -> None:
    table = small(tmp_path, SURE)
    close = [summary("lstm", seed, 0.8 + seed / 1000) for seed in range(3)]
    assert said(table, *close) == "matched"
    report = build(table, runs(), "paper")
    assert str(reproduction.state(report, report.main()["tree"], table.row("tree"))) == "run (no published numbers)"
    far = [summary("lstm", seed, 0.6 + seed / 100) for seed in range(3)]
    assert said(table, *far) == "differs: Accuracy (%) -19.0 [-21.5, -16.5]"
    assert said(table, *runs()[:3]) == "open: Accuracy (%) +1.0 [-1.5, +3.5]"
    # A small difference that is surely there is no less a match.
    assert said(table, *[summary("lstm", seed, 0.81 + seed / 1e6) for seed in range(3)]) == "matched"
    assert said(table, summary("lstm", 0, 0.6)) == "open: Accuracy (%) -20.0 (50.0 published errors)"
    nan = {"val/accuracy": 1, "test/accuracy": math.nan}
    assert said(table, *[summary("lstm", s, 0.8, metrics=nan) for s in (0, 1)]).startswith("differs")
    assert said(table, summary("lstm", 0, 0.8, budget="quick")) == "not run"
    closed = small(tmp_path, ("[structure=none],", "[structure=none], unavailable: no such data,"))
    assert said(closed) == "data not to be had"


def test_an_error_of_the_paper_makes_no_match(tmp_path: Path) -> None:
    close = [summary("lstm", seed, 0.8 + seed / 1000) for seed in range(3)]
    assert said(small(tmp_path, ("[80.0, 4.0]", "[80.0, 40.0]")), *close).startswith("open: ")


def test_one_run_with_an_exact_column_matches_only_that(tmp_path: Path) -> None:
    table = small(tmp_path, ("{accuracy: [80.0, 4.0]}", "{accuracy: [80.0, 4.0], calls: 1}"))
    metrics = {"val/accuracy": 0.1, "test/accuracy": 0.1, "test/calls": 1.0}
    assert said(table, summary("lstm", 0, 0.1, metrics=metrics)) == "open: Accuracy (%) -70.0 (17.5 published errors)"


def test_numbers_without_any_spread(tmp_path: Path) -> None:
    table = small(tmp_path, ("[80.0, 4.0]", "[80.0, 0.0]"))
    for accuracy, expected in ((0.5, "differs: Accuracy (%) -30.0 [-30.0, -30.0]"), (0.8, "matched")):
        assert said(table, *[summary("lstm", seed, accuracy) for seed in range(2)]) == expected


def test_runs_with_settings_of_the_user_are_no_reproduction(tmp_path: Path) -> None:
    made = {"table": "small", "row": "lstm", "parameters": {}, "extra": ["task.hidden=9"]}
    runs = [summary("lstm", seed, 0.8 + seed / 100, sweep=made | {"trial": seed}) for seed in range(2)]
    table = small(tmp_path)
    assert said(table, *runs) == "run (not compared): with task.hidden=9"


def test_the_page_has_every_row(tmp_path: Path) -> None:
    everything = [tables.load(name, FOLDER) for name in tables.names(FOLDER)]
    reports = [build(table, [], "paper") for table in everything if table.budget == "paper"]
    text = reproduction.document(reports)
    rows = sum(len(report.table.rows) for report in reports)
    closed = [report.table for report in reports if report.table.unavailable]
    of_closed = sum(len(table.rows) for table in closed)
    assert text.count("`python sweep.py table=") == rows - of_closed + len(closed) > 150
    assert f"{rows} rows: {of_closed} data not to be had; " in text
    assert text.count(" rows=all budget=paper`") == len(closed) > 1
    assert "quick" not in text.replace("sweep.py", "")


def test_the_cheapest_come_first() -> None:
    everything = [tables.load(name, FOLDER) for name in tables.names(FOLDER)]
    hours = [entry.hours for entry in reproduction.order(everything)]
    known = [h for h in hours if h is not None]
    assert known == sorted(known)
    assert hours[: len(known)] == known
    day = reproduction.order(everything, 24.0)
    assert ("paulus_2", "lstm") in {(e.table.name, e.row.name) for e in day}
    assert all(e.hours is not None and e.hours <= 24 for e in day)
    assert not any(e.table.unavailable for e in day)


def test_the_script_lists_its_work_and_writes_its_page(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "reproduce.py")]
    listed = subprocess.run([*script, "--list", "--hours", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert "struminsky_toy" in listed.stdout
    page = tmp_path / "page.md"
    done = subprocess.run([*script, "--only-page", "--page", str(page)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not run" in page.read_text()


def test_runs_with_overrides_of_the_user_are_found_beside_the_others(tmp_path: Path) -> None:
    for folder, seed in (("small", 0), ("small-0123ab", 1), ("small_quick", 2), ("smaller", 3)):
        (tmp_path / folder).mkdir()
        content = summary("lstm", seed, 0.8)
        (tmp_path / folder / "x.json").write_text(json.dumps(content.content))
    assert [run.seed for run in of_sweeps(tmp_path, "small")] == [0, 1]
    assert of_sweeps(tmp_path, "none") == []


def test_the_picture_has_a_point_a_row_with_both_errors(tmp_path: Path) -> None:
    table = small(tmp_path)
    report = build(table, runs(), "paper")
    (point,) = reproduction.points([report])  # the other rows have no published number
    assert (point.table, point.title, point.published) == ("small", "lstm: Accuracy (%)", 80.0)
    assert point.ours == pytest.approx(81.0)
    # Published: a standard deviation over four seeds; ours: three.
    assert point.published_error == pytest.approx(3.182 * 2, rel=1e-3)
    assert point.our_error == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    figure = reproduction.figure([report])
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["small"]
    diagonal = next(line for line in axes.lines if list(line.get_xdata()) == list(line.get_ydata()))
    low, high = axes.get_xlim()
    assert tuple(diagonal.get_xdata()) == (low, high) == axes.get_ylim()
    assert low < point.published - point.published_error
    assert high > point.published + point.published_error  # the whole bar is seen
    page = reproduction.document([report], "images/x.png")
    assert page.startswith("# Reproduction\n\n![Published numbers against ours](images/x.png)")


def test_tables_without_published_numbers_are_apart(tmp_path: Path) -> None:
    curves = replace(small(tmp_path, (", published: {accuracy: [80.0, 4.0]}", "")), title="Curves")
    page = reproduction.document([build(curves, runs(), "paper"), build(small(tmp_path), runs(), "paper")])
    own, apart = page.split("## Without published numbers\n")
    assert "## Small (`small`, A paper, Table 1)" in own
    assert "Curves" not in own
    assert "### Curves (`small`, A paper, Table 1)" in apart


def test_stand_in_data_are_grouped_under_their_name(tmp_path: Path) -> None:
    stand_in = small(tmp_path, ("source: A paper", "stand_in: digits for clothes\nsource: A paper"))
    page = reproduction.document([build(stand_in, runs(), "paper"), build(small(tmp_path), runs(), "paper")])
    own, apart = page.split("## Stand-in data")
    assert "## Small (`small`, A paper, Table 1)" in own
    assert "### digits for clothes: Small" in apart
    assert "Selection: mean and standard error; device cpu" in apart
    assert not reproduction.points([build(stand_in, runs(), "paper")])
