"""Tests of all structures over bit vectors: compiled and plain versions agree, distributions and sizes are right."""

from __future__ import annotations

import math

import pytest
import torch

from structgrad.structures.base import Structure
from structgrad.structures.budget_subset import BudgetSubset
from structgrad.structures.correlated_k_subset import CorrelatedKSubset
from structgrad.structures.k_subset import KSubset
from structgrad.structures.one_hot import OneHot
from structgrad.structures.subset import Subset

EVERY: list[tuple[Structure, int]] = [
    (OneHot(), 7),
    (Subset(), 7),
    (KSubset(3), 7),
    (KSubset(7), 7),
    (BudgetSubset(3), 7),
    (CorrelatedKSubset(3), 9),
    (CorrelatedKSubset(1), 1),
]
MEASURED = ("log_partition", "marginals", "entropy", "project")


@pytest.mark.parametrize(("structure", "size"), EVERY, ids=str)
@pytest.mark.parametrize("oracle", MEASURED)
def test_vmap_takes_the_plain_version_and_agrees(structure: Structure, size: int, oracle: str) -> None:
    if oracle not in structure.oracles:
        pytest.skip(f"{structure} has no {oracle}")
    function = getattr(structure, oracle)
    for scale in (1.0, 100.0):
        scores = scale * torch.randn(5, size, dtype=torch.float64)
        direct = function(scores)
        torch.testing.assert_close(torch.func.vmap(function)(scores), direct, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(direct)
    scores = torch.randn(5, size, dtype=torch.float64, requires_grad=True)
    (compiled,) = torch.autograd.grad((function(scores) * weight).sum(), scores)
    plain = torch.func.vmap(torch.func.grad(lambda s, w: (function(s) * w).sum()))(scores.detach(), weight)
    torch.testing.assert_close(plain, compiled, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("structure", "size"), EVERY, ids=str)
def test_plain_argmax_agrees(structure: Structure, size: int) -> None:
    scores = torch.randn(9, size, dtype=torch.float64)
    assert torch.equal(torch.func.vmap(structure.argmax)(scores), structure.argmax(scores))


@pytest.mark.parametrize("structure", [KSubset(2), CorrelatedKSubset(2)], ids=str)
def test_plain_samples_have_the_same_law(structure: Structure) -> None:
    scores = torch.randn(5, dtype=torch.float64)
    draws = 4000
    sample = torch.func.vmap(structure.sample, randomness="different")(scores.expand(draws, 5))
    mean = structure.marginals(scores)
    error = (mean * (1 - mean) / draws).sqrt()
    # 5 standard errors: 3e-6 for all entries together, with a fixed seed.
    assert ((sample.mean(0) - mean).abs() <= 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 64, 130])
@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda d: Subset(), "nested"),
        (lambda d: Subset(), "systematic"),
        (lambda d: KSubset(max(1, d // 3)), "systematic"),
        (lambda d: KSubset(max(1, d // 3)), "sorted"),
        (lambda d: BudgetSubset(d // 2), "systematic"),
        (lambda d: BudgetSubset(d // 2), "sorted"),
    ],
)
def test_sparsemap_at_size(dtype: torch.dtype, d: int, make: object, method: str) -> None:
    """Sizes at which active sets lost gradients (D >= 64): mean, its gradient, sizes, and at most D + 1 vertices."""
    structure = make(d)  # type: ignore[operator]
    for scale in (0.01, 0.6, 5.0, 100.0):
        scores = (0.5 + scale * torch.randn(16, d, dtype=dtype)).requires_grad_()
        sparse = structure.sparsemap(scores, method=method)
        mean = torch.zeros_like(scores).index_add(0, sparse.rows, sparse.vertices * sparse.weights[:, None])
        direct = structure.project(scores)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(mean, direct, rtol=0, atol=tolerance)
        upstream = torch.randn_like(scores)
        (through_weights,) = torch.autograd.grad((mean * upstream).sum(), scores)
        (through_mean,) = torch.autograd.grad((direct * upstream).sum(), scores)
        torch.testing.assert_close(through_weights, through_mean, rtol=1e-4, atol=20 * tolerance)
        assert ((sparse.vertices == 0) | (sparse.vertices == 1)).all()
        size = sparse.vertices.sum(-1)
        if isinstance(structure, KSubset):
            assert (size == structure.k).all()
        if isinstance(structure, BudgetSubset):
            assert (size <= structure.budget).all()
        assert (torch.bincount(sparse.rows, minlength=16) <= d + 1).all()
        for row in range(16):
            own = sparse.vertices[sparse.rows == row]
            assert len(torch.unique(own, dim=0)) == len(own)
    with pytest.raises(ValueError, match="method"):
        structure.sparsemap(scores, method="other")


def test_each_row_has_its_own_noise() -> None:
    for structure, size in EVERY:
        if (isinstance(structure, KSubset) and structure.k == size) or size == 1:
            continue
        sample = structure.sample(torch.zeros(200, size))
        assert len(torch.unique(sample, dim=0)) > 1


def test_too_few_parts_name_the_example() -> None:
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 1:] = False
    for structure in (KSubset(2), CorrelatedKSubset(2)):
        with pytest.raises(ValueError, match=r"example \[1\]"):
            structure.argmax(torch.zeros(3, 5), mask)
        with pytest.raises(ValueError, match="must be chosen"):
            type(structure)(9).argmax(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"example \[2\]"):
        OneHot().marginals(torch.zeros(3, 5), torch.tensor([[True], [True], [False]]))
    with pytest.raises(ValueError, match="pairs have shape"):
        CorrelatedKSubset(1).argmax(torch.zeros(3, 4))
    for wrong in (lambda: KSubset(0), lambda: BudgetSubset(0), lambda: CorrelatedKSubset(-1)):
        with pytest.raises(ValueError, match="at least 1"):
            wrong()


def test_k_best_do_not_repeat_beyond_all_there_are() -> None:
    vertices, values = Subset().top_k(torch.randn(3, 3), 12)
    assert (values[:, 8:] == -math.inf).all()
    assert values[:, :8].isfinite().all()
    for row in vertices[:, :8]:
        assert len(torch.unique(row, dim=0)) == 8


@pytest.mark.parametrize("structure", [KSubset(4), BudgetSubset(4), BudgetSubset(9), Subset()], ids=str)
def test_k_best_at_size(structure: Structure) -> None:
    """Only a window of the parts is open: comparison with all vertices of nine parts, with ties."""
    every = structure.enumerate(9)
    for scores in (torch.randn(20, 9, dtype=torch.float64), torch.randint(-2, 3, (20, 9)).double()):
        for k in (1, 2, 3, 5, 20):
            vertices, values = structure.top_k(scores, k)
            expected = (scores @ every.T).sort(dim=-1, descending=True).values[:, :k]
            torch.testing.assert_close(values, expected)
            for row in vertices:
                assert len(torch.unique(row, dim=0)) == k
            assert (vertices[:, :, None] == every).all(-1).any(-1).all()
    with pytest.raises(ValueError, match="at least 1"):
        structure.top_k(scores, 0)
