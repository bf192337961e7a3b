r"""The matrix-tree theorem for rooted directed trees, without a subtraction.

Let ``w[k, j] = exp(s[k, j])`` be the weight of the edge k -> j. The total weight of the
arborescences from a root is the determinant of a Laplacian (Tutte 1948; Koo et al. 2007; Paulus et
al. 2020, B.7 and B.8). An LU factorisation of it cancels catastrophically once scores spread over
about ten nats. Instead nodes are eliminated one by one, in the way of Grassmann, Taksar and Heyman
(1985). Eliminating i, where ``D = sum_k w[k, i]`` and ``p[k] = w[k, i] / D``, gives

    Z(w) = D Z(w'),    w'[k, j] = w[k, j] + p[k] w[i, j]    (k != j).

All terms are positive, so every intermediate is accurate to a few units in the last place for any
scores. The derivatives ``g = d log Z / d w`` follow from the same numbers in the opposite order.
The derivatives ``g[k, j]`` of the weights that remained after eliminating i do not change, and

    g[i, j] = sum_k p[k] g[k, j],    g[k, i] = (1 - sum_j g[i, j] w[i, j] + sum_j g[k, j] w[i, j]) /
    D.

The only subtraction involves the mean number of children of i. So the absolute error of the
marginals ``w g`` is about 1e-14 at scores of +-100. The same is true of an exact Gibbs sample
(:func:`sample_arborescences`). After its elimination, row i keeps ``w[i, j]`` and column i keeps
``p[k]``. So everything is done in place, with n^3 multiplications and O(n^2) memory for one
example.

On the CPU compiled kernels invert the Laplacian of an example, which is faster. They keep the
result if residuals and a bound on the amplification of rounding certify it (:func:`_invert`); for
most scores in training they do. Otherwise they do the elimination above in linear float64. If
products come near underflow, they do it with logarithms (:func:`_eliminate_logs`), and each thread
takes O(n^3) memory. GPU kernels work with logarithms throughout, one program an example. The plain
torch version serves larger graphs and other devices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms import gpu
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import gradients, second_gradients, twin_needed
from structgrad.algorithms.eager import on_host, transformed
from structgrad.algorithms.gpu import tl
from structgrad.algorithms.gradients import value_and_gradient
from structgrad.algorithms.semirings import IMPOSSIBLE, log_sum
from structgrad.algorithms.threads import run
from structgrad.common.private import untraced

#: Stands for log 0 in the kernels, as ``IMPOSSIBLE`` does in plain torch. It is finite, so sums and
#: differences of it are not NaN; exp of it plus any score is 0.
_NO_WEIGHT = gpu.constant(IMPOSSIBLE)
#: The largest graph for one GPU program. Samples beyond 64 nodes take 128 KiB of shared memory,
#: which GPUs of data centres have.
LARGEST = 128
#: The flags allow reassociation and fused multiply-add only: infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract"}
#: A product of weights below this may have lost digits to underflow. The example is then redone
#: with logarithms.
_TINY = 1e-280
#: How the derivatives of an example are computed: not at all, because it has no tree; from an
#: inverse; by elimination; by elimination of logarithms.
_NOTHING, _INVERSE, _ELIMINATION, _LOGS = range(4)
#: An inverse is used if its amplification of rounding is below the first and its residuals are
#: below the second.
_AMPLIFIED, _RESIDUAL = 1e3, 1e-10
#: ``exp(-x)`` is 0 from here on in float64, and ``log1p(x) == x`` up to here.
_FAR, _EPSILON = 746.0, 1e-16


def present_nodes(exists: Tensor) -> Tensor:
    """The nodes that touch an existing edge: bool ``[*batch, n]``."""
    return exists.any(-1) | exists.any(-2)


def log_partition(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """``log Z`` ``[B]`` in float64, -inf where there is no arborescence.

    The arguments are those of :func:`eliminate`, contiguous.
    """
    logz: Tensor
    if not transformed(exists) and gpu.takes(scores, scores.shape[-1], LARGEST, on_cpu=True):
        logz, _ = _eliminate_operator(scores, exists, root)
        return logz
    if on_host(scores) and not (transformed(scores) or transformed(exists)):
        logz = _compiled_log_partition(scores, exists, root)
        return logz
    return torch_log_partition(scores, exists, root)


def marginals(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """Edge marginals ``[B, n, n]`` in the dtype of the scores.

    They are differentiable: the first derivative is compiled, later ones are in plain torch.
    """
    mean: Tensor
    if not transformed(exists) and gpu.takes(scores, scores.shape[-1], LARGEST, on_cpu=True):
        mean = _marginals_operator(scores, exists, root)
        return mean
    if on_host(scores) and not (transformed(scores) or transformed(exists)):
        mean = _compiled_marginals(scores, exists, root)
        return mean
    return torch_marginals(scores, exists, root)


def sample_arborescences(scores: Tensor, exists: Tensor, root: Tensor, uniform: Tensor | None = None) -> Tensor:
    """One exact Gibbs sample for each example: ``[B, n, n]``.

    It is a function of the noise ``uniform`` (float64, in the shape of the scores), which is drawn
    if it is not given. Noise for more rows, ``[d B, n, n]``, gives d samples of each example after
    one elimination; row i is of example i modulo B.

    The elimination is undone on trees. Take a tree of the reduced graph without i. Each of its
    edges k -> j goes through i with probability ``p[k] w[i, j] / w'[k, j]``, and then j becomes a
    child of i. If some edge does, the parent of i is drawn with probability proportional to ``w[k,
    i]`` among the k that still reach the root (not those below i).

    The old parents k of those edges carry no further information, by Cayley's identity. Let ``a``
    be the weight from the root's side, and ``b_1, ..., b_r`` the weights from the subtrees that
    were cut off. The ways to attach them to each other weigh ``a (a + sum b)^(r - 1)``, and ``a +
    sum b = D``.

    There is no rejection, no subtraction, and no random walk whose length depends on the scores (as
    in Wilson's algorithm).
    """
    if uniform is None:
        uniform = torch.rand(scores.shape, dtype=torch.float64, device=scores.device)
    scores = scores.detach()
    if gpu.takes(scores, scores.shape[-1], LARGEST, on_cpu=True):
        _, factors = _eliminate_operator(scores, exists, root)
        times = len(uniform) // max(len(scores), 1)
        tree: Tensor = _sample_operator(*repeated(times, scores, exists, root, factors), uniform)
        return tree
    if not on_host(scores):
        return torch_sample(scores, exists, root, uniform)
    out = scores.new_zeros(uniform.shape)
    _run(_sample_kernel, *_weights(scores, exists), scores, exists, root, uniform, out)
    return out


def repeated(times: int, *tensors: Tensor) -> list[Tensor]:
    """Each tensor repeated this many times along its rows: all rows, then all rows again."""
    return [t if times == 1 else t.repeat(times, *[1] * (t.dim() - 1)) for t in tensors]


# --- plain torch ------------------------------------------------------------------------------------------------------


def eliminate(scores: Tensor, exists: Tensor, root: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Eliminate all nodes of a batch, differentiably.

    Args:
        scores: ``[B, n, n]``; entries outside ``exists`` are never read.
        exists: bool ``[B, n, n]``.
        root: int64 ``[B]``.

    Returns:
        log Z ``[B]`` in float64, and the log-weights ``[B, n, n]`` before each elimination, node
        n-1 first. Absent nodes and the root are eliminated too. They count as nodes without
        children and with one edge of weight 1 from the root.
    """
    n = scores.shape[-1]
    nodes = torch.arange(n, device=scores.device)
    exists = exists & (nodes != root[:, None])[:, None, :] & (nodes[:, None] != nodes)
    w = torch.where(exists, scores.double(), IMPOSSIBLE)
    # The root moves to a row of its own, the last; its old place becomes one more absent node.
    from_root = w.gather(1, root[:, None, None].expand(-1, 1, n))
    idle = ~present_nodes(exists) | (nodes == root[:, None])
    from_root = torch.where(idle[:, None, :], 0.0, from_root)
    w = torch.where((nodes == root[:, None])[:, :, None], IMPOSSIBLE, w)
    w = torch.cat([w, from_root], 1)
    # The largest score that enters a node is counted at the end: sums of very low ones would lose the others.
    tops = w.detach().amax(1, keepdim=True)
    tops = torch.where(tops > IMPOSSIBLE / 2, tops, 0.0)
    w = w - tops
    logz = w.new_zeros(w.shape[0])
    stages = []
    for i in reversed(range(n)):
        stages.append(w)
        total = log_sum(torch.cat([w[:, :i, i], w[:, -1:, i]], 1), 1)
        logz = logz + total
        rest = torch.cat([w[:, :i], w[:, -1:]], 1)
        detour = rest[:, :, i, None] - total[:, None, None] + w[:, i, None, :i]
        loops = torch.eye(i + 1, i, dtype=torch.bool, device=w.device)
        # Not logaddexp: its second derivative is NaN where the two are 700 apart.
        w = log_sum(torch.stack([rest[:, :, :i], detour]), 0).masked_fill(loops, IMPOSSIBLE)
    return logz + tops.sum((1, 2)), stages


def torch_log_partition(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """``log Z`` by :func:`eliminate`, -inf where there is no arborescence."""
    logz = eliminate(scores, exists, root)[0]
    return logz.masked_fill(logz.detach() < IMPOSSIBLE / 2, -torch.inf)


def torch_marginals(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    """The gradient of :func:`torch_log_partition`, differentiable itself."""
    _, mean = value_and_gradient(torch_log_partition, scores, exists, root)
    return mean.clamp(0, 1)


def torch_sample(scores: Tensor, exists: Tensor, root: Tensor, uniform: Tensor) -> Tensor:
    """The same as :func:`sample_arborescences`, on any device."""
    batch, n = uniform.shape[:2]
    rows = torch.arange(batch, device=scores.device)
    stages = eliminate(scores, exists, root)[1]
    times = batch // max(len(scores), 1)
    scores, exists, root, *stages = repeated(times, scores, exists, root, *stages)
    # Node n is the root; above[x, y]: y is x or an ancestor of x. Only columns of nodes back in the tree matter.
    parent = torch.full((batch, n), n, device=scores.device)
    above = torch.eye(n + 1, dtype=torch.bool, device=scores.device).repeat(batch, 1, 1)
    above[:, :, n] = True
    for i in range(n):
        w = stages[n - 1 - i]
        into_i = torch.cat([w[:, :i, i], w[:, -1:, i]], 1)
        row = parent[:, :i].clamp(max=i)  # the parent's row in the reduced weights, where the root is the last
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
        # A node below a moved node keeps its ancestors up to that node, and continues with
        # i and the ancestors of i.
        kept = above & (cuts[:, :, None] == cuts[:, None, :])
        above = torch.where(below[:, :, None], kept | above[:, i, None, :], above)
    chosen = torch.where(parent == n, root[:, None], parent)
    nodes = torch.arange(n, device=scores.device)
    has_parent = present_nodes(exists) & (nodes != root[:, None])
    return torch.zeros_like(scores).scatter(1, chosen[:, None, :], has_parent[:, None, :].to(scores.dtype))


# --- CPU kernels ------------------------------------------------------------------------------------------------------
# Row and column 0 belong to the root, 1 to m to the present nodes. The diagonal has no edge and
# holds the D.


@njit(cache=True, nogil=True)
def _weights_kernel(first: int, stride: int, scores: Any, exists: Any, weights: Any, tops: Any) -> None:
    """Write the ``tops`` of :func:`_weights` and the logs of its ``weights``."""
    n = scores.shape[1]
    for b in range(first, scores.shape[0], stride):
        tops[b] = -math.inf
        for k in range(n):
            for j in range(n):
                score = scores[b, k, j] if exists[b, k, j] else -math.inf
                weights[b, k, j] = score
                tops[b, j] = max(tops[b, j], score)
        for j in range(n):
            tops[b, j] = tops[b, j] if tops[b, j] > -math.inf else 0.0
        for k in range(n):
            for j in range(n):
                weights[b, k, j] -= tops[b, j]


@njit(cache=True)
def _load(weights: Any, exists: Any, root: int, nodes: Any, w: Any) -> tuple[int, bool]:
    """Load one example, and return m and whether an existing edge has a weight near underflow.

    The root and the nodes that touch an existing edge go to ``nodes`` (then -1), their weights to
    ``w``. m is the number of these nodes without the root.
    """
    n = exists.shape[0]
    nodes[:] = -1
    nodes[0] = root
    m = 0
    for v in range(n):
        if v != root:
            for u in range(n):
                if exists[u, v] or exists[v, u]:
                    m += 1
                    nodes[m] = v
                    break
    tiny = 0
    if m + 1 == n and root == 0:
        for k in range(n):
            for j in range(n):
                w[k, j] = weights[k, j]
                tiny += (weights[k, j] < _TINY) & exists[k, j] & (k != j)
    else:
        for k in range(m + 1):
            for j in range(1, m + 1):
                w[k, j] = weights[nodes[k], nodes[j]]
                tiny += (w[k, j] < _TINY) & exists[nodes[k], nodes[j]] & (k != j)
    return m, tiny > 0


@njit(cache=True)
def _store(m: int, nodes: Any, values: Any, out: Any) -> None:
    """Write ``values``, except for the diagonal, to their places in ``out``, which is zeroed."""
    if m + 1 == out.shape[0] and nodes[0] == 0:
        for k in range(m + 1):
            for j in range(1, m + 1):
                out[k, j] = values[k, j]
            out[k, k] = 0.0
    else:
        for k in range(m + 1):
            for j in range(1, m + 1):
                if k != j:
                    out[nodes[k], nodes[j]] = values[k, j]


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def _eliminate(m: int, w: Any) -> float:
    """Eliminate the nodes m, ..., 1 in place and return log Z.

    It returns -inf if there is no tree, and +inf if products came near underflow.
    """
    logz = 0.0
    for i in range(m, 0, -1):
        total = 0.0
        for k in range(i):
            total += w[k, i]
        if total == 0.0:
            return -math.inf
        logz += math.log(total)
        w[i, i] = total
        least_in, least_out = math.inf, math.inf
        for j in range(1, i):
            if w[i, j] > 0.0:
                least_out = min(least_out, w[i, j])
        for k in range(i):
            p = w[k, i] / total
            w[k, i] = p
            if p > 0.0:
                least_in = min(least_in, p)
                for j in range(1, i):
                    w[k, j] += p * w[i, j]
        if least_in * least_out < _TINY:
            return math.inf
    return logz


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def _invert(m: int, w: Any, x: Any, rows: Any) -> float:
    """Write the inverse of the Laplacian of the nodes 1 to m to ``x``, and return log Z.

    It uses Gauss and Jordan's method without exchanges. It returns NaN if the result is not
    certified to be right.

    The Laplacian is a column diagonally dominant M-matrix. Its inverse is positive, and no entry of
    a column exceeds the diagonal entry of its row. Rounding is amplified by ``D[j] x[j, j]``, where
    D is the diagonal, in each of the three factors of an error, ``x |L| x`` (Higham 2002, section
    14.4). So the inverse is used on two conditions: that product is moderate, and the identities
    ``sum_j w[0, j] x[j, k] = 1`` and ``(x L)[j, j] = 1`` hold. Their errors are the residuals.
    """
    size = m + 1
    for j in range(1, size):
        w[j, j] = 0.0
        rows[0, j] = 0.0
    for k in range(size):
        for j in range(1, size):
            rows[0, j] += w[k, j]
            x[k, j] = -w[k, j]
    for j in range(1, size):
        w[j, j], x[j, j] = rows[0, j], rows[0, j]
    logz = 0.0
    for p in range(1, m, 2):  # two pivots at a time: half the passes over the matrix
        q = p + 1
        a, b, c, d = x[p, p], x[p, q], x[q, p], x[q, q]
        determinant = a * d - b * c
        if not (a > 0.0 and determinant > 0.0):
            return math.nan
        logz += math.log(determinant)
        a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant
        x[p, p], x[p, q], x[q, p], x[q, q] = 1.0, 0.0, 0.0, 1.0
        for j in range(1, size):
            rows[0, j], rows[1, j] = a * x[p, j] + b * x[q, j], c * x[p, j] + d * x[q, j]
        for i in range(1, size):
            one, other = x[i, p], x[i, q]
            x[i, p], x[i, q] = 0.0, 0.0
            for j in range(1, size):
                x[i, j] -= one * rows[0, j] + other * rows[1, j]
        for j in range(1, size):
            x[p, j], x[q, j] = rows[0, j], rows[1, j]
    if m % 2:
        pivot = x[m, m]
        if not pivot > 0.0:
            return math.nan
        logz += math.log(pivot)
        x[m, m] = 1.0
        for j in range(1, size):
            rows[0, j] = x[m, j] / pivot
        for i in range(1, m):
            one = x[i, m]
            x[i, m] = 0.0
            for j in range(1, size):
                x[i, j] -= one * rows[0, j]
        for j in range(1, size):
            x[m, j] = rows[0, j]
    amplified, off = 0.0, 0.0
    for k in range(1, size):
        rows[0, k] = 0.0
    for j in range(1, size):
        returned = 0.0
        from_root = w[0, j]
        for k in range(1, size):
            rows[0, k] += from_root * x[j, k]
            rows[1, k] = w[k, j]
        for k in range(1, size):
            returned += x[j, k] * rows[1, k]
        own = w[j, j] * x[j, j]
        amplified = max(amplified, own)
        off = max(off, abs(2.0 * own - returned - 1.0))  # the sum contains the diagonal with the other sign
    for k in range(1, size):
        off = max(off, abs(rows[0, k] - 1.0))
    return logz if amplified < _AMPLIFIED and off < _RESIDUAL else math.nan


@njit(cache=True, fastmath=_FAST)
def _invert_tangent(m: int, x: Any, dw: Any, dx: Any, scratch: Any) -> None:
    """``dx = -x dL x``, how the inverse moves as the weights move by ``dw``."""
    for j in range(1, m + 1):
        dw[j, j] = 0.0
        scratch[0, j] = 0.0
    for k in range(m + 1):
        for j in range(1, m + 1):
            scratch[0, j] += dw[k, j]
    for j in range(1, m + 1):
        dw[j, j] = -scratch[0, j]
    _multiply(m, x, dw, scratch)
    _multiply(m, scratch, x, dx)


@njit(cache=True, fastmath=_FAST)
def _multiply(m: int, a: Any, b: Any, product: Any) -> None:
    """The product over the rows and columns 1 to m."""
    size = m + 1
    for i in range(1, size):
        for j in range(1, size):
            product[i, j] = 0.0
        for k in range(1, m - 2, 4):  # four at a time: a quarter of the passes over the row
            p, q, r, s = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
            for j in range(1, size):
                product[i, j] += p * b[k, j] + q * b[k + 1, j] + r * b[k + 2, j] + s * b[k + 3, j]
        for k in range(m - m % 4 + 1, size):
            p = a[i, k]
            for j in range(1, size):
                product[i, j] += p * b[k, j]


@njit(cache=True, fastmath=_FAST)
def _differentiate(m: int, w: Any, g: Any) -> None:
    """Write to ``g`` the derivatives of log Z in the weights, from the result of
    :func:`_eliminate`.
    """
    for i in range(1, m + 1):
        g[i, 1 : i + 1] = 0.0
        for k in range(i):
            p = w[k, i]
            g[k, i] = 0.0
            if p > 0.0:  # the derivative in a weight that remained 0 is not needed and may overflow
                through = 0.0
                for j in range(1, i):
                    through += g[k, j] * w[i, j]
                    g[i, j] += p * g[k, j]
                g[k, i] = through
        has_children = 0.0
        for j in range(1, i):
            has_children += g[i, j] * w[i, j]
        for k in range(i):
            if w[k, i] > 0.0:
                g[k, i] = (1.0 - has_children + g[k, i]) / w[i, i]


@njit(cache=True, fastmath=_FAST)
def _tangent(m: int, w: Any, g: Any, dw: Any, dg: Any) -> None:
    """Write to ``dg`` how ``g`` moves if the weights move by ``dw`` (overwritten): both passes,
    differentiated.
    """
    for i in range(m, 0, -1):
        d_total = 0.0
        for k in range(i):
            d_total += dw[k, i]
        dw[i, i] = d_total
        for k in range(i):
            p = w[k, i]
            if p > 0.0:
                dp = (dw[k, i] - p * d_total) / w[i, i]
                dw[k, i] = dp
                for j in range(1, i):
                    dw[k, j] += dp * w[i, j] + p * dw[i, j]
    for i in range(1, m + 1):
        dg[i, 1 : i + 1] = 0.0
        for k in range(i):
            p, dp = w[k, i], dw[k, i]
            dg[k, i] = 0.0
            if p > 0.0:
                through = 0.0
                for j in range(1, i):
                    through += dg[k, j] * w[i, j] + g[k, j] * dw[i, j]
                    dg[i, j] += dp * g[k, j] + p * dg[k, j]
                dg[k, i] = through
        d_children = 0.0
        for j in range(1, i):
            d_children += dg[i, j] * w[i, j] + g[i, j] * dw[i, j]
        for k in range(i):
            if w[k, i] > 0.0:
                dg[k, i] = (dg[k, i] - d_children - g[k, i] * dw[i, i]) / w[i, i]


@njit(cache=True)
def _eliminate_logs(m: int, scores: Any, exists: Any, tops: Any, nodes: Any, w: Any, through: Any) -> float:
    """The same as :func:`_eliminate`, of logarithms, for scores of any size.

    It writes the logs of the weights to ``w`` first; ``nodes`` are those of :func:`_load`.
    ``through[i, k, j]`` is the part ``p[k] w[i, j] / w'[k, j]`` of a reduced edge that goes through i.
    """
    for k in range(m + 1):
        for j in range(1, m + 1):
            edge = exists[nodes[k], nodes[j]] and k != j
            w[k, j] = scores[nodes[k], nodes[j]] - tops[nodes[j]] if edge else -math.inf
    logz = 0.0
    for i in range(m, 0, -1):
        top, total = -math.inf, 0.0
        for k in range(i):
            top = max(top, w[k, i])
        if top == -math.inf:
            return -math.inf
        for k in range(i):
            total += math.exp(w[k, i] - top)
        total = top + math.log(total)
        logz += total
        for k in range(i):
            w[k, i] -= total
            for j in range(1, i):
                detour = w[k, i] + w[i, j]
                share = 0.0
                if detour > -math.inf and j != k:
                    gap = detour - w[k, j]
                    share, less = 1.0 if gap > 0.0 else 0.0, 0.0
                    if abs(gap) < _FAR:  # else the exponential is 0
                        less = math.exp(-abs(gap))
                        share = max(share, less) / (1.0 + less)
                    w[k, j] = max(w[k, j], detour) + (math.log1p(less) if less > _EPSILON else less)
                through[i, k, j] = share
    return logz


@njit(cache=True, fastmath=_FAST)
def _differentiate_logs(m: int, w: Any, through: Any, mean: Any) -> None:
    """Write the marginals to ``mean``, from the result of :func:`_eliminate_logs`.

    They are those of the reduced graphs, from the smallest on. A reduced edge k -> j through i
    stands for the edges k -> i and i -> j. If no edge goes through i, then i has the parent k with
    probability ``p[k]``. No number leaves [0, 1].
    """
    for i in range(1, m + 1):
        mean[i, 1 : i + 1] = 0.0
        children = 0.0
        for k in range(i):
            carried = 0.0
            for j in range(1, i):
                moved = through[i, k, j] * mean[k, j]
                mean[k, j] -= moved
                mean[i, j] += moved
                carried += moved
            mean[k, i] = carried
            children += carried
        for k in range(i):
            mean[k, i] += math.exp(w[k, i]) * (1.0 - children)


@njit(cache=True, fastmath=_FAST)
def _tangent_logs(m: int, w: Any, through: Any, mean: Any, dw: Any, d_through: Any, d_mean: Any) -> None:
    """Write to ``d_mean`` how ``mean`` moves if the scores move by ``dw`` (overwritten)."""
    for i in range(m, 0, -1):
        d_total = 0.0
        for k in range(i):
            d_total += math.exp(w[k, i]) * dw[k, i]
        for k in range(i):
            dw[k, i] -= d_total
            for j in range(1, i):
                share = through[i, k, j]
                gap = dw[k, i] + dw[i, j] - dw[k, j]
                dw[k, j] += share * gap
                d_through[i, k, j] = share * (1.0 - share) * gap
    for i in range(1, m + 1):
        mean[i, 1 : i + 1] = 0.0
        d_mean[i, 1 : i + 1] = 0.0
        children, d_children = 0.0, 0.0
        for k in range(i):
            carried, d_carried = 0.0, 0.0
            for j in range(1, i):
                moved = through[i, k, j] * mean[k, j]
                d_moved = d_through[i, k, j] * mean[k, j] + through[i, k, j] * d_mean[k, j]
                mean[k, j] -= moved
                mean[i, j] += moved
                d_mean[k, j] -= d_moved
                d_mean[i, j] += d_moved
                carried += moved
                d_carried += d_moved
            mean[k, i], d_mean[k, i] = carried, d_carried
            children += carried
            d_children += d_carried
        for k in range(i):
            p = math.exp(w[k, i])
            mean[k, i] += p * (1.0 - children)
            d_mean[k, i] += p * (dw[k, i] * (1.0 - children) - d_children)


@njit(cache=True)
def _attach(m: int, weights: Any, nodes: Any, w: Any, through: Any, uniform: Any, parent: Any) -> None:
    """Undo an elimination on trees: write ``parent[1:m + 1]``. See :func:`sample_arborescences`.

    ``through`` is None, or that of an elimination of logarithms.
    """
    reaches_root = np.empty(m + 1, np.bool_)
    joined = np.empty(m + 1, np.bool_)
    walk = np.empty(m + 1, np.int64)
    for i in range(1, m + 1):
        for j in range(1, i):
            k = parent[j]
            if through is None:
                whole = weights[nodes[k], nodes[j]]
                for e in range(i, m + 1):
                    whole += w[k, e] * w[e, j]
                if uniform[nodes[i], nodes[j]] * whole < w[k, i] * w[i, j]:
                    parent[j] = i
            elif uniform[nodes[i], nodes[j]] < through[i, k, j]:
                parent[j] = i
        # The parent of i may be any node that still reaches the root, so it is not below i.
        joined[:i] = False
        reaches_root[0], joined[0] = True, True
        reaches_root[i], joined[i] = False, True
        for j in range(1, i):
            length, v = 0, j
            while not joined[v]:
                walk[length] = v
                length += 1
                v = parent[v]
            for t in range(length):
                joined[walk[t]] = True
                reaches_root[walk[t]] = reaches_root[v]
        likely = w[:, i]
        if through is not None:
            top = -math.inf
            for k in range(i):
                top = max(top, w[k, i] if reaches_root[k] else -math.inf)
            likely = np.exp(likely[:i] - top)
        total = 0.0
        for k in range(i):
            total += likely[k] if reaches_root[k] else 0.0
        running = 0.0
        for t in range(1, i + 1):
            k = t % i  # the root is the last, as in the versions for other devices
            if reaches_root[k] and likely[k] > 0.0:
                parent[i] = k
                running += likely[k]
                if running > uniform[nodes[i], nodes[i]] * total:
                    break


@njit(cache=True, nogil=True)
def _moments_kernel(
    first: int,
    stride: int,
    weights: Any,
    tops: Any,
    scores: Any,
    exists: Any,
    root: Any,
    with_mean: bool,
    logz: Any,
    mean: Any,
    nodes: Any,
    method: Any,
    factors: Any,
) -> None:
    """``logz [B]``, relative to the tops, and on request ``mean [B, n, n]`` (zeroed by the caller).

    ``logz`` is -inf where there is no arborescence.

    The kernel leaves ``nodes [B, n]``, ``method [B]`` and ``factors [B, 2, n, n]`` for the
    derivative. The factors are the weights and the inverse, or ``w`` and ``g``, or nothing, by the
    method.
    """
    n = weights.shape[1]
    rows, moved, through = np.empty((2, n)), np.empty((n, n)), np.empty((0, n, n))
    for b in range(first, weights.shape[0], stride):
        w, g = factors[b, 0], factors[b, 1]
        m, tiny = _load(weights[b], exists[b], root[b], nodes[b], w)
        # The weights near underflow do not matter where the inverse is certified: its entries are
        # at most _AMPLIFIED, so the marginals of those edges are as small.
        logz[b] = _invert(m, w, g, rows) if with_mean else math.nan
        method[b] = _INVERSE
        if math.isnan(logz[b]):
            method[b] = _ELIMINATION
            logz[b] = math.inf if tiny else _eliminate(m, w)
        if logz[b] == math.inf:
            method[b] = _LOGS
            if len(through) < m + 1:
                through = np.empty((m + 1, n, n))
            logz[b] = _eliminate_logs(m, scores[b], exists[b], tops[b], nodes[b], w, through)
        if logz[b] == -math.inf:
            method[b] = _NOTHING
        elif with_mean:
            if method[b] == _INVERSE:
                for j in range(1, m + 1):
                    rows[0, j] = g[j, j]
                    moved[0, j] = min(1.0, w[0, j] * g[j, j])
                for k in range(1, m + 1):
                    for j in range(1, m + 1):
                        moved[k, j] = min(1.0, max(0.0, w[k, j] * (rows[0, j] - g[j, k])))
            elif method[b] == _ELIMINATION:
                _differentiate(m, w, g)
                for k in range(m + 1):
                    for j in range(1, m + 1):
                        weight = weights[b, nodes[b, k], nodes[b, j]]
                        # The error is about 1e-14; this removes that much and no more.
                        moved[k, j] = min(1.0, max(0.0, weight * g[k, j])) if weight > 0.0 and k != j else 0.0
            else:
                _differentiate_logs(m, w, through, moved)
                for k in range(m + 1):
                    for j in range(1, m + 1):
                        moved[k, j] = min(1.0, max(0.0, moved[k, j]))
            _store(m, nodes[b], moved, mean[b])


@njit(cache=True, nogil=True)
def _covariance_kernel(
    first: int,
    stride: int,
    weights: Any,
    tops: Any,
    scores: Any,
    exists: Any,
    nodes: Any,
    method: Any,
    factors: Any,
    direction: Any,
    out: Any,
) -> None:
    """``out [B, n, n]`` (zeroed by the caller): the covariance of the edges times ``direction``."""
    n = weights.shape[1]
    dw, dg, scratch = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    through = np.empty((2, 0, n, n))
    for b in range(first, weights.shape[0], stride):
        if method[b] == _NOTHING:
            continue
        m = (nodes[b] >= 0).sum() - 1
        w, g = factors[b, 0], factors[b, 1]
        plain = m + 1 == n and nodes[b, 0] == 0
        for k in range(m + 1):
            if plain:
                for j in range(1, m + 1):
                    dw[k, j] = direction[b, k, j]
            else:
                for j in range(1, m + 1):
                    dw[k, j] = direction[b, nodes[b, k], nodes[b, j]]
        if method[b] == _INVERSE:
            for k in range(m + 1):
                for j in range(1, m + 1):
                    dw[k, j] *= w[k, j]
            _invert_tangent(m, g, dw, dg, scratch)
            for j in range(1, m + 1):
                scratch[0, j] = dw[0, j] * g[j, j] + w[0, j] * dg[j, j]
            for k in range(1, m + 1):
                for j in range(1, m + 1):
                    scratch[k, j] = dw[k, j] * (g[j, j] - g[j, k]) + w[k, j] * (dg[j, j] - dg[j, k])
        elif method[b] == _ELIMINATION:
            for k in range(m + 1):
                for j in range(1, m + 1):
                    weight = weights[b, nodes[b, k], nodes[b, j]]
                    dw[k, j] = weight * dw[k, j] if weight > 0.0 else 0.0
            _tangent(m, w, g, dw, dg)
            for k in range(m + 1):
                for j in range(1, m + 1):
                    weight = weights[b, nodes[b, k], nodes[b, j]]
                    moved = direction[b, nodes[b, k], nodes[b, j]] * g[k, j] + dg[k, j]
                    scratch[k, j] = weight * moved if weight > 0.0 and k != j else 0.0
        else:
            if through.shape[1] < m + 1:
                through = np.empty((2, m + 1, n, n))
            _eliminate_logs(m, scores[b], exists[b], tops[b], nodes[b], w, through[0])
            for k in range(m + 1):
                for j in range(1, m + 1):
                    edge = exists[b, nodes[b, k], nodes[b, j]] and k != j
                    dw[k, j] = dw[k, j] if edge else 0.0
            _tangent_logs(m, w, through[0], g, dw, through[1], scratch)
        _store(m, nodes[b], scratch, out[b])


@njit(cache=True, nogil=True)
def _sample_kernel(
    first: int,
    stride: int,
    weights: Any,
    tops: Any,
    scores: Any,
    exists: Any,
    root: Any,
    uniform: Any,
    out: Any,
) -> None:
    """Exact Gibbs samples into ``out [d B, n, n]`` (zeroed by the caller) from ``uniform [d B, n, n]``.

    Row i is of example i modulo B.
    """
    n = weights.shape[1]
    w, nodes, parent = np.empty((n, n)), np.empty(n, np.int64), np.empty(n, np.int64)
    through = np.empty((0, n, n))
    for b in range(first, weights.shape[0], stride):
        m, tiny = _load(weights[b], exists[b], root[b], nodes, w)
        logs = tiny or _eliminate(m, w) == math.inf
        if logs:
            if len(through) < m + 1:
                through = np.empty((m + 1, n, n))
            _eliminate_logs(m, scores[b], exists[b], tops[b], nodes, w, through)
        for row in range(b, len(uniform), len(weights)):
            if logs:
                _attach(m, weights[b], nodes, w, through, uniform[row], parent)
            else:
                _attach(m, weights[b], nodes, w, None, uniform[row], parent)
            for j in range(1, m + 1):
                out[row, nodes[parent[j]], nodes[j]] = 1.0


def _weights(scores: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[B, n, n]`` relative to the largest that enters a node, and logs of the largest
    ``[B, n]``.

    The logs are 0 where no edge enters. Both are float64.
    """
    weights, tops = (torch.empty(shape, dtype=torch.float64) for shape in (scores.shape, scores.shape[:2]))
    run(_weights_kernel, 6 * scores.numel(), scores, exists, weights, tops)
    return weights.exp_(), tops


def _run(kernel: Any, weights: Tensor, *rest: Any) -> None:
    run(kernel, weights.numel() * weights.shape[-1], weights, *rest)


def _moments(scores: Tensor, exists: Tensor, root: Tensor, with_mean: bool) -> tuple[Tensor, ...]:
    """Log Z, marginals (zeros unless requested), and the input of :func:`_covariance`."""
    weights, tops = _weights(scores, exists)
    batch, n = scores.shape[:2]
    logz, mean = torch.empty(batch, dtype=torch.float64), torch.zeros_like(scores, requires_grad=False)
    nodes, factors = torch.empty(batch, n, dtype=torch.int64), weights.new_empty(batch, 2, n, n)
    method = torch.empty(batch, dtype=torch.int8)
    given = (scores.detach(), exists, root, with_mean)
    _run(_moments_kernel, weights, tops, *given, logz, mean, nodes, method, factors)
    logz += tops.scatter(1, root[:, None], 0.0).sum(1) if n else 0.0
    return logz, mean, weights, tops, nodes, method, factors


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
        logz, mean, *_ = _moments(scores, exists, root, ctx.needs_input_grad[0])
        ctx.save_for_backward(scores, exists, root, mean)
        return logz

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        scores, exists, root, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted
            mean = _Marginals.apply(scores, exists, root)
        return upstream[:, None, None].to(mean.dtype) * mean, None, None


class _Marginals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
        _, mean, *saved = _moments(scores, exists, root, True)
        ctx.save_for_backward(scores, exists, root, *saved)
        return mean

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The Jacobian is the covariance of the edges, which is symmetric: the derivative along `upstream` is wanted.
        scores, exists, root, *saved = ctx.saved_tensors
        if twin_needed(upstream):
            return *gradients(lambda s: torch_marginals(s, exists, root), [scores], [upstream]), None, None
        return _covariance(scores, exists, upstream, *saved), None, None


def _covariance(
    scores: Tensor,
    exists: Tensor,
    upstream: Tensor,
    weights: Tensor,
    tops: Tensor,
    nodes: Tensor,
    method: Tensor,
    factors: Tensor,
) -> Tensor:
    """The covariance of the edges times ``upstream``, from the results of :func:`_moments`."""
    out = torch.zeros_like(scores)
    found = nodes, method, factors
    _run(_covariance_kernel, weights, tops, scores.detach(), exists, *found, upstream.contiguous(), out)
    return out


# torch.compile calls these as they are, between two graphs.
_compiled_log_partition = untraced(_LogPartition.apply)
_compiled_marginals = untraced(_Marginals.apply)


# --- GPU kernels ------------------------------------------------------------------------------------------------------
# One program an example, in float64 logarithms.
# Blocks are [SIZE, SIZE], in registers. `ends` are the indices of the nodes as rows (tails) and as
# columns (heads). Nodes are eliminated in the order n-1, ..., 0 without the root r. At node i the
# earlier nodes and the root are left.


@gpu.jit
def _log_add_exp(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y) + tl.log(1.0 + tl.exp(-tl.abs(x - y)))


@gpu.jit
def _load_block(
    scores_ptr: tl.tensor, exists_ptr: tl.tensor, root_ptr: tl.tensor, n: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """Log-weights relative to the largest that enters a node, which entries are edges, their places,
    the root, and the sum of the largest.

    An absent node has an edge of weight 1 from the root.
    """
    b = tl.program_id(0).to(tl.int64)
    k, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    r = tl.load(root_ptr + b).to(tl.int32)
    at = b * n * n + k * n + j
    within = (k < n) & (j < n)
    exists = (tl.load(exists_ptr + at, mask=within, other=0) != 0) & (k != j) & (j != r)
    w = tl.where(exists, tl.load(scores_ptr + at, mask=within & exists, other=0.0).to(tl.float64), _NO_WEIGHT)
    absent = tl.max(exists.to(tl.int32), 0) + tl.max(exists.to(tl.int32), 1) == 0
    # Sums of very low weights would lose the others.
    tops = tl.max(w, 0)
    tops = tl.where(tops > 0.5 * _NO_WEIGHT, tops, 0.0)
    w = tl.where(exists, w - tops[None, :], w)
    return tl.where((k == r) & absent[None, :], 0.0, w), exists, at, r, tl.sum(tops, 0)


@gpu.jit
def _eliminate_block(
    w: tl.tensor, t: tl.tensor, r: tl.tensor, n: tl.tensor, TANGENT: tl.constexpr, SIZE: tl.constexpr
) -> tl.tensor:
    """Eliminate all nodes. ``w`` then holds rows ``w[i, j]`` and columns ``p[k]``; ``total [SIZE]``
    are the D; all logs.

    With ``TANGENT``, ``t`` says how ``w`` moves before, and afterwards how the results move;
    ``moved [SIZE]`` says how the D move.
    """
    at = tl.arange(0, SIZE)
    total, moved = tl.zeros([SIZE], tl.float64), tl.zeros([SIZE], tl.float64)
    for step in range(n - 1):
        i = n - 1 - step
        i = tl.where(i <= r, i - 1, i)
        left = (at < i) | (at == r)
        into, out = tl.where(left, gpu.column(w, i), _NO_WEIGHT), gpu.row(w, i)
        d = gpu.log_sum_exp(into, 0)
        p = tl.where(left, into - d, _NO_WEIGHT)
        remains = left[:, None] & (at < i)[None, :] & (at != r)[None, :] & (at[:, None] != at[None, :])
        now_i = left[:, None] & (at == i)[None, :]
        detour = p[:, None] + out[None, :]
        after = tl.where(remains, _log_add_exp(w, detour), w)
        if TANGENT:
            t_into, t_out = gpu.column(t, i), gpu.row(t, i)
            t_d = tl.sum(tl.exp(p) * t_into, 0)
            t_p = t_into - t_d
            mixed = tl.exp(w - after) * t + tl.exp(detour - after) * (t_p[:, None] + t_out[None, :])
            t = tl.where(remains, mixed, tl.where(now_i, t_p[:, None], t))
            moved = tl.where(at == i, t_d, moved)
        w = tl.where(now_i, p[:, None], after)
        total = tl.where(at == i, d, total)
    return w, total, t, moved


@gpu.jit
def _differentiate_block(
    w: tl.tensor,
    total: tl.tensor,
    t: tl.tensor,
    moved: tl.tensor,
    r: tl.tensor,
    n: tl.tensor,
    TANGENT: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """``g``, the logs of the derivatives of log Z in the weights; with ``TANGENT`` also how they
    move.
    """
    at = tl.arange(0, SIZE)
    g, t_g = tl.full([SIZE, SIZE], _NO_WEIGHT, tl.float64), tl.zeros([SIZE, SIZE], tl.float64)
    for step in range(n - 1):
        i = tl.where(step >= r, step + 1, step)
        left, heads = (at < i) | (at == r), (at < i) & (at != r)
        p = tl.where(left, gpu.column(w, i), _NO_WEIGHT)
        out = tl.where(heads, gpu.row(w, i), _NO_WEIGHT)
        d = tl.sum(tl.where(at == i, total, 0.0), 0)
        via, beyond = p[:, None] + g, g + out[None, :]
        row, through = gpu.log_sum_exp(via, 0), gpu.log_sum_exp(beyond, 1)
        children = tl.exp(row + out)
        # 1 - children + through, relative to the larger of 1 and through.
        top, bottom = tl.maximum(through, 0.0), tl.minimum(through, 0.0)
        whole = tl.exp(bottom) + (1.0 - tl.sum(children, 0)) * tl.exp(-top)
        positive = whole > 0.0
        whole = tl.where(positive, whole, 1.0)
        column = tl.where(positive, top + tl.log(whole), _NO_WEIGHT) - d
        now_row, now_column = (at == i)[:, None] & heads[None, :], left[:, None] & (at == i)[None, :]
        if TANGENT:
            t_p, t_out = gpu.column(t, i), gpu.row(t, i)
            t_row = tl.sum(tl.exp(via - row[None, :]) * (t_p[:, None] + t_g), 0)
            t_through = tl.sum(tl.exp(beyond - through[:, None]) * (t_g + t_out[None, :]), 1)
            t_children = tl.sum(children * (t_row + t_out), 0)
            t_whole = tl.exp(bottom) * t_through - tl.exp(-top) * t_children
            t_column = tl.where(positive, t_whole / whole, 0.0) - tl.sum(tl.where(at == i, moved, 0.0), 0)
            t_g = tl.where(now_row, t_row[None, :], tl.where(now_column, t_column[:, None], t_g))
        g = tl.where(now_row, row[None, :], tl.where(now_column, column[:, None], g))
    return g, t_g


@gpu.jit
def _reached(total: tl.tensor) -> tl.tensor:
    """Whether an arborescence exists."""
    return tl.min(total, 0) > 0.5 * _NO_WEIGHT


@gpu.jit
def _gpu_eliminate(
    scores_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    root_ptr: tl.tensor,
    logz_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    w, _, at, r, tops = _load_block(scores_ptr, exists_ptr, root_ptr, n, SIZE)
    w, total, _, _ = _eliminate_block(w, w, r, n, False, SIZE)
    ends = tl.arange(0, SIZE)
    tl.store(factors_ptr + at, w, mask=(ends < n)[:, None] & (ends < n)[None, :])
    tl.store(logz_ptr + tl.program_id(0), tl.where(_reached(total), tl.sum(total, 0) + tops, -float("inf")))


@gpu.jit
def _gpu_marginals(
    scores_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    root_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    start, exists, at, r, _ = _load_block(scores_ptr, exists_ptr, root_ptr, n, SIZE)
    w, total, t, moved = _eliminate_block(start, start, r, n, False, SIZE)
    g, _ = _differentiate_block(w, total, t, moved, r, n, False, SIZE)
    within = tl.arange(0, SIZE) < n
    # The error is about 1e-14; the minimum removes that much and no more.
    value = tl.minimum(tl.exp(start + g), 1.0)
    tl.store(
        mean_ptr + at,
        tl.where(_reached(total), tl.where(exists, value, 0.0), 0.0),
        mask=within[:, None] & within[None, :],
    )


@gpu.jit
def _gpu_covariance(
    scores_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    root_ptr: tl.tensor,
    direction_ptr: tl.tensor,
    product_ptr: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    start, exists, at, r, _ = _load_block(scores_ptr, exists_ptr, root_ptr, n, SIZE)
    within = tl.arange(0, SIZE) < n
    within = within[:, None] & within[None, :]
    along = tl.where(exists, tl.load(direction_ptr + at, mask=within, other=0.0).to(tl.float64), 0.0)
    w, total, t, moved = _eliminate_block(start, along, r, n, True, SIZE)
    g, t_g = _differentiate_block(w, total, t, moved, r, n, True, SIZE)
    value = tl.where(exists, tl.exp(start + g) * (along + t_g), 0.0)
    tl.store(product_ptr + at, tl.where(_reached(total), value, 0.0), mask=within)


@gpu.jit
def _gpu_sample(
    scores_ptr: tl.tensor,
    exists_ptr: tl.tensor,
    root_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    tree_ptr: tl.tensor,
    n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Like :func:`torch_sample`, which explains the names. Here the root is a node like the others."""
    start, exists, at, r, _ = _load_block(scores_ptr, exists_ptr, root_ptr, n, SIZE)
    first = tl.program_id(0).to(tl.int64) * n * n
    ends = tl.arange(0, SIZE)
    k, j = ends[:, None], ends[None, :]
    within = (k < n) & (j < n)
    w = tl.load(factors_ptr + at, mask=within, other=_NO_WEIGHT)
    parent = tl.zeros([SIZE], tl.int32) + r
    above = ((k == j) | (j == r)).to(tl.int32)
    for step in range(n - 1):
        i = tl.where(step >= r, step + 1, step)
        left, heads = (ends < i) | (ends == r), (ends < i) & (ends != r)
        into = tl.where(left, gpu.column(w, i), _NO_WEIGHT)
        draws = tl.load(uniform_ptr + first + i * n + ends, mask=ends < n, other=1.0)
        # The weight of parent[j] -> j after eliminating the nodes from i on: the edge itself and
        # the ways through those nodes.
        through = (k >= i) & (k != r) & (k < n) & heads[None, :]
        ways = tl.load(factors_ptr + first + parent[None, :] * n + k, mask=through, other=_NO_WEIGHT) + w
        chosen = k == parent[None, :]
        direct = tl.sum(tl.where(chosen, start, 0.0), 0)
        whole = _log_add_exp(direct, gpu.log_sum_exp(tl.where(through, ways, _NO_WEIGHT), 0))
        detour = tl.sum(tl.where(chosen, into[:, None], 0.0), 0) + gpu.row(w, i)
        moved = heads & (draws < tl.exp(detour - whole))
        parent = tl.where(moved, i, parent)
        cuts = tl.sum(above * moved[None, :].to(tl.int32), 1)
        attached = tl.where(left & (cuts == 0), into, _NO_WEIGHT)
        weights = tl.where(attached > 0.5 * _NO_WEIGHT, tl.exp(attached - tl.max(attached, 0)), 0.0)
        others = tl.where(ends == r, 0.0, weights)
        threshold = tl.sum(tl.where(ends == i, draws, 0.0), 0) * tl.sum(weights, 0)
        drawn = tl.min(tl.where((others > 0.0) & (tl.cumsum(others, 0) > threshold), ends, SIZE), 0)
        last = tl.where(tl.sum(weights - others, 0) > 0.0, r, tl.max(tl.where(others > 0.0, ends, 0), 0))
        drawn = tl.where(drawn == SIZE, last, drawn)
        parent = tl.where(ends == i, drawn, parent)
        above_i = tl.where(ends == i, 1, tl.sum(tl.where(k == drawn, above, 0), 0))
        above = tl.where(k == i, above_i[None, :], above)
        kept = tl.where(cuts[:, None] == cuts[None, :], above, 0)
        above = tl.where((cuts > 0)[:, None], tl.maximum(kept, above_i[None, :]), above)
    present = tl.max(exists.to(tl.int32), 0) + tl.max(exists.to(tl.int32), 1) > 0
    tl.store(tree_ptr + at, tl.where((k == parent[None, :]) & (present & (ends != r))[None, :], 1.0, 0.0), mask=within)


def _launch(kernel: Any, scores: Tensor, *others: Tensor) -> None:
    n = scores.shape[-1]
    size = gpu.block(n)
    gpu.launch(kernel, len(scores) if n else 0, scores, *others, n, warps=gpu.warps(size * size), SIZE=size)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("structgrad::matrix_tree_eliminate", mutates_args=())
def _eliminate_operator(scores: Tensor, exists: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """``log Z`` ``[B]``, and the result of elimination for samples: rows ``w[i, j]`` and columns
    ``p[k]``, as logs.
    """
    logz, factors = _eliminate_fake(scores, exists, root)
    if not gpu.launches(scores):
        return _moments(scores, exists.contiguous(), root, False)[0], factors
    _launch(_gpu_eliminate, scores, exists, root, logz, factors)
    return logz, factors


@_eliminate_operator.register_fake
def _eliminate_fake(scores: Tensor, exists: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    empty = torch.empty if scores.shape[-1] else torch.zeros
    wide: dict[str, Any] = {"dtype": torch.float64, "device": scores.device}
    return empty(scores.shape[:1], **wide), empty(scores.shape, **wide)


@torch.library.custom_op("structgrad::matrix_tree_marginals", mutates_args=())
def _marginals_operator(scores: Tensor, exists: Tensor, root: Tensor) -> Tensor:
    if not gpu.launches(scores):
        return _moments(scores, exists.contiguous(), root, True)[1]
    mean = scores.new_empty(scores.shape)
    _launch(_gpu_marginals, scores, exists, root, mean)
    return mean


@torch.library.custom_op("structgrad::matrix_tree_covariance", mutates_args=())
def _covariance_operator(scores: Tensor, exists: Tensor, root: Tensor, direction: Tensor) -> Tensor:
    """The covariance of the edges times ``direction``: the Jacobian of the marginals, which is symmetric."""
    if not gpu.launches(scores):
        exists = exists.contiguous()
        return _covariance(scores, exists, direction, *_moments(scores, exists, root, True)[2:])
    product = scores.new_empty(scores.shape)
    _launch(_gpu_covariance, scores, exists, root, direction, product)
    return product


@torch.library.custom_op("structgrad::matrix_tree_sample", mutates_args=())
def _sample_operator(scores: Tensor, exists: Tensor, root: Tensor, factors: Tensor, uniform: Tensor) -> Tensor:
    if not gpu.launches(scores):
        return sample_arborescences(scores, exists, root, uniform)
    tree = scores.new_empty(scores.shape)
    _launch(_gpu_sample, scores, exists, root, factors, uniform, tree)
    return tree


def _eliminate_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    mean = _marginals_operator(*ctx.saved_tensors)
    return upstream[:, None, None].to(mean.dtype) * mean, None, None


def _marginals_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _covariance_operator(*ctx.saved_tensors, upstream), None, None


def _covariance_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    scores, exists, root, direction = ctx.saved_tensors
    found = second_gradients(lambda s: torch_marginals(s, exists, root), scores, direction, upstream)
    return found[0], None, None, found[1]


for _operator in (_marginals_operator, _covariance_operator, _sample_operator):
    _operator.register_fake(gpu.like_first)
_eliminate_operator.register_autograd(_eliminate_backward, setup_context=gpu.save_inputs)
_marginals_operator.register_autograd(_marginals_backward, setup_context=gpu.save_inputs)
_covariance_operator.register_autograd(_covariance_backward, setup_context=gpu.save_inputs)
