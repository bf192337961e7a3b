"""Chu-Liu-Edmonds: the torch version and the compiled one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structgrad.algorithms import chu_liu_edmonds
from structgrad.structures import Arborescence
from tests.kernels import by_operators, compiled, needs_triton, quiet
from tests.structures._trees import assert_same_traces, cases_for_both_paths, weight

STRUCTURE = Arborescence()


def test_plain_torch_agrees_with_the_compiled_argmax() -> None:
    for rounded in (False, True):
        scores, exists = cases_for_both_paths(STRUCTURE)
        scores = scores.round() if rounded else scores
        vertex, choices, reached = chu_liu_edmonds.minimum_arborescence(scores, exists, 0)
        plain, plain_choices, plain_reached = chu_liu_edmonds.torch_minimum_arborescence(scores, exists, 0)
        found, other = (weight(STRUCTURE, v, scores.nan_to_num()) for v in (vertex, plain))
        torch.testing.assert_close(other, found)
        assert torch.equal(reached, plain_reached)
        if not rounded:
            assert torch.equal(vertex, plain)
            assert torch.equal(choices, plain_choices)
        total = chu_liu_edmonds.log_entering(scores, exists, choices)
        torch.testing.assert_close(chu_liu_edmonds.torch_log_entering(scores, exists, choices), total)


def graphs(root: int) -> tuple[Tensor, Tensor]:
    """Scores and parts ``[9, 6, 6]``: everything, missing edges, absent nodes, nothing, a node out of reach."""
    scores = torch.randn(9, 6, 6, dtype=torch.float64)
    mask = torch.ones(9, 6, 6, dtype=torch.bool)
    mask[1, 0, 1:3] = mask[1, 3, 4] = False
    mask[2, 3] = mask[2, :, 3] = False
    mask[3] = False
    mask[8, :, 5] = False
    exists = Arborescence(root).parts(scores, mask)
    return scores.masked_fill(~exists, torch.nan), exists


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_sums_of_rates_agree_with_plain_torch(dtype: torch.dtype, scale: float) -> None:
    """Whether rates can be added as they are, or only as logarithms, to second order."""
    scores, exists = graphs(0)
    scores = scores.to(dtype)
    scores[3:5] /= scale  # one batch has examples of both kinds
    _, choices, _ = chu_liu_edmonds.minimum_arborescence(scores, exists, 0)
    scores, exists, choices = scale * scores[:8], exists[:8], choices[:8]
    assert (choices[:8, 6:, 0] >= 0).any()
    spread = (scores.nan_to_num(-torch.inf).amax((1, 2)) - scores.nan_to_num(torch.inf).amin((1, 2))).max()
    assert (spread > chu_liu_edmonds._SPREAD) == (scale > 1)
    rates = scores.nan_to_num().requires_grad_()
    upstream, direction = torch.randn(choices.shape[:2], dtype=torch.float64), torch.randn_like(rates)
    found = []
    for function in (chu_liu_edmonds.log_entering, chu_liu_edmonds.torch_log_entering):
        total = function(rates, exists, choices)
        (plain,) = torch.autograd.grad(total, rates, upstream, retain_graph=True)
        (first,) = torch.autograd.grad(total, rates, upstream, create_graph=True)
        (second,) = torch.autograd.grad(first, rates, direction)
        found.append((total.detach(), plain, first.detach(), second))
    torch.testing.assert_close(*found)


def test_waiting_and_entering() -> None:
    """They are transposes of each other, agree with plain torch, and have all derivatives."""
    scores, exists = graphs(0)
    _, choices, _ = chu_liu_edmonds.minimum_arborescence(scores[:8], exists[:8], 0)
    minima = torch.randn(choices.shape[:2], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(8, 6, 6, dtype=torch.float64, requires_grad=True)
    waited, sums = chu_liu_edmonds.waiting(minima, choices, 6), chu_liu_edmonds.entering(weights, choices)
    torch.testing.assert_close(waited, chu_liu_edmonds.torch_waiting(minima, choices, 6))
    torch.testing.assert_close(sums, chu_liu_edmonds.torch_entering(weights, choices))
    torch.testing.assert_close((waited * weights).sum(), (sums * minima).sum())
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda m: chu_liu_edmonds.waiting(m, choices, 6), minima)
        assert check(lambda w: chu_liu_edmonds.entering(w, choices), weights)
    batched = torch.func.vmap(lambda m, c: chu_liu_edmonds.waiting(m[None], c[None], 6)[0])(minima, choices)
    torch.testing.assert_close(batched, waited)
    jacobian = torch.autograd.functional.jacobian(
        lambda m: chu_liu_edmonds.waiting(m, choices, 6).sum(0), minima, vectorize=True
    )
    assert jacobian.shape == (6, 6, 8, choices.shape[1])


@needs_triton
@quiet
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sign", "root"), [(1.0, 0), (-1.0, 2)])
def test_kernels_agree_with_the_cpu(dtype: torch.dtype, sign: float, root: int) -> None:
    scores, exists = graphs(root)
    scores = 100 * scores.to(dtype)
    vertex, choices, reached = chu_liu_edmonds.minimum_arborescence(scores, exists, root, sign)
    found = by_operators(chu_liu_edmonds.minimum_arborescence, scores, exists, root, sign)
    assert found[2].tolist() == reached.tolist() == [True] * 8 + [False]
    assert (choices[:8, 6:, 0] >= 0).any()  # something was contracted
    assert torch.equal(found[0][:8], vertex[:8])
    assert torch.equal(found[1][:8], choices[:8])

    scores, exists, choices = scores[:8], exists[:8], choices[:8]
    assert torch.equal(by_operators(chu_liu_edmonds.inside, choices, 6), chu_liu_edmonds.inside(choices, 6))
    rates = scores.nan_to_num().requires_grad_()
    expected = chu_liu_edmonds.log_entering(rates, exists, choices)
    total = by_operators(chu_liu_edmonds.log_entering, rates, exists, choices)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    upstream, direction = torch.randn_like(total).requires_grad_(), torch.randn_like(rates)
    first, other = (torch.autograd.grad(t, rates, upstream, create_graph=True)[0] for t in (total, expected))
    torch.testing.assert_close(first, other)
    second, other = (torch.autograd.grad(f, [rates, upstream], direction) for f in (first, other))
    torch.testing.assert_close(second, other)


@needs_triton
@quiet
def test_kernels_with_ties() -> None:
    scores = torch.randn(6, 6, 6, dtype=torch.float64).round()
    exists = STRUCTURE.parts(scores)
    found = by_operators(chu_liu_edmonds.minimum_arborescence, scores, exists, 0, -1.0)[0]
    assert (found.sum(1)[:, 1:] == 1).all()
    expected = chu_liu_edmonds.minimum_arborescence(scores, exists, 0, -1.0)[0]
    torch.testing.assert_close(weight(STRUCTURE, found, scores), weight(STRUCTURE, expected, scores))


@needs_triton
@quiet
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0), (2, 1, 1), (2, 2, 2), (2, 4, 4)])
def test_traces_of_nothing_and_little(shape: tuple[int, int, int]) -> None:
    assert_same_traces(STRUCTURE, shape)


@needs_triton
@pytest.mark.parametrize("n", [10, pytest.param(chu_liu_edmonds.LARGEST, marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu(n: int) -> None:
    lines = compiled(
        "import torch\n"
        "from structgrad.algorithms import chu_liu_edmonds\n"
        "gpu.DEVICES.add('cpu')\n"
        f"scores, exists = torch.zeros(2, {n}, {n}, requires_grad=True), torch.ones(2, {n}, {n}, dtype=torch.bool)\n"
        "_, choices, _ = chu_liu_edmonds.minimum_arborescence(scores, exists, 0)\n"
        "chu_liu_edmonds.log_entering(scores, exists, choices).sum().backward()\n"
        "one = torch.zeros(2, 1, 1)\n"
        "chu_liu_edmonds.minimum_arborescence(one, one > 0, 0)\n"
    )
    assert lines.count("\n") == 5
