"""The network of single numbers: compiled, in plain torch, and as autograd has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structgrad.algorithms import threads
from structgrad.tasks.communication_game.scalars import network_of_numbers
from structgrad.testing import computing


def arguments(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(40), torch.tensor([0.0, 1e4, -1e4])])
    return [t.to(dtype).requires_grad_() for t in (x, torch.randn(37), torch.randn(37))]


def plainly(x: Tensor, inward: Tensor, outward: Tensor) -> Tensor:
    return (x[:, None] * inward).sigmoid() @ outward


@pytest.mark.parametrize("path", ["native", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("workers", [1, 2])
def test_values_and_gradients(path: str, dtype: torch.dtype, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    inputs, wide = arguments(dtype), arguments(torch.float64)
    upstream = torch.linspace(-1, 1, len(inputs[0]), dtype=torch.float64)
    with computing(path):
        values = network_of_numbers(*inputs)
        found = values, *torch.autograd.grad(values, inputs, upstream.to(dtype))
    expected = plainly(*wide)
    for ours, theirs in zip(found, (expected, *torch.autograd.grad(expected, wide, upstream)), strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=1e-5, atol=1e-5)


def test_second_derivatives() -> None:
    found = []
    for function in (network_of_numbers, plainly):
        inputs = arguments(torch.float64)
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), inputs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_not_a_number_is_seen() -> None:
    inputs = arguments(torch.float32)
    with torch.no_grad():
        inputs[0][3] = torch.nan
    values = network_of_numbers(*inputs)
    assert values.isnan().nonzero().tolist() == [[3]]
    gradients = torch.autograd.grad(values.sum(), inputs)
    assert all(g.isnan().any() for g in gradients)


def test_vectorised_jacobian() -> None:
    found = []
    for function in (network_of_numbers, plainly):
        inputs = arguments(torch.float32)
        upstream = torch.linspace(-1, 1, 2 * len(inputs[0])).view(2, -1)
        found.append(torch.autograd.grad(function(*inputs), inputs, upstream, is_grads_batched=True))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
