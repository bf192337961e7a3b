"""Every structure at the limits: no vertex, no part, one node, too many vertices, extreme rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from structgrad.structures import (
    Alignment,
    Arborescence,
    BinaryTree,
    BudgetSubset,
    Constituency,
    CorrelatedKSubset,
    DagPath,
    KSubset,
    Labelled,
    LinearChain,
    Matching,
    OneHot,
    Permutation,
    ProjectiveTree,
    SemiMarkov,
    SpanningTree,
    Structure,
    Subset,
)
from structgrad.structures.base import ORACLES
from structgrad.testing import computing
from tests import cases

CASES = {name: (case.plain, case.shape) for name, case in cases.CASES.items()}


def calls(structure: Structure, scores: Tensor, mask: Tensor | None = None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every oracle and relaxation of scores, by name."""
    costs = scores.double().exp()
    vertex = structure.argmax(scores.double(), mask).to(scores.dtype)
    of_vertex = {"log_prob", "conditional_utility"}
    of_two = {"cross_entropy", "kl", "expected_hamming"}
    for oracle in (o for o in ORACLES if o in structure.oracles):
        if oracle == "enumerate":
            yield oracle, lambda: structure.enumerate(*scores.shape[1:])
        elif oracle == "top_k":
            yield oracle, lambda: structure.top_k(scores, 3, mask)
        elif oracle == "trace":
            yield oracle, lambda: structure.trace(costs, mask)
        elif oracle in ("trace_log_prob", "conditional"):
            trace = structure.trace(costs, mask)
            yield oracle, lambda o=oracle, t=trace: getattr(structure, o)(t, scores, mask)  # type: ignore[misc]
        elif oracle == "renyi":
            yield oracle, lambda: structure.renyi(scores, scores / 2, 0.5, mask)
        elif oracle in of_two:
            yield oracle, lambda o=oracle: getattr(structure, o)(scores, scores / 2, mask)  # type: ignore[misc]
        elif oracle in of_vertex:
            yield oracle, lambda o=oracle: getattr(structure, o)(vertex, scores, mask)  # type: ignore[misc]
        else:
            yield oracle, lambda o=oracle: getattr(structure, o)(scores, mask)  # type: ignore[misc]
    for relaxation, described in structure.relaxations.items():
        draws = described.draws
        utility = scores if draws is None else scores.expand(draws, *scores.shape)
        yield relaxation, lambda r=relaxation, u=utility: structure.relax(r, u, mask)  # type: ignore[misc]


# --- what is no vertex ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "log_prob" in s.oracles])
def test_log_prob_of_what_is_no_vertex(name: str, masked: bool) -> None:
    """Of all 0/1 vectors (some, where they are many), with the wrong ones refused and the right ones not."""
    structure, shape = CASES[name]
    mask = cases.CASES[name].mask[1] if masked else None
    scores = torch.randn(shape, dtype=torch.float64)
    size = structure.argmax(scores, mask).shape
    vertices = {tuple(v.flatten().tolist()) for v in structure.argmax(torch.randn(2000, *shape), mask)}
    candidates = (torch.rand(200, *size) < 0.4).double()
    candidates = torch.cat([candidates, structure.argmax(torch.randn(20, *shape).double(), mask)])
    refused = 0
    for candidate in candidates:
        if tuple(candidate.flatten().tolist()) in vertices:
            assert structure.log_prob(candidate, scores, mask).isfinite()
        else:
            refused += 1
            with pytest.raises(ValueError, match=f"is no vertex of {structure.name}"):
                structure.log_prob(candidate, scores, mask)
    assert refused > 0 or structure.is_independent
    for wrong in (torch.full(size, 0.5), torch.full(size, 2.0), torch.full(size, torch.nan)):
        with pytest.raises(ValueError, match="is no vertex"):
            structure.log_prob(wrong.double(), scores, mask)


