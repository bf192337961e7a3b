"""Compiled (numba, CPU) kernels of the tree structures; the plain torch versions are in ``_matrix_tree`` and ``_contraction``.

Examples of a batch are dealt out to the threads; a thread allocates its scratch memory once. Every kernel works on the nodes that are
present, so an example of length m costs what m costs, whatever the padding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads

#: Reassociation and fused multiply-add only: infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract"}
#: A product of weights below this may have lost digits to underflow; the example is then redone with logarithms.
_TINY = 1e-280


def threads() -> int:
    """How many threads a kernel may use: as many as torch uses; tells numba."""
    count = int(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
    set_num_threads(count)
    return count


# --- the matrix-tree theorem without subtractions --------------------------------------------------------------------


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
def _eliminate(scores: Any, exists: Any, nodes: Any, m: int, w: Any, share: Any, via: Any) -> float:
    """Eliminate the nodes m-1, ..., 0 in linear float64; see ``_matrix_tree`` for the algorithm.

    Returns log Z, +inf if weights came near underflow (then ``_eliminate_logs`` has to be asked), -inf if there is no tree.
    """
    logz = 0.0
    for j in range(m):
        top = -math.inf
        low = math.inf
        for k in range(m + 1):
            if k != j and exists[nodes[k], nodes[j]]:
                s = scores[nodes[k], nodes[j]]
                top = max(top, s)
                low = min(low, s)
        if top == -math.inf:
            return -math.inf
        if top - low > 640.0:
            return math.inf
        logz += top
        for k in range(m + 1):
            if k != j and exists[nodes[k], nodes[j]]:
                w[k, j] = math.exp(scores[nodes[k], nodes[j]] - top)
            else:
                w[k, j] = 0.0
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
                via[block + row * i + j] = detour / (whole + 1e-305)
            if row < i:
                w[k, k] = 0.0
                via[block + row * i + row] = 0.0
        if least_in * least_out < _TINY:
            return math.inf
        block += (i + 1) * i
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
                    via[block + row * i + j] = 0.0
                else:
                    whole = high + math.log1p(math.exp(min(old, detour) - high))
                    w[k, j] = whole
                    via[block + row * i + j] = math.exp(detour - whole)
        block += (i + 1) * i
    return logz


@njit(cache=True)
def _eliminate_safely(scores: Any, exists: Any, nodes: Any, m: int, w: Any, share: Any, via: Any) -> tuple[float, bool]:
    """log Z, and whether ``w`` was left holding logarithms."""
    logz = _eliminate(scores, exists, nodes, m, w, share, via)
    if logz == math.inf:
        return _eliminate_logs(scores, exists, nodes, m, w, share, via), True
    return logz, False


@njit(cache=True, fastmath=_FAST)
def _expand(m: int, share: Any, via: Any, mu: Any) -> None:
    """Marginals ``mu[k, j]`` from the shares and detours of an elimination, undoing it node by node."""
    block = m * (m - 1) * (m + 1) // 3
    for i in range(m):
        block -= (i + 1) * i
        for j in range(i):
            mu[i, j] = 0.0
        everything = 0.0
        for row in range(i + 1):
            k = row if row < i else m
            moved = 0.0
            for j in range(i):
                q = mu[k, j] * via[block + row * i + j]
                mu[k, j] -= q
                mu[i, j] += q
                moved += q
            mu[k, i] = moved
            everything += moved
        mu[i, i] = 0.0
        for row in range(i + 1):
            k = row if row < i else m
            mu[k, i] += share[k, i] * (1.0 - everything)
    # What follows is not a clamp of a bad formula: every term above is accurate to a few units of 1e-16 absolutely, so is mu.
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
                f = via[block + row * i + j]
                c = shift + dlog[i, j] - dlog[k, j]
                dlog[k, j] += f * c
                slack[block + row * i + j] = (1.0 - f) * c
        block += (i + 1) * i
    for i in range(m):
        block -= (i + 1) * i
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
                f = via[block + row * i + j]
                q = mu[k, j] * f
                dq = dmu[k, j] * f + q * slack[block + row * i + j]
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


@njit(cache=True, parallel=True)
def matrix_tree(scores: Any, exists: Any, root: Any, chunks: int, with_marginals: bool, logz: Any, mean: Any) -> None:
    """``logz [B]`` and, if asked, ``mean [B, n, n]`` (zeroed by the caller); -inf where there is no arborescence."""
    n = scores.shape[1]
    for chunk in prange(chunks):
        w = np.empty((n, n))
        share = np.empty((n, n))
        mu = np.empty((n, n))
        nodes = np.empty(n + 1, np.int64)
        via = np.empty(n * (n - 1) * (n - 2) // 3 + 1)
        for b in range(chunk, scores.shape[0], chunks):
            m = _present(exists[b], root[b], nodes)
            logz[b], _ = _eliminate_safely(scores[b], exists[b], nodes, m, w, share, via)
            if with_marginals and logz[b] != -math.inf:
                _expand(m, share, via, mu)
                for k in range(m + 1):
                    for j in range(m):
                        mean[b, nodes[k], nodes[j]] = mu[k, j]


@njit(cache=True, parallel=True)
def matrix_tree_tangent(scores: Any, exists: Any, root: Any, direction: Any, chunks: int, out: Any) -> None:
    """``out [B, n, n]`` (zeroed by the caller): the covariance of the edges times ``direction``."""
    n = scores.shape[1]
    for chunk in prange(chunks):
        w = np.empty((n, n))
        share = np.empty((n, n))
        mu = np.empty((n, n))
        dmu = np.empty((n, n))
        dlog = np.empty((n, n))
        nodes = np.empty(n + 1, np.int64)
        via = np.empty(n * (n - 1) * (n - 2) // 3 + 1)
        slack = np.empty(n * (n - 1) * (n - 2) // 3 + 1)
        for b in range(chunk, scores.shape[0], chunks):
            m = _present(exists[b], root[b], nodes)
            _eliminate_safely(scores[b], exists[b], nodes, m, w, share, via)
            for k in range(m + 1):
                for j in range(m):
                    there = exists[b, nodes[k], nodes[j]] and k != j
                    dlog[k, j] = direction[b, nodes[k], nodes[j]] if there else 0.0
            _tangent(m, share, via, dlog, slack, mu, dmu)
            for k in range(m + 1):
                for j in range(m):
                    if exists[b, nodes[k], nodes[j]] and k != j:
                        out[b, nodes[k], nodes[j]] = dmu[k, j]
