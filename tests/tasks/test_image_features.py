"""The script that makes features of any images; needs torchvision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from structgrad.tasks.communication_game import FeatureFile

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "image_features.py"


def test_says_what_is_missing(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['torchvision'] = None; sys.argv = ['x', '.', 'o.npz']; exec({SCRIPT.read_text()!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: this script needs torchvision: pip install")
    assert not list(tmp_path.iterdir())


def test_features_of_folders_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from image_features import image_features

    rng = np.random.default_rng(0)
    for concept in ("cat", "dog", "owl"):
        (tmp_path / "images" / concept).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / concept / f"{k}.png")
    arrays = image_features(tmp_path / "images", torch.nn.Flatten(), transforms.ToTensor(), batch_size=5)
    np.testing.assert_allclose(arrays["features"][-1].reshape(3, 5, 4), pixels.transpose(2, 0, 1) / 255, rtol=1e-6)
    np.savez(tmp_path / "f.npz", **arrays)
    concepts = FeatureFile("f.npz", tmp_path, features=60).split("train")
    assert concepts.concept.tolist() == [0, 0, 1, 1, 2, 2]
    assert concepts.names == ["cat", "dog", "owl"]
