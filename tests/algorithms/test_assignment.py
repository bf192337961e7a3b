"""Linear assignment against scipy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize

from structgrad.algorithms.assignment import assign, assign_compiled, greedy
from structgrad.structures import Matching
from tests.kernels import by_operators, compiled, needs_triton, quiet


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_both_algorithms_agree_with_scipy(n: int) -> None:
    exists = torch.rand(40, n, n) > 0.4
    exists |= torch.stack([torch.eye(n, dtype=torch.bool)[torch.randperm(n)] for _ in range(40)])
    for utility in (torch.randn(40, n, n), torch.randint(-2, 3, (40, n, n)).float(), 1e2 * torch.randn(40, n, n)):
        compiled, duals, feasible = assign_compiled(utility, exists)
        assert feasible.all()
        for vertex, dual in ((compiled, duals), assign(utility, exists)):
            f, g = dual.unbind(1)
            reduced = utility.double() + f[:, :, None] + g[:, None]
            assert (reduced[exists] <= 1e-9).all()
            assert (reduced[vertex > 0].abs() <= 1e-9).all()
            assert (vertex.sum(-1) == 1).all()
            assert (vertex.sum(-2) == 1).all()
            assert (vertex[~exists] == 0).all()
            values = (vertex * torch.where(exists, utility, 0.0)).double().sum((-1, -2))
            for b in range(40):
                cost = torch.where(exists[b], utility[b].double(), -torch.inf).numpy()
                row, column = optimize.linear_sum_assignment(cost, maximize=True)
                assert math.isclose(values[b].item(), cost[row, column].sum(), rel_tol=1e-6, abs_tol=1e-5)


@pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_mask_is_a_mask_of_every_entry(batch: tuple[int, ...], n: int) -> None:
    utility = torch.randn(*batch, n, n).mT  # of other strides
    every = torch.ones((), dtype=torch.bool).expand(utility.shape)
    for one, other in zip(assign_compiled(utility, None), assign_compiled(utility, every), strict=True):
        assert torch.equal(one, other)
    vertex, duals, feasible = assign_compiled(utility, None)
    assert feasible.shape == batch
    assert duals.shape == (*batch, 2, n)
    assert torch.equal(vertex, Matching().argmax(utility))
    assert torch.equal(vertex.sum(-1), torch.ones(*batch, n))


def test_assignment_ends_although_duals_fall_in_tiny_steps() -> None:
    """Rows that bid for the same two columns, nearly equal ones, 1e15 steps away from the third."""
    utility = torch.tensor([[0.0, 1e-9, -1e6], [0.0, 1e-9, -1e6], [0.0, 1e-9, -1e6 + 1]], dtype=torch.float64)
    utility = torch.stack([utility, utility.T, utility.flip(0)])
    exists = torch.ones_like(utility, dtype=torch.bool)
    vertex, duals, feasible = assign_compiled(utility, exists)
    assert feasible.all()
    torch.testing.assert_close((vertex * utility).sum((-1, -2)), torch.full((3,), 1e-9 - 1e6 + 1, dtype=torch.float64))
    f, g = duals.unbind(1)
    reduced = utility + f[:, :, None] + g[:, None]
    assert reduced.max() <= 1e-9
    assert reduced[vertex > 0].abs().max() <= 1e-9


@needs_triton
@quiet
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_gpu_kernels_agree_with_the_cpu(n: int) -> None:
    exists = torch.rand(3, n, n) > 0.4
    exists |= torch.stack([torch.eye(n, dtype=torch.bool)[torch.randperm(n)] for _ in range(3)])
    if n > 1:
        exists[0, 0] = exists[0, :, 0] = False  # smaller than the others, or without a matching
    tiny = torch.tensor([0.0, 1e-9, *[-1e6] * 3])[:n] + torch.zeros(3, n, n)
    for utility in (100 * torch.randn(3, n, n), tiny.double(), torch.randint(-2, 3, (3, n, n)).double()):
        vertex, duals, feasible = assign_compiled(utility, exists)
        ours, ours_duals = by_operators(assign, utility, exists)
        assert torch.equal(ours[feasible], vertex[feasible])
        assert torch.equal(ours_duals[feasible], duals[feasible])
        costs = torch.where(exists, utility.exp(), torch.inf)
        for one, other in zip(by_operators(greedy, costs), greedy(costs), strict=True):
            assert torch.equal(one, other)
    assert by_operators(assign, utility[:0], exists[:0])[0].shape == (0, n, n)
    assert by_operators(greedy, costs[:0])[1].shape == (0, n)


@needs_triton
@quiet
def test_operators_under_compile() -> None:
    scores = torch.randn(2, 3, 3, requires_grad=True)
    matching = Matching()
    noise = matching.conditional_noise(matching.trace(scores.exp()), scores)

    def everything(s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trace = matching.trace(s.exp())
        conditional = matching.conditional(trace, s, noise=noise)
        return matching.argmax(s), trace.vertex, trace.choices, matching.trace_log_prob(trace, s), conditional

    ours = by_operators(torch.compile(everything, backend="aot_eager", fullgraph=True), scores)
    expected = everything(scores)
    torch.testing.assert_close(ours, expected)
    for weight in (torch.randn(2), torch.randn(2, 3, 3)):
        which = 3 if weight.dim() == 1 else 4
        pair = [
            torch.autograd.grad((found[which] * weight).sum(), scores, retain_graph=True) for found in (ours, expected)
        ]
        torch.testing.assert_close(*pair)


@needs_triton
def test_gpu_kernels_compile_for_a_gpu() -> None:
    done = compiled("""
import torch
from structgrad.algorithms import assignment
for n, dtype in ((assignment.LARGEST_GREEDY, torch.float64), (3, torch.float32)):
    matrix = torch.ones(2, n, n, dtype=dtype)
    assignment._greedy_operator(matrix)
    assignment._assign_operator(matrix, matrix > 0)
matrix = torch.ones(1, assignment.LARGEST, assignment.LARGEST)
assignment._assign_operator(matrix, matrix > 0)
""")
    assert [line.split()[0] for line in done.splitlines()] == ["_gpu_greedy", "_gpu_assign"] * 2 + ["_gpu_assign"]
