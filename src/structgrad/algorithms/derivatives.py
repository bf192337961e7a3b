"""Second derivatives of what is differentiated by hand: backward passes, and roots found by iteration.

A backward pass in compiled code has no derivative of its own. Asked for one, autograd would drop the path silently
(``torch.autograd.grad(..., create_graph=True)`` with other inputs, ``torch.autograd.functional.hessian``), also where
the pass is marked once-differentiable. A backward pass that builds a graph (``torch.is_grad_enabled()``) therefore
either goes through a twin in plain torch, or is tied to what it depends on by a node that raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structgrad.algorithms.eager import transformed


def twin_needed(*upstream: Tensor | None) -> bool:
    """Whether a compiled backward pass has to leave its work to a twin in plain torch: a graph is to be built, or the
    upstream gradients are those of a vectorised Jacobian (``is_grads_batched``), which compiled code cannot read.
    """
    return torch.is_grad_enabled() or any(u is not None and transformed(u) for u in upstream)


def gradients(
    twin: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Vector-Jacobian products of a twin in plain torch, themselves differentiable in ``inputs`` and ``upstream``.

    For the backward pass of an ``autograd.Function``, where :func:`twin_needed` says so.

    Args:
        twin: what the function computes, of its saved ``inputs``.
        inputs: saved by ``ctx.save_for_backward``, so that they are still connected.
        upstream: one for each output, None for those without a gradient.

    Returns:
        one for each input; None for inputs that need none.
    """
    # Aliases: where an input is a function of another (an upstream gradient may be), the path between them is not ours.
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
    """The same for a backward pass that is an operator: derivatives of the twin's vector-Jacobian product.

    Args:
        twin: what the forward pass computes of its scores, in plain torch.
        scores: saved, still connected.
        upstream: of the forward pass's value; likewise.
        again: upstream of the backward pass's result.

    Returns:
        in the scores and in ``upstream``; None for what needs none.
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
    """The result of a backward pass, of which a derivative raises, however it is asked for.

    Args:
        gradient: any shape.
        what: the subject of the message.
        depends_on: what the gradient is a function of.
    """
    if not torch.is_grad_enabled():
        return gradient
    tied: Tensor = _FirstOrder.apply(gradient, what, *depends_on)
    return tied


def implicit(root: Tensor, residual: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor]) -> Tensor:
    """A root of an equation, differentiable twice in whatever the equation depends on; its value is unchanged.

    Two simplified Newton steps from the root, along which nothing moves but derivatives: the first makes those of
    first order right (the implicit function theorem), the second those of second order, as each leaves an error of one
    order more.

    Args:
        root: found without a graph.
        residual: the equation's left side, differentiable; how far it is from 0 at the root does not matter.
        step: minus the inverse Jacobian of the residual at the root, without a graph: linear.
    """
    for _ in range(2):
        excess = residual(root)
        root = root + step(excess - excess.detach())
    return root
