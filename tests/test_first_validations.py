"""The script that compares first validations with the stored ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripts.first_validations import Comparison, command_of, first_runs, main

from structgrad.experiments.runs import read

STORED = Path(__file__).resolve().parent.parent / "results" / "struminsky_toy" / "arborescence_e_reinforce-1.json"


def changed(folder: Path, **sweep: Any) -> Path:
    """A stored summary with other entries about its sweep."""
    content = json.loads(STORED.read_text())
    content["sweep"] |= sweep
    file = folder / "changed.json"
    file.write_text(json.dumps(content))
    return file


def test_a_stored_run_is_found_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(STORED)]) == 0
    assert "val/objective after step 99 stored" in capsys.readouterr().out


def test_another_curve_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = json.loads(STORED.read_text())["sweep"]["curve"]
    (step, value), (second, later) = curve[:2]
    away = value + 2 * abs(later - value)
    file = changed(tmp_path, curve=[[step, away], [second, away + abs(later - value)]])
    assert main([str(file)]) == 1
    assert "differs" in capsys.readouterr().out


def test_a_run_that_fails_is_no_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(changed(tmp_path)), "task.no_such_option=1"]) == 1
    printed = capsys.readouterr()
    assert "failed" in printed.out
    assert "no_such_option" in printed.err


@pytest.mark.parametrize(
    ("sweep", "arguments", "reason"),
    [
        ({}, ["trainer=cpu"], "type a folder of results, or a summary"),
        ({}, ["no/such/folder"], "no finished run in"),
        ({"curve": []}, ["changed.json"], "no summary has the curve of its validations"),
        ({"table": "struminsky_to"}, ["changed.json"], "nearest: struminsky_toy"),
        ({"row": "arborescence_e_reinforc"}, ["changed.json"], "nearest: arborescence_e_reinforce"),
    ],
)
def test_nothing_to_compare_is_an_error_of_one_line(
    sweep: dict[str, Any],
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed(tmp_path, **sweep)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert reason in capsys.readouterr().err


def test_given_settings_are_those_of_the_table_s_own_budget() -> None:
    summary = read(STORED.parents[1] / "paulus_2" / "lstm-0.json")
    assert "task.optimizer.lr=0.001" in command_of(summary)
    assert not any("optimizer" in each for each in command_of(replace(summary, budget="quick")))


def test_a_folder_stands_for_the_first_run_of_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(summary.sweep["row"], summary.sweep["trial"]) for summary in first_runs(STORED.parent)]
    assert len(found) == len({row for row, _ in found}) > 1
    assert {trial for _, trial in found} == {0}


@pytest.mark.parametrize(("now", "differs"), [(1.5, False), (2.1, True), (-0.1, True), (float("nan"), True)])
def test_differences_are_measured_by_the_change_until_the_second_validation(now: float, differs: bool) -> None:
    assert Comparison(step=0, stored=1.0, now=now, change=-1.0).differs is differs


def test_without_a_second_validation_nothing_is_marked() -> None:
    assert not Comparison(step=0, stored=1.0, now=9.0, change=None).differs
