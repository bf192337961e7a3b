from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from torch.nn import functional as F

from structgrad.estimators import SST, ExponentialSchedule, Marginalize, Perturbed, Reinforce, SumAndSample
from structgrad.estimators.base import Estimator
from structgrad.structures import KSubset, OneHot
from structgrad.tasks.ssvae import SemiSupervisedImages, SemiSupervisedVAE, WarmStart, warm_start
from structgrad.tasks.ssvae.data import published_split, resample
from structgrad.tasks.ssvae.model import CLASSIFICATION_LOSSES, Encoder, Networks
from structgrad.training.callbacks import RandomState
from structgrad.training.run import assemble
from tests.tasks.trainers import quiet_trainer

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"pixels": 16, "classes": 4, "style": 2, "hidden": 8, "vae_hidden": 8}


# --- data ----------------------------------------------------------------------------------------------------------


def test_the_split_is_the_published_one(shared_data: Path) -> None:
    ours = published_split()
    for name, file in (("labelled", "labeled_train"), ("unlabelled", "unlabeled_train"), ("val", "validation")):
        published = np.load(shared_data / "MNIST" / "ssvae_split" / f"{file}_indx.npy", allow_pickle=False)
        np.testing.assert_array_equal(ours[name].numpy(), published)


def test_the_split_divides_the_training_images() -> None:
    assert sorted(torch.cat(list(published_split().values())).tolist()) == list(range(60_000))


def test_images_are_those_of_the_split(shared_data: Path, tmp_path: Path) -> None:
    data = SemiSupervisedImages("MNIST/parquet", shared_data, tmp_path, labelled=50, unlabelled=70, val=30, test=20)
    sizes = {name: data.split(name)["images"].shape for name in ("labelled", "unlabelled", "val", "test")}
    assert sizes == {"labelled": (50, 784), "unlabelled": (70, 784), "val": (30, 784), "test": (20, 784)}
    assert data.split("test")["labels"][:5].tolist() == [7, 2, 1, 0, 4]
    with pytest.raises(ValueError, match=r"the split has 5000 labelled images; got data\.labelled=5001"):
        SemiSupervisedImages("MNIST/parquet", shared_data, tmp_path, labelled=5001).split("labelled")


