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

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from structgrad.algorithms.derivatives import gradients
from structgrad.algorithms.gradients import value_and_gradient
from structgrad.algorithms.threads import run

#: Stands for log 0: finite, so that sums and differences of it are no NaN; exp of it, and of it plus any score, is 0.
_LOG_ZERO = -1e30
#: Reassociation and fused multiply-add only: infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract"}
#: A product of weights below this may have lost digits to underflow; the example is then redone with logarithms.
_TINY = 1e-280


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
    _, mean = value_and_gradient(torch_log_partition, scores, exists, root)
    return mean.clamp(0, 1)


# --- compiled, CPU: the kernels --------------------------------------------------------------------------------------


@njit(cache=True)
def _present(exists: Any, root: int, nodes: Any) -> int:
    """Write the nodes other than the root that touch an existing edge to ``nodes``; return how many there are."""
    n = exists.shape[0]
    m = 0
    for v in range(n):
        if v != root:
            for u in range(n):
                if exists[u, v] or exists[v, u]:
                    nodes[m] = v
                    m += 1
                    break
    nodes[m] = root
    return m


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def _eliminate(weights: Any, tops: Any, exists: Any, nodes: Any, m: int, w: Any, share: Any, via: Any) -> float:
    """Eliminate the nodes m-1, ..., 0 in linear float64; see above for the algorithm.

    Returns log Z, +inf if weights came near underflow (then ``_eliminate_logs`` has to be asked), -inf if there is no
    tree.
    """
    logz = 0.0
    for j in range(m):
        if tops[nodes[j]] > -math.inf:
            logz += tops[nodes[j]]
        for k in range(m + 1):
            w[k, j] = weights[nodes[k], nodes[j]]
            if w[k, j] < _TINY and k != j and exists[nodes[k], nodes[j]]:
                return math.inf
    block = 0
    for step in range(m):
        i = m - 1 - step
        total = w[m, i]
        for k in range(i):
            total += w[k, i]
        if total == 0.0:
            return -math.inf
        logz += math.log(total)
        least_in, least_out = math.inf, math.inf
        for j in range(i):
            if w[i, j] > 0.0:
                least_out = min(least_out, w[i, j])
        for row in range(i + 1):
            k = row if row < i else m
            p = w[k, i] / total
            share[k, i] = p
            if p > 0.0:
                least_in = min(least_in, p)
            for j in range(i):
                detour = p * w[i, j]
                whole = w[k, j] + detour
                w[k, j] = whole
                via[block + row, j] = detour / (whole + 1e-305)
            if row < i:
                w[k, row] = 0.0
                via[block + row, row] = 0.0
        if least_in * least_out < _TINY:
            return math.inf
        block += i + 1
    return logz


@njit(cache=True)
def _eliminate_logs(scores: Any, exists: Any, nodes: Any, m: int, w: Any, share: Any, via: Any) -> float:
    """The same with logarithms of the weights: slower, for any range of scores."""
    logz = 0.0
    for j in range(m):
        for k in range(m + 1):
            there = k != j and exists[nodes[k], nodes[j]]
            w[k, j] = scores[nodes[k], nodes[j]] if there else -math.inf
    block = 0
    for step in range(m):
        i = m - 1 - step
        top = w[m, i]
        for k in range(i):
            top = max(top, w[k, i])
        if top == -math.inf:
            return -math.inf
        total = math.exp(w[m, i] - top)
        for k in range(i):
            total += math.exp(w[k, i] - top)
        log_total = top + math.log(total)
        logz += log_total
        for row in range(i + 1):
            k = row if row < i else m
            log_p = w[k, i] - log_total
            share[k, i] = math.exp(log_p)
            for j in range(i):
                detour = log_p + w[i, j]
                old = w[k, j]
                high = max(old, detour)
                if j == row or high == -math.inf:
                    w[k, j] = -math.inf
                    via[block + row, j] = 0.0
                else:
                    whole = high + math.log1p(math.exp(min(old, detour) - high))
                    w[k, j] = whole
                    via[block + row, j] = math.exp(detour - whole)
        block += i + 1
    return logz


@njit(cache=True)
def _eliminate_safely(
    scores: Any, weights: Any, tops: Any, exists: Any, nodes: Any, m: int, w: Any, share: Any, via: Any
) -> tuple[float, bool]:
    """Log Z, and whether ``w`` was left holding logarithms."""
    logz = _eliminate(weights, tops, exists, nodes, m, w, share, via)
    if logz == math.inf:
        return _eliminate_logs(scores, exists, nodes, m, w, share, via), True
    return logz, False