def test_the_example_is_named() -> None:
    vertices = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match=r"example \[1\] is no vertex of OneHot"):
        OneHot().log_prob(vertices, torch.zeros(2, 3))


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "log_prob" in s.oracles])
def test_log_prob_of_another_shape(name: str) -> None:
    structure, shape = CASES[name]
    scores = torch.randn(2, *shape, dtype=torch.float64)
    vertices = structure.argmax(scores)
    for wrong in (vertices[:, :-1], vertices[..., :-1], vertices[[0, 1, 0]], vertices[None], vertices[0, 0]):
        with pytest.raises(ValueError, match=r"vertices of \w+ have shape \[2, .* got \["):
            structure.log_prob(wrong, scores)
    torch.testing.assert_close(structure.log_prob(vertices[0], scores)[0], structure.log_prob(vertices, scores)[0])


def test_scores_of_several_vertices_are_expanded() -> None:
    scores = torch.randn(2, 5)
    vertices = KSubset(2).sample(scores, n=7)
    with pytest.raises(ValueError, match=r"need scores.expand\(\[7, 2, 5\]\)"):
        KSubset(2).log_prob(vertices, scores)
    assert KSubset(2).log_prob(vertices, scores.expand(vertices.shape)).shape == (7, 2)


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "log_prob" in s.oracles])
def test_log_prob_has_the_precision_of_the_scores(name: str) -> None:
    structure, shape = CASES[name]
    for scores, other in ((torch.randn(2, *shape), torch.float64), (torch.randn(2, *shape).double(), torch.float32)):
        vertices = structure.argmax(scores)
        found = structure.log_prob(vertices.to(other), scores)
        assert found.dtype == scores.dtype
        torch.testing.assert_close(found, structure.log_prob(vertices, scores), rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "top_k" in s.oracles])
def test_a_number_of_vertices_is_a_whole_number(name: str) -> None:
    structure, shape = CASES[name]
    for wrong in (2.5, True, 2.0):
        with pytest.raises(TypeError, match="k must be a whole number"):
            structure.top_k(torch.randn(2, *shape), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1"):
        structure.top_k(torch.randn(2, *shape), 0)


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "sample" in s.oracles])
def test_samples_follow_the_seed_and_not_the_strides(name: str) -> None:
    structure, shape = CASES[name]
    scores = torch.randn(5, *shape)
    turned = scores.movedim(0, -1).contiguous().movedim(-1, 0)
    assert turned.stride() != scores.stride()
    samples = []
    for same in (scores, turned):
        torch.manual_seed(0)
        samples.append(structure.sample(same))
    assert torch.equal(*samples)


def test_inner_does_not_look_at_missing_parts() -> None:
    vertex = torch.tensor([1.0, torch.nan, 1.0], requires_grad=True)
    scores = torch.tensor([2.0, torch.nan, 3.0], requires_grad=True)
    value = OneHot().inner(vertex, scores, torch.tensor([True, False, True]))
    assert value == 5
    assert [g.tolist() for g in torch.autograd.grad(value, (vertex, scores))] == [[2, 0, 3], [1, 0, 1]]


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", CASES)
def test_other_precisions_are_refused_by_name(name: str, dtype: torch.dtype) -> None:
    structure, shape = CASES[name]
    scores = (3 * torch.randn(2, *shape)).to(dtype)
    for what, call in calls(structure, scores):
        if what not in ("enumerate", "trace"):
            with pytest.raises(TypeError, match=rf"float32 or float64\); got {dtype}"):
                call()


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "conditional" in s.oracles])
def test_conditional_samples_at_wild_rates(name: str) -> None:
    """Log-rates of standard deviation 30 in float32, with traces of these rates: finite, positive, the same trace."""
    structure, shape = CASES[name]
    mask = cases.CASES[name].mask[:, None].expand(2, 500, *shape)
    log_rates = 30 * torch.randn(2, 500, *shape)
    exists = structure.parts(log_rates, mask)
    costs = torch.empty(log_rates.shape, dtype=torch.float64).exponential_() * (-log_rates.double()).exp()
    trace = structure.trace(torch.where(exists, costs, 1.0), mask)
    again = structure.conditional(trace, log_rates, mask)
    assert again.dtype == torch.float64
    assert again.isfinite().all()
    assert (again > 0).all()
    assert torch.equal(structure.trace(again, mask).choices, trace.choices)


