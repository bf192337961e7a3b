"""Command lines for reports that cannot work: one line each that ends with what to type, before anything is printed."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from structgrad.commands import report
from tests.experiments.test_tables import summary

R = "results/listops_quick"

#: Arguments, and the end of the line that refuses them.
WRONG: list[tuple[str, str]] = [
    # --- tables ---
    ("table=paulus_22", "nearest: paulus_2, "),
    ("table=", "type e.g. table=paulus_2, or leave it out\n"),
    ("tabel=paulus_2", "type table=...\n"),
    ("seeds=3", "there are table= and budget=; type "),
    ("table=paulus_2 table=paulus_2", "type it once, or leave it out for all\n"),
    ("budget=big", "type budget=paper or budget=quick or budget=smoke\n"),
    ("budget=", "type e.g. budget=quick, or leave it out\n"),
    ("budget=quick budget=paper", "type it once, or leave it out for all\n"),
    ("hydra.searchpth=[x]", "type "),
    ("hydra.searchpath=(x", "type 'hydra.searchpath=[pkg://mylab.configs]'\n"),
    ("table=paulus_2 hydra.searchpath=[pkg://nowhere]", "no package nowhere for pkg://nowhere; is it on PYTHONPATH?\n"),
    # --- folders ---
    ("nowhere", "is no folder; type "),
    ("results/listops_quik", "is no folder; type results/listops_quick\n"),
    ("nowhere/at/all", "is no folder; type a folder of finished runs, e.g. results/listops_quick\n"),
    ("README.md", "is no folder; type "),
    ("table=paulus_2 nowhere/at/all", "type a folder of finished runs, e.g. results/listops_quick\n"),
    ("docs", "type a folder that train.py or sweep.py has filled\n"),
    (f"{R} nowhere/at/all --by estimator", "type a folder of finished runs, e.g. results/listops_quick\n"),
    # --- comparisons ---
    (f"{R} --by estimater", "nearest: estimator\n"),
    (f"{R} --by estimator.temprature", "nearest: estimator.temperature\n"),
    (f"{R} --by ''", "a name is missing; type e.g. --by estimator\n"),
    (f"{R} --by estimator,", "a name is missing; type e.g. --by estimator\n"),
    (f"{R} --by estimator,estimator", "estimator is given twice; type it once\n"),
    (f"{R} --metric test/acuracy", "nearest: test/accuracy, "),
    (f"{R} --metric test/accuracy,test/precison", "nearest: test/precision, "),
    (f"{R} --metric ''", "a name is missing; type e.g. --metric test/accuracy\n"),
    (f"{R} --metric test/loss,test/loss", "test/loss is given twice; type it once\n"),
    (f"{R} --where estimator", "expected key=value; type e.g. --where estimator=sst\n"),
    (f"{R} --where =3", "expected key=value; type e.g. --where estimator=sst\n"),
    (f"{R} --where estimator=", "expected key=value; type e.g. --where estimator=sst\n"),
    (f"{R} --where budget=quik", "type --where budget=quick, of quick\n"),
    (f"{R} --where nokey=3", "nearest: "),
    (f"{R} --where seed=0 --where seed=1", "and a run has one value; type it once\n"),
    (f"{R} table=paulus_2 --by estimator", "say --where table=paulus_2\n"),
    (f"{R} --by estimator --into README.md", "--markdown prints it\n"),
    (f"{R} --by estimator --compare", "both say what is compared; type one of them\n"),
    # --- options ---
    (f"{R} --latex --csv", "not allowed with argument --latex; type --help for the options\n"),
    (f"{R} --latx", "unrecognized arguments: --latx; type --help for the options\n"),
    (f"{R} -x", "unrecognized arguments: -x; type --help for the options\n"),
    ("--by", "expected one argument; type --help for the options\n"),
    ("--metric", "expected one argument; type --help for the options\n"),
    ("--where", "expected one argument; type --help for the options\n"),
    ("--html", "expected one argument; type --help for the options\n"),
    ("--into", "expected one argument; type --help for the options\n"),
    ("--runs", "expected one argument; type --help for the options\n"),
    # --- what is written ---
    (f"{R} --into nowhere.md", "type a document that has a place for the table\n"),
    (f"{R} --into docs", "type a document that has a place for the table\n"),
    (f"{R} --html page.png", "type --html page.html\n"),
    (f"{R} --html results", "type --html results.html\n"),
    (f"{R} --html nowhere/x.html", "has no folder nowhere; type --html with a file in a folder of yours\n"),
    (f"{R} --by estimator --html /proc/nowhere/x.html", "type --html with a file in a folder of yours\n"),
    # --- all runs ---
    ("runs --runs /nowhere", "--runs /nowhere is no folder; type --runs with the folder of the runs\n"),
    ("/nowhere", "is no folder; type a folder of finished runs, e.g. results/listops_quick\n"),
    ("runs --runs docs", "type --runs with the folder of the runs\n"),
    ("runs --runs docs --csv", "type --html page.html in its place\n"),
    ("runs --runs docs --latex", "type --html page.html in its place\n"),
    ("runs --runs docs --markdown", "type --html page.html in its place\n"),
    ("runs --runs docs --into README.md", "type --html page.html in its place\n"),
]


@pytest.mark.parametrize(("given", "end"), WRONG, ids=[given for given, _ in WRONG])
def test_it_is_refused_in_one_line_that_ends_with_what_to_type(
    given: str, end: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert report.main(shlex.split(given)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(end) if end.endswith("\n") else end in printed.err


def test_a_document_without_a_place_is_told_which(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    (tmp_path / "page.md").write_text("")
    assert report.main([R, "--into", str(tmp_path / "page.md")]) == 1
    end = "has no place for the table; type there <!-- table:listops_quick --> and, below it, <!-- /table -->\n"
    assert capsys.readouterr().err.endswith(end)


def test_a_table_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All tables are asked for: the others are printed, and the error says which one and why."""
    monkeypatch.chdir(tmp_path)
    for folder, content in {
        "results/listops_quick": {"task": "listops", "structure": "none", "estimator": "none", "val/accuracy": 0.5},
        "results/toy_quick": {
            "task": "toy",
            "structure": "spanning_tree",
            "estimator": "sst",
            "val/objective": math.nan,
        },
    }.items():
        metrics = {key: content.pop(key) for key in list(content) if key.startswith("val/")}  # type: ignore[attr-defined]
        metrics |= {key.replace("val/", "test/"): 0.5 for key in metrics}
        config = {"estimator": {"n_samples": 3}} if content["task"] == "toy" else {}
        run = {"name": folder[8:], "budget": "quick", "seed": 0, "device": "cpu", "metrics": metrics, "config": config}
        Path(folder).mkdir(parents=True)
        (Path(folder) / "one.json").write_text(json.dumps(content | run))
    assert report.main([]) == 1
    printed = capsys.readouterr()
    assert "LSTM" in printed.out
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(
        "error: left out: toy, spanning_tree_sst: toy_quick has a value of nan for val/objective"
    )
    assert report.main(["table=toy", "budget=quick"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: toy, spanning_tree_sst: toy_quick has a value of nan")


def test_a_reader_that_has_seen_enough_is_no_error(root: Path) -> None:
    """As `| head -1`: the pipe closes before the report is written."""
    command = [sys.executable, "report.py", R]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(("table", "named"), [("mine", True), ("paulus_2", False)])
def test_runs_of_a_table_that_is_not_found_are_compared_with_a_line_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, named: bool
) -> None:
    """A table of ours is found, wherever its runs lie."""
    for seed in range(2):
        made = {"table": table, "row": "lstm", "trial": seed, "parameters": {}}
        content = summary("lstm", seed, 0.8, sweep=made).content
        (tmp_path / f"{seed}.json").write_text(json.dumps(content))
    assert report.main([str(tmp_path)]) == 0
    line = f"table {table} is not found; hydra.searchpath=[pkg://mylab.configs] says where it is\n"
    assert (line in capsys.readouterr().err) == named


def test_runs_of_a_row_that_is_gone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {"table": "listops_quick", "row": "gone", "trial": 0}
    (tmp_path / "run.json").write_text(json.dumps(summary("tree", 0, 0.9, sweep=sweep).content))
    report.main([str(tmp_path), "table=listops_quick"])
    assert "warning: listops_quick has no row gone; runs of it are left out" in capsys.readouterr().err
