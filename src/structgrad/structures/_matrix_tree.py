r"""The matrix-tree theorem for rooted directed trees, without a subtraction.

With weights ``w[k, j] = exp(s[k, j])`` of the edges k -> j, the arborescences from a root sum to the determinant of a
Laplacian (Tutte 1948; Koo et al. 2007; Paulus et al. 2020, B.7 and B.8). An LU factorisation of it cancels
catastrophically once scores spread over some ten nats. Instead nodes are eliminated one by one, in the way of
Grassmann, Taksar and Heyman (1985). Eliminating i, where ``D = sum_k w[k, i]``, gives

    Z(w) = D Z(w'),    w'[k, j] = w[k, j] + w[k, i] w[i, j] / D    (k != j),

with positive terms only, so that every intermediate is accurate to a few units in the last place whatever the scores.
Let ``share[k] = w[k, i] / D`` and ``via[k, j] = (w[k, i] w[i, j] / D) / w'[k, j]``, the part of the new edge that goes
through i; both lie in [0, 1] and are all that the derivatives of ``log Z`` need. Marginals follow by undoing the
elimination: with ``q[k, j] = mu'[k, j] via[k, j]``,

    mu[k, j] = mu'[k, j] - q[k, j],   mu[i, j] = sum_k q[k, j],   mu[k, i] = share[k] (1 - sum q) + sum_j q[k, j],

all of it sums and products of probabilities, so that marginals are right to some 1e-14 (absolutely) at scores of +-100,
and an exact Gibbs sample likewise (:func:`sample_arborescences`). O(n^3 / 3) multiplications, O(n^3 / 3) memory for one
example.

On the CPU compiled kernels do this for each example (in linear float64, with logarithms where that came near
underflow); elsewhere a loop over nodes does it for the whole batch with logarithms in float64, and autograd provides
the derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structgrad._threads import run
from structgrad.structures import _tree_kernels as kernels

#: Stands for log 0: finite, so that sums and differences of it are no NaN; exp of it, and of it plus any score, is 0.
_LOG_ZERO = -1e30


def present_nodes(exists: Tensor) -> Tensor:
    """Which nodes touch an existing edge: bool ``[*batch, n]``."""
    return exists.any(-1) | exists.any(-2)


# --- plain torch, any device -----------------------------------------------------------------------------------------


def eliminate(scores: Tensor, exists: Tensor, root: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Eliminate all nodes of a batch, differentiably.

    Args:
        scores: ``[B, n, n]``; what lies outside ``exists`` is never looked at.
        exists: bool ``[B, n, n]``.
        root: int64 ``[B]``.

    Returns:
        log Z ``[B]`` in float64, and the log-weights ``[B, n, n]`` before each elimination, node n-1 first. Absent
        nodes and the root are eliminated too, as nodes without children and with one edge of weight 1 from the root.
    """
    n = scores.shape[-1]
    nodes = torch.arange(n, device=scores.device)
    exists = exists & (nodes != root[:, None])[:, None, :] & (nodes[:, None] != nodes)
    w = torch.where(exists, scores.double(), _LOG_ZERO)
    # The root moves to a row of its own, the last; its old place becomes one more absent node.
    from_root = w.gather(1, root[:, None, None].expand(-1, 1, n))
    idle = ~present_nodes(exists) | (nodes == root[:, None])
    from_root = torch.where(idle[:, None, :], 0.0, from_root)
    w = torch.where((nodes == root[:, None])[:, :, None], _LOG_ZERO, w)
    w = torch.cat([w, from_root], 1)
    logz = w.new_zeros(w.shape[0])
    stages = []
    for i in reversed(range(n)):
        stages.append(w)
        total = torch.cat([w[:, :i, i], w[:, -1:, i]], 1).logsumexp(1)
        logz = logz + total
        rest = torch.cat([w[:, :i], w[:, -1:]], 1)
        detour = rest[:, :, i, None] - total[:, None, None] + w[:, i, None, :i]
        loops = torch.eye(i + 1, i, dtype=torch.bool, device=w.device)
        # Not logaddexp: its second derivative is NaN where the two are 700 apart.
        w = torch.stack([rest[:, :, :i], detour]).logsumexp(0).masked_fill(loops, _LOG_ZERO)
    return logz, stages


