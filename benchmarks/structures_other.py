"""Binary trees, matchings, orderings and active-set SparseMAP:
``python -m benchmarks.structures_other``.

Medians, float32. ``published`` is what the code released with the papers takes on a two-core
machine (issue 3's table).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from benchmarks.harness import Row, measure, report, settings
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from structgrad.structures import Arborescence, BinaryTree, Matching, Permutation, SpanningTree, Structure, Subset
from structgrad.structures.derived import project, sparsemap


def both_ways(function: Callable[[Tensor], Tensor], scores: Tensor) -> Callable[[], object]:
    """Forward and backward of ``function`` with a fixed upstream gradient."""
    upstream = torch.randn_like(function(scores))

    def call() -> object:
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, upstream)

    return call


def item_rows(structure: Structure, batch: int, n: int, bound: float | None, published: float | None) -> list[Row]:
    """Trace, and trace log-probability and conditional forward and backward, of orderings and binary trees."""
    scores = torch.randn(batch, n)
    trace = structure.trace(torch.rand(batch, n))
    size, name = f"B {batch}, n {n}", structure.name
    exponentials = torch.rand(batch, n)
    log_prob = both_ways(lambda s: structure.trace_log_prob(trace, s), scores)
    conditional = both_ways(lambda s: structure.conditional(trace, s), scores)
    return [
        Row(f"{name} trace", size, measure(lambda: structure.trace(exponentials)), bound=bound, published=published),
        Row(f"{name} trace log-prob, fwd + bwd", size, measure(log_prob)),
        Row(f"{name} conditional, fwd + bwd", size, measure(conditional)),
    ]


def assignment_row(batch: int, n: int) -> Row:
    """The exact argmax against a loop over scipy, of other scores in each call.

    A processor learns the branches of scores that it sees again and again, which no model does.
    """
    matching = Matching()
    several = [torch.randn(batch, n, n) for _ in range(50)]
    tensors, arrays = itertools.cycle(several), itertools.cycle([scores.numpy() for scores in several])
    theirs = measure(lambda: [linear_sum_assignment(a, maximize=True) for a in next(arrays)], repeats=40)
    ours = measure(lambda: matching.argmax(next(tensors)), repeats=40)
    bound = theirs.processor / 3
    opponent = "scipy.linear_sum_assignment, loop"
    return Row("Matching argmax", f"B {batch}, n {n}", ours, opponent, theirs, bound)


def matching_rows(batch: int, n: int) -> list[Row]:
    """Sinkhorn and the greedy trace."""
    scores = torch.randn(batch, n, n)
    matching, size = Matching(), f"B {batch}, n {n}"
    return [
        Row("Matching trace", size, measure(lambda: matching.trace(scores.exp()))),
        Row("Matching sinkhorn, fwd + bwd", size, measure(both_ways(matching.sinkhorn, scores), repeats=5)),
    ]


def sparse_rows(structure: Structure, batch: int, *shape: int) -> list[Row]:
    """The active-set projection and its distribution, against the closed form where the structure has one."""
    scores = torch.randn(batch, *shape)
    size = f"B {batch}, {'x'.join(map(str, shape))}"
    closed = structure.name if "sparsemap" in vars(type(structure)) else ""

    def mean(s: Tensor) -> Tensor:
        return project(structure, s)

    ours = measure(both_ways(mean, scores), repeats=5, warmup=1)
    theirs = measure(both_ways(structure.project, scores)) if closed else None
    rows = [Row(f"active set: project {structure.name}, f+b", size, ours, closed and "its closed form", theirs)]
    ours = measure(lambda: sparsemap(structure, scores), repeats=5, warmup=1)
    theirs = measure(lambda: structure.sparsemap(scores)) if closed else None
    return [*rows, Row(f"active set: sparsemap {structure.name}", size, ours, closed and "its closed form", theirs)]


def oracle_row(structure: Structure, batch: int, *shape: int) -> Row:
    """The active-set projection against the argmaxes that it asks for, one after the other."""
    scores = 0.3 * torch.randn(batch, *shape)
    asked: list[Tensor] = []

    class Recorded(type(structure)):  # type: ignore[misc]
        def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
            asked.append(utility)
            return super().argmax(utility, mask)

    project(Recorded(), scores)
    ours = measure(lambda: project(structure, scores), repeats=3, warmup=1)
    theirs = measure(lambda: [structure.argmax(utility) for utility in asked], repeats=3, warmup=1)
    size = f"B {batch}, {'x'.join(map(str, shape))}"
    return Row(f"active set: project {structure.name}, fwd", size, ours, f"its {len(asked)} argmaxes", theirs)


def support(structure: Structure, batch: int, *shape: int) -> dict[str, float]:
    """Vertices an example: of the active set, and of the structure's own distribution."""
    scores = torch.randn(batch, *shape)
    return {
        "active set": len(sparsemap(structure, scores).rows) / batch,
        "own": len(structure.sparsemap(scores).rows) / batch,
    }


def rows() -> list[Row]:
    """All of them."""
    return [
        *item_rows(BinaryTree(), 128, 20, 2.0, 55.0),
        *item_rows(Permutation(), 128, 20, None, None),
        assignment_row(128, 10),
        assignment_row(100, 50),
        *matching_rows(128, 10),
        *sparse_rows(Subset(), 64, 32),
        *sparse_rows(Matching(), 32, 6, 6),
        *sparse_rows(SpanningTree(), 32, 8, 8),
        *sparse_rows(Arborescence(), 32, 8, 8),
        oracle_row(Matching(), 2, 48, 48),
    ]


if __name__ == "__main__":
    found = [row for _ in settings() for row in rows()]
    report("structures_other", found, support={"Subset D 32": support(Subset(), 64, 32)})
