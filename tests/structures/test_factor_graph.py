"""Factor graphs: the contract where the local polytope is tight, solvers of scipy where it is not."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import linalg, optimize
from torch import Tensor

from structgrad.algorithms import eager, local_polytope
from structgrad.algorithms.eager import StoppedEarly
from structgrad.structures import (
    Arborescence,
    AtMostOne,
    Budget,
    BudgetSubset,
    FactorGraph,
    Implication,
    KSubset,
    LabelPair,
    LinearChain,
    Matching,
    OneHot,
    Or,
    Ordered,
    Pair,
    Permutation,
    SpanningTree,
    Structure,
    StructureFactor,
    UnsupportedError,
    Xor,
)
from structgrad.structures.factor_graph import Factor
from structgrad.testing import Case, StructureContract, computing

CHAIN: list[Factor] = [Pair([[0, 1, 3], [1, 2, 4]])]
LOGIC: list[Factor] = [Xor([[0, 1, 2]]), Implication([[0, 3]]), Budget([[3, 4, 5]], 1)]
LABELS: list[Factor] = [Xor([[0, 1], [2, 3]]), LabelPair([0, 1], [2, 3], [[4, 5], [6, 7]])]
MIXED: list[Factor] = [StructureFactor(OneHot(), [0, 1, 2]), StructureFactor(BudgetSubset(1), [2, 3]), Ordered([3, 4])]


def without(size: int, *missing: int) -> Tensor:
    """A mask of so many parts."""
    return ~torch.isin(torch.arange(size), torch.tensor(missing))


LISTED = [
    Case(FactorGraph(5, CHAIN), (5,), [without(5, 2, 4), without(5, 4)]),
    Case(FactorGraph(6, LOGIC), (6,), [without(6, 1), without(6, 3)]),
    Case(FactorGraph(8, LABELS), (8,), [without(8, 2, 3, 4, 5, 6, 7)]),
    Case(FactorGraph(5, MIXED), (5,), [without(5, 3, 4), without(5, 1)]),
]
SOLVED = [
    Case(FactorGraph(5, CHAIN, listed=0), (5,), LISTED[0].masks),
    Case(FactorGraph(6, LOGIC, listed=0), (6,), LISTED[1].masks),
    Case(FactorGraph(8, LABELS, listed=0), (8,), LISTED[2].masks),
    Case(FactorGraph(5, MIXED, listed=0), (5,), LISTED[3].masks),
]


class TestListed(StructureContract):
    """Graphs without loops: the local polytope is the convex hull."""

    cases = LISTED

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        graph = case.plain
        assert isinstance(graph, FactorGraph)
        listed = FactorGraph(graph.size, graph.factors)
        every, real = listed.restrict(torch.zeros(1, *case.shape).double(), torch.zeros(case.shape), mask)
        return every[real]


class TestSolved(TestListed):
    """The same by dual decomposition."""

    cases = SOLVED


# --- single factors are the structures that exist already -------------------------------------------------------------

SINGLE: dict[str, tuple[Any, Any, int]] = {
    "xor": (Xor(range(6)), OneHot(), 6),
    "at most one": (AtMostOne(range(6)), BudgetSubset(1), 6),
    "budget": (Budget(range(6), 3), BudgetSubset(3), 6),
    "exactly": (Budget(range(6), 3, exactly=True), KSubset(3), 6),
    "chain": (StructureFactor(LinearChain(2), torch.arange(12).reshape(3, 2, 2)), LinearChain(2), 12),
    "tree": (StructureFactor(Arborescence(), torch.arange(9).reshape(3, 3)), Arborescence(), 9),
    "undirected": (StructureFactor(SpanningTree(), torch.arange(9).reshape(3, 3)), SpanningTree(), 9),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_factor_is_that_structure(name: str) -> None:
    factor, structure, size = SINGLE[name]
    shape = structure.shape({12: 4, 9: 3}.get(size, size))
    graph = FactorGraph(size, [factor], listed=0)
    torch.manual_seed(0)
    scores = torch.randn(4, *shape, dtype=torch.float64)
    flat = scores.flatten(1)
    parts = structure.parts(scores).flatten(1)
    mask = None if bool(parts.all()) else parts
    counted = torch.where(parts, structure.project(scores).flatten(1), 0.0)
    torch.testing.assert_close(graph.project(flat, mask), counted, rtol=1e-8, atol=1e-8)
    assert torch.equal(graph.argmax(flat, mask), torch.where(parts, structure.argmax(scores).flatten(1), 0.0))
    upstream = torch.randn_like(flat)

    def gradient(function: Any, s: Tensor) -> Tensor:
        leaf = s.detach().requires_grad_()
        return torch.autograd.grad((function(leaf).flatten(1) * upstream * parts).sum(), leaf)[0].flatten(1)

    ours, theirs = gradient(lambda s: graph.project(s, mask), flat), gradient(structure.project, scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


# --- against solvers, where the local polytope is not tight ----------------------------------------------------------

LOOPS: dict[str, FactorGraph] = {
    "ising": FactorGraph.ising_grid(2, 3, listed=0),
    "matching": FactorGraph.partial_matching(3, 3, listed=0),
    "windows": FactorGraph.windows(8, 3, 2, listed=0),
    "logic": FactorGraph(
        6,
        [Xor([[0, 1, 2], [2, 3, 4]]), Or([[1, 3, 5]], negated=[[True, False, False]]), Implication([[0, 3, 5]])],
        listed=0,
    ),
    "labels": FactorGraph(
        18,
        [
            Xor([[0, 1], [2, 3], [4, 5]]),
            LabelPair([[0, 1], [2, 3], [0, 1]], [[2, 3], [4, 5], [4, 5]], 6 + torch.arange(12).reshape(3, 2, 2)),
        ],
        listed=0,
    ),
}


def constraints(graph: FactorGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``A x <= b`` and ``C x = d``: the local polytope, written down by hand."""
    upper: list[tuple[np.ndarray, float]] = []
    equal: list[tuple[np.ndarray, float]] = []
    for factor in graph.factors:
        for group in factor.groups():
            for f, parts in enumerate(group.parts.tolist()):
                if isinstance(group, local_polytope.Pairs):
                    for sign, offset in zip(
                        ((0, 0, -1), (-1, 0, 1), (0, -1, 1), (1, 1, -1)), (0, 0, 0, 1), strict=True
                    ):
                        upper.append((np.zeros(graph.size), offset))
                        upper[-1][0][parts] = sign
                    continue
                assert isinstance(group, local_polytope.Counts)
                row, shift = np.zeros(graph.size), 0
                for part, negated in zip(parts, group.negated[f].tolist(), strict=True):
                    if part >= 0:
                        row[part] = -1 if negated else 1
                        shift += negated
                if group.low == group.high:
                    equal.append((row, group.low - shift))
                else:
                    upper += [(row, group.high - shift), (-row, shift - group.low)]
    zero = (np.zeros(graph.size), 0.0)
    (a, b), (c, d) = (zip(*(rows or [zero]), strict=True) for rows in (upper, equal))
    c, d = np.stack(c), np.array(d)
    # SLSQP needs equations that do not follow from others.
    _, triangle, order = linalg.qr(c.T, pivoting=True)
    rank = int((np.abs(np.diag(triangle)) > 1e-9).sum())
    independent = order[: max(rank, 1)]
    return np.stack(a), np.array(b), c[independent], d[independent]


