"""Subset-like structures against entmax and lp-sparsemap: medians, float32.

python -m benchmarks.subsets
"""

from __future__ import annotations

from collections.abc import Callable

import entmax
import torch
from benchmarks.harness import Row, measure, report, settings
from torch import Tensor

from structgrad.structures import BudgetSubset, CorrelatedKSubset, KSubset, OneHot, Subset
from structgrad.structures.base import SparseDistribution


def through(fn: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], None]:
    """Forward and backward of ``fn`` on random scores."""
    scores = torch.randn(*shape, requires_grad=True)
    upstream = torch.randn_like(fn(scores).detach())

    def run() -> None:
        torch.autograd.grad(fn(scores), scores, upstream)

    return run


def through_sparse(fn: Callable[[Tensor], SparseDistribution], *shape: int) -> Callable[[], None]:
    """Forward and backward of the weights of a sparse distribution."""
    scores = torch.randn(*shape, requires_grad=True)
    upstream = torch.randn_like(fn(scores).weights.detach())

    def run() -> None:
        torch.autograd.grad(fn(scores).weights, scores, upstream)

    return run


def measured() -> list[Row]:
    """All lines."""
    torch.manual_seed(0)
    rows: list[Row] = []
    one_hot = OneHot()
    for batch, bound in ((64, 0.47), (4096, 17.0)):
        theirs = measure(through(lambda s: entmax.sparsemax(s, dim=-1), batch, 256))
        ours = measure(through(one_hot.project, batch, 256))
        rows.append(Row("sparsemax, fwd + bwd", f"{batch} x 256", ours, "entmax", theirs, bound))
    for d, bound, public in ((32, 2.0, 20.0), (128, 8.0, 165.0)):
        for method in ("nested", "systematic"):
            ours = measure(through_sparse(lambda s, m=method: Subset().sparsemap(s, method=m), 64, d))
            rows.append(
                Row(f"SparseMAP bit vectors, {method}, fwd + bwd", f"B 64, D {d}", ours, bound=bound, published=public)
            )
    for d, bound, public in ((32, 3.0, 23.0), (128, 12.0, 230.0)):
        structure = BudgetSubset(d // 2)
        for method in ("systematic", "sorted"):
            ours = measure(through_sparse(lambda s, m=method, x=structure: x.sparsemap(s, method=m), 64, d))
            rows.append(
                Row(
                    f"SparseMAP budget D/2, {method}, fwd + bwd",
                    f"B 64, D {d}",
                    ours,
                    bound=bound,
                    published=public,
                )
            )
    for d, bound, public in ((32, 1.0, 0.12), (128, 4.0, 0.46)):
        scores = torch.randn(64, d)
        ours = measure(lambda s=scores: Subset().top_k(s, 10))
        rows.append(Row("top-10 bit vectors", f"B 64, D {d}", ours, bound=bound, published=public))
        ours = measure(lambda s=scores, d=d: BudgetSubset(d // 2).top_k(s, 10))
        rows.append(Row("top-10 bit vectors, budget D/2", f"B 64, D {d}", ours))
    k_subset = KSubset(10)
    rows.append(
        Row(
            "k-subset marginals, fwd + bwd",
            "B 100, n 350, k 10",
            measure(through(k_subset.marginals, 100, 350)),
            bound=15.0,
            published=143.0,
        )
    )
    rows.append(
        Row(
            "k-subset marginals, fwd + bwd",
            "B 100, n 350, k 50",
            measure(through(KSubset(50).marginals, 100, 350)),
        )
    )
    correlated = CorrelatedKSubset(10)
    rows.append(
        Row(
            "correlated k-subset marginals, fwd + bwd",
            "B 100, n 350, k 10",
            measure(through(correlated.marginals, 100, 699)),
        )
    )
    for name in ("euclidean", "categorical", "binary", "softsub"):
        ours = measure(through(lambda s, r=name: k_subset.relax(r, s), 100, 350))
        rows.append(Row(f"k-subset {name}, fwd + bwd", "B 100, n 350, k 10", ours))
    rows.append(Row("k-subset l2x, fwd + bwd", "B 100, n 350, k 10", measure(through(k_subset.l2x, 10, 100, 350))))
    scores, noise = torch.randn(100, 350), torch.rand(100, 350)
    rows.append(Row("k-subset exact sample", "B 100, n 350, k 10", measure(lambda: k_subset.sample(scores))))
    trace = k_subset.trace(noise)
    rows.append(
        Row(
            "k-subset trace log-prob, fwd + bwd",
            "B 100, n 350, k 10",
            measure(through(lambda s: k_subset.trace_log_prob(trace, s), 100, 350)),
        )
    )
    rows.append(
        Row(
            "k-subset conditional, fwd + bwd",
            "B 100, n 350, k 10",
            measure(through(lambda s: k_subset.conditional(trace, s), 100, 350)),
        )
    )
    return rows


if __name__ == "__main__":
    report("subsets", [row for _ in settings() for row in measured()])
