"""The page of what is reproduced, and the order of the work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from structgrad.experiments import reproduction, tables
from structgrad.experiments.report import build
from structgrad.experiments.runs import of_sweeps
from tests.experiments.test_tables import FOLDER, ROOT, runs, small, summary


def test_states(tmp_path: Path) -> None:
    table = small(tmp_path)
    report = build(table, runs(), "paper")
    lines = report.main()
    assert reproduction.state(report, lines["lstm"], table.row("lstm")) == "matched"
    assert reproduction.state(report, lines["tree"], table.row("tree")) == "run; no published numbers"
    far = build(table, [summary("lstm", seed, 0.6 + seed / 100) for seed in range(3)], "paper")
    assert reproduction.state(far, far.main()["lstm"], table.row("lstm")) == "differs: Accuracy (%) by 9.1 s.e."
    one = build(table, [summary("lstm", 0, 0.6)], "paper")
    assert reproduction.state(one, one.main()["lstm"], table.row("lstm")).startswith("run; too few runs for an error")
    nan = build(
        table, [summary("lstm", s, 0.8, metrics={"val/accuracy": 1, "test/accuracy": math.nan}) for s in (0, 1)]
    )
    assert reproduction.state(nan, nan.main()["lstm"], table.row("lstm")).startswith("differs")
    none = build(table, [summary("lstm", 0, 0.8, budget="quick")], "paper")
    assert reproduction.state(none, none.main().get("lstm"), table.row("lstm")) == "not run"
    closed = small(tmp_path, ("[structure=none],", "[structure=none], unavailable: no such data,"))
    assert reproduction.state(build(closed, []), None, closed.row("lstm")) == "data not to be had"


def test_one_run_with_an_exact_column_matches_nothing(tmp_path: Path) -> None:
    table = small(tmp_path, ("{accuracy: [80.0, 4.0]}", "{accuracy: [80.0, 4.0], calls: 1}"))
    metrics = {"val/accuracy": 0.1, "test/accuracy": 0.1, "test/calls": 1.0}
    report = build(table, [summary("lstm", 0, 0.1, metrics=metrics)])
    found = reproduction.state(report, report.main()["lstm"], table.row("lstm"))
    assert found == "run; too few runs for an error (without an error: Accuracy (%))"


def test_numbers_without_any_spread_that_differ(tmp_path: Path) -> None:
    table = small(tmp_path, ("[80.0, 4.0]", "[80.0, 0.0]"))
    for accuracy, expected in ((0.5, "differs: Accuracy (%) by -30.0 without any spread"), (0.8, "matched")):
        report = build(table, [summary("lstm", seed, accuracy) for seed in range(2)])
        assert reproduction.state(report, report.main()["lstm"], table.row("lstm")) == expected


def test_runs_with_settings_of_the_user_are_no_reproduction(tmp_path: Path) -> None:
    made = {"table": "small", "row": "lstm", "parameters": {}, "extra": ["task.hidden=9"]}
    runs = [summary("lstm", seed, 0.8 + seed / 100, sweep=made | {"trial": seed}) for seed in range(2)]
    table = small(tmp_path)
    report = build(table, runs)
    found = reproduction.state(report, report.main()["lstm"], table.row("lstm"))
    assert found == "run; with task.hidden=9, so not compared"


def test_the_page_has_every_row(tmp_path: Path) -> None:
    everything = [tables.load(name, FOLDER) for name in tables.names(FOLDER)]
    reports = [build(table, [], "paper") for table in everything if table.budget == "paper"]
    text = reproduction.document(reports)
    rows = sum(len(table.rows) for table in everything if table.budget == "paper")
    assert text.count("`python sweep.py table=") == rows > 250
    assert f"{rows} rows: " in text
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
