"""A training step of ListOps with the paper's expressions: its time, its parts, and its speed relative
to a matrix product.

Run once as it is and once with glibc's default allocator:
``python benchmarks/listops_step.py --untuned``.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial

import torch
from benchmarks.harness import Row, matmul_rate, measure, report, settings, training_step
from benchmarks.stopwatch import Stopwatch

from structgrad.data import Batch
from structgrad.estimators import SST
from structgrad.structures import Arborescence
from structgrad.tasks.listops import ListOps, ListOpsData
from structgrad.training.runtime import tune_allocator

BATCH, HIDDEN, MESSAGE_STEPS = 100, 60, 5


def flops(batch: Batch) -> float:
    """Multiply-adds, twice, that the step's matrix products need: forward, and twice that backward."""
    lengths = (batch["tokens"] != 0).sum(1).double()
    tokens, pairs, d = float(lengths.sum()), float((lengths**2).sum()), HIDDEN
    lstm = 2 * tokens * (d * 4 * d)  # two of them: the recurrent product into four gates; inputs are few tokens
    scores = pairs * d
    # Second layer and sum for all pairs, but in the last step only for those whose receiver is a first token; first
    # layer.
    messages = ((MESSAGE_STEPS - 1) * pairs + tokens) * (d * d + d)
    nodes = MESSAGE_STEPS * tokens * 2 * d * d
    return 3 * 2 * (lstm + scores + messages + nodes)


def measured() -> list[Row]:
    """The lines of a batch."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as cache:
        data = ListOpsData(cache, 2000, 5, 5)
        data.prepare()
        estimator = SST(Arborescence())
        task = ListOps(
            structure=estimator.structure,
            estimator=estimator,
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            data=data,
            batch_size=BATCH,
            hidden=HIDDEN,
            message_steps=MESSAGE_STEPS,
        )
        batch = next(iter(task.batches("train")))
    optimizer, watch = task.configure_optimizers(), Stopwatch(estimator)
    step = training_step(optimizer, lambda: task.step(batch).loss)
    size, rows = f"{BATCH} x {batch['tokens'].shape[1]}, d={HIDDEN}", []
    for _ in settings(precisions=("highest", "medium")):
        step()  # compiles the kernels
        watch.restart()
        time = measure(step, repeats=9)
        share = round(time.rate(flops(batch)) / matmul_rate(), 3)
        rows += [
            Row("training step, arborescence, SST", size, time, share=share),
            Row("  of it structure and estimator (mean)", size, watch.mean(), bound=0.3 * time.processor),
        ]
    return rows


def main() -> None:
    """Measure a batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--untuned", action="store_true", help="leave glibc's allocator as it is")
    untuned = parser.parse_args().untuned
    if not untuned and not tune_allocator():
        print("the allocator cannot be tuned on this machine")
    rows = measured()
    name = "listops_step_untuned" if untuned else "listops_step"
    report(name, rows, allocator="glibc default" if untuned else "tuned")


if __name__ == "__main__":
    main()
