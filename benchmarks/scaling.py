"""The growth of cost with n = 10 ... 400 and batch 1 ... 4096, for the main oracles of every
structure.

    RECORD=1 python -m benchmarks.scaling    measure; without RECORD only print
    python scripts/scaling_figure.py         pictures and table of docs/scaling.md from what was recorded

Ours and the best available opponent are measured with one thread. A line ends where one call is
expected to take longer than ``--limit`` seconds, so the whole takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import entmax
import networkx as nx
import torch
from benchmarks.harness import measure, record
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from structgrad.structures import (
    Arborescence,
    BinaryTree,
    BudgetSubset,
    CorrelatedKSubset,
    KSubset,
    Matching,
    OneHot,
    Permutation,
    SpanningTree,
    Subset,
)

SIZES = (10, 20, 50, 100, 200, 400)
BATCHES = (1, 16, 128, 1024, 4096)
#: Where the other axis is held while one varies.
FIXED_SIZE, FIXED_BATCH = 10, 16

Call = Callable[[], Any]


@dataclass
class Point:
    """One measurement: median milliseconds of processor time of a call on ``batch`` examples of size ``n``."""

    line: str
    axis: str
    batch: int
    n: int
    ours: float | None
    theirs: float | None
    opponent: str


@dataclass
class Line:
    """An oracle: how to call ours, and the opponent's, on scores ``[batch, *shape(n)]``."""

    name: str
    shape: Callable[[int], tuple[int, ...]]
    ours: Callable[[Tensor], Call]
    theirs: Callable[[Tensor], Call] | None = None
    opponent: str = ""


def both_ways(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Call]:
    """Forward and backward with respect to the scores."""

    def prepare(scores: Tensor) -> Call:
        leaf = scores.clone().requires_grad_()

        def call() -> None:
            value = function(leaf)
            torch.autograd.grad(value, leaf, torch.ones_like(value))

        return call

    return prepare


def forward(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Call]:
    """The forward pass alone."""
    return lambda scores: lambda: function(scores)


def trace_log_prob(structure: Any) -> Callable[[Tensor], Call]:
    """Log-probability of a trace, forward and backward; the trace is made before."""

    def prepare(scores: Tensor) -> Call:
        trace = structure.trace(torch.rand_like(scores))
        return both_ways(lambda s: structure.trace_log_prob(trace, s))(scores)

    return prepare


def loop_scipy(scores: Tensor) -> Call:
    """Assignment, one example after another."""
    arrays = scores.numpy()
    return lambda: [linear_sum_assignment(a, maximize=True) for a in arrays]


def loop_networkx(scores: Tensor) -> Call:
    """Maximum spanning trees, one example after another."""
    n = scores.shape[-1]
    rows = scores.tolist()

    def call() -> None:
        for s in rows:
            graph = nx.Graph()
            graph.add_weighted_edges_from((i, j, s[i][j]) for i in range(n) for j in range(i + 1, n))
            nx.maximum_spanning_tree(graph)

    return call


def slogdet_marginals(scores: Tensor) -> Tensor:
    """What torch-struct and most public code do: the matrix-tree theorem by ``slogdet`` and autograd."""
    n = scores.shape[-1]
    weights = (scores.triu(1) + scores.triu(1).transpose(-1, -2)).exp() * (1 - torch.eye(n))
    laplacian = weights.sum(-1).diag_embed() - weights
    log_partition = torch.linalg.slogdet(laplacian[..., 1:, 1:]).logabsdet
    return torch.autograd.grad(log_partition.sum(), scores, create_graph=True)[0]


def square(n: int) -> tuple[int, ...]:
    """Scores of a graph on n nodes."""
    return (n, n)


def vector(n: int) -> tuple[int, ...]:
    """Scores of n items."""
    return (n,)


def lines() -> list[Line]:
    """Every structure's main oracles."""
    tree, arborescence, matching = SpanningTree(), Arborescence(), Matching()
    return [
        Line("SpanningTree argmax", square, forward(tree.argmax), loop_networkx, "networkx, loop"),
        Line("SpanningTree marginals f+b", square, both_ways(tree.marginals), both_ways(slogdet_marginals), "slogdet"),
        Line("SpanningTree trace log-prob f+b", square, trace_log_prob(tree)),
        Line("Arborescence argmax", square, forward(arborescence.argmax)),
        Line("Arborescence marginals f+b", square, both_ways(arborescence.marginals)),
        Line("Arborescence trace log-prob f+b", square, trace_log_prob(arborescence)),
        Line("Matching argmax", square, forward(matching.argmax), loop_scipy, "scipy, loop"),
        Line("Matching sinkhorn f+b", square, both_ways(matching.sinkhorn)),
        Line("Matching trace log-prob f+b", square, trace_log_prob(matching)),
        Line("Permutation trace log-prob f+b", vector, trace_log_prob(Permutation())),
        Line("BinaryTree trace", vector, lambda s: (lambda e: lambda: BinaryTree().trace(e))(s.exp())),
        Line("BinaryTree trace log-prob f+b", vector, trace_log_prob(BinaryTree())),
        Line("KSubset(5) marginals f+b", vector, both_ways(KSubset(5).marginals)),
        Line("CorrelatedKSubset(5) marginals f+b", lambda n: (2 * n - 1,), both_ways(CorrelatedKSubset(5).marginals)),
        Line("BudgetSubset(5) project f+b", vector, both_ways(BudgetSubset(5).project)),
        Line("Subset sparsemap f+b", vector, both_ways(lambda s: Subset().sparsemap(s).weights)),
        Line("OneHot project f+b", vector, both_ways(OneHot().project), both_ways(entmax.sparsemax), "entmax"),
    ]


def sweep(line: Line, axis: str, limit: float) -> list[Point]:
    """Grow one axis until a call would take longer than ``limit`` seconds."""
    found: list[Point] = []
    last: dict[str, float | None] = {"ours": 0.0, "theirs": 0.0 if line.theirs else None}
    for value in SIZES if axis == "n" else BATCHES:
        n, batch = (value, FIXED_BATCH) if axis == "n" else (FIXED_SIZE, value)
        scores = torch.randn(batch, *line.shape(n))
        times: dict[str, float | None] = {}
        for who, prepare in (("ours", line.ours), ("theirs", line.theirs)):
            before = last[who]
            if prepare is None or before is None or before > limit:
                times[who] = last[who] = None
                continue
            times[who] = milliseconds = measure(prepare(scores), repeats=3, warmup=1).processor
            # n doubles and cost is up to cubic in it, or the batch grows eightfold: expect eight times this.
            last[who] = 8e-3 * milliseconds
        if times["ours"] is not None or times["theirs"] is not None:
            found.append(Point(line.name, axis, batch, n, times["ours"], times["theirs"], line.opponent))
    return found


def main() -> None:
    """Measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1.0, help="no call longer than this many seconds")
    parser.add_argument("--only", default="", help="lines whose name contains this; such a part is never recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = []
    for line in lines():
        if options.only in line.name:
            points += sweep(line, "n", options.limit) + sweep(line, "batch", options.limit)
            print(line.name, [round(p.ours, 2) for p in points if p.line == line.name and p.ours], flush=True)
    if not options.only:
        record("scaling", points=[asdict(p) for p in points])


if __name__ == "__main__":
    main()
