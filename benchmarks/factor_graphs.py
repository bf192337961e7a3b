"""Factor graphs against a loop over a solver: ``python -m benchmarks.factor_graphs``.

Of projections the opponents are SLSQP of scipy and, where it is installed, OSQP, set up for every example, and set up
once with new scores only. Of best vertices it is HiGHS in scipy. All solve the same programmes, of batch 64, one
example after the other, and results are compared.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from benchmarks.harness import Row, measure, report, settings
from scipy import optimize, sparse

from structgrad.algorithms.local_polytope import Counts
from structgrad.structures import FactorGraph

BATCH = 64
#: That of ours, which the solvers are asked for.
ACCURACY = 1e-9

GRAPHS: dict[str, FactorGraph] = {
    "Ising grid 4x4": FactorGraph.ising_grid(4, 4, listed=0),
    "matching 5x5, at most one": FactorGraph.partial_matching(5, 5, listed=0),
    "3 windows of 4 in 30": FactorGraph.windows(30, 4, 3, listed=0),
}


def constraints(graph: FactorGraph) -> tuple[sparse.csc_matrix, np.ndarray, np.ndarray]:
    """``low <= A x <= high``: the local polytope, without the bounds of parts."""
    rows, low, high = [], [], []
    for group in (group for factor in graph.factors for group in factor.groups()):
        for f, parts in enumerate(group.parts.tolist()):
            if isinstance(group, Counts):
                row = np.zeros(graph.size)
                row[[part for part in parts if part >= 0]] = 1.0
                rows.append(row)
                low.append(float(group.low))
                high.append(float(group.high))
                continue
            assert f < len(group.parts)
            for sign, bound in (((-1, 0, 1), 0.0), ((0, -1, 1), 0.0), ((1, 1, -1), 1.0)):
                row = np.zeros(graph.size)
                row[parts] = sign
                rows.append(row)
                low.append(-np.inf)
                high.append(bound)
    return sparse.csc_matrix(np.stack(rows)), np.array(low), np.array(high)


Loop = Callable[[], list[np.ndarray]]


def quadratic_loops(graph: FactorGraph, scores: np.ndarray) -> dict[str, Loop]:
    """Projections, by whatever solver is there."""
    rows, low, high = constraints(graph)
    size = graph.size
    loops = {"scipy SLSQP, loop": scipy_loop(graph, scores)}
    if importlib.util.find_spec("osqp"):
        osqp: Any = importlib.import_module("osqp")
        both = sparse.vstack([rows, sparse.identity(size)], format="csc")
        bounds = {"l": np.concatenate([low, np.zeros(size)]), "u": np.concatenate([high, np.ones(size)])}
        options = {"verbose": False, "eps_abs": ACCURACY, "eps_rel": ACCURACY, "max_iter": 100_000}

        def ready(s: np.ndarray) -> Any:
            solver = osqp.OSQP()
            solver.setup(sparse.identity(size, format="csc"), -s, both, **bounds, **options)
            return solver

        kept = ready(scores[0])

        def once() -> list[np.ndarray]:
            points = []
            for s in scores:
                kept.update(q=-s)
                points.append(kept.solve().x)
            return points

        loops["OSQP, loop"] = lambda: [ready(s).solve().x for s in scores]
        loops["OSQP, loop, set up once"] = once
    return loops


def scipy_loop(graph: FactorGraph, scores: np.ndarray) -> Loop:
    """Projections, by scipy's sequential quadratic programming."""
    rows, low, high = constraints(graph)
    constraint = optimize.LinearConstraint(rows.toarray(), low, high)
    minimize: Any = optimize.minimize
    return lambda: [
        minimize(
            lambda x, s=s: 0.5 * x @ x - s @ x,
            np.full(graph.size, 0.5),
            jac=lambda x, s=s: x - s,
            bounds=[(0, 1)] * graph.size,
            constraints=constraint,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        ).x
        for s in scores
    ]


def linear_loop(graph: FactorGraph, scores: np.ndarray) -> Loop:
    """Best vertices, by scipy's branch and bound (HiGHS)."""
    constraint = optimize.LinearConstraint(*constraints(graph))
    ones, milp = np.ones(graph.size), cast(Any, optimize.milp)
    return lambda: [milp(-s, constraints=constraint, integrality=ones, bounds=optimize.Bounds(0, 1)).x for s in scores]


def rows() -> list[Row]:
    """All of them; results are compared first."""
    found = []
    for name, graph in GRAPHS.items():
        torch.manual_seed(0)
        scores = torch.randn(BATCH, graph.size, dtype=torch.float64)
        size = f"B {BATCH}, {graph.size} parts"
        ours = measure(lambda g=graph, s=scores: g.project(s), repeats=9)  # type: ignore[misc]
        for opponent, loop in quadratic_loops(graph, scores.numpy()).items():
            apart = float((torch.from_numpy(np.stack(loop())) - graph.project(scores)).abs().max())
            assert apart < 1e-5, f"{name}: {opponent} is {apart} away"
            found.append(Row(f"project, {name}", size, ours, opponent, measure(loop, repeats=3, warmup=0)))

        def both_ways(g: FactorGraph = graph, s: torch.Tensor = scores) -> None:
            leaf = s.detach().requires_grad_()
            g.project(leaf).sum().backward()  # type: ignore[no-untyped-call]

        found.append(Row(f"project, fwd + bwd, {name}", size, measure(both_ways, repeats=9)))
        best = graph.best_vertex(scores)
        vertices = torch.from_numpy(np.stack(linear_loop(graph, scores.numpy())()))
        value = (vertices * scores).sum(-1)
        assert bool((best.value - value >= -1e-6).all()), f"{name}: scipy has a better vertex"
        ours = measure(lambda g=graph, s=scores: g.argmax(s), repeats=9)  # type: ignore[misc]
        theirs = measure(linear_loop(graph, scores.numpy()), repeats=3, warmup=0)
        found.append(Row(f"argmax, {name}", size, ours, "scipy milp (HiGHS), loop", theirs))
    return found


if __name__ == "__main__":
    report("factor_graphs", [row for _ in settings(threads=(1,)) for row in rows()])
