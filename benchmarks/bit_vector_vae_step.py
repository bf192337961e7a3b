"""Decoder of the bit-vector VAE, forward and backward, at the paper's size: vertices evaluated in a
second; and the importance samples of a test.

Run from the root of the checkout: ``python -m benchmarks.bit_vector_vae_step``.
"""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.harness import Row, matmul_rate, measure, report, settings
from torch import Tensor
from torch.nn import functional as F

from structgrad.estimators import Reinforce
from structgrad.structures import Subset
from structgrad.tasks.bit_vector_vae import BitVectorVAE, ImageData
from structgrad.tasks.bit_vector_vae.model import LEVELS, Decoder
from structgrad.training.runtime import tune_allocator

BATCH, PIXELS, HIDDEN, RANK = 64, 784, 128, 5
#: Vertices a second that we ask of ourselves, of a core.
BOUND = 1000


def flops(bits: int) -> float:
    """Multiplications and additions of a vertex, forward and backward, if the logits are computed once."""
    return 3 * 2.0 * (bits * HIDDEN + HIDDEN * PIXELS * RANK + PIXELS * RANK * LEVELS)


def plain(decoder: Decoder, vertices: Tensor, images: Tensor, rows: Tensor) -> Tensor:
    """The same losses by plain PyTorch."""
    features = decoder.outer(decoder.inner(vertices).relu()).reshape(-1, PIXELS, RANK)
    logits = decoder.levels(features).flatten(0, 1)
    losses = F.cross_entropy(logits, images[rows].flatten().long(), reduction="none")
    return losses.reshape(len(vertices), -1).sum(1)


def samples(bits: int = 32, number: int = 1024) -> Row:
    """Losses of the importance samples of images whose bits have probabilities of 0.02 and 0.98."""
    structure = Subset()
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    data = ImageData("unused", "unused", "unused")
    task = BitVectorVAE(structure=structure, estimator=Reinforce(structure), optimizer=optimizer, data=data, bits=bits)
    images = torch.randint(0, LEVELS, (BATCH, PIXELS), dtype=torch.uint8)
    scores = torch.randn(BATCH, bits).sign() * 4
    vertices, rows, _ = (torch.cat(x) for x in zip(*task._posterior_samples(scores, number), strict=True))
    with torch.no_grad():
        mine = measure(lambda: task._losses_of(vertices, images, rows), repeats=3, warmup=1)
        other = measure(lambda: task.decoder(vertices, images, rows), repeats=1, warmup=0)
    return Row("importance samples", f"D={bits} {number}x{BATCH}", mine, "every sample decoded", other)


def main() -> None:
    """Ours against plain PyTorch for one and for several vertices an image."""
    tune_allocator()
    torch.manual_seed(0)
    images = torch.randint(0, LEVELS, (BATCH, PIXELS), dtype=torch.uint8)
    rows_out = []
    for _ in settings():
        product = matmul_rate()
        for bits, support in ((32, 1), (32, 10), (128, 1)):
            decoder = Decoder(PIXELS, bits, HIDDEN, RANK)
            vertices = torch.rand(BATCH * support, bits).lt(0.5).float()
            rows = torch.arange(BATCH).repeat_interleave(support)
            weights = torch.full((len(rows),), 1 / len(rows))

            def ours(v: Tensor = vertices, r: Tensor = rows, w: Tensor = weights, d: Decoder = decoder) -> None:
                torch.autograd.grad((d(v, images, r) * w).sum(), list(d.parameters()))

            def theirs(v: Tensor = vertices, r: Tensor = rows, w: Tensor = weights, d: Decoder = decoder) -> None:
                torch.autograd.grad((plain(d, v, images, r) * w).sum(), list(d.parameters()))

            mine, other = measure(ours, repeats=7), measure(theirs, repeats=3, warmup=1)
            size = f"D={bits} vertices={support}x{BATCH}"
            bound = 1e3 * len(rows) / BOUND
            share = round(mine.rate(flops(bits) * len(rows)) / product, 2)
            row = Row("decoder, forward and backward", size, mine, "plain PyTorch", other, bound, share=share)
            rows_out.append(row)
    rows_out.append(samples())
    report("bit_vector_vae_step", rows_out)


if __name__ == "__main__":
    main()
