from __future__ import annotations

import io
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.nn import functional as F

from structgrad.data import DamagedDataError, MissingDataError
from structgrad.data.images import prepare_images, read_images
from structgrad.estimators import SST, Deterministic, Marginalize, Perturbed, Reinforce, SurrogateGradient
from structgrad.estimators.base import Estimator
from structgrad.experiments import tables
from structgrad.structures import BudgetSubset, Subset, UnsupportedError
from structgrad.structures.base import Structure
from structgrad.tasks.bit_vector_vae import BitVectorVAE, ImageData, likelihood
from structgrad.tasks.bit_vector_vae.likelihood import cross_entropy
from structgrad.training.identity import identity, portable
from structgrad.training.run import assemble
from tests.kernels import by_operators, compiled, needs_triton, quiet
from tests.tasks.trainers import quiet_trainer

ROOT = Path(__file__).resolve().parents[2]
MNIST = ROOT.parent / "shared" / "data" / "MNIST" / "parquet"


# --- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of data sets with one of 4 x 4 images, ``tiny``: 40 for training, 12 for the test."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("test", 12)):
        images = []
        for pixels in rng.integers(0, 256, (n, 4, 4), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": images, "label": np.arange(n) % 10})
        features = (
            '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
        )
        pq.write_table(table.replace_schema_metadata({"huggingface": features}), folder / f"{split}-0.parquet")
    return tmp_path / "data"


def test_images_are_decoded_once(tiny: Path, tmp_path: Path) -> None:
    folder = prepare_images("tiny", tiny, tmp_path / "cache")
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (40, 4, 4), dtype=np.uint8)
    train = read_images(folder, "train")
    np.testing.assert_array_equal(train.pixels, expected)
    np.testing.assert_array_equal(train.labels, np.arange(40) % 10)
    manifest = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_images("tiny", tiny, tmp_path / "cache") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == manifest


def test_split_is_first_and_last(tiny: Path, tmp_path: Path) -> None:
    data = ImageData("tiny", tiny, tmp_path / "cache", train=30, val=5, test=12)
    every = torch.from_numpy(read_images(prepare_images("tiny", tiny, tmp_path / "cache"), "train").pixels).flatten(1)
    torch.testing.assert_close(data.split("train"), every[:30])
    torch.testing.assert_close(data.split("val"), every[-5:])
    assert data.split("test").shape == (12, 16)
    with pytest.raises(ValueError, match="has 40 train images"):
        ImageData("tiny", tiny, tmp_path / "cache", train=36, val=5, test=12).split("train")
    with pytest.raises(ValueError, match=r"data\.val"):
        ImageData("tiny", tiny, tmp_path / "cache", val=0)


