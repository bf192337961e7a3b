"""Tables from summaries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from structgrad.experiments.runs import Cell, load
from structgrad.experiments.tables import caption, insert, table

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, structure: str, seed: int, accuracy: float, budget: str = "quick") -> None:
    estimator = "none" if structure == "none" else "sst"
    metrics = {"test/accuracy": accuracy} | ({} if structure == "none" else {"test/precision": 0.5, "test/recall": 1})
    content = {
        "task": "listops", "structure": structure, "estimator": estimator, "budget": budget, "seed": seed,
        "metrics": metrics, "training_s": 10.0, "device": "cpu", "commit": "0123456789abcdef",
    }  # fmt: skip
    (folder / f"{structure}-{budget}-{seed}.json").write_text(json.dumps(content))


def test_mean_and_standard_error() -> None:
    cell = Cell.of([1.0, 2.0, 3.0])
    assert cell.show(digits=2) == "2.00 ± 0.58"
    assert Cell.of([1.0]).show() == "1.0"


def test_rows_follow_the_paper_and_missing_metrics_are_dashes(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "arborescence", seed, 0.8 + seed / 100)
        write(tmp_path, "none", seed, 0.5)
    lines = table(load(tmp_path)).splitlines()
    assert lines[2].startswith("| none | none | 3 | 50.0 ± 0.0 | - | - |")
    assert lines[3].startswith("| arborescence | sst | 3 | 81.0 ± 0.6 | 50.0 ± 0.0 | 100.0 ± 0.0 |")
    assert "published" not in lines[0]


def test_the_selected_run_stands_in_brackets(tmp_path: Path) -> None:
    for seed, (validation, elbo) in enumerate([(-3.0, -30.0), (-1.0, -20.0), (-2.0, -10.0)]):
        metrics = {"val/elbo": validation, "test/elbo": elbo, "test/edge_precision": 0.5, "test/edge_recall": 0.5}
        content = {
            "task": "graph_layout", "structure": "spanning_tree", "estimator": "sst", "budget": "quick", "seed": seed,
            "metrics": metrics, "device": "cpu", "commit": None,
        }  # fmt: skip
        (tmp_path / f"{seed}.json").write_text(json.dumps(content))
    summaries = load(tmp_path)
    assert "| -20 ± 6 (-20) | 50 ± 0 (50) |" in table(summaries)
    assert "`val/elbo`" in caption(summaries)


def test_published_numbers_stand_beside_the_papers_budget_only(tmp_path: Path) -> None:
    write(tmp_path, "arborescence", 0, 0.9, "paper")
    lines = table(load(tmp_path)).splitlines()
    assert "published" in lines[0]
    assert "75.5 ± 7.0" in lines[2]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "arborescence", 0, 0.9, "paper")
    write(tmp_path, "arborescence", 0, 0.9)
    with pytest.raises(ValueError, match="one budget"):
        table(load(tmp_path))
    (tmp_path / "arborescence-paper-0.json").rename(tmp_path / "x.json")
    (tmp_path / "x.json").write_text((tmp_path / "arborescence-quick-0.json").read_text())
    with pytest.raises(ValueError, match="repeat"):
        table(load(tmp_path))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not the summary"):
        load(tmp_path)


def test_a_table_is_put_where_the_document_says(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- table:x -->\nold\n<!-- /table -->\nb\n")
    insert(document, "x", "new")
    assert document.read_text() == "a\n<!-- table:x -->\nnew\n<!-- /table -->\nb\n"
    with pytest.raises(ValueError, match="no place"):
        insert(document, "y", "new")


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "report.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == f"error: no finished run in {tmp_path}\n"
