"""Gradients as values: the derivative of a log-partition function is a mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structgrad.algorithms.eager import transformed


def value_and_gradient(function: Callable[..., Tensor], scores: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """``function(scores, *others)`` and the gradient of its sum in the scores.

    It works under ``no_grad`` and ``inference_mode`` as well.

    Args:
        function: differentiable in its first argument.
        scores: any shape.
        others: the other arguments of the function, tensors without gradient.

    Returns:
        both are differentiable if the scores are; the gradient has the shape of the scores.
    """
    if torch.compiler.is_compiling() or any(map(transformed, (scores, *others))):

        def total(inputs: Tensor) -> tuple[Tensor, Tensor]:
            value = function(inputs, *others)
            return value.sum(), value

        gradient, (_, value) = torch.func.grad_and_value(total, has_aux=True)(scores)
        return value, gradient
    tracked = torch.is_grad_enabled() and scores.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode cannot take part in a graph, but their copies can.
        inputs = scores if tracked else scores.detach().clone().requires_grad_()
        value = function(inputs, *(other.clone() if other.is_inference() else other for other in others))
        if not value.requires_grad:  # nothing to sum over: no part was looked at
            return value, torch.zeros_like(inputs)
        (gradient,) = torch.autograd.grad(value.sum(), inputs, create_graph=tracked, materialize_grads=True)
        if tracked and not gradient.requires_grad:  # a constant, as of a single vertex, whose derivative is 0
            gradient = torch.where(torch.zeros_like(inputs, dtype=torch.bool), inputs, gradient)
    return (value, gradient) if tracked else (value.detach(), gradient)