def png(pixels: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_other_images_are_refused_in_one_line(tmp_path: Path) -> None:
    good = [png(np.full((4, 4), 10 * k, np.uint8)) for k in range(5)]
    columns: dict[str, Any]
    for number, (columns, reason) in enumerate(
        (
            ({"image": good}, "no column label; there are image"),
            ({"img": good, "label": [0] * 5}, "no column image; there are img, label"),
            ({"image": good, "label": list("abcde")}, "whole numbers; got 'a'"),
            ({"image": good, "label": [0.5] * 5}, "whole numbers; got 0.5"),
            ({"image": good, "label": [0, 1, 2, 3, None]}, "whole numbers; got None"),
            ({"image": [*good[:4], None], "label": [0] * 5}, "an image is missing"),
            ({"image": [*good[:4], png(np.zeros((4, 5), np.uint8))], "label": [0] * 5}, "of one size"),
            ({"image": [{"bytes": b"no image", "path": None}] * 5, "label": [0] * 5}, "cannot identify image"),
            ({"image": [png(np.full((4, 4), 300, np.uint16))] * 5, "label": [0] * 5}, "8 bits a channel"),
        )
    ):
        folder = tmp_path / f"images{number}"
        folder.mkdir()
        for split in ("train", "test"):
            pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        with pytest.raises(DamagedDataError, match=rf"the train images of 'images{number}' cannot be read: .*{reason}"):
            prepare_images(folder.name, tmp_path, tmp_path / "cache")
    (folder / "train.parquet").write_bytes(b"cut")
    with pytest.raises(DamagedDataError, match=r"cannot be read: .*train\.parquet"):
        prepare_images(folder.name, tmp_path, tmp_path / "cache")


def test_missing_images_say_what_to_do(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no folder .*nowhere.* put them into .*nowhere"):
        prepare_images(str(tmp_path / "nowhere"), tiny, tmp_path / "cache")


def test_download_without_network_fails_at_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    start = time.monotonic()
    with pytest.raises(MissingDataError, match=r"hub does not give it.*zalando-datasets/fashion_mnist, put them into"):
        prepare_images("zalando-datasets/fashion_mnist", tiny, tmp_path / "cache")
    # Folders that budgets take are no names on the hub.
    with pytest.raises(
        MissingDataError, match=r"zalando-datasets/fashion_mnist, or from Debian's package dataset-fashion"
    ):
        prepare_images("FashionMNIST/parquet", tiny, tmp_path / "cache")
    with pytest.raises(MissingDataError, match=r"datasets/ylecun/mnist, put .*task\.data\.source=ylecun/mnist"):
        prepare_images("MNIST/parquet", tiny, tmp_path / "cache")
    assert time.monotonic() - start < 15


@pytest.mark.skipif(not MNIST.is_dir(), reason="the shared MNIST is not here")
def test_mnist(tmp_path: Path) -> None:
    folder = prepare_images("MNIST/parquet", MNIST.parents[1], tmp_path / "cache")
    test = read_images(folder, "test")
    assert test.pixels.shape == (10_000, 28, 28)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.pixels.mean() / 255 == pytest.approx(0.1325, abs=1e-4)


# --- likelihood ----------------------------------------------------------------------------------------------------


def arguments(n: int, pixels: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((n, 6), (pixels * 5, 6), (pixels * 5,), (256, 5), (256,))
    weights = [(scale * torch.randn(s, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes]
    return weights, torch.randint(0, 256, (3, pixels), dtype=torch.uint8), torch.arange(n) % 3


def plain(weights: list[Tensor], targets: Tensor, rows: Tensor) -> Tensor:
    hidden, weight, bias, classes, offsets = weights
    logits = F.linear(F.linear(hidden, weight, bias).reshape(len(hidden), -1, 5), classes, offsets)
    losses = F.cross_entropy(logits.flatten(0, 1), targets[rows].long().flatten(), reduction="none")
    return losses.reshape(len(hidden), -1).sum(1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])  # at 5 logits differ by thousands
@pytest.mark.parametrize(("n", "pixels"), [(1, 11), (7, 12), (150, 11), (2, 1)])
def test_cross_entropy_is_that_of_plain_logits(n: int, pixels: int, scale: float) -> None:
    weights, targets, rows = arguments(n, pixels, torch.float32, scale)
    exact = [w.detach().double().requires_grad_() for w in weights]
    gradient = torch.randn(n)
    gradient[0] = 0.0
    ours, expected = cross_entropy(*weights, targets=targets, rows=rows), plain(exact, targets, rows)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(*weights, targets=targets, rows=rows), ours, rtol=1e-6, atol=1e-6)
    pairs = zip(
        torch.autograd.grad(ours, weights, gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
        strict=True,
    )
    for mine, theirs in pairs:
        size = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=(1e-5 if scale < 5 else 2e-3) * size)


def test_cross_entropy_is_the_same_on_several_threads() -> None:
    weights, targets, rows = arguments(150, 11, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            losses = cross_entropy(*weights, targets=targets, rows=rows)
            results.append((losses.detach(), *torch.autograd.grad(losses.sum(), weights)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_vectorised_jacobian_of_the_cross_entropy() -> None:
    weights, targets, rows = arguments(4, 3, torch.float64)
    upstream = torch.randn(2, len(rows), dtype=torch.float64)
    losses = cross_entropy(*weights, targets=targets, rows=rows), plain(weights, targets, rows)
    found = [torch.autograd.grad(value, weights, upstream, is_grads_batched=True) for value in losses]
    torch.testing.assert_close(*found)


def test_cross_entropy_passes_gradcheck() -> None:
    weights, targets, rows = arguments(4, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *w: cross_entropy(*w, targets=targets, rows=rows), weights)
    torch.testing.assert_close(cross_entropy(*weights, targets=targets, rows=rows), plain(weights, targets, rows))


def test_cross_entropy_of_nan_is_nan() -> None:
    weights, targets, rows = arguments(2, 3, torch.float32)
    hidden = weights[0].detach().clone()
    hidden[1, 0] = math.nan
    losses = cross_entropy(hidden, *weights[1:], targets=targets, rows=rows)
    assert losses.isnan().tolist() == [False, True]
    assert torch.autograd.grad(losses.sum(), weights[3])[0].isnan().all()
    with torch.no_grad():
        losses = cross_entropy(hidden, *weights[1:], targets=targets, rows=rows)
    assert losses.isnan().tolist() == [False, True]


def test_cross_entropy_of_observed_levels_that_are_most_improbable() -> None:
    """Their exponentials are the reference of all others, and those of others overflow."""
    weights, targets, rows = arguments(3, 4, torch.float32)
    with torch.no_grad():
        weights[4][targets[0].long()] -= torch.tensor([1e2, 5e2, 1e4, 80.0])
    exact = [w.detach().double().requires_grad_() for w in weights]
    ours, expected = cross_entropy(*weights, targets=targets, rows=rows), plain(exact, targets, rows)
    assert expected[0] > 1e4
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-4)
    mine, theirs = torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(expected.sum(), exact)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def nearly_certain(n: int = 3, pixels: int = 5) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits of about 1,500 of which the observed one is some 7 nats above the next: a trained decoder's."""
    weights, targets, rows = arguments(n, pixels, torch.float32)
    with torch.no_grad():
        for weight, size in zip(weights, (0.05, 0.05, 0.01), strict=False):
            weight *= size
        weights[2] += 10.0
        weights[3][0], weights[3][1] = 30.0, 1.0
        weights[4][1] = 5 * 10 * (30 - 1) - 7.0
    return weights, torch.zeros_like(targets), rows


def assert_nearly_certain_is_exact(function: Callable[..., Tensor]) -> None:
    weights, targets, rows = nearly_certain()
    exact = [w.detach().double().requires_grad_() for w in weights]
    ours, expected = function(weights, targets, rows), plain(exact, targets, rows)
    assert expected.max() < 0.1
    torch.testing.assert_close(ours.double(), expected, rtol=0.0, atol=5 * 5e-4)  # the logits' own rounding
    mine, theirs = torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(expected.sum(), exact)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=2e-3 * other.abs().max().item())


def test_cross_entropy_of_observed_levels_that_are_nearly_certain() -> None:
    """The derivative by a logit is a probability less 1, and must not be the rounding of a large logit instead."""
    assert_nearly_certain_is_exact(lambda w, targets, rows: cross_entropy(*w, targets=targets, rows=rows))


@needs_triton
@quiet
def test_gpu_kernels_of_observed_levels_that_are_nearly_certain() -> None:
    assert_nearly_certain_is_exact(by_operator)


def by_operator(weights: list[Tensor], targets: Tensor, rows: Tensor) -> Tensor:
    result: Tensor = by_operators(
        lambda *w: cross_entropy(*w[:-2], targets=w[-2], rows=w[-1]),  # type: ignore[misc]
        *weights,
        targets,
        rows,
    )
    return result


@needs_triton
@quiet
@pytest.mark.parametrize(
    ("n", "pixels", "dtype", "scale"),
    [(5, 11, torch.float32, 1.0), (2, 3, torch.float32, 5.0), (3, 5, torch.float64, 1.0), (0, 3, torch.float32, 1.0)],
)
def test_gpu_kernels_agree_with_the_cpu(
    n: int, pixels: int, dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_SUMS", 3)  # so that a program has several portions of pixels
    weights, targets, rows = arguments(n, pixels, dtype, scale)
    ours, expected = by_operator(weights, targets, rows), cross_entropy(*weights, targets=targets, rows=rows)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    along = torch.randn(n, dtype=dtype)
    # Squares, so that what comes from upstream depends on the weights as well.
    once = [torch.autograd.grad(losses.square(), weights, along, create_graph=True) for losses in (ours, expected)]
    directions = [torch.randn_like(g) for g in once[0]]
    twice = [torch.autograd.grad(gradients, weights, directions) for gradients in once]
    for found in (once, twice):
        for mine, theirs in zip(*found, strict=True):
            size = theirs.detach().abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=(1e-5 if scale < 5 else 2e-3) * size)


@needs_triton
@quiet
def test_gpu_kernels_of_nan_and_under_compile() -> None:
    weights, targets, rows = arguments(2, 3, torch.float32)
    hidden = weights[0].detach().clone()
    hidden[1, 0] = math.nan
    assert by_operator([hidden, *weights[1:]], targets, rows).isnan().tolist() == [False, True]
    function = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    meta = [w.detach().to("meta").requires_grad_() for w in weights]
    losses = function(*meta, targets=targets.to("meta"), rows=rows.to("meta"))
    losses.sum().backward()
    assert all(w.grad is not None and w.grad.shape == w.shape for w in meta)


@needs_triton
def test_gpu_kernels_compile_for_a_gpu() -> None:
    done = compiled("""
import torch
from structgrad.tasks.bit_vector_vae import likelihood
features, classes, offsets = torch.ones(2, 784, 5), torch.ones(256, 5), torch.ones(256)
targets, rows = torch.zeros(3, 784, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
losses = likelihood._operator(features, classes, offsets, targets, rows)
likelihood._backward_operator(features, classes, offsets, targets, rows, losses)
""")
    assert [line.split()[0] for line in done.splitlines()] == ["_gpu_forward", "_gpu_backward"]


# --- task ----------------------------------------------------------------------------------------------------------


def estimators(structure: Structure) -> dict[str, Estimator]:
    gibbs: dict[str, Any] = {"utility": "logistic", "kl": "distribution"}
    return {
        "sfe": Reinforce(structure, baseline="ema"),
        "sfe_plus": Reinforce(structure, baseline="sample"),
        "nvil": Reinforce(structure, baseline="nvil", context_size=8),
        "gumbel": SST(structure, **gibbs),
        "st": SST(structure, straight_through=True, **gibbs),
        "topk_sparsemax": Marginalize(structure, "topk_sparsemax", k=4),
        "sparsemap": Marginalize(structure, "sparsemap"),
    }


NAMES = ("sfe", "sfe_plus", "nvil", "gumbel", "st", "topk_sparsemax", "sparsemap")


def make(structure: Structure, estimator: Estimator, data: ImageData | None = None, **options: Any) -> BitVectorVAE:
    torch.manual_seed(0)
    return BitVectorVAE(
        structure=structure,
        estimator=estimator,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        data=data or ImageData("unused", "unused", "unused"),
        **{"bits": 5, "pixels": 16, "hidden": 8, "batch_size": 10, "eval_batch_size": 5} | options,
    )


def exact_log_likelihood(task: BitVectorVAE, images: Tensor) -> Tensor:
    every = Subset().enumerate(task.bits).float()
    rows = torch.arange(len(images)).repeat_interleave(len(every))
    losses = task.decoder(every.repeat(len(images), 1), images, rows).reshape(len(images), -1).double()
    scores = torch.zeros(task.bits) if task.prior is None else task.prior.detach()
    total: Tensor = ((every @ scores).double().log_softmax(0) - losses).logsumexp(1)
    return total


@pytest.mark.parametrize("prior", ["uniform", "learnt"])
@pytest.mark.parametrize("name", ["sfe", "topk_sparsemax", "sparsemap", "budget"])
@torch.no_grad()
def test_importance_sampling_is_unbiased(name: str, prior: str) -> None:
    """Mean of 200 estimates of p(x) over the enumerated p(x), within 4 standard errors (99.99 % each)."""
    if name == "budget":
        structure: Structure = BudgetSubset(3)
        estimator: Estimator = Marginalize(structure, "sparsemap")
    else:
        structure = Subset()
        estimator = estimators(structure)[name]
    task = make(structure, estimator, bits=6, prior=prior).eval()
    if task.prior is not None:
        task.prior.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0, 0.3, -1.0]))
    task.encoder.outer.weight *= 3
    task.decoder.inner.weight *= 2
    images = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    exact = exact_log_likelihood(task, images)
    _, scores, estimate = task._step({"images": images})
    assert estimate.exact == (name != "sfe")
    ratios = torch.stack([task.log_likelihood(images, scores, estimate, 30) - exact for _ in range(200)]).exp()
    error = ratios.std(0) / math.sqrt(len(ratios))
    assert ((ratios.mean(0) - 1).abs() < 4 * error).all()
    assert (error < 0.05).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@torch.no_grad()
def test_losses_of_all_pairs_are_those_of_each_pair(scale: float) -> None:
    """Also where a decoder has logits of hundreds, and for more vertices than are decoded at once."""
    task = make(Subset(), Reinforce(Subset()), bits=6)
    task.decoder.outer.weight *= scale
    vertices = torch.randint(0, 2, (150, 6)).float()
    images = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    rows = torch.arange(3).repeat(150)
    expected = task.double().decoder(vertices.double().repeat_interleave(3, 0), images, rows)
    pairs = task.float().decoder.of_all_pairs(vertices, images)
    torch.testing.assert_close(pairs, expected.reshape(150, 3), rtol=1e-5, atol=1e-4)
    assert not pairs.isclose(pairs[:1]).all()


def test_equal_samples_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(Subset(), Reinforce(Subset()), bits=3)
    vertices = torch.randint(0, 2, (90, 3)).float()
    images = torch.randint(0, 256, (2, 16), dtype=torch.uint8)
    rows = torch.arange(90) % 2
    expected = task.decoder(vertices, images, rows)
    decoded = []
    decode = task.decoder.forward
    monkeypatch.setattr(task.decoder, "forward", lambda v, *others: decoded.append(len(v)) or decode(v, *others))
    torch.testing.assert_close(task._losses_of(vertices, images, rows).float(), expected)
    assert sum(decoded) == 16  # two images, eight bit vectors


def test_bits_per_dim_of_a_test_are_those_of_its_first_images(tiny: Path, tmp_path: Path) -> None:
    """Seven of twelve, in batches of five; with the whole posterior nothing is left to estimate."""
    structure = Subset()
    data = ImageData("tiny", tiny, tmp_path / "cache", train=30, val=10, test=12)
    task = make(structure, Marginalize(structure), data, importance_samples=20, importance_images=7)
    with torch.no_grad():
        task.decoder.inner.weight *= 8  # or all images are as likely
        exact = exact_log_likelihood(task, data.split("test"))
    (metrics,) = quiet_trainer().test(task, verbose=False)
    expected = -exact[:7].mean() / (16 * math.log(2))
    assert metrics["test/bits_per_dim"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["test/bits_per_dim"] != pytest.approx(-exact.mean().item() / (16 * math.log(2)), rel=1e-5)


def test_scores_and_reconstructions_are_those_written_out() -> None:
    """From bytes over 255; the expected grey level of every pixel, under the posterior of the bits."""
    structure = Subset()
    task = make(structure, Marginalize(structure), bits=3).eval()
    images = torch.randint(0, 256, (4, 16), dtype=torch.uint8)
    out, scores, _ = task._step({"images": images})
    encoder, decoder = task.encoder, task.decoder
    expected = encoder.outer(encoder.inner(images.double().div(255).float()).relu())
    torch.testing.assert_close(scores, expected)
    every = structure.enumerate(3).float()
    posterior = (scores @ every.T).softmax(1)
    features = decoder.outer(decoder.inner(every).relu()).reshape(8, 16, 5)
    greys = (decoder.levels(features).softmax(-1) * torch.arange(256)).sum(-1)
    assert out.predictions is not None
    with torch.no_grad():
        made = out.predictions()
    torch.testing.assert_close(made.prediction, (posterior @ greys).detach())
    assert made.target is images
    assert isinstance(made.vertices, Tensor)
    assert made.vertices.equal((scores > 0).float())


def test_rate_counts_all_bit_vectors() -> None:
    structure = BudgetSubset(2)
    task = make(structure, Marginalize(structure, "sparsemap")).eval()
    images = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    out, _, estimate = task._step({"images": images})
    entropy = -estimate.mean(estimate.weights.log())
    rate, distortion, elbo = (out.metrics[name] for name in ("rate", "distortion", "elbo"))
    assert isinstance(rate, Tensor)
    assert isinstance(distortion, Tensor)
    assert isinstance(elbo, Tensor)
    torch.testing.assert_close(rate, (5 * math.log(2) - entropy).mean())
    torch.testing.assert_close(elbo, -(rate + distortion))
    torch.testing.assert_close(out.loss.detach(), -elbo)
    assert (-elbo.item()) >= -exact_log_likelihood(task, images).mean().item()


@pytest.mark.parametrize("name", ["sfe", "sparsemap", "marginal"])
def test_rate_from_a_learnt_prior(name: str) -> None:
    """Over all bit vectors, also where the structure has some of them; its gradient is the difference of means."""
    structure = BudgetSubset(2)
    kinds = {
        "sfe": Reinforce(structure),
        "sparsemap": Marginalize(structure, "sparsemap"),
        "marginal": Deterministic(structure),
    }
    task = make(structure, kinds[name], prior="learnt").eval()
    assert task.prior is not None
    task.prior.data.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0, 0.3]))
    images = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    out, scores, estimate = task._step({"images": images})
    every = structure.enumerate(5).float()
    everything = Subset().enumerate(5).float()
    log_prior = every @ task.prior - (everything @ task.prior).logsumexp(0)
    if name == "sfe":
        q = (scores @ every.T).softmax(1).detach()
    else:
        same = (estimate.vertices.detach()[:, None] == every).all(-1).float()
        q = estimate.mean(same)
    expected = (torch.special.xlogy(q, q) - q * log_prior).sum(1).mean()
    rate = out.metrics["rate"]
    assert isinstance(rate, Tensor)
    torch.testing.assert_close(rate, expected.detach())
    (gradient,) = torch.autograd.grad(out.loss, task.prior)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, task.prior)[0])
    assert task.generate(4).shape == (4, 16)
    with pytest.raises(
        UnsupportedError, match="learns the prior from the KL divergence, and SurrogateGradient has none"
    ):
        make(Subset(), SurrogateGradient(Subset()), prior="learnt")