@njit(cache=True, fastmath=_FAST)
def _expand(m: int, share: Any, via: Any, mu: Any) -> None:
    """Marginals ``mu[k, j]`` from the shares and detours of an elimination, undoing it node by node."""
    block = m * (m + 1) // 2
    for i in range(m):
        block -= i + 1
        for j in range(i):
            mu[i, j] = 0.0
        everything = 0.0
        for row in range(i + 1):
            k = row if row < i else m
            moved = 0.0
            for j in range(i):
                q = mu[k, j] * via[block + row, j]
                mu[k, j] -= q
                mu[i, j] += q
                moved += q
            mu[k, i] = moved
            everything += moved
        mu[i, i] = 0.0
        for row in range(i + 1):
            k = row if row < i else m
            mu[k, i] += share[k, i] * (1.0 - everything)
    # Every term above is accurate to some 1e-14 absolutely; what follows removes that much and no more.
    for k in range(m + 1):
        for j in range(m):
            mu[k, j] = min(1.0, max(0.0, mu[k, j]))


@njit(cache=True, fastmath=_FAST)
def _tangent(m: int, share: Any, via: Any, dlog: Any, slack: Any, mu: Any, dmu: Any) -> None:
    """Derivative ``dmu`` of the marginals along ``dlog`` (a direction of scores; overwritten)."""
    block = 0
    for step in range(m):
        i = m - 1 - step
        mean = share[m, i] * dlog[m, i]
        for k in range(i):
            mean += share[k, i] * dlog[k, i]
        for row in range(i + 1):
            k = row if row < i else m
            dlog[k, i] -= mean
            shift = dlog[k, i]
            for j in range(i):
                f = via[block + row, j]
                c = shift + dlog[i, j] - dlog[k, j]
                dlog[k, j] += f * c
                slack[block + row, j] = (1.0 - f) * c
        block += i + 1
    for i in range(m):
        block -= i + 1
        for j in range(i):
            mu[i, j] = 0.0
            dmu[i, j] = 0.0
        everything = 0.0
        d_everything = 0.0
        for row in range(i + 1):
            k = row if row < i else m
            moved = 0.0
            d_moved = 0.0
            for j in range(i):
                q = mu[k, j] * via[block + row, j]
                dq = dmu[k, j] * via[block + row, j] + q * slack[block + row, j]
                mu[k, j] -= q
                dmu[k, j] -= dq
                mu[i, j] += q
                dmu[i, j] += dq
                moved += q
                d_moved += dq
            mu[k, i] = moved
            dmu[k, i] = d_moved
            everything += moved
            d_everything += d_moved
        mu[i, i] = 0.0
        dmu[i, i] = 0.0
        for row in range(i + 1):
            k = row if row < i else m
            p = share[k, i]
            mu[k, i] += p * (1.0 - everything)
            dmu[k, i] += p * (dlog[k, i] * (1.0 - everything) - d_everything)


