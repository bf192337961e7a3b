"""Linear assignment against scipy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize

from structgrad.algorithms.assignment import assign, assign_compiled


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