def test_the_same_noise_makes_the_same_sample() -> None:
    for structure, shape in CASES.values():
        if "conditional" in structure.oracles:
            log_rates = torch.randn(2, *shape)
            trace = structure.trace(torch.rand(2, *shape).double() + 0.1)
            noise = structure.conditional_noise(trace, log_rates)
            one, two = (structure.conditional(trace, log_rates, None, noise) for _ in range(2))
            assert torch.equal(one, two)
            assert not torch.equal(one, structure.conditional(trace, log_rates))


# --- nothing, and one -----------------------------------------------------------------------------------------------

SMALL: dict[str, tuple[Structure, tuple[int, ...]]] = {
    "one category": (OneHot(), (1,)),
    "no bit": (Subset(), (0,)),
    "one node, edges": (Subset("undirected"), (1, 1)),
    "one node, directed edges": (Subset("directed"), (1, 1)),
    "no node, edges": (Subset("undirected"), (0, 0)),
    "no bit, budget": (BudgetSubset(2), (0,)),
    "one bit, budget": (BudgetSubset(2), (1,)),
    "one node, budget": (BudgetSubset(2, "undirected"), (1, 1)),
    "one of one": (KSubset(1), (1,)),
    "one of one, correlated": (CorrelatedKSubset(1), (1,)),
    "tree of one": (SpanningTree(), (1, 1)),
    "tree of none": (SpanningTree(), (0, 0)),
    "arborescence of one": (Arborescence(), (1, 1)),
    "arborescence of none": (Arborescence(), (0, 0)),
    "matching of one": (Matching(), (1, 1)),
    "matching of none": (Matching(), (0, 0)),
    "ordering of one": (Permutation(), (1,)),
    "ordering of none": (Permutation(), (0,)),
    "binary tree of one": (BinaryTree(), (1,)),
    "binary tree of none": (BinaryTree(), (0,)),
    "projective tree of one": (ProjectiveTree(), (1, 1)),
    "projective tree of none": (ProjectiveTree(), (0, 0)),
    "chain of one": (LinearChain(2), (0, 2, 2)),
    "segments of one": (SemiMarkov(1, 2), (0, 2, 1, 1)),
    "alignment of one": (Alignment(), (1, 1)),
    "alignment of none": (Alignment(), (0, 0)),
    "constituents of one": (Constituency(1), (1, 1, 1)),
    "constituents of none": (Constituency(1), (0, 0, 1)),
}


@pytest.mark.parametrize("path", ["native", "plain"])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_small_sets(name: str, empty: bool, path: str) -> None:
    """The scores as they are, and with everything masked if that leaves the empty vertex."""
    with computing(path):
        check_small(name, empty)


