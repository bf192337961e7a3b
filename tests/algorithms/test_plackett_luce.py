"""Plackett-Luce: the total rates left at every step, by GPU kernels and on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from structgrad.algorithms.plackett_luce import log_totals
from structgrad.structures import KSubset, Matching
from structgrad.structures.base import Structure, Trace
from tests.kernels import by_operators, compiled, needs_triton, quiet

MASK = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
MATRIX = torch.ones(2, 3, 3, dtype=torch.bool)
MATRIX[1, 1] = MATRIX[1, :, 0] = False


@needs_triton
@quiet
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("structure", "mask"), [(KSubset(3), MASK), (KSubset(6), MASK[:1]), (Matching(), MATRIX)], ids=str
)
def test_traces_by_kernels_agree_with_the_cpu(structure: Structure, mask: Tensor, scale: float) -> None:
    rates = (scale * torch.randn(mask.shape, dtype=torch.float64)).requires_grad_()
    trace = structure.trace(torch.rand(mask.shape, dtype=torch.float64), mask)
    steps, parts = structure.conditional_noise(trace, rates)

    def ask(vertex: Tensor, choices: Tensor, rates: Tensor, mask: Tensor, *noise: Tensor) -> Any:
        trace = Trace(vertex, choices)
        conditional = structure.conditional(trace, rates, mask, noise)  # type: ignore[arg-type]
        return structure.trace_log_prob(trace, rates, mask), conditional

    arguments = (trace.vertex, trace.choices, rates, mask, steps, parts)
    found, expected = by_operators(ask, *arguments), ask(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(e) for e in expected]
    once = [torch.autograd.grad(pair, rates, weights, create_graph=True)[0] for pair in (found, expected)]
    torch.testing.assert_close(*once, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(rates)
    twice = [torch.autograd.grad(gradient, rates, direction)[0] for gradient in once]
    torch.testing.assert_close(*twice, rtol=1e-8, atol=1e-8)


@needs_triton
@quiet
def test_totals_of_nothing_are_zero() -> None:
    until = torch.tensor([[0, -1, 1], [-1, -1, -1]])
    rates = torch.tensor([[1e3, 5.0, -1e3], [1.0, 2.0, 3.0]], requires_grad=True)
    totals = by_operators(log_totals, until, rates, 3)
    assert torch.equal(totals, torch.tensor([[1e3, -1e3, 0.0], [0.0, 0.0, 0.0]]))
    (slope,) = torch.autograd.grad(totals.sum(), rates)
    assert torch.equal(slope, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert by_operators(log_totals, until[:0], rates[:0], 3).shape == (0, 3)
    assert by_operators(log_totals, until[:, :0], rates[:, :0], 1).tolist() == [[0.0], [0.0]]


@needs_triton
def test_gpu_kernels_compile_for_a_gpu() -> None:
    done = compiled("""
import torch
from structgrad.algorithms import plackett_luce
for n, dtype in ((350, torch.float32), (plackett_luce.LARGEST, torch.float64)):
    rates = torch.zeros(2, n, dtype=dtype)
    totals = plackett_luce._totals_operator(rates.long(), rates, 5)
    plackett_luce._slope_operator(rates.long(), rates, totals, totals)
""")
    assert [line.split()[0] for line in done.splitlines()] == ["_gpu_totals", "_gpu_totals_backward"] * 2
