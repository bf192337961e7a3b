"""Spanning trees and arborescences against torch-struct and networkx:
``python benchmarks/trees.py``.

``published`` is what the code released with the papers takes on a two-core machine (issue 3's
table); torch-struct, networkx and our own plain torch are run here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import networkx as nx
import torch
from benchmarks.harness import Row, measure, report, settings
from torch import Tensor

from structgrad.algorithms import matrix_tree
from structgrad.structures import Arborescence, SpanningTree
from structgrad.structures.base import Structure


def forward_backward(function: Callable[[Tensor], Tensor], scores: Tensor) -> Callable[[], object]:
    """A call that runs ``function`` and its vector-Jacobian product with a fixed vector."""
    upstream = torch.randn_like(function(scores))

    def call() -> object:
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, upstream)

    return call


def networkx_trees(scores: Tensor, directed: bool) -> Callable[[], object]:
    """networkx, one example after the other."""
    n = scores.shape[-1]

    def call() -> None:
        for s in scores.tolist():
            graph = nx.DiGraph() if directed else nx.Graph()
            pairs = ((i, j) for i in range(n) for j in range(n) if (i != j and j > 0 if directed else i < j))
            graph.add_weighted_edges_from((i, j, s[i][j]) for i, j in pairs)
            nx.maximum_spanning_arborescence(graph) if directed else nx.maximum_spanning_tree(graph)

    return call


def torch_struct_marginals(scores: Tensor) -> Tensor:
    """The marginals of torch-struct's projective-free dependency CRF, the same matrix-tree theorem by LU."""
    from torch_struct import NonProjectiveDependencyCRF

    marginals: Tensor = NonProjectiveDependencyCRF(scores, multiroot=True).marginals
    return marginals


def row(structure: Structure, oracle: str, batch: int, n: int, bound: float, published: float, *, loop: bool) -> Row:
    """Measure one line of the table; ``loop``: measure the opponent (a tenth of the batch for networkx)."""
    scores = torch.randn(batch, n, n)
    directed = isinstance(structure, Arborescence)
    size = f"B {batch}, n {n}"
    if oracle == "argmax":
        ours = measure(lambda: structure.argmax(scores))
        theirs = None
        if loop:
            some = min(batch, 20)
            theirs = measure(networkx_trees(scores[:some], directed), repeats=3, warmup=1) * batch / some
        return Row(f"{structure.name} argmax", size, ours, "networkx", theirs, bound, published)
    if oracle == "marginals":
        ours = measure(forward_backward(structure.marginals, scores))
        # torch-struct has no root among the tokens: n - 1 of them, the root's scores on the diagonal.
        theirs = measure(forward_backward(torch_struct_marginals, scores[:, 1:, 1:])) if directed else None
        return Row(f"{structure.name} marginals, fwd + bwd", size, ours, "torch-struct", theirs, bound, published)
    trace = structure.trace(torch.empty_like(scores).exponential_() * torch.exp(-scores))
    function = getattr(structure, oracle)
    ours = measure(forward_backward(lambda s: function(trace, s), scores))
    return Row(f"{structure.name} {oracle}, fwd + bwd", size, ours, bound=bound, published=published)


def far_scores(batch: int, n: int) -> list[Row]:
    """Marginals that need logarithms, beside those in plain torch: of normal scores with a standard
    deviation of 800, and of scores that are costs of negative exponentials at low rates.
    """
    structure, root = Arborescence(), torch.zeros(batch, dtype=torch.int64)
    rates = torch.nn.functional.softplus(-30 * torch.rand(batch, n, n))
    kinds = {"N(0, 800^2)": 800 * torch.randn(batch, n, n), "costs": -torch.empty(batch, n, n).exponential_() / rates}
    rows = []
    for kind, scores in kinds.items():
        plain = partial(matrix_tree.torch_marginals, exists=structure.parts(scores), root=root)
        ours, theirs = (
            measure(forward_backward(function, scores), repeats=7) for function in (structure.marginals, plain)
        )
        what = f"Arborescence marginals of {kind}, fwd + bwd"
        rows.append(Row(what, f"B {batch}, n {n}", ours, "ours in plain torch", theirs))
    return rows


def main() -> None:
    """Print the table, and record it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-opponents", dest="opponents", action="store_false", help="leave networkx out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines: list[tuple[Structure, str, int, int, float, float]] = [
        (SpanningTree(), "argmax", 128, 10, 0.7, 3.3),
        (SpanningTree(), "argmax", 100, 50, 7, 68),
        (SpanningTree(), "argmax", 10_000, 10, 30, 167),
        (SpanningTree(), "marginals", 128, 10, 1.0, 1.9),
        (SpanningTree(), "marginals", 100, 50, 9, 17.6),
        (SpanningTree(), "trace_log_prob", 128, 10, 1.5, 5.5),
        (SpanningTree(), "trace_log_prob", 100, 50, 20, 155),
        (Arborescence(), "argmax", 100, 50, 25, 335),
        (Arborescence(), "marginals", 100, 50, 6, 6.3),
        (Arborescence(), "trace_log_prob", 100, 50, 15, 112),
        (Arborescence(), "conditional", 100, 50, 25, 219),
    ]
    rows = []
    for _ in settings():
        rows += [*(row(*line, loop=arguments.opponents) for line in lines), *far_scores(100, 50)]
    report("trees", rows)


if __name__ == "__main__":
    main()
