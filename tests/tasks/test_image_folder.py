"""The communication game on a folder of images."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from structgrad.data import DamagedDataError, MissingDataError
from structgrad.estimators import Marginalize
from structgrad.structures import OneHot
from structgrad.tasks.communication_game import CommunicationGame, ImageFolder
from tests.tasks.trainers import quiet_trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images each of three concepts, of several sizes and kinds, and a file that is none."""
    rng = np.random.default_rng(0)
    for concept in ("cat", "dog", "owl"):
        (tmp_path / "images" / concept).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 256, (5 + k, 4, 3) if k else (6, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / concept / f"{k}.png")
    (tmp_path / "images" / "owl" / "readme.txt").write_text("birds")
    (tmp_path / "images" / "nothing").mkdir()
    return tmp_path


def test_pixels_of_a_folder_are_features(folder: Path) -> None:
    data = ImageFolder("images", folder, folder / "cache", features=48)
    data.prepare()
    splits = {split: data.split(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert [c.concept.tolist() for c in splits.values()] == [[0, 0, 1, 1, 2, 2], [0, 1, 2], [0, 1, 2]]
    assert all(c.names == ["cat", "dog", "owl"] for c in splits.values())

    def pixels(concept: str, k: int) -> torch.Tensor:
        image = Image.open(folder / "images" / concept / f"{k}.png").convert("RGB")
        top = (image.height - 4) / 2
        square = image.resize((4, 4), Image.Resampling.BICUBIC, box=(0, top, 4, top + 4))
        return torch.from_numpy(np.array(square)).flatten().float()

    mean = torch.stack([pixels(concept, k) for concept in ("cat", "dog", "owl") for k in (0, 1)]).mean(0)
    torch.testing.assert_close(splits["test"].features[2], F.normalize(pixels("owl", 3) - mean, dim=0))
    assert data.pixels("test").shape == (3, 64, 64, 3)
    task = CommunicationGame(
        structure=OneHot(),
        estimator=Marginalize(OneHot()),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        data=data,
        symbols=4,
        candidates=3,
        embedding=8,
        hidden=4,
        eval_games=8,
        test_games=8,
    )
    trainer = quiet_trainer(val_check_interval=1, max_steps=2)
    trainer.fit(task)
    assert 0 <= trainer.test(task, verbose=False)[0]["test/success"] <= 1
    assert (task.pictures(folder)[0]).name == "symbols.png"


def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names, with a small network in place of VGG-16: the sum of the pixels of each image, 4,096 times."""

    def vgg16(weights: object) -> nn.Module:
        network = nn.Sequential()
        network.add_module("sum", nn.Flatten())
        network.classifier = nn.Sequential(nn.LazyLinear(4096, bias=False), nn.ReLU())
        network(torch.ones(1, 3, 2, 2))
        nn.init.ones_(network.classifier[0].weight)
        assert weights == "published"
        return network

    def transforms() -> Any:
        return lambda image: torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1) / 255

    models = ModuleType("torchvision.models")
    models.VGG16_Weights = SimpleNamespace(  # type: ignore[attr-defined]
        IMAGENET1K_V1=type("Weights", (str,), {"transforms": staticmethod(transforms)})("published")
    )
    models.vgg16 = vgg16  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def test_activations_of_a_network_are_features(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchvision(monkeypatch)
    data = ImageFolder("images", folder, folder / "cache", network="vgg16", features=4096)
    torch.testing.assert_close(data.split("val").features, torch.full((3, 4096), 1 / 64))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert len(data.split("test").features) == 3  # cached
    with pytest.raises(MissingDataError, match=r"needs torchvision: pip install .* takes the images' pixels"):
        ImageFolder("images", folder, folder / "other", network="vgg16", features=4096).prepare()


def test_refusals(folder: Path) -> None:
    def make(**options: Any) -> ImageFolder:
        return ImageFolder("images", folder, folder / "cache", **options)

    for options, reason in (
        ({"features": 784}, "must be 3 x side x side, e.g. 768 = 3 x 16 x 16; got 784"),
        ({"network": "vgg16"}, "makes 4096 features, which data.features must say; got 768"),
        ({"network": "vgg19"}, "data.network"),
        ({"weights": "w.pt"}, "data.network=vgg16 takes one"),
        ({"val": 0.5, "test": 0.5}, "shares that leave some"),
    ):
        with pytest.raises(ValueError, match=reason):
            make(**options)
    with pytest.raises(MissingDataError, match=r"no images in .*elsewhere\. It needs one folder for each concept"):
        ImageFolder("elsewhere", folder, folder / "cache").prepare()
    deep = folder / "images" / "owl" / "2.png"
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(deep)
    with pytest.raises(DamagedDataError, match=r"2\.png cannot be read: they must have 8 bits"):
        make().prepare()
    deep.write_text("no image")
    with pytest.raises(DamagedDataError, match=r"2\.png cannot be read"):
        make().prepare()
    deep.unlink()
    make().split("train")
    (folder / "images" / "owl" / "1.png").unlink()
    with pytest.raises(ValueError, match="concept owl has fewer than 3 images"):
        make().split("train")