def test_the_default_prior_is_no_part_of_a_run_s_identity() -> None:
    with initialize_config_dir(version_base=None, config_dir=str(ROOT / "configs")):
        for task in ("bit_vector_vae", "ssvae"):
            configs = [compose("config", [f"task={task}", *more]) for more in ([], ["task.prior=learnt"])]
            plain, learnt = (portable(config) for config in configs)
            assert "prior" not in plain["task"]
            assert identity(plain) != identity(learnt)


@pytest.mark.parametrize("method", ["identity", "blackbox", "spigot"])
def test_a_point_mass_costs_all_bits(method: str) -> None:
    """Its ELBO is a lower bound of the enumerated log-likelihood, which it was not without them."""
    step = None if method == "identity" else 1.0
    task = make(Subset(), SurrogateGradient(Subset(), method, step=step)).eval()  # type: ignore[arg-type]
    images = torch.randint(0, 256, (8, 16), dtype=torch.uint8)
    out = task.step({"images": images})
    assert out.metrics["rate"].item() == pytest.approx(5 * math.log(2))  # type: ignore[union-attr]
    assert out.metrics["elbo"].item() <= exact_log_likelihood(task, images).mean().item()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_fits_tests_and_draws(name: str, tiny: Path, tmp_path: Path) -> None:
    structure = Subset()
    data = ImageData("tiny", tiny, tmp_path / "cache", train=30, val=10, test=12)
    task = make(structure, estimators(structure)[name], data, importance_samples=20, importance_images=7)
    trainer = quiet_trainer(max_steps=6, val_check_interval=3)
    trainer.fit(task)
    assert {"val/varying_bits", "val/elbo", "val/rate", "val/distortion", "val/decoder_calls"} <= set(
        trainer.callback_metrics
    )
    (metrics,) = trainer.test(task, verbose=False)
    # What the tables show in bits a dimension: the loss of a test is the negative ELBO.
    assert metrics["test/loss"] == pytest.approx(-metrics["test/elbo"], rel=1e-6)
    # ELBO of the whole test against the bound on its first images only: both near log2(256) bits a pixel here.
    assert 5 < metrics["test/bits_per_dim"] < 12
    assert [p.name for p in task.pictures(tmp_path)] == ["reconstructions.png", "samples.png"]


