"""The decoder's rollout as one function with its own derivative, for devices where every operator
is a launch.

It computes the same as ``Decoder._step``, step by step. Autograd would launch an accumulation for
each parameter at each step and keep the saved tensors of each operator. Here the steps write into
common tensors. The backward pass propagates only the gradient of the layout. The gradients of
parameters are one product over all steps at the end.

Rows of vertices are ``[N * n]``, and rows of edges ``[N * n * (n - 1)]``, receiver-major (see
``model``). Both edge types lie side by side: ``[..., 2, hidden]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.derivatives import gradients, twin_needed


def rollout(state: Tensor, edges: Tensor, parameters: list[Tensor], steps: int) -> Tensor:
    """All states that follow ``state``.

    Args:
        state: ``[N, n, features]``, the first layouts.
        edges: ``[N, n, n - 1]``, weights of the edges.
        parameters: those of the decoder: weight ``[2 * hidden, 2 * features]`` and bias of the first layer of
            messages, weight ``[2, hidden, hidden]`` and bias ``[2, hidden]`` of the second, three
            weights and biases of the update.
        steps: number of steps.

    Returns:
        ``[N, steps, n, features]``.
    """
    if torch.compiler.is_compiling():
        return _in_torch(steps, state, edges, *parameters)
    states: Tensor = _Rollout.apply(state, edges, steps, *parameters)
    return states


def _ends(n: int, device: torch.device) -> Tensor:
    """Sender and receiver of every edge, alternating: int64 ``[2 * n * (n - 1)]``."""
    vertex = torch.arange(n, device=device)
    senders = (vertex[:, None] + vertex[1:]) % n
    return torch.stack((senders, vertex[:, None].expand_as(senders)), -1).flatten()


def _by_type(edges: Tensor, hidden: int) -> Tensor:
    """Rows of edges ``[edges, 2 * hidden]`` as a batch of two: ``[2, edges, hidden]``, a view."""
    return edges.view(-1, 2, hidden).transpose(0, 1)


def _through_relu(grad: Tensor, output: Tensor) -> None:
    """``grad`` where ``output`` of a relu is positive, in place."""
    torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, edges: Tensor, steps: int, *parameters: Tensor) -> Tensor:
        w1, b1, w2, b2, *update = parameters
        (graphs, n, features), hidden = state.shape, b2.shape[-1]
        vertices, messages_in = graphs * n, 2 * (n - 1)
        ends = _ends(n, state.device)
        types = torch.stack((1 - edges, edges), -1).view(vertices, 1, messages_in)
        around = state.new_empty(steps, graphs, len(ends), features)
        first, second = state.new_empty(2, steps, vertices * (n - 1), 2 * hidden)
        # A vertex's inputs: its features and received messages.
        known = state.new_empty(steps + 1, vertices, features + hidden)
        third, fourth = state.new_empty(2, steps, vertices, hidden)
        states = known[..., :features].unflatten(1, (graphs, n))
        states[0] = state
        for t in range(steps):
            torch.index_select(states[t], 1, ends, out=around[t])
            torch.addmm(b1, around[t].view(-1, 2 * features), w1.mT, out=first[t]).relu_()
            torch.baddbmm(b2.unsqueeze(1), _by_type(first[t], hidden), w2, out=_by_type(second[t], hidden))
            second[t].relu_()
            torch.bmm(types, second[t].view(vertices, messages_in, hidden), out=known[t, :, features:].unsqueeze(1))
            torch.addmm(update[1], known[t], update[0].mT, out=third[t]).relu_()
            torch.addmm(update[3], third[t], update[2].mT, out=fourth[t]).relu_()
            torch.addmm(known[t, :, :features], fourth[t], update[4].mT, out=known[t + 1, :, :features]).add_(update[5])
        ctx.save_for_backward(state, edges, *parameters, ends, types, around, first, second, known, third, fourth)
        following: Tensor = states[1:].transpose(0, 1).contiguous()
        return following

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        state, edges, *parameters, ends, types, around, first, second, known, third, fourth = ctx.saved_tensors
        if twin_needed(upstream):
            steps = upstream.shape[1]
            found = gradients(lambda *inputs: _in_torch(steps, *inputs), [state, edges, *parameters], [upstream])
            return *found[:2], None, *found[2:]
        w1, _, w2, b2, *update = parameters
        (graphs, n, features), hidden, steps = state.shape, b2.shape[-1], len(around)
        vertices, messages_in = graphs * n, 2 * (n - 1)
        # The ends of edges as a matrix: the edges' gradient goes back to the layout by a product
        # with it.
        scatter = F.one_hot(ends, n).to(state.dtype)
        moved = torch.cat((upstream.new_zeros(graphs, 1, n, features), upstream), 1).transpose(0, 1).contiguous()
        moved = moved.view(steps + 1, vertices, features)
        d_first, d_second = torch.empty_like(first), torch.empty_like(second)
        d_third, d_fourth = torch.empty_like(third), torch.empty_like(fourth)
        d_types = types.new_empty(steps, vertices, 1, messages_in)
        for t in reversed(range(steps)):
            torch.mm(moved[t + 1], update[4], out=d_fourth[t])
            _through_relu(d_fourth[t], fourth[t])
            torch.mm(d_fourth[t], update[2], out=d_third[t])
            _through_relu(d_third[t], third[t])
            d_known = torch.mm(d_third[t], update[0])
            d_received = d_known[:, features:].unsqueeze(1)
            messages = (vertices, messages_in, hidden)
            torch.bmm(d_received, second[t].view(messages).mT, out=d_types[t])
            torch.mul(types.mT, d_received, out=d_second[t].view(messages))
            _through_relu(d_second[t], second[t])
            torch.bmm(_by_type(d_second[t], hidden), w2.mT, out=_by_type(d_first[t], hidden))
            _through_relu(d_first[t], first[t])
            d_around = torch.mm(d_first[t], w1).view(graphs, len(scatter), features)
            moved[t].add_(moved[t + 1])
            moved[t].add_(d_known[:, :features])
            torch.baddbmm(
                moved[t].view(state.shape), scatter.mT.expand(graphs, -1, -1), d_around, out=moved[t].view(state.shape)
            )
        d_edges = d_types.sum(0).view(*edges.shape, 2)
        rows = (d_first, d_second, d_third, d_fourth, moved[1:])
        d1, d2, d3, d4, d5 = (r.flatten(0, 1) for r in rows)
        return (
            moved[0].view(state.shape),
            d_edges[..., 1] - d_edges[..., 0],
            None,
            d1.mT @ around.view(-1, 2 * features),
            d1.sum(0),
            _by_type(first, hidden).mT @ _by_type(d2, hidden),
            d2.sum(0).view_as(b2),
            d3.mT @ known[:-1].flatten(0, 1),
            d3.sum(0),
            d4.mT @ third.flatten(0, 1),
            d4.sum(0),
            d5.mT @ fourth.flatten(0, 1),
            d5.sum(0),
        )


def _in_torch(steps: int, state: Tensor, edges: Tensor, *parameters: Tensor) -> Tensor:
    """The same as :class:`_Rollout`, in operations that autograd knows."""
    w1, b1, w2, b2, *update = parameters
    ends = _ends(state.shape[1], state.device)
    types = torch.stack((1 - edges, edges), -1)
    states = []
    for _ in range(steps):
        around = state[:, ends].reshape(*edges.shape, 2 * state.shape[-1])
        first = F.linear(around, w1, b1).relu().unflatten(-1, b2.shape)
        messages = (torch.einsum("...th,thk->...tk", first, w2) + b2).relu()
        received = (types.unsqueeze(-1) * messages).sum((-3, -2))
        hidden = F.linear(torch.cat((state, received), -1), *update[:2]).relu()
        state = state + F.linear(F.linear(hidden, *update[2:4]).relu(), *update[4:])
        states.append(state)
    return torch.stack(states, 1)
