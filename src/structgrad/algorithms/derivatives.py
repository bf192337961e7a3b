"""Second derivatives of code with a handwritten backward pass, and of roots found by iteration.

A backward pass in compiled code has no derivative of its own. If a second derivative is wanted,
autograd would drop the path silently, even where the pass is marked once-differentiable. This
happens in ``torch.autograd.grad(..., create_graph=True)`` with other inputs and in
``torch.autograd.functional.hessian``. Therefore a backward pass that builds a graph
(``torch.is_grad_enabled()``) does one of two things. It goes through a twin in plain torch, or a
node that raises ties its result to all that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structgrad.algorithms.eager import transformed


def twin_needed(*upstream: Tensor | None) -> bool:
    """Whether a compiled backward pass must leave its work to a twin in plain torch.

    It must if a graph is to be built. It must also if the upstream gradients belong to a vectorised
    Jacobian (``is_grads_batched``), because compiled code cannot read those.
    """
    return torch.is_grad_enabled() or any(u is not None and transformed(u) for u in upstream)


def gradients(
    twin: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Vector-Jacobian products of a twin in plain torch, themselves differentiable in ``inputs``
    and ``upstream``.

    For the backward pass of an ``autograd.Function``, if :func:`twin_needed` says so.

    Args:
        twin: the same function of its saved ``inputs``, in plain torch.
        inputs: saved by ``ctx.save_for_backward``, so that they are still connected.
        upstream: one for each output, None for those without a gradient.

    Returns:
        one for each input; None for inputs that need none.
    """
    # Aliases: if an input is a function of another input (or of an upstream gradient), that path is
    # not ours.
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [i.view_as(i) if i.requires_grad else i for i in inputs]
        outputs = twin(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
    wanted = [i for i in inputs if i.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) if i.requires_grad else None for i in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [u for _, u in pairs], create_graph=again, materialize_grads=True
    )
    by_input = iter(found)
    return [next(by_input) if i.requires_grad else None for i in inputs]


def second_gradients(
    twin: Callable[[Tensor], Tensor], scores: Tensor, upstream: Tensor, again: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The same for a backward pass that is an operator: derivatives of the twin's vector-Jacobian
    product.

    Args:
        twin: the forward pass as a function of its scores, in plain torch.
        scores: saved, still connected to the graph.
        upstream: the upstream gradient of the forward pass's value; likewise connected.
        again: the upstream gradient of the backward pass's result.

    Returns:
        the gradients in the scores and in ``upstream``; None where none is needed.
    """

    def backward(inputs: Tensor, along: Tensor) -> Tensor:
        inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        return torch.autograd.grad(twin(inputs), inputs, along, create_graph=True)[0]

    with torch.enable_grad():
        by_scores, by_upstream = gradients(backward, [scores, upstream], [again])
    return by_scores, by_upstream


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, what: str, *depends_on: Tensor) -> Tensor:
        ctx.what = what
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(f"{ctx.what} has a first derivative only; a second one was asked for")


def first_order_only(gradient: Tensor, what: str, *depends_on: Tensor) -> Tensor:
    """The result of a backward pass, made so that every attempt to differentiate it raises.

    Args:
        gradient: any shape.
        what: the subject of the message.
        depends_on: the tensors of which the gradient is a function.
    """
    if not torch.is_grad_enabled():
        return gradient
    tied: Tensor = _FirstOrder.apply(gradient, what, *depends_on)
    return tied


def implicit(root: Tensor, residual: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor]) -> Tensor:
    """A root of an equation, differentiable twice in all that the equation depends on.

    The value is unchanged. Two simplified Newton steps start at the root; they move only
    derivatives. The first step makes the first derivative right (the implicit function theorem),
    the second step the second derivative. Each step raises the order of the error by one.

    Args:
        root: found without a graph.
        residual: the equation's left side, differentiable. Its distance from 0 at the root does not
            matter.
        step: minus the inverse Jacobian of the residual at the root, as a linear function without a
            graph.
    """
    for _ in range(2):
        excess = residual(root)
        root = root + step(excess - excess.detach())
    return root