def test_colours_are_drawn(tmp_path: Path) -> None:
    structure = Subset()
    data = ImageData("unused", "unused", "unused", colour="channels")
    data._loaded["test"] = torch.randint(0, 256, (12, 12), dtype=torch.uint8)
    task = make(structure, Marginalize(structure), data, pixels=12)
    assert [p.name for p in task.pictures(tmp_path)] == ["reconstructions.png", "samples.png"]


def test_inputs_are_centred_on_the_mean_training_image(tiny: Path, tmp_path: Path) -> None:
    """The mean training image itself gives the scores of no input at all; a run that is continued has it, too."""
    structure = Subset()
    data = ImageData("tiny", tiny, tmp_path / "cache", train=30, val=10, test=12)
    task = make(structure, estimators(structure)["sparsemap"], data, centre_inputs=True)
    quiet_trainer(max_steps=2, val_check_interval=1).fit(task)
    mean = data.split("train").float().mean(0, keepdim=True)
    expected = task.encoder.outer(task.encoder.inner(torch.zeros(1, 16)).relu())
    torch.testing.assert_close(task.encoder(mean)[0], expected, rtol=1e-4, atol=1e-5)
    assert "encoder.centre" in task.state_dict()
    assert "encoder.centre" not in make(structure, estimators(structure)["sparsemap"], data).state_dict()


