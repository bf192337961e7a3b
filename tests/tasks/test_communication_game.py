from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from structgrad.data import MissingDataError
from structgrad.estimators import SST, ExponentialSchedule, ImportanceWeighted, Marginalize, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import KSubset, OneHot
from structgrad.tasks.communication_game import CommunicationGame, FeatureFile, Omniglot, PublishedFeatures
from structgrad.tasks.communication_game.data import ConceptData, Concepts, draw_games
from structgrad.tasks.communication_game.labels import read_labels
from structgrad.tasks.communication_game.model import Receiver, Sender
from structgrad.training.run import assemble
from tests.tasks.trainers import quiet_trainer

ROOT = Path(__file__).resolve().parents[2]


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [["b", "a", "b"], ("b", "a", "b"), [3, 1, 3], np.array(["b", "a", "b"]), np.array([3, 1, 3])],
    ids=["list", "tuple", "numbers", "array of strings", "array of numbers"],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_labels_are_read(content: Any, protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "labels.objects"
    file.write_bytes(pickle.dumps(content, protocol))
    assert read_labels(file) == list(content)


def test_labels_of_python_2_are_read(tmp_path: Path) -> None:
    file = tmp_path / "labels.objects"
    file.write_bytes(b"(lp0\nS'dog'\np1\naS'caf\\xe9'\np2\na.")
    assert read_labels(file) == ["dog", "caf\xe9"]


class Hostile:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_file_does_nothing(protocol: int, tmp_path: Path) -> None:
    target, file = tmp_path / "harm", tmp_path / "labels.objects"
    for hostile in (
        Hostile(os.mkdir, str(target)),
        Hostile(eval, f"__import__('os').mkdir({str(target)!r})"),
        ["a", Hostile(os.system, f"mkdir {target}")],
        Hostile(getattr, "a", "upper"),
        Hostile(np.load, str(target)),
    ):
        file.write_bytes(pickle.dumps(hostile, protocol))
        with pytest.raises(ValueError, match=r"no pickled list of labels: it asks for .*only lists") as caught:
            read_labels(file)
        assert "\n" not in str(caught.value)
        assert not target.exists()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.objects"
    for content, reason in (
        ({"a": 1}, "one dict"),
        ([1.5], "a float"),
        ([["a"]], "a list"),
        ([True], "a bool"),
        (np.zeros((2, 2)), r"shape \[2, 2\]"),
        (np.array([1.5]), "type 'f8'"),
        (np.array([{"a": 1}], dtype=object), "a dict"),
        (np.zeros(2, dtype="i4,f4"), "type"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=reason) as caught:
            read_labels(file)
        assert "\n" not in str(caught.value)
    array = pickle.dumps(np.array(["ab", "cd"]), 2)
    assert read_labels_of(file, array) == ["ab", "cd"]
    for broken in (
        b"",
        b"not a pickle",
        pickle.dumps(["a"] * 100)[:-7],
        b"\x80\x04\x95",
        array.replace(b"U2", b"U3"),
        b"\x80\x04\x95" + b"\xff" * 8 + b"].",  # a length that no integer holds
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f.",  # a string of exabytes
        pickle.dumps(np.array(["q"]), 3).replace(b"q\0\0\0", b"q\0\0k"),  # no character of Unicode
        b"Fx\n.",
    ):
        with pytest.raises(ValueError, match="no pickled list of labels") as caught:
            read_labels_of(file, broken)
        assert "\n" not in str(caught.value)


def read_labels_of(file: Path, content: bytes) -> list[str | int]:
    file.write_bytes(content)
    return read_labels(file)


# --- data ----------------------------------------------------------------------------------------------------------


def test_games_have_different_concepts_uniformly() -> None:
    """60,000 games of 3 out of 5: shares of concepts and images, in any place, within 5 standard errors (99.99 %)."""
    sizes = torch.tensor([1, 4, 2, 7, 3])
    images = draw_games(sizes, 60_000, 3)
    concept = torch.arange(5).repeat_interleave(sizes)
    drawn = concept[images]
    assert all(len(set(game)) == 3 for game in drawn[:500].tolist())
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    n = len(images)
    for place in range(3):
        shares = images[:, place].bincount(minlength=17) / n
        p = (1 / 5) * (1 / sizes)[concept]
        assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_omniglot_is_divided_by_drawer(shared_data: Path) -> None:
    data = Omniglot("omniglot/omniglot_small.npz", shared_data)
    splits = {split: data.split(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert [len(c.features) for c in splits.values()] == [242 * 14, 242 * 3, 242 * 3]
    for concepts, drawers in zip(splits.values(), (14, 3, 3), strict=True):
        assert (concepts.concept.bincount() == drawers).all()
        torch.testing.assert_close(concepts.features.norm(dim=1), torch.ones(len(concepts.features)))
    with np.load(shared_data / "omniglot" / "omniglot_small.npz") as arrays:
        assert (
            data.pixels("val") == torch.from_numpy(arrays["images"]).reshape(242, 20, 28, 28)[:, 14:17].flatten(0, 1)
        ).all()
    # Centred on the training drawings: their features point into all directions, those of the raw pixels into one.
    assert float(splits["train"].features.mean(0).norm()) < 0.05
    assert float(torch.nn.functional.normalize(data.pixels("train").flatten(1) / 255).mean(0).norm()) > 0.3
    with pytest.raises(ValueError, match="share 20 drawers"):
        Omniglot("x", "x", train=18)
    with pytest.raises(MissingDataError, match=r"There is no .*brendenlake/omniglot"):
        Omniglot("x.npz", "/nowhere").prepare()


def feature_file(file: Path, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    concept = np.array([1, 0, 1, 2, 0, 2, 0, 1, 2, 0, 0, 0, 0])
    arrays = {
        "features": rng.normal(size=(13, 5)).astype(np.float32),
        "concept": concept,
        "names": ["cat", "dog", "owl"],
    }
    np.savez(file, **(arrays | changes))


def test_any_features_are_divided_within_each_concept(tmp_path: Path) -> None:
    feature_file(tmp_path / "f.npz")
    data = FeatureFile("f.npz", tmp_path, features=5)
    splits = [data.split(split) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert [c.concept.tolist() for c in splits] == [[0] * 5 + [1, 2], [0, 1, 2], [0, 1, 2]]
    assert len({tuple(row) for c in splits for row in c.features.tolist()}) == 13
    assert splits[0].names == ["cat", "dog", "owl"]
    for changes, reason in (
        ({"concept": np.array([0] * 12 + [1])}, "fewer than 3 images"),
        ({"features": np.full((13, 5), np.nan)}, "finite"),
        ({"features": np.zeros((12, 5))}, "13 labels"),
    ):
        feature_file(tmp_path / "f.npz", **changes)
        with pytest.raises(ValueError, match=reason):
            data.split("train")
    np.savez(tmp_path / "f.npz", features=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="lacks the arrays concept, names"):
        data.split("train")
    with pytest.raises(MissingDataError, match="data=image_folder needs no file"):
        FeatureFile("g.npz", tmp_path, features=5).prepare()
    with pytest.raises(ValueError, match="shares"):
        FeatureFile("f.npz", tmp_path, features=5, val=0.5, test=0.5)


def test_shares_of_a_concept_are_taken_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Of ten images of one concept and twenty of another, mixed: half for training, then a fifth, then the rest."""
    concept = np.array([0, 1, 1] * 10)
    features = np.stack([np.ones(30), np.arange(30)], 1)
    np.savez(tmp_path / "f.npz", features=features, concept=concept, names=["cat", "dog"])
    data = FeatureFile("f.npz", tmp_path, features=2, val=0.2, test=0.3)
    cats, dogs = (np.flatnonzero(concept == k) for k in (0, 1))
    expected = {
        "train": [*cats[:5], *dogs[:10]],
        "val": [*cats[5:7], *dogs[10:14]],
        "test": [*cats[7:], *dogs[14:]],
    }
    for split, rows in expected.items():
        found = data.split(split)  # type: ignore[arg-type]
        numbers = found.features[:, 1] / found.features[:, 0]
        assert numbers.round().int().tolist() == rows
        assert found.concept.tolist() == concept[rows].tolist()


def test_characters_are_centred_on_the_drawings_for_training_alone(tmp_path: Path) -> None:
    """Drawings for validation and the test say nothing about their own features."""
    images = np.random.default_rng(0).integers(0, 256, (10, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "o.npz", images=images, character=np.arange(10) // 5, character_names=np.array(["a", "b"]))
    data = Omniglot("o.npz", tmp_path, features=6, train=2, val=1, test=2)
    pixels = images.reshape(2, 5, 6).astype(np.float64)
    mean = pixels[:, :2].reshape(4, 6).mean(0)
    for split, drawers in (("train", [0, 1]), ("val", [2]), ("test", [3, 4])):
        expected = (pixels[:, drawers] - mean).reshape(-1, 6)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        found = data.split(split).features  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_a_feature_file_may_say_which_images_are_for_the_test_and_have_them(tmp_path: Path) -> None:
    """Under either name of the concepts' names; the images lie in the file or in parquet files, test images apart."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    test = np.array([0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0], dtype=bool)
    images = np.random.default_rng(1).integers(0, 256, (13, 4, 6, 3), dtype=np.uint8)
    feature_file(tmp_path / "f.npz", test=test, images=images)
    with np.load(tmp_path / "f.npz") as arrays:
        renamed = {("concept_names" if name == "names" else name): arrays[name] for name in arrays}
        features, concept = arrays["features"], arrays["concept"]
    np.savez(tmp_path / "f.npz", **renamed)
    own = FeatureFile("f.npz", tmp_path, features=5, val=0.2, test=None)
    assert own.split("test").concept.tolist() == [0, 0, 1, 2]
    assert own.split("val").concept.tolist() == [0, 1, 2]
    assert own.split("train").concept.tolist() == [0, 0, 0, 0, 1, 2]
    folder = tmp_path / "photographs"
    folder.mkdir()
    for part, chosen in (("train", ~test), ("test", test)):
        encoded = [{"bytes": png(image), "path": None} for image in images[chosen]]
        table = pa.table({"image": encoded, "label": concept[chosen]})
        pq.write_table(table, folder / f"{part}-0.parquet")
    apart = FeatureFile("f.npz", tmp_path, features=5, val=0.2, test=None, images="photographs")
    apart.prepare()
    for split in ("train", "val", "test"):
        for data in (own, apart):
            shown, concepts = data.pixels(split), data.split(split)  # type: ignore[arg-type]
            assert shown is not None
            for pixels, direction in zip(shown, concepts.features, strict=True):
                (place,) = [k for k in range(13) if (images[k] == pixels.numpy()).all()]
                torch.testing.assert_close(direction, F.normalize(torch.from_numpy(features[place]), dim=0))
    pq.write_table(table.set_column(1, "label", pa.array([0, 0, 0, 0])), folder / "test-0.parquet")
    with pytest.raises(ValueError, match="labels of its test images are not the concepts"):
        apart.pixels("test")
    feature_file(tmp_path / "f.npz", test=test | True)
    refused(own, "concept cat has fewer than 3 images, one for each split: 7, of which 7 are for the test")
    feature_file(tmp_path / "f.npz", test=test.astype(int))
    refused(own, r"test must be bool \[13\]; got torch\.int64")
    feature_file(tmp_path / "f.npz")
    refused(own, "lacks the arrays test")
    assert own.test is None
    assert FeatureFile("f.npz", tmp_path, features=5).pixels("test") is None
    with pytest.raises(ValueError, match=r"data\.test=null takes from the file"):
        FeatureFile("f.npz", tmp_path, features=5, images="photographs")
    with pytest.raises(MissingDataError, match=r"task\.data\.images=null"):
        FeatureFile("f.npz", tmp_path, features=5, test=None, images="elsewhere").prepare()


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.usefixtures("_configs")
def test_photographs_of_caltech_are_divided_and_shown(shared_data: Path) -> None:
    task = assemble(compose("config", ["task=communication_game", "data=caltech101", f"paths.data={shared_data}"]))
    assert isinstance(task, CommunicationGame)
    task.setup("fit")
    sizes = {split: task.get_buffer(f"{split}_sizes") for split in ("train", "val", "test")}
    assert all(len(size) == 99 for size in sizes.values())
    assert int(sizes["test"].sum()) == 1485
    assert int(sizes["train"].sum() + sizes["val"].sum()) == 4613
    shown = task.data.pixels("test")
    assert shown is not None
    assert shown.shape == (1485, 64, 64, 3)


def refused(data: FeatureFile | Omniglot | PublishedFeatures, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        data.split("train")
    assert "\n" not in str(caught.value)


def test_feature_files_of_other_contents_are_refused(tmp_path: Path) -> None:
    file, data = tmp_path / "f.npz", FeatureFile("f.npz", tmp_path, features=5)
    concept = np.array([1, 0, 1, 2, 0, 2, 0, 1, 2, 0, 0, 0, 0])
    for changes, reason in (
        ({"concept": concept - 1}, "numbered from 0 to 2, one name each; got -1 to 1"),
        ({"concept": concept + 1}, "got 1 to 3"),
        ({"concept": concept / 2}, "whole number; got float64"),
        ({"concept": concept[:, None]}, r"whole number; got int64 \[13, 1\]"),
        ({"concept": np.array(["cat"] * 13)}, "whole number; got <U3"),
        ({"concept": concept[:0], "features": np.zeros((0, 5))}, r"whole number; got int64 \[0\]"),
        ({"features": np.full((13, 5), "a")}, "real numbers; got <U1"),
        ({"features": np.ones((13, 5), complex)}, "real numbers; got complex128"),
        ({"features": np.full((13, 5), 1e300)}, "finite"),
        ({"features": np.full((13, 5), 1e30)}, "the length"),
    ):
        feature_file(file, **changes)
        refused(data, reason)
    feature_file(file)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        file.write_bytes(content)
        refused(data, "is no .npz file with the arrays features, concept, names or concept_names")
    np.save(tmp_path / "f.npy", concept)
    file.write_bytes((tmp_path / "f.npy").read_bytes())
    refused(data, "it is no archive")


def test_characters_of_other_contents_are_refused(tmp_path: Path) -> None:
    data = Omniglot("o.npz", tmp_path, features=4)
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (60, 2, 2), dtype=np.uint8),
        "character": np.arange(60) // 20,
        "character_names": np.array(["a", "b", "c"]),
    }
    np.savez(tmp_path / "o.npz", **arrays)
    assert len(data.split("train").features) == 42
    for changes, reason in (
        ({"character": np.arange(60) % 3}, "sorted by character"),
        ({"character": np.arange(60) // 25}, "character c has 10 drawings; data.train, val and test need 20"),
        ({"character": np.arange(60) // 20 + 1}, "numbered from 0 to 2"),
        ({"images": arrays["images"][:50]}, r"as many as characters; got uint8 \[50, 2, 2\]"),
        ({"images": arrays["images"] / 255}, "must be uint8"),
    ):
        np.savez(tmp_path / "o.npz", **(arrays | changes))
        refused(data, reason)
    np.savez(tmp_path / "o.npz", images=arrays["images"])
    refused(data, "lacks the arrays character, character_names")


def test_published_files_are_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    data = PublishedFeatures("game", tmp_path, features=6)
    with pytest.raises(MissingDataError, match=r"There is no .*SignalingGame"):
        data.prepare()
    for split, n in (("train", 8), ("test", 4)):
        folder = tmp_path / "game" / split
        folder.mkdir(parents=True)
        with h5py.File(folder / "ours_images_single_sm0.h5", "w") as file:
            file["fc"] = np.arange(6 * n, dtype=np.float64).reshape(n, 6) + 1
        labels = np.array([("zebra", "ant")[k % 2] for k in range(n)])
        (folder / "ours_images_single_sm0.objects").write_bytes(pickle.dumps(labels))
    data.prepare()
    train, test = data.split("train"), data.split("test")
    assert train.names == ["ant", "zebra"]
    assert train.concept.tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(train.features[0], F.normalize(torch.arange(7.0, 13), dim=0))
    assert len(test.features) == 4
    torch.testing.assert_close(data.split("val").features, train.features)
    file = tmp_path / "game" / "train" / "ours_images_single_sm0.h5"
    whole = file.read_bytes()
    assert b"SNOD" in whole
    for broken in (b"nothing", whole.replace(b"SNOD", b"SNOB")):  # the second is a RuntimeError of h5py
        file.write_bytes(broken)
        refused(data, "no file with one array")
    with h5py.File(file, "w") as content:  # petabytes that are not there
        content.create_dataset("fc", (1 << 30, 1 << 20), dtype="f4", chunks=(1024, 1024))
    refused(data, "no file with one array")


# --- model ---------------------------------------------------------------------------------------------------------


def test_sender_is_the_plain_network_with_its_gradients() -> None:
    """More numbers than a portion, in float64, against the hidden units written out."""
    sender = Sender(7, 30, 20, 9, temperature=2.0).double()
    features = torch.randn(19, 7, dtype=torch.float64)

    def plain() -> Tensor:
        numbers = sender.embed(features)
        hidden = (numbers[:, :, None] * sender.inward).sigmoid()
        scores: Tensor = sender.score((hidden @ sender.outward).sigmoid()) / 2.0
        return scores

    ours, expected = sender(features), plain()
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(ours)
    parameters = list(sender.parameters())
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("count", [1, 40, 200], ids=["few", "some", "many"])
def test_receiver_scores_are_dot_products(count: int) -> None:
    receiver = Receiver(5, 6, 50)
    candidates = torch.randn(3, 4, 6, requires_grad=True)
    rows, symbols = torch.randint(3, (count,)), torch.randint(50, (count,))
    vertices = F.one_hot(symbols, 50).float()
    expected = torch.einsum("nce,ne->nc", candidates[rows], receiver.symbols.weight[symbols])
    weights = torch.randn(count, 4)
    for given in (vertices, vertices.clone().requires_grad_()):
        ours = receiver(given, rows, candidates)
        torch.testing.assert_close(ours, expected)
        parameters = (candidates, receiver.symbols.weight)
        for mine, theirs in zip(
            torch.autograd.grad((ours * weights).sum(), parameters, retain_graph=True),
            torch.autograd.grad((expected * weights).sum(), parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# --- task ----------------------------------------------------------------------------------------------------------


class Clusters(ConceptData):
    """Twelve concepts of six images, each near an axis of its own."""

    features = 12

    def prepare(self) -> None:
        pass

    def split(self, split: str) -> Concepts:
        generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
        concept = torch.arange(12).repeat_interleave(6)
        noise = 0.1 * torch.randn(72, 12, generator=generator)
        names = [f"concept {k}" for k in range(12)]
        return Concepts(F.normalize(torch.eye(12)[concept] + noise), concept, names)


def estimators() -> dict[str, Estimator]:
    structure = OneHot()
    gumbel: dict[str, Any] = {"utility": "gibbs", "kl": "distribution", "temperature": ExponentialSchedule(rate=1e-5)}
    return {
        "dense": Marginalize(structure),
        "sparsemax": Marginalize(structure, "sparsemax"),
        "sfe": Reinforce(structure, baseline="ema"),
        "sfe_plus": Reinforce(structure, baseline="sample"),
        "nvil": Reinforce(structure, baseline="nvil", context_size=12),
        "gumbel_softmax": SST(structure, evaluation="relaxed", **gumbel),
        "st_gumbel": SST(structure, straight_through=True, **gumbel),
    }


CALLS = {"dense": 16, "sfe": 1, "sfe_plus": 2, "nvil": 1, "gumbel_softmax": 1, "st_gumbel": 1}


def make(estimator: Estimator, **options: Any) -> CommunicationGame:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"symbols": 16, "candidates": 4, "embedding": 16, "hidden": 8, "batch_size": 32}
    defaults |= {
        "eval_batch_size": 16,
        "eval_games": 40,
        "test_games": 24,
        "temperature": 1.0,
        "entropy_bonus": 0.01,
        "data": Clusters(),
    }
    return CommunicationGame(
        structure=estimator.structure,
        estimator=estimator,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        **defaults | options,
    )


def test_the_estimator_knows_the_weight_of_the_kl() -> None:
    """A bound has the KL in its logarithm with weight 1, which would be another objective."""
    train, bound = torch.zeros(32, dtype=torch.int64), ImportanceWeighted(OneHot(), 2)
    for bonus in (0.0, 0.01, 1.0):
        task = make(bound, entropy_bonus=bonus)
        task.setup("fit")
        batch = {"train": train, "target": train}
        if bonus == 1:
            assert task.train().step(batch).loss.isfinite()
            continue
        with pytest.raises(ValueError, match=rf"this loss weighs it by {bonus:g}$"):
            task.train().step(batch)


@pytest.mark.parametrize("name", [*CALLS, "sparsemax"])
@pytest.mark.parametrize("loss", ["nll", "zero_one"])
def test_fits_tests_and_draws(name: str, loss: str, tmp_path: Path) -> None:
    task = make(estimators()[name], loss=loss, eval_games=33)
    fitted = quiet_trainer(val_check_interval=1, max_steps=2)
    fitted.fit(task)
    assert {"val/success", "val/entropy", "val/training_calls"} <= set(fitted.callback_metrics)
    (metrics,) = fitted.test(task, verbose=False)
    assert metrics["test/training_calls"] == CALLS.get(name, metrics["test/training_calls"])
    assert 0 <= metrics["test/success"] <= 1
    assert not any("features" in key for key in task.state_dict())
    assert [p.name for p in task.pictures(tmp_path)] == ["symbols.png", "history.png"]


def test_pictures_are_made_in_portions_and_names_are_no_formulas(tmp_path: Path) -> None:
    class Named(Clusters):
        def split(self, split: str) -> Concepts:
            concepts = super().split(split)
            return Concepts(concepts.features, concepts.concept, ["$a_{$"] * 12)

    task = make(estimators()["dense"], data=Named())
    seen: list[int] = []
    task.sender.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert [p.name for p in task.pictures(tmp_path)] == ["symbols.png"]
    assert seen == [16, 16, 16, 16, 8]


def test_exact_sum_learns_to_communicate() -> None:
    """Random guessing succeeds in a quarter of the games."""
    task = make(estimators()["dense"])
    fitted = quiet_trainer(max_steps=500, val_check_interval=250)
    fitted.fit(task)
    (metrics,) = fitted.test(task, verbose=False)
    assert metrics["test/success"] > 0.6
    assert len(task.history["success"]) == 2


class Apart(Clusters):
    """Every split has a feature of its own, which is 1 for its images."""

    features = 15

    def split(self, split: str) -> Concepts:
        concepts = super().split(split)
        own = torch.eye(3)[["train", "val", "test"].index(split)].expand(72, 3)
        return Concepts(torch.cat([concepts.features, own], 1), concepts.concept, concepts.names)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_games_are_played_with_the_images_of_their_split(split: Any) -> None:
    """The sender, and the baseline of NVIL, see the image that is meant; the receiver sees it at the target's place."""
    task = make(Reinforce(OneHot(), baseline="nvil", context_size=15), data=Apart()).train(split == "train")
    task.setup("fit")
    seen: dict[str, Tensor] = {}
    task.sender.register_forward_pre_hook(lambda _, inputs: seen.update(sender=inputs[0]))
    task.receiver.embed.register_forward_pre_hook(lambda _, inputs: seen.update(candidates=inputs[0]))
    assert task.estimator is not None
    task.estimator.register_forward_pre_hook(
        lambda _, inputs, named: seen.update(baseline=named["context"]), with_kwargs=True
    )
    batch = next(iter(task.batches(split)))
    task.step(batch)
    own = torch.eye(3)[["train", "val", "test"].index(split)]
    assert (seen["candidates"][..., 12:] == own).all()
    games = torch.arange(len(batch["target"]))
    assert seen["sender"].equal(seen["candidates"][games, batch["target"]])
    assert seen["baseline"].equal(seen["sender"])


@pytest.mark.parametrize("loss", ["nll", "zero_one"])
def test_objective_and_bonus_are_those_written_out(loss: str) -> None:
    task = make(estimators()["dense"], loss=loss, entropy_bonus=0.3).eval()
    task.setup("fit")
    batch = next(iter(task.batches("val")))
    out = task.step(batch)
    seen = task.val_features[batch["val"]]  # type: ignore[index]
    meant = seen[torch.arange(16), batch["target"]]
    posterior = task.sender(meant).softmax(-1)
    choice = (task.receiver.symbols.weight @ task.receiver.embed(seen).transpose(1, 2)).log_softmax(-1)
    right = choice[torch.arange(16), :, batch["target"]]
    objective = (posterior * (-right if loss == "nll" else 1 - right.exp())).sum(1).mean()
    entropy = -(posterior * posterior.log()).sum(1).mean()
    torch.testing.assert_close(out.metrics["objective"], objective)
    torch.testing.assert_close(out.metrics["entropy"], entropy)
    torch.testing.assert_close(out.loss, objective + 0.3 * (math.log(16) - entropy))
    best = choice[torch.arange(16), posterior.argmax(1)].argmax(1)
    torch.testing.assert_close(out.metrics["success_most_likely"], (best == batch["target"]).float().mean())
    # Success of the sum over all symbols is an expectation, too.
    expected = (posterior * (choice.argmax(-1) == batch["target"][:, None])).sum(1).mean()
    torch.testing.assert_close(out.metrics["success"], expected)


def test_success_is_tested_as_the_released_code_does() -> None:
    """A sampled symbol for the score function (99.99 % of 10,240 games); a relaxed message for Gumbel-softmax."""
    task = make(estimators()["sfe"], eval_games=10_240, eval_batch_size=10_240).eval()
    task.setup("fit")
    exact = make(estimators()["dense"], entropy_bonus=0.3)  # trained until its symbols mean something, and undecided
    exact.setup("fit")
    optimizer = torch.optim.Adam(exact.parameters(), lr=3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        exact.step(next(iter(exact.batches("train")))).loss.backward()
        optimizer.step()
    task.load_state_dict(exact.state_dict(), strict=False)
    batch = next(iter(task.batches("val")))
    assert len(task.batches("test").tensors["target"]) == 24
    with torch.no_grad():
        out = task.step(batch)
    seen = task.get_buffer("val_features")[batch["val"]]
    choice = (task.receiver.symbols.weight @ task.receiver.embed(seen).transpose(1, 2)).argmax(-1)
    posterior = task.sender(seen[torch.arange(10_240), batch["target"]]).softmax(-1)
    p = (posterior * (choice == batch["target"][:, None])).sum(1).detach()
    bound = 4 * (p * (1 - p)).sum().sqrt() / 10_240
    assert abs(float(out.metrics["success"]) - float(p.mean())) < bound
    assert abs(float(out.metrics["success_most_likely"]) - float(p.mean())) > bound  # another number

    relaxed = make(estimators()["gumbel_softmax"], eval_games=64, eval_batch_size=64).eval()
    relaxed.setup("fit")
    calls: list[Tensor] = []

    def check(_: Any, inputs: tuple[Tensor, Tensor, Tensor], scores: Tensor) -> None:
        """The message itself is received, not its most likely symbol."""
        vertices, rows, candidates = inputs
        messages = vertices @ relaxed.receiver.symbols.weight
        torch.testing.assert_close(scores, (candidates[rows] @ messages[..., None])[..., 0])
        calls.append(vertices)

    relaxed.receiver.register_forward_hook(check)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            relaxed.step(next(iter(relaxed.batches("val"))))
    objective, success, most_likely, *_ = calls
    assert objective is success
    assert ((objective > 0) & (objective < 1)).all()
    assert ((most_likely == 0) | (most_likely == 1)).all()


@pytest.mark.parametrize("name", ["sfe", "gumbel_softmax", "st_gumbel"])
def test_predictions_are_the_choices_that_success_counts(name: str) -> None:
    """As an evaluation writes them, of the message that was received: a symbol, or a relaxed one."""
    task = make(estimators()[name], eval_games=64, eval_batch_size=64).eval()
    task.setup("fit")
    batch = next(iter(task.batches("val")))
    with torch.no_grad():
        out = task.step(batch)
        assert out.predictions is not None
        made = out.predictions()
    assert isinstance(made.vertices, Tensor)
    assert isinstance(made.prediction, Tensor)
    seen = task.get_buffer("val_features")[batch["val"]]
    messages = made.vertices @ task.receiver.symbols.weight
    choice = (task.receiver.embed(seen) @ messages[..., None])[..., 0].argmax(-1)
    assert made.prediction.tolist() == choice.tolist()
    assert out.metrics["success"] == (made.prediction == made.target).float().mean()


def test_symbols_start_as_an_embedding_or_as_a_linear_map() -> None:
    """Standard deviations of 51,200 numbers, within 5 standard errors: N(0, 1), and uniform within 1/16."""
    torch.manual_seed(0)
    normal, uniform = (Receiver(5, 200, 256, kind).symbols.weight.detach() for kind in ("embedding", "linear"))  # type: ignore[arg-type]
    n = normal.numel()
    assert abs(float(normal.std()) - 1) < 5 / math.sqrt(2 * n)
    assert float(uniform.abs().max()) < 1 / 16
    assert abs(float(uniform.std()) * 16 * math.sqrt(3) - 1) < 5 / math.sqrt(2 * n)
    with pytest.raises(ValueError, match="one of embedding, linear"):
        make(estimators()["dense"], symbol_map="table")


def test_evaluation_games_are_the_same_for_all_runs_and_training_games_are_not() -> None:
    tasks = [make(estimators()["sfe"]), make(estimators()["dense"])]
    for task in tasks:
        task.setup("fit")
    for split in ("val", "test"):
        first, second = (next(iter(task.batches(split))) for task in tasks)  # type: ignore[arg-type]
        torch.manual_seed(5)
        assert (first[split] == second[split]).all()
        assert (first["target"] == second["target"]).all()
        assert len(first["target"].unique()) > 1
    task = tasks[1].train()
    batch = next(iter(task.batches("train")))
    assert task.step(batch).loss.item() != task.step(batch).loss.item()


def test_refusals() -> None:
    dense = estimators()["dense"]
    for options, reason in (
        ({"loss": "hinge"}, "one of nll, zero_one"),
        ({"candidates": 1}, "at least 2 candidates"),
        ({"entropy_bonus": -1.0}, "not negative"),
        ({"temperature": 0.0}, "positive"),
        ({"symbols": 0}, "symbols must be at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            make(dense, **options)
    with pytest.raises(ValueError, match="structure=one_hot"):
        make(Reinforce(KSubset(2), baseline="ema"))
    with pytest.raises(ValueError, match="that of SST is over parts"):
        make(SST(OneHot()))
    with pytest.raises(ValueError, match="too few for games of 13"):
        make(dense, candidates=13).setup("fit")
    wrong = Clusters()
    wrong.features = 7
    with pytest.raises(ValueError, match="have 12 features"):
        make(dense, data=wrong).setup("fit")


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


ROWS = {
    "estimator=dense": (1e-3, 0.1, "nll"),
    "estimator=sparsemax": (5e-3, 0.1, "nll"),
    "estimator=sfe": (1e-3, 0.05, "nll"),
    "experiment=communication_game/sfe_zero_one": (1e-3, 0.01, "zero_one"),
    "estimator=sfe_plus": (1e-3, 0.05, "zero_one"),
    "estimator=nvil": (1e-3, 0.1, "nll"),
    "estimator=gumbel_softmax": (1e-3, 0.01, "nll"),
    "estimator=st_gumbel": (1e-3, 0.01, "nll"),
}


@pytest.mark.usefixtures("_configs")
@pytest.mark.parametrize("row", ROWS)
def test_published_rows_by_configuration_alone(row: str) -> None:
    config = compose("config", ["task=communication_game", row])
    task = assemble(config)
    assert isinstance(task, CommunicationGame)
    assert (config.task.optimizer.lr, task.entropy_bonus, task.loss) == ROWS[row]
    assert (task.candidates, task.batch_size, config.task.symbols, task.data.features) == (16, 64, 256, 4096)
    assert config.trainer.max_steps == 500 * 100
    assert task.games["test"] == 156 * 64
    assert config.task.symbol_map == ("linear" if "gumbel" in row else "embedding")
    if "gumbel" in row:
        assert config.estimator.temperature.rate == 1e-5
        assert task.estimator.evaluation == ("relaxed" if "softmax" in row else "hard")  # type: ignore[union-attr]


@pytest.mark.usefixtures("_configs")
def test_quick_budget_plays_with_real_characters() -> None:
    task = assemble(compose("config", ["task=communication_game", "budget=quick"]))
    assert isinstance(task, CommunicationGame)
    assert isinstance(task.data, Omniglot)
    assert isinstance(
        assemble(compose("config", ["task=communication_game", "data=image_features"])), CommunicationGame
    )


def test_a_whole_run_on_real_characters(root: Path, shared_data: Path, tmp_path: Path) -> None:
    options = ["task=communication_game", "budget=smoke", "trainer=cpu", "logger=csv", f"paths.runs={tmp_path}"]
    command = [sys.executable, "train.py", *options, f"paths.data={shared_data}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "success" in done.stdout


def test_the_script_of_the_first_steps(root: Path, shared_data: Path) -> None:
    command = [sys.executable, "scripts/sender_start.py", "budget=smoke", "trainer=cpu", f"paths.data={shared_data}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["step", "sigmoids", "common", "images"]
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300]
    first, last = ([float(number) for number in line.split()[1:]] for line in (lines[0], lines[-1]))
    assert 0 < first[0] < 1
    assert last[2] > 10 * first[2]  # at this budget it learns to tell images apart


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data=caltech", "data=caltech: no such choice; nearest: caltech101"),
        ("task.hiden=3", "hiden"),
        ("task.hidden=-3", "hidden must be"),
    ],
)
def test_that_script_explains_a_wrong_override_in_one_line(root: Path, override: str, reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/sender_start.py", "budget=smoke", override], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line