def test_images_of_ones_own_are_divided_at_random(tmp_path: Path) -> None:
    """A folder of image files; parts that share no image, the same for all runs; a model trains on them."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 4)):
        for label, name in enumerate(("ant", "bee", "cat", "dog")):
            folder = tmp_path / "animals" / part / name
            folder.mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 256, (4, 4), dtype=np.uint8)
                pixels[label] = 255
                Image.fromarray(pixels).save(folder / f"{k}.png")
    sizes = {"labelled": 16, "unlabelled": 24, "val": 8, "test": 16}
    data, again = (SemiSupervisedImages("animals", tmp_path, tmp_path / "cache", **sizes) for _ in range(2))
    parts = {name: data.split(name) for name in sizes}
    assert {name: len(part["labels"]) for name, part in parts.items()} == sizes
    seen = torch.cat([parts[name]["images"] for name in ("labelled", "unlabelled", "val")])
    assert len(seen.unique(dim=0)) == 48
    assert (again.split("labelled")["images"] == parts["labelled"]["images"]).all()
    for name in sizes:
        assert (parts[name]["images"].reshape(-1, 4, 4)[torch.arange(sizes[name]), parts[name]["labels"]] == 255).all()
    quiet_trainer(max_steps=2, val_check_interval=1).fit(make(estimators()["dense"], data))
    shares = SemiSupervisedImages("animals", tmp_path, tmp_path / "cache", 0.25, None, 0.25, None)
    assert [len(shares.split(name)["labels"]) for name in sizes] == [9, 27, 12, 16]
    counted = {"pixels": None, "classes": None}
    task = make(estimators()["dense"], shares, warm_start=WarmStart(epochs=1, batch_size=9), batch_size=9, **counted)
    assert (task.sizes["pixels"], task.sizes["classes"]) == (16, 4)
    quiet_trainer(max_steps=2, val_check_interval=1).fit(task)
    assert task.weight == 3
    with pytest.raises(ValueError, match=r"animals has 48 training images; data\.labelled=0\.01 is none"):
        SemiSupervisedImages("animals", tmp_path, tmp_path / "cache", 0.01, None, 0.25, None).split("val")
    with pytest.raises(ValueError, match=r"animals has 48 training images, fewer than data\.labelled=16"):
        SemiSupervisedImages("animals", tmp_path, tmp_path / "cache", **sizes | {"val": 9}).split("val")


def test_pixels_are_bernoulli_with_their_grey_level() -> None:
    """4,000 draws of every grey level: means within 5 standard errors (256 levels: 99.98 %); 0 and 255 are certain."""
    levels = torch.arange(256, dtype=torch.uint8).expand(4000, 256)
    drawn = resample(levels)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    p = levels[0] / 255
    assert ((drawn.mean(0) - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()
    assert (resample(levels) != drawn).any()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.labelled must be at least 1"):
        SemiSupervisedImages("x", "x", "x", labelled=0)
    with pytest.raises(ValueError, match=r"data\.val must be at least 1, or a share between 0 and 1; got 1\.5"):
        SemiSupervisedImages("x", "x", "x", val=1.5)
    with pytest.raises(ValueError, match=r"warm_start\.epochs must be at least 0"):
        WarmStart(epochs=-1)
    with pytest.raises(ValueError, match=r"warm_start\.lr must be greater than 0"):
        WarmStart(lr=0.0)


# --- model ---------------------------------------------------------------------------------------------------------


def test_the_first_layer_sees_image_and_class_side_by_side() -> None:
    encoder = Encoder(6, 3, 2, 5)
    images, vertices = torch.rand(4, 6), F.one_hot(torch.tensor([0, 1, 2, 1]), 3).float()
    first = torch.nn.Linear(9, 5)
    with torch.no_grad():
        first.weight.copy_(torch.cat([encoder.image.weight, encoder.label.weight], 1))
        first.bias.copy_(encoder.image.bias)
    expected = encoder.outer(encoder.inner(first(torch.cat([images, vertices], 1)).relu()).relu())
    torch.testing.assert_close(torch.cat(encoder(encoder.image(images), vertices), 1), expected)


def reference(networks: Networks, images: Tensor, vertices: Tensor) -> Tensor:
    mean, log_deviation = networks.encoder(networks.encoder.image(images), vertices)
    posterior = Normal(mean, log_deviation.exp())
    style = mean + log_deviation.exp() * torch.randn_like(mean)
    likelihood = Bernoulli(logits=networks.decoder(style, vertices)).log_prob(images).sum(1)
    return kl_divergence(posterior, Normal(0.0, 1.0)).sum(1) - likelihood


def test_negative_elbo_is_that_of_the_distributions() -> None:
    networks = Networks(**SIZES)
    images = torch.rand(3, 16).round()
    rows = torch.tensor([0, 0, 1, 2, 2])
    vertices = F.one_hot(torch.tensor([0, 3, 1, 2, 0]), 4).float()
    torch.manual_seed(1)
    ours = networks.negative_elbo(images, networks.encoder.image(images), vertices, rows)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, reference(networks, images[rows], vertices))


def test_likelihood_of_impossible_pixels_is_finite() -> None:
    networks = Networks(**SIZES)
    with torch.no_grad():
        networks.decoder.outer.bias.fill_(100.0)
    images = torch.zeros(1, 16)
    loss = networks.negative_elbo(images, networks.encoder.image(images), torch.eye(4)[:1], torch.tensor([0]))
    assert 1500 < loss.item() < 1700
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), list(networks.encoder.parameters())))


def test_sparsemax_has_its_own_loss() -> None:
    """Fenchel-Young: its gradient is sparsemax minus the label, and it is 0 where sparsemax is certain of the label."""
    scores = (3 * torch.randn(20, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(20) % 5
    losses = CLASSIFICATION_LOSSES["sparsemax"](scores, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    point = OneHot().project(scores.detach())
    torch.testing.assert_close(gradient, point - F.one_hot(labels, 5))
    certain = point.gather(1, labels[:, None])[:, 0] == 1
    assert certain.any()
    assert (losses[~certain] > 0).all()
    torch.testing.assert_close(losses[certain], torch.zeros(int(certain.sum()), dtype=torch.float64))


# --- task ----------------------------------------------------------------------------------------------------------


def estimators() -> dict[str, Estimator]:
    structure = OneHot()
    gumbel: dict[str, Any] = {"utility": "gibbs", "kl": "distribution", "temperature": ExponentialSchedule()}
    return {
        "dense": Marginalize(structure),
        "sparsemax": Marginalize(structure, "sparsemax"),
        "sfe": Reinforce(structure, baseline="ema"),
        "sfe_plus": Reinforce(structure, baseline="sample"),
        "nvil": Reinforce(structure, baseline="nvil", context_size=16),
        "sum_and_sample": SumAndSample(structure),
        "gumbel_softmax": SST(structure, **gumbel),
        "st_gumbel": SST(structure, straight_through=True, **gumbel),
    }


CALLS = {"dense": 4, "sfe": 1, "sfe_plus": 2, "nvil": 1, "sum_and_sample": 2, "gumbel_softmax": 1, "st_gumbel": 1}


@pytest.fixture
def data(tmp_path: Path) -> SemiSupervisedImages:
    """Tiny images of four classes, each with ink in a row of its own."""
    rng = np.random.default_rng(0)
    images = SemiSupervisedImages("unused", "unused", tmp_path / "cache", labelled=20, unlabelled=60, val=12, test=12)
    for name, n in (("labelled", 20), ("unlabelled", 60), ("val", 12), ("test", 12)):
        labels = torch.from_numpy(rng.integers(0, 4, n))
        rows = F.one_hot(labels, 4)[:, :, None].expand(n, 4, 4).flatten(1)
        images._loaded[name] = ((225 * rows + 15).to(torch.uint8), labels)
    images.prepare = lambda: None  # type: ignore[method-assign]
    return images


def make(estimator: Estimator, data: SemiSupervisedImages, **options: Any) -> SemiSupervisedVAE:
    torch.manual_seed(0)
    defaults = {**SIZES, "batch_size": 10, "eval_batch_size": 6, "warm_start": WarmStart(epochs=2, batch_size=10)}
    return SemiSupervisedVAE(
        structure=estimator.structure,
        estimator=estimator,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        data=data,
        **defaults | options,
    )


@pytest.mark.parametrize("name", [*CALLS, "sparsemax"])
def test_fits_tests_and_draws(name: str, data: SemiSupervisedImages, tmp_path: Path) -> None:
    task = make(estimators()[name], data)
    fitted = quiet_trainer(max_steps=6, val_check_interval=3)
    fitted.fit(task)
    assert {"val/elbo", "val/accuracy", "val/training_calls"} <= set(fitted.callback_metrics)
    (metrics,) = fitted.test(task, verbose=False)
    if name in CALLS:
        assert metrics["test/training_calls"] == CALLS[name]
        assert task.history["training_calls"] == [CALLS[name]] * 2
        assert {len(past) for past in task.history.values()} == {2}
    else:
        assert 1 <= metrics["test/training_calls"] <= 4
    assert metrics["test/loss"] == pytest.approx(-metrics["test/elbo"], rel=1e-5)
    assert [p.name for p in task.pictures(tmp_path)] == ["digits.png", "samples.png", "decoder_calls.png"]


def test_it_learns_the_classes_and_their_images(data: SemiSupervisedImages) -> None:
    start = WarmStart(epochs=60, batch_size=10, lr=1e-2)
    task = make(estimators()["sparsemax"], data, classification_loss="sparsemax", warm_start=start)
    (before,) = quiet_trainer().test(task, verbose=False)
    fitted = quiet_trainer(max_steps=100, val_check_interval=50)
    fitted.fit(task)
    (after,) = fitted.test(task, verbose=False)
    assert after["test/accuracy"] > 0.9
    # Entropy of 16 pixels of grey level 15 or 240 of 255 and log 4 for the class: about 5.
    assert 4 < -after["test/elbo"] < 7 < -before["test/elbo"]
    assert after["test/training_calls"] < 1.5


def test_elbo_of_the_exact_sum(data: SemiSupervisedImages) -> None:
    task = make(estimators()["dense"], data).eval()
    batch = data.split("test")
    torch.manual_seed(3)
    out = task.step(batch)
    torch.manual_seed(3)
    images = resample(batch["images"])
    every = torch.eye(4).repeat(12, 1)
    losses = reference(task.networks, images.repeat_interleave(4, 0), every).reshape(12, 4)
    posterior = Categorical(logits=task.networks.classifier(images))
    kl = math.log(4) - posterior.entropy()
    torch.testing.assert_close(out.metrics["elbo"], -((posterior.probs * losses).sum(1) + kl).mean())
    torch.testing.assert_close(out.loss, -out.metrics["elbo"])  # type: ignore[arg-type]


def test_training_loss_is_labelled_plus_weighted_unlabelled(data: SemiSupervisedImages) -> None:
    task = make(estimators()["dense"], data).train()
    assert task.weight == 3
    batch = next(iter(task.batches("train")))
    assert {name: len(t) for name, t in batch.items()} == {"images": 10, "labelled": 10, "labels": 10}

    def loss(weight: float) -> Tensor:
        torch.manual_seed(3)
        task.weight = weight
        return task.step(batch).loss

    supervised, one = loss(0.0), loss(1.0)
    torch.testing.assert_close(loss(3.0), supervised + 3 * (one - supervised))
    torch.manual_seed(3)
    images = resample(torch.cat([batch["labelled"], batch["images"]]))
    unlabelled = images[10:]
    posterior = Categorical(logits=task.networks.classifier(unlabelled))
    # One sample of the style for all: the labelled images at their classes, then every class of the unlabelled.
    vertices = torch.cat([F.one_hot(batch["labels"], 4).float(), torch.eye(4).repeat(10, 1)])
    both = torch.cat([images[:10], unlabelled.repeat_interleave(4, 0)])
    labelled, losses = reference(task.networks, both, vertices).split([10, 40])
    losses = losses.reshape(10, 4)
    expected = (posterior.probs * losses).sum(1) + math.log(4) - posterior.entropy()
    torch.testing.assert_close(one - supervised, expected.mean(), rtol=1e-4, atol=1e-4)
    scores = task.networks.classifier(images[:10])
    expected = labelled + F.cross_entropy(scores, batch["labels"], reduction="none")
    torch.testing.assert_close(supervised, expected.mean(), rtol=1e-4, atol=1e-4)


def sparse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sparsemax by trying every size of the support (Martins and Astudillo 2016): probabilities, and the threshold."""
    ordered = scores.sort(-1, descending=True).values
    sizes = torch.arange(1, scores.shape[-1] + 1)
    thresholds = (ordered.cumsum(-1) - 1) / sizes
    size = (ordered > thresholds).sum(-1, keepdim=True)
    threshold = thresholds.gather(-1, size - 1)
    return (scores - threshold).clamp_min(0), threshold