def test_varying_bits_are_those_whose_likelier_value_differs_between_images() -> None:
    structure = Subset()
    scores = torch.tensor([[0.9, 0.4, -1.0, 2.0], [0.1, 0.3, -0.5, 0.6]])
    for name, expected in (("sparsemap", 0.25), ("sfe", 0.0)):  # clip(s) > 1/2, and sigmoid(s) > 1/2
        task = make(structure, estimators(structure)[name]).eval()
        estimate = task.estimator(scores, lambda vertices, rows: vertices.sum(1))  # type: ignore[misc]
        assert task._varying_bits(scores, estimate).item() == expected


@pytest.mark.usefixtures("_configs")
def test_kept_results_are_the_runs_of_the_same_commands() -> None:
    """Options that came later are no part of the identity where they change nothing."""
    files = sorted((ROOT / "results" / "bit_vector_vae_mnist").glob("*.json"))
    table = tables.load("bit_vector_vae_mnist", ROOT / "configs" / "table")
    assert files
    for file in files:
        summary = json.loads(file.read_text())
        overrides = [*table.overrides, *table.row(summary["sweep"]["row"]).overrides]
        config = compose("config", [*overrides, "budget=paper", "trainer=cpu", f"seed={summary['seed']}"])
        assert summary["name"].endswith(identity(portable(config))), file.name
    plain, centred = (compose("config", ["task=bit_vector_vae", *more]) for more in ([], ["task.centre_inputs=true"]))
    assert identity(portable(centred)) != identity(portable(plain))


