"""Matrix products of structures. They stay float32 whatever the precision of the model's products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from structgrad.common.private import constant_when_traced


@contextmanager
def _highest() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@constant_when_traced  # a run has one precision, and a compiled step cannot ask for it
def _is_highest() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` and its derivatives, as under
    ``torch.set_float32_matmul_precision("highest")``.

    Args:
        left: ``[*batch, m, k]``.
        right: ``[*batch, k, n]``; batch dimensions are broadcast.
    """
    if left.dtype != torch.float32 or _is_highest():
        return left @ right
    return _Product.apply(left, right)  # type: ignore[no-any-return]


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with _highest():
            return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (left, right) = gradients, ctx.saved_tensors
        of_left = product(gradient, right.mT).sum_to_size(left.shape) if ctx.needs_input_grad[0] else None
        of_right = product(left.mT, gradient).sum_to_size(right.shape) if ctx.needs_input_grad[1] else None
        return of_left, of_right