def test_labelled_images_have_the_loss_that_was_chosen(data: SemiSupervisedImages) -> None:
    """The sparsemax loss in the place of the cross-entropy, as Martins and Astudillo (2016, equation 23) write it."""
    found = {}
    for loss in ("cross_entropy", "sparsemax"):
        task = make(estimators()["dense"], data, classification_loss=loss, weight=0.0).train()
        with torch.no_grad():
            task.networks.classifier[-1].weight *= 6
        batch = next(iter(task.batches("train")))
        torch.manual_seed(3)
        found[loss] = task.step(batch).loss
    torch.manual_seed(3)
    images = resample(torch.cat([batch["labelled"], batch["images"]]))[:10]
    scores = task.networks.classifier(images)
    p, threshold = sparse(scores)
    own = scores.gather(1, batch["labels"][:, None])[:, 0]
    expected = -own + ((scores**2 - threshold**2) * (p > 0)).sum(1) / 2 + 1 / 2
    moved = expected - F.cross_entropy(scores, batch["labels"], reduction="none")
    torch.testing.assert_close(found["sparsemax"] - found["cross_entropy"], moved.mean(), rtol=1e-4, atol=1e-4)


def test_each_part_of_a_batch_is_of_its_own_images(data: SemiSupervisedImages) -> None:
    """And the estimator sees the pixels of the unlabelled images, those that its vertices belong to."""
    levels = {"labelled": 50, "unlabelled": 100, "val": 150, "test": 200}
    for name, level in levels.items():
        images, labels = data._loaded[name]
        data._loaded[name] = (torch.full_like(images, level), labels)
    task = make(estimators()["nvil"], data).train()
    batch = next(iter(task.batches("train")))
    seen = {name: batch[name].unique().tolist() for name in ("labelled", "images")}
    for split in ("val", "test"):
        seen[split] = next(iter(task.batches(split)))["images"].unique().tolist()  # type: ignore[arg-type]
    assert seen == {"labelled": [50], "images": [100], "val": [150], "test": [200]}
    contexts: list[Tensor] = []
    assert task.estimator is not None
    task.estimator.register_forward_pre_hook(
        lambda _, inputs, named: contexts.append(named["context"]), with_kwargs=True
    )
    torch.manual_seed(3)
    task.step(batch)
    torch.manual_seed(3)
    assert contexts[0].equal(resample(torch.cat([batch["labelled"], batch["images"]]))[10:])


