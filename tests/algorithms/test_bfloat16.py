"""bfloat16 numbers in compiled kernels: the same as torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms import bfloat16
from structgrad.algorithms.bfloat16 import as_array, narrow, products_in, widen
from structgrad.algorithms.compiled import njit


@njit()
def copy(source: Any, target: Any) -> None:
    for i in range(len(source)):
        target[i] = narrow(widen(source[i]), target)


def test_rounding_is_that_of_torch() -> None:
    # Halves of the last place go to the even neighbour; zeros, infinities, subnormal and the largest numbers.
    halves = 1 + torch.arange(64) / 256
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -1e-45, torch.finfo(torch.float32).max])
    values = torch.cat((halves, -halves, special, torch.randn(1000) * torch.logspace(-30, 30, 1000)))
    rounded = torch.empty(len(values), dtype=torch.bfloat16)
    copy(as_array(values), as_array(rounded))
    assert torch.equal(rounded.view(torch.int16), values.bfloat16().view(torch.int16))
    back = torch.empty_like(values)
    copy(as_array(rounded), as_array(back))
    assert torch.equal(back, rounded.float())


def test_a_nan_stays_one() -> None:
    values = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    rounded = torch.empty(3, dtype=torch.bfloat16)
    copy(as_array(values), as_array(rounded))
    assert rounded.isnan().all()


def test_other_types_are_copied() -> None:
    for dtype in (torch.float32, torch.float64):
        values, target = torch.randn(5, dtype=dtype), torch.empty(5, dtype=dtype)
        copy(as_array(values), as_array(target))
        assert torch.equal(values, target)


def test_factors_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    try:
        for units in (True, False):
            monkeypatch.setattr(bfloat16, "has_bfloat16_units", lambda units=units: units)
            for precision in ("highest", "high", "medium"):
                torch.set_float32_matmul_precision(precision)
                lower = units and precision == "medium"
                assert products_in(single) == (torch.bfloat16 if lower else torch.float32)
                assert products_in(double) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_rounds_under_medium_only(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "has_bfloat16_units", lambda: True)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 50, 64, requires_grad=True), torch.randn(40, 64, requires_grad=True)
    leaves = [x, weight, torch.randn(40, requires_grad=True)][: 3 if bias else 2]
    upstream = torch.randn(3, 50, 40)

    def results(layer: Callable[..., Tensor]) -> list[Tensor]:
        value = layer(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]

    exact = results(F.linear)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert all(torch.equal(a, b) for a, b in zip(results(bfloat16.linear), exact, strict=True))
        torch.set_float32_matmul_precision("medium")
        rounded = results(bfloat16.linear)
        doubles = [leaf.detach().double() for leaf in leaves]
        assert torch.equal(bfloat16.linear(*doubles), F.linear(*doubles))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {t.dtype for t in rounded} == {torch.float32}
    for a, b in list(zip(rounded, exact, strict=True))[:3]:
        assert 1e-4 < float((a - b).norm() / b.norm()) < 1e-2  # 0 would mean that bfloat16 was not used
    if bias:
        torch.testing.assert_close(rounded[3], exact[3])  # a sum of float32 numbers
