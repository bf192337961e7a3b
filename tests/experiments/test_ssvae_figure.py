"""The figure of the semi-supervised VAE, from synthetic summaries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from structgrad.common.pictures import colour
from tests.experiments.figures import figure

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, estimator: str, seed: int, calls: float, curve: list[tuple[int, float]] | None) -> None:
    content = {
        "task": "ssvae", "structure": "one_hot", "estimator": estimator, "budget": "paper", "seed": seed,
        "device": "cpu", "sweep": {} if curve is None else {"curve": curve},
        "metrics": {
            "test/accuracy": 0.9 + 0.02 * seed, "test/elbo": -100.0, "test/training_calls": calls, "val/elbo": -100.0,
        },
    }  # fmt: skip
    (folder / f"{estimator}-{seed}.json").write_text(json.dumps(content))


def test_draws_a_curve_and_a_point_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        write(tmp_path, "dense", seed, 10.0, [(step, -110.0 + step / 100 + seed) for step in range(0, 1000, 50)])
        write(tmp_path, "sfe", seed, 1.0, [(step, -112.0 + step / 100 + seed) for step in range(0, 1000, 50)])
        write(tmp_path, "nvil", seed, 1.0, None)  # not from a sweep: a point without a curve
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from figures import read
    from ssvae_figure import curves, draw

    report = read("correia_figure_1", tmp_path)
    found = curves(report)
    assert list(found) == ["SFE", "Dense"]
    steps, values = found["Dense"]
    assert steps.tolist() == list(range(0, 1000, 50))
    assert values.shape == (2, 20)
    assert np.allclose(values[1] - values[0], 1.0)

    learning, tested = draw(report).axes
    assert [line.get_color() for line in learning.lines] == [colour(0), colour(2)]
    assert [label.get_text() for label in tested.get_yticklabels()] == ["SFE: 1", "NVIL: 1", "Dense: 10"]

    output = tmp_path / "images" / "figure.png"
    done = figure("ssvae_figure", tmp_path, output)
    assert done.returncode == 0, done.stderr
    assert imread(output).std() > 0.01


def test_refuses_curves_of_different_steps(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0, 10.0, [(0, -110.0), (50, -109.0)])
    write(tmp_path, "dense", 1, 10.0, [(0, -110.0), (70, -109.0)])
    done = figure("ssvae_figure", tmp_path, tmp_path / "figure.png")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: Dense: runs were validated at different steps"
    assert not (tmp_path / "figure.png").exists()
