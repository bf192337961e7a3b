"""Minimum spanning trees: the torch version and the compiled one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structgrad.algorithms import kruskal
from structgrad.structures import SpanningTree
from tests.kernels import by_operators, compiled, needs_triton, quiet
from tests.structures._trees import assert_same_traces, cases_for_both_paths, weight

STRUCTURE = SpanningTree()


def test_plain_torch_agrees_with_the_compiled_code() -> None:
    for rounded in (False, True):
        scores, exists = cases_for_both_paths(STRUCTURE)
        scores = scores.round() if rounded else scores
        vertex, choices, reached = kruskal.minimum_spanning_tree(scores, exists)
        plain, plain_choices, plain_reached = kruskal.torch_minimum_spanning_tree(scores, exists)
        assert torch.equal(reached, plain_reached)
        found, other = (weight(STRUCTURE, v, scores.nan_to_num()) for v in (vertex, plain))
        torch.testing.assert_close(other, found)
        if not rounded:
            assert torch.equal(vertex, plain)
            assert torch.equal(choices, plain_choices)
        assert torch.equal(kruskal.joined_at(choices, 7), kruskal.torch_joined_at(choices, 7))
    broken = exists.clone()
    broken[0, :3, 3:] = False
    for function in (kruskal.minimum_spanning_tree, kruskal.torch_minimum_spanning_tree):
        assert function(scores, broken)[2].tolist() == [False] + [True] * (len(scores) - 1)


def graphs() -> tuple[Tensor, Tensor]:
    """Scores and parts ``[5, 5, 5]``: everything, missing edges, absent nodes, nothing, not connected."""
    scores = torch.randn(5, 5, 5, dtype=torch.float64)
    mask = torch.ones(5, 5, 5, dtype=torch.bool)
    mask[1, 0, 1:3] = mask[1, 3, 4] = False
    mask[2, 3] = mask[2, :, 3] = False
    mask[3] = False
    mask[4, :2, 2:] = False
    exists = STRUCTURE.parts(scores, mask)
    return scores.masked_fill(~exists, torch.nan), exists


@needs_triton
@quiet
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_kernels_agree_with_the_cpu(dtype: torch.dtype, sign: float) -> None:
    scores, exists = graphs()
    scores = 100 * scores.to(dtype)
    expected = kruskal.minimum_spanning_tree(scores, exists, sign)
    found = by_operators(kruskal.minimum_spanning_tree, scores, exists, sign)
    assert found[2].tolist() == expected[2].tolist() == [True, True, True, True, False]
    for ours, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(ours[:4], other[:4])
    scores, exists, choices = scores[:4], exists[:4], expected[1][:4]
    joined = kruskal.joined_at(choices, 5)
    assert torch.equal(by_operators(kruskal.joined_at, choices, 5), joined)

    rates = scores.nan_to_num().requires_grad_()
    total, expected_total = (
        by_operators(kruskal.log_running, rates, exists, joined),
        kruskal.log_running(rates, exists, joined),
    )
    torch.testing.assert_close(total, expected_total, rtol=1e-12, atol=1e-12)
    upstream, direction = torch.randn_like(total).requires_grad_(), torch.randn_like(rates)
    first, expected_first = (
        torch.autograd.grad(t, rates, upstream, create_graph=True)[0] for t in (total, expected_total)
    )
    torch.testing.assert_close(first, expected_first)
    second, expected_second = (torch.autograd.grad(f, [rates, upstream], direction) for f in (first, expected_first))
    torch.testing.assert_close(second, expected_second)


@needs_triton
@quiet
def test_kernels_with_ties_and_forced_edges() -> None:
    scores = torch.randn(4, 6, 6, dtype=torch.float64).round()
    scores[0, 1, 4] = torch.inf
    exists = STRUCTURE.parts(scores)
    found = by_operators(kruskal.minimum_spanning_tree, scores, exists, -1.0)[0]
    expected = kruskal.minimum_spanning_tree(scores, exists, -1.0)[0]
    assert found[0, 1, 4] == 1
    assert (found.sum((1, 2)) == 10).all()
    finite = scores.clamp(max=50)
    torch.testing.assert_close(weight(STRUCTURE, found, finite), weight(STRUCTURE, expected, finite))


@needs_triton
@quiet
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0), (2, 1, 1), (2, 2, 2)])
def test_traces_of_nothing_and_little(shape: tuple[int, int, int]) -> None:
    assert_same_traces(STRUCTURE, shape)


@needs_triton
@pytest.mark.parametrize("n", [10, pytest.param(kruskal.LARGEST, marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu(n: int) -> None:
    lines = compiled(
        "import torch\n"
        "from structgrad.algorithms import kruskal\n"
        "gpu.DEVICES.add('cpu')\n"
        f"scores, exists = torch.zeros(2, {n}, {n}, requires_grad=True), torch.ones(2, {n}, {n}, dtype=torch.bool)\n"
        "_, choices, _ = kruskal.minimum_spanning_tree(scores, exists)\n"
        "kruskal.log_running(scores, exists, kruskal.joined_at(choices, scores.shape[-1])).sum().backward()\n"
    )
    assert lines.count("\n") == 4