def test_elbo_of_a_sparse_posterior(data: SemiSupervisedImages) -> None:
    """Of a test, and of the warm start: the sum over the support, and ``log K + sum_z p log p``."""
    task = make(estimators()["sparsemax"], data).eval()
    with torch.no_grad():
        task.networks.classifier[-1].weight *= 6
    batch = data.split("test")
    torch.manual_seed(3)
    found = task.step(batch).metrics["elbo"]
    torch.manual_seed(3)
    images = resample(batch["images"])
    p, _ = sparse(task.networks.classifier(images).detach())
    rows, classes = p.nonzero(as_tuple=True)
    assert 12 < len(rows) < 48
    p = p[rows, classes]
    losses = reference(task.networks, images[rows], F.one_hot(classes, 4).float()).detach()
    expected = -(p * (losses + p.log())).sum() / 12 - math.log(4)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(3)
    assert warm_start._elbo(task.networks, "sparsemax", batch) == pytest.approx(expected.item(), rel=1e-5)


def test_a_learnt_prior(data: SemiSupervisedImages) -> None:
    """In the labelled loss, in the ELBO, in what is generated; learnt to the shares of the classes."""
    for part in ("labelled", "unlabelled"):  # three of four images of class 1
        labels = data._loaded[part][1]
        rare = torch.arange(len(labels)) % 4 == 0
        kept = torch.where(rare, labels, 1)
        rows = F.one_hot(kept, 4)[:, :, None].expand(len(kept), 4, 4).flatten(1)
        data._loaded[part] = ((225 * rows + 15).to(torch.uint8), kept)
    task = make(estimators()["dense"], data, prior="learnt").train()
    assert task.prior is not None
    batch = next(iter(task.batches("train")))

    def loss(prior: Tensor) -> Tensor:
        torch.manual_seed(3)
        task.prior.data.copy_(prior)  # type: ignore[union-attr]
        return task.step(batch).loss

    flat, chosen = torch.zeros(4), torch.tensor([0.5, -1.0, 0.0, 2.0])
    uniform = make(estimators()["dense"], data).train()
    uniform.load_state_dict(task.state_dict(), strict=False)
    torch.manual_seed(3)
    torch.testing.assert_close(uniform.step(batch).loss + math.log(4), loss(flat))
    torch.manual_seed(3)
    posterior = Categorical(
        logits=task.networks.classifier(resample(torch.cat([batch["labelled"], batch["images"]])))[10:]
    )
    other = Categorical(logits=chosen)
    moved = kl_divergence(posterior, other) - kl_divergence(posterior, Categorical(logits=flat))
    expected = task.weight * moved.mean() - other.log_prob(batch["labels"]).mean() - math.log(4)
    torch.testing.assert_close(loss(chosen) - loss(flat), expected, rtol=1e-3, atol=1e-4)
    task.prior.data.zero_()
    quiet_trainer(max_steps=80, val_check_interval=80).fit(task)
    assert task.prior.softmax(-1)[1] > 0.6
    task.prior.data.copy_(torch.tensor([50.0, 0.0, 0.0, 0.0]))
    classes, means = task.generate(20)
    assert classes.tolist() == [0] * 20
    assert means.shape == (20, 16)


