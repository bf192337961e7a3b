"""What compiled code does under ``torch.func`` (``vmap``, ``jvp``, ``grad`` and what is made of them).

The tensors of a transform have no memory that compiled code could read. What is differentiated is then computed in
plain torch (``values_can_be_read`` says no); what has no derivative is computed as ever, by :func:`over_batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structgrad.algorithms.eager import transformed


def over_batch(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, which sees plain tensors under ``torch.func`` transforms as well: the examples of
    ``vmap`` are one more leading dimension.

    Args:
        function: of tensors with any leading dimensions, the same of all; so are its results.
        tensors: the arguments.

    Returns:
        what the function returns, without a derivative.
    """
    if not any(map(transformed, tensors)):
        return function(*tensors)
    results: tuple[Tensor, ...] = _OverBatch.apply(function, *tensors)
    return results


class _OverBatch(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], function: Any, *tensors: Tensor) -> tuple[Any, ...]:
        first = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, dims[1:], strict=True)
        ]
        results = over_batch(function, *first)
        return results, (0,) * len(results)
