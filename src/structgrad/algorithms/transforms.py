"""Compiled code under ``torch.func`` (``vmap``, ``jvp``, ``grad`` and functions made of them).

The tensors of a transform have no memory that compiled code could read. What needs a derivative is
therefore computed in plain torch (``values_can_be_read`` returns False). What has no derivative
goes through :func:`over_batch`, which calls the usual code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structgrad.algorithms.eager import transformed


def over_batch(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, where the function sees plain tensors under ``torch.func`` transforms
    too.

    The examples of ``vmap`` become one more leading dimension.

    Args:
        function: accepts tensors with any leading dimensions, the same for all, and returns such
            tensors.
        tensors: the arguments.

    Returns:
        the results of the function, without a derivative.
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