def check_small(name: str, empty: bool) -> None:
    structure, shape = SMALL[name]
    if empty and isinstance(structure, OneHot | KSubset | CorrelatedKSubset):
        return
    scores = torch.randn(2, *shape, requires_grad=True)
    mask = torch.zeros(2, *shape, dtype=torch.bool) if empty else None
    count = 1 if empty or "one bit" not in name else 2
    for what, call in calls(structure, scores, mask):
        out = call()
        if what == "top_k":
            vertices, values = out
            assert vertices.shape[:2] == values.shape == (2, 3)
            assert (values.isfinite().sum(1) == count).all()
        elif what == "sparsemap":
            totals = torch.zeros(2).index_add(0, out.rows, out.weights.detach())
            torch.testing.assert_close(totals, torch.ones(2))
        elif what == "enumerate":
            assert len(out) == (2 if "one bit" in name else 1)
        elif isinstance(out, Tensor):
            assert out.isfinite().all()
            if scores.numel():
                assert out.requires_grad or what not in ("log_partition", "marginals", "entropy", "log_prob", "project")
            if out.requires_grad and out.numel():
                (gradient,) = torch.autograd.grad(out.sum(), scores, allow_unused=True)
                assert gradient is None or gradient.isfinite().all()
            if what in ("log_prob", "trace_log_prob", "entropy") and count == 1:
                torch.testing.assert_close(out, torch.zeros(2))


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_structure_at_its_smallest(name: str, n: int) -> None:
    """Every oracle gives finite numbers with finite gradients, or all refuse in one line."""
    structure, shape = CASES[name][0], CASES[name][0].shape(n)
    scores = torch.randn(2, *shape, requires_grad=True)
    try:
        structure.argmax(scores)
    except ValueError as refusal:
        message = str(refusal).split(":")[0]
        for oracle in ("log_partition", "marginals", "sample", "project", "top_k", "sparsemap"):
            if oracle in structure.oracles:
                with pytest.raises(ValueError, match=re.escape(message)):
                    getattr(structure, oracle)(scores, *[2] * (oracle == "top_k"))
        return
    for what, call in calls(structure, scores):
        out = call()
        if isinstance(out, Tensor) and what != "enumerate":
            assert out.isfinite().all(), what
            if out.requires_grad:
                (gradient,) = torch.autograd.grad(out.sum(), scores, allow_unused=True)
                assert gradient is None or gradient.isfinite().all(), what
    if {"enumerate", "log_partition"} <= structure.oracles:
        count = structure.log_partition(torch.zeros(shape, dtype=torch.float64)).exp().item()
        assert len(structure.enumerate(*shape)) == pytest.approx(count)


# --- too many -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if "enumerate" in s.oracles])
def test_every_set_is_listed_or_too_large(name: str) -> None:
    """With its number of vertices, at a small and a large size."""
    structure = CASES[name][0]
    for n in (4, 40):
        shape = structure.shape(n)
        try:
            structure.enumerate(*shape)
        except ValueError as refusal:
            if isinstance(structure, Labelled):  # refused by what is labelled, which has fewer vertices
                structure, shape = structure.structure, shape[:-1]
            assert re.match(rf"{structure.name} has [\d,]+ vertices of shape", str(refusal))  # noqa: PT017
            count = int(str(refusal).split()[2].replace(",", ""))
            if "log_partition" in structure.oracles:
                log_z = structure.log_partition(torch.zeros(shape, dtype=torch.float64)).item()
                assert log_z == pytest.approx(math.log(count), rel=1e-9)
            return
    assert structure.enumerate(*structure.shape(40)).numel() <= 2**26


@pytest.mark.parametrize(
    ("structure", "shape", "count"),
    [
        (Subset(), (60,), 2**60),
        (Subset("undirected"), (12, 12), 2**66),
        (KSubset(10), (50,), 10272278170),
        (BudgetSubset(3), (2000,), 1333335001),
        (CorrelatedKSubset(10), (99,), 10272278170),
        (SpanningTree(), (12, 12), 12**10),
        (Arborescence(), (12, 12), 12**10),
        (Matching(), (12, 12), 479001600),
        (Permutation(), (12,), 479001600),
        (BinaryTree(), (20,), 6564120420),
        (LinearChain(5), (19, 5, 5), 5**20),
        (SemiMarkov(1, 2), (79, 2, 1, 1), 23416728348467685),  # a Fibonacci number
        (Alignment(), (20, 20), 45849429914943),  # a central Delannoy number
        (Constituency(2), (20, 20, 2), 1767263190 * 2**39),
        (DagPath([[i, i + 1] for i in range(40)] * 2), (80,), 2**40),
    ],
    ids=lambda v: str(v),
)
def test_sets_too_large_to_list(structure: Structure, shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match=f"{structure.name} has {count:,} vertices .* too many to be listed"):
        structure.enumerate(*shape)