def test_images_that_are_not_square_are_not_drawn(tmp_path: Path) -> None:
    structure = Subset()
    data = ImageData("unused", "unused", "unused")
    data._loaded["test"] = torch.zeros(12, 15, dtype=torch.uint8)
    assert make(structure, Marginalize(structure), data, pixels=15).pictures(tmp_path) == []


def test_the_size_of_images_is_counted(tiny: Path, tmp_path: Path) -> None:
    structure = Subset()
    data = ImageData("tiny", tiny, tmp_path / "cache", train=20, val=10, test=10)
    task = make(structure, Marginalize(structure), data, pixels=None)
    assert task.pixels == 16
    assert task.batches("test")
    with pytest.raises(ValueError, match=r"pixels=15, but the images of tiny have 16; null counts them"):
        make(structure, Marginalize(structure), data, pixels=15).batches("test")


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    name = version = "recorder"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them."""
        self.seen.append((step, metrics))


def test_quartiles_of_decoder_calls_are_those_of_every_epoch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches of ten are an epoch; a third epoch is not finished. Calls of an image: its number of vertices."""
    structure = Subset()
    estimator = Marginalize(structure, "sparsemap")
    data = ImageData("tiny", tiny, tmp_path / "cache", train=30, val=10, test=12)
    calls: list[Tensor] = []
    forward = estimator.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        estimate = forward(*args, **kwargs)
        if estimator.training:
            calls.append(torch.stack([(estimate.rows == image).sum() for image in range(10)]))
        return estimate

    monkeypatch.setattr(estimator, "forward", counted)
    task = make(structure, estimator, data)
    with torch.no_grad():
        task.encoder.outer.weight *= 8  # or all supports are of one size
    logger = Recorder()
    quiet_trainer(max_steps=8, limit_val_batches=0, logger=logger).fit(task)
    logged = [(step, metrics) for step, metrics in logger.seen if "train/decoder_calls_median" in metrics]
    assert [step for step, _ in logged] == [2, 5]
    for (_, metrics), epoch in zip(logged, (calls[:3], calls[3:6]), strict=True):
        expected = np.percentile(torch.cat(epoch).numpy(), [25, 50, 75])
        names = ("lower_quartile", "median", "upper_quartile")
        assert [metrics[f"train/decoder_calls_{name}"] for name in names] == pytest.approx(expected)
        assert torch.cat(epoch).float().std() > 0


