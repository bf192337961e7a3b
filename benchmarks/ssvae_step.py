"""Training step of the semi-supervised VAE at the paper's size against plain PyTorch: a loop over
the ten classes.

Then the same step by ``trainer.compile=inductor`` against the step as it is.

Run from the root of the checkout: ``python -m benchmarks.ssvae_step``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from benchmarks.harness import Row, matmul_rate, measure, report, settings, training_step
from torch import Tensor
from torch.nn import functional as F

from structgrad.estimators import Marginalize, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import OneHot
from structgrad.tasks.ssvae import SemiSupervisedImages, SemiSupervisedVAE, WarmStart
from structgrad.tasks.ssvae.model import Networks
from structgrad.training.compiled import compiled_step
from structgrad.training.runtime import tune_allocator

BATCH, CLASSES = 64, 10
#: Milliseconds a step that we ask of ourselves, on one core.
BOUND = 3.5


def flops(calls: float) -> float:
    """Multiplications and additions of a step, forward and backward; no gradient for pixels."""
    first = 2 * 2.0 * 2 * BATCH * 784 * (256 + 128)
    classifier = 3 * 2.0 * 2 * BATCH * (2 * 256 * 256 + 256 * CLASSES)
    vertices = BATCH * (1 + calls)
    encoder = 3 * 2.0 * vertices * (CLASSES * 128 + 128 * 128 + 128 * 16)
    decoder = 3 * 2.0 * vertices * (18 * 128 + 128 * 128 + 128 * 784)
    return first + classifier + encoder + decoder


def plain_elbo(networks: Networks, images: Tensor, vertices: Tensor) -> Tensor:
    """Negative ELBO of each image at its class."""
    encoder = networks.encoder
    weight = torch.cat([encoder.image.weight, encoder.label.weight], 1)
    hidden = F.relu(F.linear(torch.cat([images, vertices], 1), weight, encoder.image.bias))
    mean, log_deviation = encoder.outer(F.relu(encoder.inner(hidden))).chunk(2, 1)
    kl = ((mean**2 + (2 * log_deviation).exp() - 1 - 2 * log_deviation) / 2).sum(1)
    style = mean + log_deviation.exp() * torch.randn_like(mean)
    logits = networks.decoder(style, vertices)
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1) + kl


def plain_step(networks: Networks, batch: dict[str, Tensor], probabilities: Callable[[Tensor], Tensor]) -> Tensor:
    """Loss of a step, the ten classes one after the other; those that no image of the batch takes are left out."""
    labelled, images = (torch.bernoulli(batch[name] / 255) for name in ("labelled", "images"))
    vertices = F.one_hot(batch["labels"], CLASSES).float()
    supervised = plain_elbo(networks, labelled, vertices).mean()
    supervised = supervised + F.cross_entropy(networks.classifier(labelled), batch["labels"])
    p = probabilities(networks.classifier(images))
    total = p.clamp_min(1e-30).log().mul(p).sum(1)
    for k in range(CLASSES):
        if bool((p[:, k] > 0).any()):
            vertices = F.one_hot(torch.full((BATCH,), k), CLASSES).float()
            total = total + p[:, k] * plain_elbo(networks, images, vertices)
    return supervised + 9 * total.mean()


def measured() -> list[Row]:
    """Dense, and sparsemax with a support of ten, of two and of one class."""
    torch.manual_seed(0)
    structure = OneHot()
    batch = {
        "images": torch.randint(0, 256, (BATCH, 784), dtype=torch.uint8),
        "labelled": torch.randint(0, 256, (BATCH, 784), dtype=torch.uint8),
        "labels": torch.randint(0, CLASSES, (BATCH,)),
    }
    rows, product = [], matmul_rate()
    for name, estimator, scale in (
        ("dense", Marginalize(structure), 1.0),
        ("sparsemax, at first", Marginalize(structure, "sparsemax"), 1.0),
        ("sparsemax, certain", Marginalize(structure, "sparsemax"), 1e4),
        ("sfe", Reinforce(structure, baseline="ema"), 1.0),
    ):
        task = make(structure, estimator)
        with torch.no_grad():
            task.networks.classifier[-1].weight.mul_(scale)  # type: ignore[operator, union-attr]
        # Without learning, so that the support does not change.
        fused = torch.optim.Adam(task.parameters(), lr=0.0, weight_decay=1e-5, fused=True)
        default = torch.optim.Adam(task.parameters(), lr=0.0, weight_decay=1e-5)
        mapping: Callable[[Tensor], Tensor] = partial(torch.softmax, dim=1) if name == "dense" else structure.project
        calls = float(task.step(batch).metrics["decoder_calls"])  # type: ignore[arg-type]

        ours = training_step(fused, lambda task=task: task.step(batch).loss)  # type: ignore[misc]
        theirs = training_step(default, partial(plain_step, task.networks, batch, mapping))
        mine = measure(ours, repeats=25)
        other = None if name == "sfe" else measure(theirs, repeats=25)
        share = round(mine.rate(flops(calls)) / product, 2)
        size = f"calls={calls:.1f}"
        opponent = "a loop over the classes" if other else ""
        rows.append(Row(f"step, {name}", size, mine, opponent, other, bound=BOUND, share=share))

        program = compiled_step(task, "inductor")
        compiled = training_step(fused, lambda program=program: program(batch).loss)  # type: ignore[misc]
        rows.append(Row(f"step, {name}, compiled", size, measure(compiled, repeats=25), "not compiled", mine))
    return rows


def make(structure: OneHot, estimator: Estimator) -> SemiSupervisedVAE:
    """The task at the paper's size, with random parameters."""
    return SemiSupervisedVAE(
        structure=structure,
        estimator=estimator,
        optimizer=torch.optim.Adam,
        data=SemiSupervisedImages("unused", "unused", "unused"),
        warm_start=WarmStart(epochs=0),
    ).train()


if __name__ == "__main__":
    tune_allocator()
    report("ssvae_step", [row for _ in settings() for row in measured()])