def quadratic_programme(graph: FactorGraph, scores: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """By scipy."""
    a, b, c, d = constraints(graph)
    start = optimize.linprog(np.zeros(graph.size), A_ub=a, b_ub=b, A_eq=c, b_eq=d, bounds=[(0, 1)] * graph.size).x
    minimize: Any = optimize.minimize  # its types know no constraints without bounds
    found = minimize(
        lambda x: 0.5 * weight @ x**2 - scores @ x,
        start,
        jac=lambda x: weight * x - scores,
        bounds=[(0, 1)] * graph.size,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
        constraints=[
            {"type": "ineq", "fun": lambda x: b - a @ x, "jac": lambda x: -a},
            {"type": "eq", "fun": lambda x: c @ x - d, "jac": lambda x: c},
        ][: 1 + bool(c.any())],
    )
    return np.asarray(found.x)


@pytest.mark.parametrize("name", LOOPS)
def test_projections_of_loopy_graphs(name: str) -> None:
    """Both relaxations against scipy, on both paths; lp where its solution is unique."""
    graph = LOOPS[name]
    torch.manual_seed(1)
    scores = torch.randn(3, graph.size, dtype=torch.float64)
    for relaxation, weight in (("euclidean", np.ones(graph.size)), ("lp", graph.variable.numpy())):
        found = graph.relax(relaxation, scores)
        with computing("plain"):
            torch.testing.assert_close(graph.relax(relaxation, scores), found, rtol=1e-7, atol=1e-7)
        for example, s in zip(found, scores.numpy(), strict=True):
            expected = quadratic_programme(graph, s, weight)
            torch.testing.assert_close(example, torch.from_numpy(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LOOPS)
def test_argmax_of_loopy_graphs(name: str) -> None:
    """Branch and bound against all vertices, with its certificate, on both paths; ties do not matter to the value."""
    graph = LOOPS[name]
    vertices = graph.enumerate(graph.size)
    torch.manual_seed(2)
    scores = torch.cat([torch.randn(12, graph.size), torch.randn(4, graph.size).round()]).double()
    best = graph.best_vertex(scores)
    assert best.proved.all()
    torch.testing.assert_close(best.value, (scores @ vertices.T).amax(-1))
    torch.testing.assert_close(best.bound, best.value)
    assert (best.vertex[:, None] == vertices).all(-1).any(-1).all()
    with computing("plain"):
        plain = graph.best_vertex(scores)
    torch.testing.assert_close(plain.value, best.value)
    assert torch.equal(plain.vertex[:12], best.vertex[:12])


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("relaxation", ["euclidean", "lp"])
def test_gradients_of_loopy_graphs(name: str, relaxation: str) -> None:
    graph = LOOPS[name]
    torch.manual_seed(3)
    scores = torch.randn(2, graph.size, dtype=torch.float64, requires_grad=True)

    def relaxed(s: Tensor) -> Tensor:
        return graph.relax(relaxation, s)

    assert torch.autograd.gradcheck(relaxed, scores, atol=1e-5, rtol=1e-4, fast_mode=True)
    with computing("plain"):
        plain = torch.autograd.grad(relaxed(scores).square().sum(), scores)[0]
    torch.testing.assert_close(
        torch.autograd.grad(relaxed(scores).square().sum(), scores)[0], plain, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", LOOPS)
def test_the_jacobian_is_a_projection(name: str) -> None:
    """Of what moves along the faces already, only rounding is across them, and conjugate gradients leave it alone."""
    graph = LOOPS[name]
    torch.manual_seed(3)
    scores = torch.randn(2, graph.size, dtype=torch.float64, requires_grad=True)
    for path in ("native", "plain"):
        with computing(path):
            point = graph.project(scores)
            (once,) = torch.autograd.grad(point, scores, point.detach(), retain_graph=True)
            (twice,) = torch.autograd.grad(point, scores, once)
        torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-9)


def test_a_structure_with_budgets() -> None:
    """A tree whose nodes have at most one child: paths from the root; both are enumerated."""
    n = 4
    edges = torch.arange(n * n).reshape(n, n)
    tree, exists = Arborescence(), Arborescence().parts(torch.zeros(n, n)).flatten()
    graph = FactorGraph(n * n, [StructureFactor(tree, edges), AtMostOne(edges)], listed=0)
    every = tree.enumerate(n, n)
    paths = every[(every.sum(-1) <= 1).all(-1)].flatten(1)
    torch.manual_seed(0)
    scores = torch.randn(3, n * n, dtype=torch.float64)
    best = graph.best_vertex(scores, exists)
    assert best.proved.all()
    torch.testing.assert_close(best.value, (scores @ paths.T).amax(-1))
    point = graph.project(scores, exists)
    # A point of both polytopes, from which no vertex of either lies beyond what the other gives back.
    shown = point.reshape(-1, n, n)
    assert (shown.sum(-1) <= 1 + 1e-8).all()
    torch.testing.assert_close(tree.project(shown), shown, rtol=0, atol=1e-8)
    leaf = scores[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: graph.project(s, exists), leaf, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_two_taggers_agree() -> None:
    """The best labels of the agreement are those of one chain with both scores."""
    n, c = 4, 2
    graph = FactorGraph.agreement(n, c, listed=0)
    torch.manual_seed(0)
    scores = torch.randn(3, graph.size, dtype=torch.float64)
    label, one, two = scores.split([n * c, (n - 1) * c * c, (n - 1) * c * c], -1)
    chain = LinearChain(c)
    both = chain.transitions(label.reshape(3, n, c), (one + two).reshape(3, n - 1, c, c))
    best = chain.argmax(both)
    found = graph.best_vertex(scores)
    assert found.proved.all()
    torch.testing.assert_close(found.value, chain.inner(best, both))
    torch.testing.assert_close(
        found.vertex[:, n * c :].reshape(3, 2, n - 1, c, c), best[:, None].expand(-1, 2, -1, -1, -1)
    )
    # The taggers agree on every label: the local polytope is tight, hence so is the solution of the relaxation.
    cold = graph.lp_sparsemap(scores / 1e-4)
    torch.testing.assert_close(cold, found.vertex, rtol=0, atol=1e-6)


# --- presets and factors ---------------------------------------------------------------------------------------------


def test_windows_do_not_overlap() -> None:
    graph = FactorGraph.windows(9, 3, 2)
    expected = {(i, j) for i, j in itertools.combinations(range(7), 2) if j - i >= 3}
    found = {tuple(vertex.nonzero()[:, 0].tolist()) for vertex in graph.enumerate(7)}
    assert found == expected
    with pytest.raises(ValueError, match="3 windows of length 4 do not fit into 9 positions"):
        FactorGraph.windows(9, 4, 3)


@pytest.mark.parametrize(
    ("factor", "allowed"),
    [
        (Xor([0, 1, 2], negated=[True, False, False]), lambda a, b, c: (not a) + b + c == 1),
        (AtMostOne([0, 1, 2]), lambda a, b, c: a + b + c <= 1),
        (Or([0, 1, 2]), lambda a, b, c: a + b + c >= 1),
        (Budget([0, 1, 2], 2), lambda a, b, c: a + b + c <= 2),
        (Budget([0, 1, 2], 2, exactly=True), lambda a, b, c: a + b + c == 2),
        (Implication([0, 1, 2]), lambda a, b, c: not (a and b) or c),
        (Ordered([0, 1]), lambda a, b, c: not b or a),
        (Pair([0, 1, 2]), lambda a, b, c: c == (a and b)),
    ],
)
def test_what_factors_allow(factor: Any, allowed: Any) -> None:
    expected = [bits for bits in itertools.product([1, 0], repeat=3) if allowed(*map(bool, bits))]
    assert [tuple(map(int, vertex)) for vertex in FactorGraph(3, [factor]).enumerate(3)] == expected


def test_masks_of_factors() -> None:
    """What is missing is 0; a factor without parts that exist is absent, a pair without its own part too."""
    graph = FactorGraph(5, [Xor([[0, 1]]), Pair([[2, 3, 4]])])
    scores = torch.tensor([-1.0, -2.0, 3.0, 4.0, -100.0])
    masks = {(): [1, 0, 0, 1, 0], (0,): [0, 1, 0, 1, 0], (0, 1): [0, 0, 0, 1, 0], (4,): [1, 0, 1, 1, 0]}
    for missing, vertex in masks.items():
        mask = without(5, *missing)
        for listed in (0, 100):
            other = FactorGraph(5, graph.factors, listed=listed)
            assert other.argmax(scores, mask).tolist() == vertex
            assert other.project(50 * scores, mask).round(decimals=5).tolist() == vertex


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="parts are numbers from 0 to 2"):
        FactorGraph(3, [Xor([0, 3])])
    with pytest.raises(ValueError, match="parts are numbers from 0 to 2"):
        FactorGraph(3, [], additional=[3])
    for parts in ([0, 1.5], torch.tensor([0.0, 1.0]), [False, True]):
        with pytest.raises(TypeError, match="parts of factors are whole numbers; got"):
            Xor(parts)
    with pytest.raises(ValueError, match=r"a factor has a part twice: \[0, 1, 0\]"):
        FactorGraph(3, [Xor([0, 1, 0])])
    with pytest.raises(ValueError, match="a pair has three parts"):
        Pair([0, 1])
    with pytest.raises(ValueError, match="ordered parts are pairs"):
        Ordered([0, 1, 2])
    with pytest.raises(ValueError, match="k must be at least 0"):
        Budget([0], -1)
    with pytest.raises(ValueError, match=r"have shape \[1, 2, 2\]"):
        LabelPair([0, 1], [2, 3], [[4, 5]])
    with pytest.raises(UnsupportedError, match="FactorGraph needs project, which Permutation lacks"):
        StructureFactor(Permutation(), [0, 1, 2])
    with pytest.raises(ValueError, match="scores over 3 parts"):
        FactorGraph(3, []).argmax(torch.zeros(4))
    nothing = FactorGraph(3, [Xor([0, 1]), Xor([1, 2]), Xor([0, 2])])
    impossible = FactorGraph(3, [Budget([0, 1, 2], 3, exactly=True), AtMostOne([0, 1])])
    for graph in (nothing, FactorGraph(3, nothing.factors, listed=0), FactorGraph(3, impossible.factors, listed=0)):
        with pytest.raises(ValueError, match=r"example \[1\] has no vertex"):
            graph.argmax(torch.randn(2, 3), torch.tensor([[False, False, False], [True, True, True]]))
    with pytest.raises(ValueError, match=r"example \[0\] has no vertex"):
        FactorGraph(3, impossible.factors, listed=0).project(torch.randn(1, 3))
    for listed in (0, 100):
        graph = FactorGraph(3, impossible.factors, listed=listed)
        with pytest.raises(ValueError, match=r"example \[0\] has no vertex"):
            graph.argmax(torch.randn(2, 3))
        best = graph.best_vertex(torch.randn(2, 3))
        assert best.vertex.tolist() == [[0.0] * 3] * 2
        assert best.value.tolist() == best.bound.tolist() == [-torch.inf] * 2
        assert not best.proved.any()


def test_lists_that_are_made_in_inference_mode_serve_training() -> None:
    graph = FactorGraph.partial_matching(2, 2)
    scores = torch.zeros(1, 4, requires_grad=True)
    with torch.inference_mode():
        graph.log_partition(scores)
    graph.log_partition(scores).sum().backward()
    torch.testing.assert_close(scores.grad, torch.full((1, 4), 2 / 7))  # of 7 matchings 2 have an edge


def test_lists_of_few_masks_are_kept() -> None:
    """A mask for every example of a long training must not fill the memory."""
    graph = FactorGraph(10, [Budget(torch.arange(10), 3)])
    masks = torch.tensor(list(itertools.islice(itertools.product([True, False], repeat=10), 300)))
    every = torch.stack([graph.log_partition(torch.zeros(10), mask) for mask in masks])
    assert len(graph._lists) <= 256
    torch.testing.assert_close(graph.log_partition(torch.zeros(300, 10), masks), every)
    counts = sum(math.comb(int(masks[-1].sum()), k) for k in range(4))
    assert every[-1].exp().item() == pytest.approx(counts)


def test_gibbs_oracles_only_where_vertices_are_few() -> None:
    large = FactorGraph.ising_grid(4, 4)
    assert not {"sample", "log_partition", "marginals", "kl"} & large.oracles
    assert set(large.relaxations) == {"euclidean", "lp"}
    with pytest.raises(UnsupportedError, match="Gibbs oracles only up to 4,096 vertices"):
        large.log_partition(torch.zeros(large.size))
    with pytest.raises(ValueError, match="too many to be listed"):
        FactorGraph.ising_grid(6, 6).enumerate(96)
    assert {"sample", "log_partition", "marginals", "kl"} <= FactorGraph.ising_grid(2, 2).oracles


def test_what_is_not_proved_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_STOPPED", set())
    torch.manual_seed(0)
    # Of three parts at most one pair may be on at once; a half of each is better than that.
    triangle = [Pair([[0, 1, 3], [1, 2, 4], [0, 2, 5]])]
    hurried = FactorGraph(6, triangle, max_nodes=1, listed=0)
    scores = torch.tensor([[1.0, 1.0, 1.0, -2.0, -2.0, -2.0]]) + 0.1 * torch.rand(3, 6)
    best = hurried.best_vertex(scores)
    assert not best.proved.all()
    assert (best.bound >= best.value).all()
    with pytest.warns(StoppedEarly, match="argmax of FactorGraph stopped early: a better vertex is not ruled out"):
        hurried.argmax(scores)
    exact = FactorGraph(6, triangle).best_vertex(scores)
    assert exact.proved.all()
    assert (exact.value <= best.bound + 1e-9).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hurried.argmax(scores)  # said once
    short = FactorGraph.ising_grid(4, 4, max_iterations=2)
    with pytest.warns(StoppedEarly, match="project of FactorGraph stopped early: copies of parts differ"):
        short.project(torch.randn(8, 40, dtype=torch.float64))


def test_float32_and_large_scores() -> None:
    torch.manual_seed(0)
    for graph in LOOPS.values():
        scores = 100 * torch.randn(4, graph.size)
        point = graph.project(scores)
        assert point.dtype == torch.float32
        torch.testing.assert_close(point.double(), graph.project(scores.double()), rtol=0, atol=1e-6)


def test_the_graph_on_meta_devices_keeps_its_groups() -> None:
    graph = FactorGraph.ising_grid(2, 2).graph
    there = graph.on(torch.device("meta"))
    assert there is graph.on(torch.device("meta"))
    assert there.part.device.type == "meta"


# --- estimators ------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "estimator"


def build(name: str, graph: FactorGraph, **options: Any) -> Any:
    """An estimator by its configuration."""
    config = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{name}.yaml").estimator, options)
    return hydra.utils.instantiate(config, structure=graph)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sst", {"relaxation": "lp", "utility": "gumbel"}),
        ("sst", {"relaxation": "euclidean", "utility": "gumbel"}),
        *((name, {}) for name in ("identity_st", "spigot", "imle", "perturbed", "sparsemap_st")),
    ],
)
def test_estimators_that_need_no_list(name: str, options: dict[str, Any]) -> None:
    """They train, and evaluate at vertices."""
    graph = FactorGraph(8, [AtMostOne([[0, 1, 2], [2, 3, 4], [4, 5, 0]]), Pair([[1, 6, 7]])], listed=0)
    torch.manual_seed(0)
    scores = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8)
    estimator = build(name, graph, **options)
    estimate = estimator(scores, lambda x, rows: (x - weight).square().sum(-1))
    (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
    hard = estimator.eval()(scores, lambda x, rows: (x - weight).square().sum(-1)).vertices
    assert graph.graph.allows(hard.double(), torch.ones_like(hard, dtype=torch.bool)).all()


@pytest.mark.parametrize(("name", "lacks"), [("sparsemap", "sparsemap"), ("sfe", "sample"), ("marginal", "marginals")])
def test_estimators_that_need_more_are_refused(name: str, lacks: str) -> None:
    with pytest.raises(hydra.errors.InstantiationException) as refused:
        build(name, LOOPS["ising"])
    assert isinstance(refused.value.__cause__, UnsupportedError)
    assert "FactorGraph lacks" in str(refused.value.__cause__)


def test_factors_of_one_structure_are_projected_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many factors and examples there are: a step calls the structure once."""
    sizes: list[int] = []
    project = LinearChain.project

    def counting(self: LinearChain, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        sizes.append(len(scores))
        return project(self, scores, mask)

    monkeypatch.setattr(LinearChain, "project", counting)
    graph = FactorGraph.agreement(3, 2, listed=0)
    graph.project(torch.zeros(5, graph.size, dtype=torch.float64))
    assert sizes
    assert set(sizes) == {2 * 5}


@pytest.mark.parametrize("listed", [4096, 0])
@pytest.mark.parametrize("structure", [Arborescence(), SpanningTree(), Matching()], ids=str)
def test_parts_where_the_structure_has_none_are_never_on(structure: Structure, listed: int) -> None:
    """The diagonal, edges into the root, the half below the diagonal: without a mask, and with an absent node."""
    graph = FactorGraph(9, [StructureFactor(structure, torch.arange(9).reshape(3, 3))], listed=listed)
    scores = torch.rand(4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1  # all are wanted
    two = torch.zeros(3, 3, dtype=torch.bool)
    two[:2, :2] = True
    for mask in (None, two):
        parts, flat = structure.parts(scores, mask), None if mask is None else mask.flatten()
        for oracle in ("argmax", "project"):
            expected = torch.where(parts, getattr(structure, oracle)(scores, mask), 0.0)
            found = getattr(graph, oracle)(scores.flatten(1), flat)
            torch.testing.assert_close(found, expected.flatten(1), rtol=1e-7, atol=1e-7)
        if listed and "log_partition" in structure.oracles:
            found = graph.log_partition(scores.flatten(1), flat)
            torch.testing.assert_close(found, structure.log_partition(scores, mask))
    if listed:
        assert len(graph.enumerate(9)) == len(structure.enumerate(3, 3))


def test_an_undirected_edge_may_be_named_in_both_halves() -> None:
    graph = FactorGraph(3, [StructureFactor(SpanningTree(), [[-1, 0, 1], [0, -1, 2], [1, 2, -1]])])
    assert graph.enumerate(3).sum(-1).tolist() == [2, 2, 2]


def test_sequences_that_agree_may_be_shorter() -> None:
    """Whether all vertices are listed or not: the third position is absent."""
    mask = torch.ones(22, dtype=torch.bool)
    mask[4:6] = mask[10:14] = mask[18:22] = False
    scores = torch.randn(22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    listed, other = (FactorGraph.agreement(3, 2, listed=most) for most in (4096, 0))
    shorter = FactorGraph.agreement(2, 2)
    assert torch.equal(listed.argmax(scores, mask), other.argmax(scores, mask))
    torch.testing.assert_close(listed.log_partition(scores, mask), shorter.log_partition(scores[mask]))
