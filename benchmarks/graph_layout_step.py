"""Training step of the graph layout task at the paper's size: T = 10, batch 128, 256 hidden units, on this machine.

Run from the root of the checkout, nothing else running: ``python -m benchmarks.graph_layout_step``.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from benchmarks.harness import Row, matmul_rate, measure, report, training_step

from structgrad.estimators import SST, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import KSubset, SpanningTree, Subset
from structgrad.structures.base import Structure
from structgrad.tasks.graph_layout import GraphLayout, GraphLayoutData
from structgrad.tasks.graph_layout.data import generate
from structgrad.training.runtime import tune_allocator

BATCH, STEPS, HIDDEN, VERTICES = 128, 10, 256, 10
#: Examples a second that we ask of ourselves on two cores, and what was measured of the authors' released code.
BOUND, PUBLISHED = 110, 42


def flops(dense: bool) -> float:
    """Arithmetic of the matrix products of one example, forward and backward (three products for one).

    Args:
        dense: both message networks on every edge; else each edge meets its own one.
    """
    edges, square = VERTICES * (VERTICES - 1), HIDDEN * HIDDEN
    messages = edges * square * (2 if dense else 1) + 8 * HIDDEN * VERTICES
    update = VERTICES * ((2 + HIDDEN) * HIDDEN + square + 2 * HIDDEN)
    decoder = (STEPS - 1) * (messages + update)
    vertices = VERTICES * (2 * STEPS * HIDDEN + square + 2 * square + 2 * square + 2 * square)
    encoder = vertices + edges * (square + 2 * square + HIDDEN)
    return 3 * 2.0 * (decoder + encoder)


def step(structure: Structure, estimator: Estimator, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of an optimiser step, estimator and logging values included."""
    torch.manual_seed(0)
    task = GraphLayout(
        structure=structure,
        estimator=estimator,
        optimizer=partial(torch.optim.Adam, lr=3e-4),
        data=GraphLayoutData("unused", steps=STEPS),
    )
    optimizer = task.configure_optimizers()

    return measure(training_step(optimizer, lambda: task.step(batch).loss), repeats=7, warmup=2)


def main() -> None:
    """Time the rows, and compare each with the rate of a plain matrix product in the same run."""
    tune_allocator()
    positions, trees = generate(GraphLayoutData("unused", train=BATCH, val=1, test=1, steps=STEPS))["train"]
    batch = {"positions": torch.from_numpy(positions), "adjacency": torch.from_numpy(trees)}
    tree, top, edges = SpanningTree(), KSubset(VERTICES - 1, "undirected"), Subset("directed")
    cases: list[tuple[str, Structure, Estimator, bool]] = [
        ("spanning tree, sst", tree, SST(tree, temperature=5.0, clip_range=15.0), True),
        ("top edges, sst", top, SST(top, temperature=5.0), True),
        ("independent edges, sst", edges, SST(edges, temperature=5.0, utility="logistic"), True),
        ("spanning tree, reinforce (U)", tree, Reinforce(tree, action="U", baseline="ema"), False),
    ]
    rows, rates, shares = [], {}, {}
    for name, structure, estimator, dense in cases:
        seconds = step(structure, estimator, batch)
        product = matmul_rate()
        rows.append(
            Row(
                what=name,
                size=f"T={STEPS} batch={BATCH}",
                ours=1e3 * seconds,
                opponent="released code (published figure)" if dense else "",
                bound=1e3 * BATCH / BOUND,
                published=1e3 * BATCH / PUBLISHED if dense else None,
            )
        )
        rates[name] = round(BATCH / seconds, 1)
        shares[name] = round(BATCH * flops(dense) / seconds / product, 2)
    report(
        "graph_layout_step",
        rows,
        examples_per_second=rates,
        gflop_per_example={"dense": round(flops(True) / 1e9, 3), "sparse": round(flops(False) / 1e9, 3)},
        share_of_matmul_rate=shares,
        load_average=round(os.getloadavg()[0], 2),
    )


if __name__ == "__main__":
    main()