def torch_log_partition(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """``log Z`` by :func:`eliminate`."""
    return eliminate(scores, exists, root)[0]


def torch_marginals(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """The gradient of :func:`torch_log_partition`, differentiable itself."""
    create = torch.is_grad_enabled() and scores.requires_grad
    with torch.enable_grad():
        inputs = scores if create else scores.detach().requires_grad_()
        logz = torch_log_partition(inputs, exists, root)
        (mean,) = torch.autograd.grad(logz.sum(), inputs, create_graph=create)
    return mean.clamp(0, 1)


# --- compiled, CPU ---------------------------------------------------------------------------------------------------


def _weights(scores: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[B, n, n]`` relative to the largest that enters a node, and the logs of these ``[B, n]``; float64."""
    if scores.numel() == 0:
        return scores.double(), scores.new_zeros(scores.shape[:2], dtype=torch.float64)
    wide = scores.detach().double().masked_fill(~exists, -torch.inf)
    tops = wide.amax(1)
    return torch.exp(wide - tops.clamp_min(torch.finfo(torch.float64).min)[:, None]), tops


def _run(kernel: Any, scores: Tensor, weights: tuple[Tensor, Tensor], *rest: Any) -> None:
    run(kernel, scores.numel() * scores.shape[-1], scores, *weights, *rest)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
        logz = torch.empty(scores.shape[0], dtype=torch.float64)
        mean = torch.zeros_like(scores)
        weights = _weights(scores, exists)
        _run(kernels.matrix_tree, scores, weights, exists, root, ctx.needs_input_grad[0], logz, mean)
        ctx.save_for_backward(scores, exists, root, mean)
        return logz

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        scores, exists, root, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            mean = _Marginals.apply(scores, exists, root)
        return upstream[:, None, None].to(mean.dtype) * mean, None, None


class _Marginals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
        logz = torch.empty(scores.shape[0], dtype=torch.float64)
        mean = torch.zeros_like(scores)
        weights = _weights(scores, exists)
        _run(kernels.matrix_tree, scores, weights, exists, root, True, logz, mean)
        ctx.save_for_backward(scores, exists, root, *weights)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # The Jacobian is the covariance of the edges, which is symmetric: the derivative along `upstream` is wanted.
        scores, exists, root, *weights = ctx.saved_tensors
        out = torch.zeros_like(scores)
        _run(kernels.matrix_tree_tangent, scores, tuple(weights), exists, root, upstream.contiguous(), out)
        return out, None, None


# Under torch.compile these are called as they are, between two graphs.
_compiled_log_partition = torch.compiler.disable(_LogPartition.apply)
_compiled_marginals = torch.compiler.disable(_Marginals.apply)


def log_partition(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """``log Z`` ``[B]`` in float64, -inf where there is no arborescence; arguments as for :func:`eliminate`,
    contiguous.
    """
    if scores.device.type == "cpu":
        logz: Tensor = _compiled_log_partition(scores, exists, root)
        return logz
    return torch_log_partition(scores, exists, root)


def marginals(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """Edge marginals ``[B, n, n]`` in the dtype of the scores, differentiable once (twice elsewhere than on the
    CPU).
    """
    if scores.device.type == "cpu":
        mean: Tensor = _compiled_marginals(scores, exists, root)
        return mean
    return torch_marginals(scores, exists, root)


def sample_arborescences(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """One exact Gibbs sample for each example: ``[B, n, n]``.

    The elimination is undone on trees. Given a tree of the reduced graph without i, each of its edges k -> j goes
    through i with probability ``via[k, j]``, and then j becomes a child of i. If so, the parent of i is drawn with
    probability proportional to ``w[k, i]`` among the k that still reach the root (not those below i); that the parents
    k of those edges say nothing more is Cayley's identity: with ``a`` the weight from the root's side and
    ``b_1, ..., b_r`` that from the subtrees cut off, the ways to attach them to each other weigh
    ``a (a + sum b)^(r - 1)``, and ``a + sum b = D``. No rejection, no random walk whose length depends on the scores
    (as Wilson's), no subtraction.
    """
    uniform = torch.rand(scores.shape, dtype=torch.float64, device=scores.device)
    scores = scores.detach()
    if scores.device.type != "cpu":
        return torch_sample(scores, exists, root, uniform)
    out = torch.zeros_like(scores)
    _run(kernels.sample_arborescences, scores, _weights(scores, exists), exists, root, uniform, out)
    return out


def torch_sample(scores: Tensor, exists: Tensor, root: Tensor, uniform: Tensor) -> Tensor:
    """:func:`sample_arborescences` for any device."""
    batch, n = scores.shape[:2]
    rows = torch.arange(batch, device=scores.device)
    stages = eliminate(scores, exists, root)[1]
    # Node n is the root; above[x, y]: y is x or an ancestor of x. Only columns of nodes back in the tree matter.
    parent = torch.full((batch, n), n, device=scores.device)
    above = torch.eye(n + 1, dtype=torch.bool, device=scores.device).repeat(batch, 1, 1)
    above[:, :, n] = True
    for i in range(n):
        w = stages[n - 1 - i]
        into_i = torch.cat([w[:, :i, i], w[:, -1:, i]], 1)
        row = parent[:, :i].clamp(max=i)  # of the parent in the reduced weights, where the root is the last
        detour = into_i.gather(1, row) - into_i.logsumexp(1, keepdim=True) + w[:, i, :i]
        direct = torch.cat([w[:, :i, :i], w[:, -1:, :i]], 1).gather(1, row[:, None, :])[:, 0]
        moved = uniform[:, i, :i] < torch.sigmoid(detour - direct)
        parent[:, :i] = torch.where(moved, i, parent[:, :i])
        cuts = (above[:, :, :i] & moved[:, None, :]).sum(-1)  # how many moved nodes are above x or x
        below = cuts > 0
        attached = torch.cat([~below[:, :i], torch.ones_like(below[:, :1])], 1)
        weights = into_i.masked_fill(~attached, -torch.inf).softmax(1).cumsum(1)
        drawn = (weights <= uniform[:, i, i, None] * weights[:, -1:]).sum(1).clamp(max=i)
        parent[:, i] = torch.where(drawn == i, n, drawn)
        above[:, i] = above[rows, parent[:, i]]
        above[:, i, i] = True
        # What lay below a moved node keeps its ancestors up to that node, and continues with i and those of i.
        kept = above & (cuts[:, :, None] == cuts[:, None, :])
        above = torch.where(below[:, :, None], kept | above[:, i, None, :], above)
    chosen = torch.where(parent == n, root[:, None], parent)
    nodes = torch.arange(n, device=scores.device)
    there = present_nodes(exists) & (nodes != root[:, None])
    return torch.zeros_like(scores).scatter(1, chosen[:, None, :], there[:, None, :].to(scores.dtype))
