"""A training step of learning to explain at the paper's sizes: its time, and the share of structure
and estimator.

Run from the root of the checkout: ``python -m benchmarks.l2x_step``.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from benchmarks.harness import Row, Time, matmul_rate, measure, report, settings, training_step
from benchmarks.stopwatch import Stopwatch

from structgrad.data import Batch
from structgrad.estimators import SST
from structgrad.structures import CorrelatedKSubset, KSubset
from structgrad.tasks.l2x import L2X, PlantedReviews
from structgrad.training.runtime import tune_allocator

BATCH, WORDS, SIZE, FILTERS, K, VOCABULARY = 100, 350, 200, 100, 10, 20_000
#: Largest share of structure and estimator in a step that we allow ourselves.
SHARE = 0.15


def flops(encoder: str) -> float:
    """Multiply-adds, twice, of the convolutions of a step: forward, and twice that backward."""
    networks = 2 if encoder == "complex" else 1
    return 3 * 2 * networks * BATCH * WORDS * 3 * FILTERS * (SIZE + FILTERS)


def times(task: L2X, batch: Batch) -> tuple[Time, Time]:
    """The times of a training step, and of structure and estimator in it."""
    assert task.estimator is not None
    optimizer, watch = torch.optim.Adam(task.parameters(), lr=1e-3), Stopwatch(task.estimator)
    step = training_step(optimizer, lambda: task.step(batch).loss)
    step()  # compiles the kernels
    watch.restart()
    return measure(step, repeats=5, warmup=1), watch.mean()


def main() -> None:
    """Simple and complex encoder, plain and correlated subsets."""
    tune_allocator()
    rows = []
    cases = [(e, s) for e in ("simple", "complex") for s in (KSubset(K), CorrelatedKSubset(K))]
    with tempfile.TemporaryDirectory() as cache:
        data = PlantedReviews(cache=cache, words=WORDS, train=BATCH, val=1, test=1, fillers=VOCABULARY - 37)
        data.prepare()
        for _ in settings():
            product = matmul_rate()
            for encoder, structure in cases:
                torch.manual_seed(0)
                task = L2X(
                    structure=structure,
                    estimator=SST(structure),
                    optimizer=partial(torch.optim.Adam, lr=1e-3),
                    data=data,
                    encoder=encoder,  # type: ignore[arg-type]
                    embedding_size=SIZE,
                    filters=FILTERS,
                    batch_size=BATCH,
                )
                task.configure_model()
                batch = next(iter(task.batches("train")))
                whole, own = times(task, batch)
                share = round(whole.rate(flops(encoder)) / product, 2)
                size = f"{BATCH} x {WORDS}, k={K}"
                rows += [
                    Row(f"step, {encoder} encoder, {structure.name}", size, whole, share=share),
                    Row("  of it structure and estimator (mean)", size, own, bound=SHARE * whole.processor),
                ]
    report("l2x_step", rows)


if __name__ == "__main__":
    main()
