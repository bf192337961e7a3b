"""Structures stay float32, bit by bit, whatever the precision of a model's products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from structgrad import losses
from structgrad.algorithms.products import product
from structgrad.structures import Arborescence, KSubset, LinearChain, Matching, OneHot, SpanningTree, Structure


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def under_all(function: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    found = []
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        found.append(function())
    return found


def assert_equal_bits(found: list[tuple[Tensor, ...]]) -> None:
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


CASES: list[tuple[Structure, tuple[int, ...]]] = [
    (Arborescence(), (3, 12, 12)),
    (SpanningTree(), (3, 12, 12)),
    (KSubset(k=3), (3, 40)),
    (OneHot(), (3, 40)),
    (Matching(), (2, 8, 8)),
    (LinearChain(4), (3, 7, 4, 4)),
]


@pytest.mark.parametrize(("structure", "shape"), CASES, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize("oracle", ["log_partition", "marginals", "project", "sinkhorn"])
def test_oracles_and_their_gradients_are_the_same(structure: Structure, shape: tuple[int, ...], oracle: str) -> None:
    if oracle not in structure.oracles and not (oracle == "sinkhorn" and hasattr(structure, "sinkhorn")):
        pytest.skip(f"{structure.name} has no {oracle}")

    def gradients() -> tuple[Tensor, ...]:
        scores = (3 * torch.randn(shape)).requires_grad_()
        value = getattr(structure, oracle)(scores)
        weights = torch.randn_like(value)
        return value.detach(), *torch.autograd.grad((value * weights).sum(), scores)

    assert_equal_bits(under_all(gradients))


def test_losses_are_the_same() -> None:
    def gradient() -> tuple[Tensor, ...]:
        scores = torch.randn(4, 9, 9, requires_grad=True)
        target = Arborescence().argmax(torch.randn(4, 9, 9))
        value = losses.SparseMAPLoss(Arborescence())(scores, target)
        return value.detach(), *torch.autograd.grad(value.sum(), scores)

    assert_equal_bits(under_all(gradient))


@pytest.mark.parametrize("shapes", [((300, 256), (256, 280)), ((2, 1, 40, 64), (3, 64, 50)), ((1, 7), (5, 7, 7))])
def test_products_and_their_derivatives(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Of first and second order, broadcast, and under ``vmap``."""

    def everything(multiply: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        left, right = (torch.randn(shape, requires_grad=True) for shape in shapes)
        value = multiply(left, right)
        first = torch.autograd.grad(value.pow(3).sum() / 100, (left, right), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (left, right))
        return value.detach(), *(g.detach() for g in (*first, *second))

    expected = everything(torch.matmul)
    for found in under_all(lambda: everything(product)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    left, right = torch.randn(5, 3, 4), torch.randn(4, 2)
    torch.set_float32_matmul_precision("medium")
    mapped = torch.func.vmap(lambda one: product(one, right))(left)
    torch.testing.assert_close(mapped, left @ right)
