"""The rate-distortion figure, from synthetic summaries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from structgrad.experiments.runs import load

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, structure: str, estimator: str, seed: int, rate: float, changes: dict[str, Any]) -> None:
    content = {
        "task": "bit_vector_vae", "structure": structure, "estimator": estimator, "budget": "quick", "seed": seed,
        "metrics": {"test/rate": rate, "test/distortion": 900 - 3 * rate + 2 * seed}, "config": {"task": {"bits": 32}},
    } | changes  # fmt: skip
    (folder / f"{len(list(folder.glob('*.json')))}.json").write_text(json.dumps(content))


def figure(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "rate_distortion.py"), str(folder), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of two rows of the paper, one seed of another row."""
    folder = tmp_path / "results"
    folder.mkdir()
    for seed in range(3):
        write(folder, "bit_vector", "sfe", seed, 5.0 + seed, {})
        write(folder, "budget_subset", "sparsemap", seed, 20.0 + 0.1 * seed, {})
    write(folder, "bit_vector", "marginal", 0, 12.0, {})
    return folder


def test_draws_one_point_a_row(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from rate_distortion import points

    cells = points(load(results))
    assert list(cells) == [("bit_vector", "sfe"), ("budget_subset", "sparsemap"), ("bit_vector", "marginal")]
    rate, distortion = cells["bit_vector", "sfe"]
    assert (rate.mean, rate.count) == (6.0, 3)
    assert rate.error == pytest.approx(1 / 3**0.5)
    assert distortion.mean == pytest.approx(884.0)
    assert cells["bit_vector", "marginal"][0].error is None

    output = tmp_path / "images" / "figure.png"
    done = figure(results, output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
    assert imread(output).std() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "listops"}, "task listops has no rate"),
        ({"budget": "paper"}, "one budget"),
        ({"config": {"task": {"bits": 128}}}, "number of bits"),
        ({"seed": 0}, "bit_vector sfe repeats seed 0"),
    ],
)
def test_refuses_what_cannot_be_compared(results: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(results, "bit_vector", "sfe", 9, 5.0, changes)
    done = figure(results, tmp_path / "figure.png")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "figure.png").exists()


def test_without_runs_says_so(tmp_path: Path) -> None:
    done = figure(tmp_path, tmp_path / "figure.png")
    assert done.returncode == 1
    assert "no finished run" in done.stderr
