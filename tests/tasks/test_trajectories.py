"""Trajectories of one's own for graph layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from structgrad.data import DamagedDataError, MissingDataError
from structgrad.estimators import SST
from structgrad.structures import GroundTruth, SpanningTree
from structgrad.tasks.graph_layout import GraphLayout, Trajectories, model
from structgrad.tasks.graph_layout.model import Decoder
from tests.tasks.trainers import quiet_trainer

SIZES = {"train": 12, "val": 5, "test": 5}


def positions(graphs: int, steps: int = 6) -> np.ndarray:
    """Three vertices in space; every value is another one."""
    return np.random.default_rng(graphs).normal(size=(graphs, steps, 3, 3)) * 4


def archives(folder: Path, edges: bool) -> Path:
    folder.mkdir(parents=True)
    tree = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    for name, graphs in SIZES.items():
        arrays = {"positions": positions(graphs)} | ({"edges": np.tile(tree, (graphs, 1, 1))} if edges else {})
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def make(data: Trajectories) -> GraphLayout:
    structure = SpanningTree()
    return GraphLayout(
        structure=structure,
        estimator=SST(structure),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        data=data,
        batch_size=6,
        eval_batch_size=5,
        hidden=8,
    )


@pytest.mark.parametrize("edges", [True, False])
def test_archives_train_and_draw(tmp_path: Path, edges: bool) -> None:
    data = Trajectories(tmp_path, str(archives(tmp_path / "mine", edges)), train=10, steps=4)
    assert (data.vertices, data.features, data.steps, data.has_edges) == (3, 3, 4, edges)
    task = make(data)
    trainer = quiet_trainer(max_steps=2, val_check_interval=1)
    trainer.fit(task)
    (metrics,) = trainer.test(task, verbose=False)
    assert {"test/elbo", "test/kl"} <= metrics.keys()
    assert ({"test/edge_precision", "test/edge_recall", "test/complement"} <= metrics.keys()) == edges
    assert [picture.name for picture in task.pictures(tmp_path)] == ["layout.png", "graphs.png"][: 1 + edges]
    train = data.split("train")["positions"]
    assert train.shape == (10, 4, 3, 3)
    raw = positions(12)[:10, :4]
    expected = 2 * (raw - raw.min()) / (raw.max() - raw.min()) - 1
    torch.testing.assert_close(train, torch.from_numpy(expected).float())


@pytest.mark.parametrize("velocities", [True, False])
def test_files_of_kipf_et_al(tmp_path: Path, velocities: bool) -> None:
    """``loc`` and ``vel`` are [graphs, steps, features, n], each scaled by its own extremes; -1 and 0 are no edges."""
    rng = np.random.default_rng(0)
    for name, graphs in {"train": 8, "valid": 4, "test": 4}.items():
        for kind, scale in (("loc", 3.0), ("vel", 50.0))[: 1 + velocities]:
            np.save(tmp_path / f"{kind}_{name}_springs5.npy", scale * rng.normal(size=(graphs, 9, 2, 5)))
        np.save(tmp_path / f"edges_{name}_springs5.npy", rng.choice([-1.0, 0.0, 1.0], size=(graphs, 5, 5)))
    data = Trajectories(tmp_path, "", "_springs5", steps=7)
    assert (data.vertices, data.features) == (5, 4 if velocities else 2)
    train = data.split("train")
    location = np.load(tmp_path / "loc_train_springs5.npy")[:, :7].transpose(0, 1, 3, 2)
    expected = 2 * (location - location.min()) / (location.max() - location.min()) - 1
    torch.testing.assert_close(train["positions"][..., :2], torch.from_numpy(expected).float())
    if velocities:
        assert (train["positions"][..., 2:].min(), train["positions"][..., 2:].max()) == (-1, 1)
    edges = np.load(tmp_path / "edges_train_springs5.npy") > 0
    edges[:, np.arange(5), np.arange(5)] = False
    assert (train["adjacency"].numpy() == edges).all()
    for name in ("train", "valid", "test"):
        (tmp_path / f"edges_{name}_springs5.npy").unlink()
    assert "adjacency" not in Trajectories(tmp_path, "", "_springs5").split("val")
    quiet_trainer(max_steps=1, val_check_interval=1).fit(make(Trajectories(tmp_path, "", "_springs5")))


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"neither .*train\.npz nor loc_train_x\.npy"):
        Trajectories(tmp_path, "nothing", "_x")
    folder = archives(tmp_path / "mine", edges=False)
    with pytest.raises(ValueError, match=r"train\.npz has 12 graphs; got data\.train=13; null takes all"):
        Trajectories(tmp_path, "mine", train=13).split("train")
    with pytest.raises(ValueError, match=r"train\.npz has 6 steps; got data\.steps=7; null takes all"):
        Trajectories(tmp_path, "mine", steps=7).split("train")
    with pytest.raises(ValueError, match="needs the true edges, which Trajectories does not have"):
        GraphLayout(
            structure=GroundTruth(), estimator=None, optimizer=torch.optim.Adam, data=Trajectories(tmp_path, "mine")
        )
    np.savez(folder / "val.npz", positions=positions(5)[:, :, :2])
    with pytest.raises(DamagedDataError, match=r"val\.npz: 2 vertices; those of the training have 3"):
        Trajectories(tmp_path, "mine").split("val")
    np.savez(folder / "val.npz", positions=np.full((5, 6, 3, 3), np.nan))
    with pytest.raises(DamagedDataError, match=r"val\.npz: not all values are finite"):
        Trajectories(tmp_path, "mine").split("val")
    np.savez(folder / "train.npz", places=positions(5))
    with pytest.raises(DamagedDataError, match=r"train\.npz has no array positions"):
        Trajectories(tmp_path, "mine")


def test_a_rollout_of_three_features_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a GPU and of a CPU agree in values and gradients."""
    torch.manual_seed(0)
    decoder = Decoder(8, 3).double()
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    found = []
    for together in (False, True):
        monkeypatch.setattr(model, "_launches_count", lambda device, together=together: together)
        edges = torch.rand(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = decoder(x, edges, 2)
        found.append((out, *torch.autograd.grad(out.square().sum(), [edges, *decoder.parameters()])))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)
