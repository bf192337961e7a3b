"""The figure of the parentheses, from synthetic summaries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.experiments.figures import figure

ROOT = Path(__file__).resolve().parents[2]
ORDERS = {"none": "none", "ground_truth": "none", "binary_tree": "relax"}


def write(folder: Path, structure: str, types: int, seed: int, new: float, budget: str = "quick") -> None:
    content = {
        "task": "parentheses", "structure": structure, "estimator": ORDERS[structure], "budget": budget, "seed": seed,
        "device": "cpu",
        "metrics": {
            "test/new_balanced": new, "test/old": 0.1, "test/unbalanced": 0.9 - new, "test/perplexity": 5.0,
            "val/perplexity": 5.0,
        },
        "config": {"task": {"data": {"types": types}}},
    }  # fmt: skip
    (folder / f"{structure}-{types}-{seed}-{budget}.json").write_text(json.dumps(content))


def test_one_curve_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from figures import read
    from parentheses_figure import curves

    for seed in range(3):
        for types in (50, 10):
            write(tmp_path, "none", types, seed, 0.5 - types / 200 + 0.1 * seed)
        write(tmp_path, "binary_tree", 30, seed, 0.6)
    found = curves(read("parentheses_quick", tmp_path))
    assert {title: list(points) for title, points in found.items()} == {
        "Left to right": [10, 50],
        "Semi-supervised": [30],
    }
    assert found["Left to right"][50]["new"].value == pytest.approx(0.35)
    assert found["Left to right"][50]["new"].standard_error == pytest.approx(0.1 / 3**0.5)

    done = figure("parentheses_figure", tmp_path, tmp_path / "images" / "figure.png")
    assert done.returncode == 0, done.stderr
    assert imread(tmp_path / "images" / "figure.png").std() > 0.01


def test_other_budgets_are_refused(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, "none", 10, seed, 0.5)
    write(tmp_path, "none", 10, 2, 0.5, budget="paper")
    done = figure("parentheses_figure", tmp_path, tmp_path / "figure.png")
    assert done.returncode == 1
    assert "runs with budget paper cannot be compared" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "figure.png").exists()
