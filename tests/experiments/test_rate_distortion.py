"""The rate-distortion figure, from synthetic summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.experiments.figures import figure

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, structure: str, estimator: str, seed: int, rate: float, changes: dict[str, Any]) -> None:
    content = {
        "task": "bit_vector_vae", "structure": structure, "estimator": estimator, "budget": "quick", "seed": seed,
        "device": "cpu",
        "metrics": {"test/rate": rate, "test/distortion": 900 - 3 * rate + 2 * seed, "val/elbo": -900.0},
        "config": {"task": {"bits": 32}},
    } | changes  # fmt: skip
    (folder / f"{len(list(folder.glob('*.json')))}.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of two rows of the table."""
    folder = tmp_path / "results"
    folder.mkdir()
    for seed in range(3):
        write(folder, "bit_vector", "sfe", seed, 5.0 + seed, {})
        write(folder, "budget_subset", "sparsemap", seed, 20.0 + 0.1 * seed, {})
    return folder


def test_draws_one_point_a_row(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from figures import read
    from rate_distortion import points

    cells = points(read("bit_vector_vae_quick", results))
    assert list(cells) == ["SFE (3 runs)", "SparseMAP (w/ budget) (3 runs)"]
    rate, distortion = cells["SFE (3 runs)"]
    assert rate.value == 6.0
    assert rate.standard_error == pytest.approx(1 / 3**0.5)
    assert distortion.value == pytest.approx(884.0)

    output = tmp_path / "images" / "figure.png"
    done = figure("rate_distortion", results, output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
    assert imread(output).std() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "paper"}, "SFE: runs with budget paper cannot be compared"),
        ({"device": "GPU"}, "SFE: runs with device GPU cannot be compared"),
        ({"config": {"task": {"bits": 32, "data": {"source": "x"}}}}, "other data"),
        ({"seed": 0}, "sfe: seeds [0, 0, 1, 2] repeat"),
    ],
)
def test_refuses_what_cannot_be_compared(results: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(results, "bit_vector", "sfe", 9, 5.0, changes)
    done = figure("rate_distortion", results, tmp_path / "figure.png")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "figure.png").exists()


def test_without_runs_says_so(tmp_path: Path) -> None:
    done = figure("rate_distortion", tmp_path, tmp_path / "figure.png")
    assert done.returncode == 1
    assert "no finished run" in done.stderr
    write(tmp_path, "bit_vector", "sfe", 0, 5.0, {"task": "listops"})
    done = figure("rate_distortion", tmp_path, tmp_path / "figure.png")
    assert "no run belongs to a row of bit_vector_vae_quick" in done.stderr