class Weights(pl.Callback):
    """Keeps the parameters after every training step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        self.seen.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())


def test_a_resumed_run_repeats_an_uninterrupted_one(data: SemiSupervisedImages, tmp_path: Path) -> None:
    """Order of labelled and unlabelled images, pixels, baseline and decoder calls: eight steps of six an epoch."""
    whole, resumed = Weights(), Weights()
    task = make(estimators()["sfe"], data)
    quiet_trainer(max_steps=8, val_check_interval=4, callbacks=[whole, RandomState()]).fit(task)
    first = quiet_trainer(max_steps=4, val_check_interval=4, callbacks=[RandomState()])
    first.fit(make(estimators()["sfe"], data))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = make(estimators()["sfe"], data)
    second = quiet_trainer(max_steps=8, val_check_interval=4, callbacks=[resumed, RandomState()])
    second.fit(again, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert len(whole.seen) == 8
    assert len(resumed.seen) == 4
    for expected, mine in zip(whole.seen[4:], resumed.seen, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    assert again.history == task.history
    assert task.history["training_calls"] == [1.0, 1.0]


def test_refuses_what_is_not_one_class(data: SemiSupervisedImages) -> None:
    structure = KSubset(2)
    with pytest.raises(ValueError, match="structure=one_hot"):
        make(Reinforce(structure, baseline="ema"), data)
    with pytest.raises(ValueError, match="that of SST is over parts"):
        make(SST(OneHot()), data)
    with pytest.raises(ValueError, match="that of Perturbed is over parts"):
        make(Perturbed(OneHot()), data)
    with pytest.raises(ValueError, match="prior must be one of uniform, learnt"):
        make(estimators()["dense"], data, prior="none")
    with pytest.raises(ValueError, match="one of cross_entropy, sparsemax"):
        make(estimators()["dense"], data, classification_loss="hinge")
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        make(estimators()["dense"], data, hidden=0)
    with pytest.raises(ValueError, match="weight must be finite"):
        make(estimators()["dense"], data, weight=-1.0)


def test_other_images_are_refused_before_anything_is_trained(data: SemiSupervisedImages) -> None:
    dense = estimators()["dense"]
    for options, reason in (
        ({"pixels": 15}, "pixels=15, but the images of unused have 16; null counts them"),
        ({"classes": 3}, "classes=3, but the labels of unused go from 0 to 3; null counts them"),
    ):
        with pytest.raises(ValueError, match=reason):
            make(dense, data, **options).prepare_data()
    assert not Path(data.cache).exists()
    with pytest.raises(ValueError, match="batch_size must be at least 1 and at most 60"):
        make(dense, data, batch_size=61)
    with pytest.raises(ValueError, match=r"warm_start\.batch_size must be at most 20"):
        make(dense, data, warm_start=WarmStart(batch_size=21))


def test_images_that_are_not_square_are_not_drawn(data: SemiSupervisedImages, tmp_path: Path) -> None:
    assert make(estimators()["dense"], data, pixels=15).pictures(tmp_path) == []


# --- warm start ----------------------------------------------------------------------------------------------------


def vector(task: SemiSupervisedVAE) -> Tensor:
    return torch.nn.utils.parameters_to_vector(task.networks.parameters()).detach().clone()


def test_warm_start_is_made_once_and_again_after_it_was_killed(
    data: SemiSupervisedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make(estimators()["dense"], data)
    random = vector(task)
    trained = 0
    train = WarmStart._train

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    def counted(*arguments: Any) -> Any:
        nonlocal trained
        trained += 1
        return train(*arguments)

    monkeypatch.setattr(WarmStart, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        task.prepare_data()
    monkeypatch.setattr(WarmStart, "_train", counted)
    state = torch.get_rng_state()
    task.prepare_data()
    assert (torch.get_rng_state() == state).all()
    task.setup("fit")
    assert (vector(task) != random).any()
    other = make(estimators()["sfe"], data, seed=7)
    other.prepare_data()
    other.setup("fit")
    torch.testing.assert_close(vector(other), vector(task), rtol=0, atol=0)
    assert trained == 1
    changes: tuple[dict[str, Any], ...] = ({"lr": 2e-3}, {"weight_decay": 0.1}, {"seed": 1})
    starts = [{"warm_start": WarmStart(**{"epochs": 2, "batch_size": 10} | change)} for change in changes]
    for options in ({"classification_loss": "sparsemax"}, *starts):
        another = make(estimators()["dense"], data, **options)
        another.setup("fit")
        assert (vector(another) != vector(task)).any()
    assert trained == 5


def test_other_images_of_the_same_name_have_a_warm_start_of_their_own(data: SemiSupervisedImages) -> None:
    task = make(estimators()["dense"], data)
    first = task._warm_start()
    images, labels = data._loaded["labelled"]
    data._loaded["labelled"] = (255 - images, labels)
    other = task._warm_start()
    data._loaded["labelled"] = (images, (labels + 1) % 4)
    assert len({first, other, task._warm_start()}) == 3


def test_warm_start_takes_the_epoch_of_the_best_validation_elbo(
    data: SemiSupervisedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four epochs with given ELBO the second; that of the networks is the ELBO of the exact sum."""

    def start(epochs: int, select: str) -> SemiSupervisedVAE:
        options = {"epochs": epochs, "batch_size": 10, "select": select}
        task = make(estimators()["dense"], data, warm_start=WarmStart(**options))
        task.setup("fit")
        return task

    values = iter([1.0, 3.0, 2.0, 2.5])
    with monkeypatch.context() as patched:
        patched.setattr(warm_start, "_elbo", lambda *_: next(values))
        best = start(4, "best")
    torch.testing.assert_close(vector(best), vector(start(2, "last")), rtol=0, atol=0)
    assert not torch.equal(vector(best), vector(start(4, "last")))
    with pytest.raises(ValueError, match="one of best, last"):
        WarmStart(select="first")  # type: ignore[arg-type]

    validation = data.split("val")
    torch.manual_seed(0)
    expected = best.eval().step(validation).metrics["elbo"]
    torch.manual_seed(0)
    found = warm_start._elbo(best.networks, "cross_entropy", validation)
    assert found == pytest.approx(float(expected), rel=1e-5)  # type: ignore[arg-type]


