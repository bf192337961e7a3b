"""A step of a gated recurrent unit: compiled, and as torch does it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from structgrad.algorithms import threads
from structgrad.tasks.listops.gru import gru_step
from structgrad.testing import computing


def arguments(dtype: torch.dtype = torch.float32) -> tuple[nn.GRUCell, Tensor, Tensor]:
    torch.manual_seed(0)
    cell, inputs, state = nn.GRUCell(5, 20), torch.randn(7, 5), torch.randn(7, 20)
    return cell.to(dtype), inputs.to(dtype).requires_grad_(), state.to(dtype).requires_grad_()


@pytest.mark.parametrize("workers", [1, 2])
def test_values_and_gradients(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    cell, inputs, state = arguments()
    everything = [inputs, state, *cell.parameters()]
    results = []
    for function in (gru_step, nn.GRUCell.__call__):
        following = function(cell, inputs, state)
        results.append((following, *torch.autograd.grad(following, everything, torch.cos(following.detach()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives() -> None:
    cell, inputs, state = arguments()
    everything = [inputs, state, *cell.parameters()]
    found = []
    for function in (gru_step, nn.GRUCell.__call__):
        gradients = torch.autograd.grad(function(cell, inputs, state).square().sum(), everything, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.sin().sum() for g in gradients]).sum(), everything))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("path", ["native", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_paths(path: str, dtype: torch.dtype) -> None:
    cell, inputs, state = arguments(dtype)
    with computing(path):
        torch.testing.assert_close(gru_step(cell, inputs, state), cell(inputs, state))


def test_far_numbers() -> None:
    cell, inputs, state = arguments()
    with torch.no_grad():
        inputs.mul_(1e4)
        inputs[2, 1], inputs[3, 0] = torch.nan, torch.inf
    torch.testing.assert_close(gru_step(cell, inputs, state), cell(inputs, state), equal_nan=True)


def test_vectorised_jacobian() -> None:
    cell, inputs, state = arguments()
    everything, upstream = [inputs, state, *cell.parameters()], torch.randn(2, 7, 20)
    found = [
        torch.autograd.grad(function(cell, inputs, state), everything, upstream, is_grads_batched=True)
        for function in (gru_step, nn.GRUCell.__call__)
    ]
    torch.testing.assert_close(*found)


class Applied(nn.Module):
    """A function of a cell, as a module."""

    def __init__(self, cell: nn.GRUCell, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.cell, self.function = cell, function

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        return self.function(self.cell, inputs, state)


def test_functional_transform_of_the_weights() -> None:
    cell, *given = arguments()
    inputs, state = (t.detach() for t in given)
    weights = {f"cell.{name}": weight.detach() for name, weight in cell.named_parameters()}
    found = []
    for function in (gru_step, nn.GRUCell.__call__):
        module = Applied(cell, function)

        def loss(own: dict[str, Tensor], module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, own, (inputs, state)).square().sum()

        found.append(torch.func.grad(loss)(weights))
    torch.testing.assert_close(*found)


def test_sizes_that_do_not_fit_are_refused() -> None:
    cell, inputs, state = arguments()
    with pytest.raises(RuntimeError, match="batch size"):
        gru_step(cell, inputs, state[:3])
