"""A training step of learning to explain at the paper's sizes: its time, and the share of structure and estimator.

Run from the root of the checkout, nothing else running: ``python -m benchmarks.l2x_step``.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from benchmarks.harness import Row, matmul_rate, measure, report
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


def times(task: L2X, batch: Batch) -> tuple[float, float]:
    """Seconds of a training step, and of structure and estimator in it."""
    assert task.estimator is not None
    optimizer, watch, steps = torch.optim.Adam(task.parameters(), lr=1e-3), Stopwatch(task.estimator), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        optimizer.zero_grad()
        task.step(batch).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()  # compiles the kernels
    watch.seconds, steps = 0.0, 0
    seconds = measure(step, repeats=5, warmup=1)
    return seconds, watch.seconds / steps


def main() -> None:
    """Simple and complex encoder, plain and correlated subsets."""
    tune_allocator()
    rows, shares, fractions = [], {}, {}
    with tempfile.TemporaryDirectory() as cache:
        data = PlantedReviews(cache=cache, words=WORDS, train=BATCH, val=1, test=1, fillers=VOCABULARY - 37)
        data.prepare()
        rate = matmul_rate()
        for encoder in ("simple", "complex"):
            for structure in (KSubset(K), CorrelatedKSubset(K)):
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
                seconds, own = times(task, batch)
                what = f"{encoder} encoder, {structure.name}"
                size = f"{BATCH} x {WORDS}, k={K}"
                rows.append(Row(f"step, {what}", size, 1e3 * seconds))
                rows.append(Row("  of it structure and estimator (mean)", size, 1e3 * own, bound=1e3 * SHARE * seconds))
                shares[what] = round(own / seconds, 3)
                fractions[what] = round(flops(encoder) / seconds / rate, 2)
    report(
        "l2x_step",
        rows,
        structure_share=shares,
        fraction_of_matmul_rate=fractions,
        matmul_gflop_per_second=round(rate / 1e9, 1),
    )


if __name__ == "__main__":
    main()
