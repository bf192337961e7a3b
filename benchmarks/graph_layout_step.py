"""Training step of the graph layout task at the paper's size: T = 10, batch 128, 256 hidden units,
on this machine.

Products are in float32, and in torch's precision ``medium``. Run from the root of the checkout:
``python -m benchmarks.graph_layout_step``.
"""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.harness import Row, Time, matmul_rate, measure, report, settings, training_step

from structgrad.estimators import SST, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import KSubset, SpanningTree, Subset
from structgrad.structures.base import Structure
from structgrad.tasks.graph_layout import GraphLayout, GraphLayoutData
from structgrad.tasks.graph_layout.data import generate
from structgrad.training.runtime import tune_allocator

BATCH, STEPS, HIDDEN, VERTICES = 128, 10, 256, 10
#: Milliseconds a step that we ask of ourselves on a core, and what was measured of the authors' released code.
BOUND, PUBLISHED = {"highest": 850, "medium": 350}, 1e3 * BATCH / 42


def flops(dense: bool) -> float:
    """Arithmetic of the matrix products of one example, forward and backward (three products for
    one).

    Args:
        dense: both message networks are applied to every edge; otherwise each edge uses its own
            one.
    """
    edges, square = VERTICES * (VERTICES - 1), HIDDEN * HIDDEN
    messages = edges * square * (2 if dense else 1) + 8 * HIDDEN * VERTICES
    update = VERTICES * ((2 + HIDDEN) * HIDDEN + square + 2 * HIDDEN)
    decoder = (STEPS - 1) * (messages + update)
    vertices = VERTICES * (2 * STEPS * HIDDEN + square + 2 * square + 2 * square + 2 * square)
    encoder = vertices + edges * (square + 2 * square + HIDDEN)
    return 3 * 2.0 * (decoder + encoder)


def step(structure: Structure, estimator: Estimator, batch: dict[str, torch.Tensor]) -> Time:
    """The time of an optimiser step, including the estimator and logged values."""
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
    rows = []
    for _ in settings(precisions=tuple(BOUND)):
        product = matmul_rate()
        for name, structure, estimator, dense in cases:
            time = step(structure, estimator, batch)
            rows.append(
                Row(
                    what=name,
                    size=f"T={STEPS} batch={BATCH}",
                    ours=time,
                    opponent="released code (published figure)" if dense else "",
                    bound=BOUND[torch.get_float32_matmul_precision()],
                    published=PUBLISHED if dense else None,
                    share=round(time.rate(BATCH * flops(dense)) / product, 2),
                )
            )
    report(
        "graph_layout_step",
        rows,
        gflop_per_example={"dense": round(flops(True) / 1e9, 3), "sparse": round(flops(False) / 1e9, 3)},
    )


if __name__ == "__main__":
    main()