def test_warm_start_learns_the_labels(data: SemiSupervisedImages) -> None:
    task = make(estimators()["dense"], data, warm_start=WarmStart(epochs=60, batch_size=10, lr=1e-2)).eval()
    before = task.step(data.split("test")).metrics
    task.setup("fit")
    after = task.step(data.split("test")).metrics
    assert after["accuracy"] == 1.0
    assert after["elbo"] > before["elbo"] + 1  # type: ignore[operator]


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


RATES = {
    "dense": 1e-3,
    "sparsemax": 5e-4,
    "sfe": 1e-4,
    "sfe_plus": 1e-4,
    "nvil": 1e-3,
    "sum_and_sample": 1e-3,
    "gumbel_softmax": 1e-3,
    "st_gumbel": 1e-3,
}


@pytest.mark.usefixtures("_configs")
@pytest.mark.parametrize("name", RATES)
def test_eight_estimators_by_configuration_alone(name: str) -> None:
    config = compose("config", ["task=ssvae", f"estimator={name}"])
    task = assemble(config)
    assert isinstance(task, SemiSupervisedVAE)
    assert config.task.optimizer.lr == RATES[name]
    assert task.classification_loss == ("sparsemax" if name == "sparsemax" else "cross_entropy")
    assert (task.weight, task.batch_size, task.warm_start.epochs) == (9, 64, 100)
    assert config.trainer.max_steps == 200 * config.trainer.val_every_n_steps == 200 * (45_000 // 64)
    if "gumbel" in name:
        assert config.estimator.temperature == {
            "_target_": "structgrad.estimators.ExponentialSchedule",
            "start": 1.0,
            "minimum": 0.5,
            "rate": 1e-4,
            "every": 1000,
        }