def test_refuses_what_is_no_bit_vector() -> None:
    matrix = Subset("matrix")
    with pytest.raises(ValueError, match="vector of bits"):
        make(matrix, Reinforce(matrix))
    for estimator in (SST(Subset()), Perturbed(Subset()), Reinforce(Subset(), "U")):
        with pytest.raises(UnsupportedError, match="that of utilities"):
            make(Subset(), estimator)
    with pytest.raises(ValueError, match="at least 1"):
        make(Subset(), Reinforce(Subset()), importance_samples=0)


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


EXPERIMENTS = {
    "sfe": ("bit_vector", "sfe", 1e-3, 1e-3),
    "sfe_plus": ("bit_vector", "sfe_plus", 1e-3, 1e-3),
    "nvil": ("bit_vector", "nvil", 1e-3, 5e-4),
    "gumbel": ("bit_vector", "gumbel_softmax", 1e-3, 1e-3),
    "st": ("bit_vector", "st_gumbel", 1e-3, 5e-4),
    "topk_sparsemax": ("bit_vector", "topk_sparsemax", 2e-3, 1e-3),
    "sparsemap": ("bit_vector", "sparsemap", 2e-3, 2e-3),
    "sparsemap_budget": ("budget_subset", "sparsemap", 2e-3, 2e-3),
}


@pytest.mark.usefixtures("_configs")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_eight_estimators_by_configuration_alone(name: str) -> None:
    structure, estimator, small, large = EXPERIMENTS[name]
    config = compose("config", ["task=bit_vector_vae", f"structure={structure}", f"estimator={estimator}"])
    task = assemble(config)
    assert isinstance(task, BitVectorVAE)
    assert (task.bits, config.task.optimizer.lr, task.batch_size) == (32, small, 64)
    if name == "sparsemap_budget":
        assert float(task.outside()) > 0.3
    config = compose("config", [f"experiment=bit_vector_vae/{name}_d128"])
    task = assemble(config)
    assert isinstance(task, BitVectorVAE)
    assert (task.bits, config.task.optimizer.lr) == (128, large)
    if structure == "budget_subset":
        assert config.structure.budget == 64
    assert config.trainer.max_steps == 100 * (55_000 // task.batch_size)