@njit(cache=True, nogil=True)
def _matrix_tree_kernel(
    first: int,
    stride: int,
    scores: Any,
    weights: Any,
    tops: Any,
    exists: Any,
    root: Any,
    with_marginals: bool,
    logz: Any,
    mean: Any,
) -> None:
    """``logz [B]`` and, if asked, ``mean [B, n, n]`` (zeroed by the caller); -inf where there is no arborescence."""
    n = scores.shape[1]
    w = np.empty((n, n))
    share = np.empty((n, n))
    mu = np.empty((n, n))
    nodes = np.empty(n + 1, np.int64)
    via = np.empty((n * (n - 1) // 2, n))
    for b in range(first, scores.shape[0], stride):
        m = _present(exists[b], root[b], nodes)
        logz[b], _ = _eliminate_safely(scores[b], weights[b], tops[b], exists[b], nodes, m, w, share, via)
        if with_marginals and logz[b] != -math.inf:
            _expand(m, share, via, mu)
            for k in range(m + 1):
                for j in range(m):
                    mean[b, nodes[k], nodes[j]] = mu[k, j]


@njit(cache=True, nogil=True)
def _tangent_kernel(
    first: int, stride: int, scores: Any, weights: Any, tops: Any, exists: Any, root: Any, direction: Any, out: Any
) -> None:
    """``out [B, n, n]`` (zeroed by the caller): the covariance of the edges times ``direction``."""
    n = scores.shape[1]
    w = np.empty((n, n))
    share = np.empty((n, n))
    mu = np.empty((n, n))
    dmu = np.empty((n, n))
    dlog = np.empty((n, n))
    nodes = np.empty(n + 1, np.int64)
    via = np.empty((n * (n - 1) // 2, n))
    slack = np.empty((n * (n - 1) // 2, n))
    for b in range(first, scores.shape[0], stride):
        m = _present(exists[b], root[b], nodes)
        _eliminate_safely(scores[b], weights[b], tops[b], exists[b], nodes, m, w, share, via)
        for k in range(m + 1):
            for j in range(m):
                there = exists[b, nodes[k], nodes[j]] and k != j
                dlog[k, j] = direction[b, nodes[k], nodes[j]] if there else 0.0
        _tangent(m, share, via, dlog, slack, mu, dmu)
        for k in range(m + 1):
            for j in range(m):
                if exists[b, nodes[k], nodes[j]] and k != j:
                    out[b, nodes[k], nodes[j]] = dmu[k, j]


@njit(cache=True, nogil=True)
def _sample_kernel(
    first: int, stride: int, scores: Any, weights: Any, tops: Any, exists: Any, root: Any, uniform: Any, out: Any
) -> None:
    """Exact Gibbs samples into ``out [B, n, n]`` (zeroed by the caller) from ``uniform [B, n, n]``; see
    :func:`sample_arborescences`.
    """
    n = scores.shape[1]
    w = np.empty((n, n))
    share = np.empty((n, n))
    nodes = np.empty(n + 1, np.int64)
    parent = np.empty(n, np.int64)
    reaches_root = np.empty(n + 1, np.bool_)
    known = np.empty(n + 1, np.bool_)
    walk = np.empty(n + 1, np.int64)
    via = np.empty((n * (n - 1) // 2, n))
    for b in range(first, scores.shape[0], stride):
        m = _present(exists[b], root[b], nodes)
        _, logs = _eliminate_safely(scores[b], weights[b], tops[b], exists[b], nodes, m, w, share, via)
        block = m * (m + 1) // 2
        for i in range(m):
            block -= i + 1
            for j in range(i):
                k = parent[j]
                row = k if k < i else i
                if uniform[b, i, j] < via[block + row, j]:
                    parent[j] = i
            # The parent of i may be any node that still reaches the root; those below i do not.
            for j in range(i):
                known[j] = False
            reaches_root[m], known[m] = True, True
            reaches_root[i], known[i] = False, True
            for j in range(i):
                length, v = 0, j
                while not known[v]:
                    walk[length] = v
                    length += 1
                    v = parent[v]
                for t in range(length):
                    known[walk[t]] = True
                    reaches_root[walk[t]] = reaches_root[v]
            top = w[m, i]
            for k in range(i):
                if reaches_root[k]:
                    top = max(top, w[k, i])
            total = 0.0
            for k in range(m + 1):
                if (k < i or k == m) and reaches_root[k]:
                    total += math.exp(w[k, i] - top) if logs else w[k, i]
            target = uniform[b, i, i] * total
            running = 0.0
            choice = -1
            for k in range(m + 1):
                if (k < i or k == m) and reaches_root[k]:
                    weight = math.exp(w[k, i] - top) if logs else w[k, i]
                    if weight > 0.0:
                        choice = k
                        running += weight
                        if running > target:
                            break
            parent[i] = choice
        for j in range(m):
            out[b, nodes[parent[j]], nodes[j]] = 1.0


# --- compiled, CPU: with derivatives ---------------------------------------------------------------------------------


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
        _run(_matrix_tree_kernel, scores, weights, exists, root, ctx.needs_input_grad[0], logz, mean)
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
        _run(_matrix_tree_kernel, scores, weights, exists, root, True, logz, mean)
        ctx.save_for_backward(scores, exists, root, *weights)
        return mean

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The Jacobian is the covariance of the edges, which is symmetric: the derivative along `upstream` is wanted.
        scores, exists, root, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients(lambda s: torch_marginals(s, exists, root), [scores], [upstream]), None, None
        out = torch.zeros_like(scores)
        _run(_tangent_kernel, scores, tuple(weights), exists, root, upstream.contiguous(), out)
        return out, None, None


# Under torch.compile these are called as they are, between two graphs.
_compiled_log_partition = torch.compiler.disable(_LogPartition.apply)
_compiled_marginals = torch.compiler.disable(_Marginals.apply)


# --- what structures call --------------------------------------------------------------------------------------------


def log_partition(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """``log Z`` ``[B]`` in float64, -inf where there is no arborescence; arguments as for :func:`eliminate`,
    contiguous.
    """
    if scores.device.type == "cpu":
        logz: Tensor = _compiled_log_partition(scores, exists, root)
        return logz
    return torch_log_partition(scores, exists, root)


def marginals(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """Edge marginals ``[B, n, n]`` in the dtype of the scores, differentiable (compiled once, then in plain torch)."""
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
    _run(_sample_kernel, scores, _weights(scores, exists), exists, root, uniform, out)
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
