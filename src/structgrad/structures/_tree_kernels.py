"""Compiled (numba, CPU) kernels of the tree structures.

The plain torch versions are in ``_matrix_tree``, ``_contraction`` and ``_kruskal``.

:func:`structgrad._threads.run` deals the examples of a batch out to threads; each allocates its scratch memory once.
Every kernel works on the nodes that are present, so an example of length m costs what m costs, whatever the padding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit

#: Reassociation and fused multiply-add only: infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract"}
#: A product of weights below this may have lost digits to underflow; the example is then redone with logarithms.
_TINY = 1e-280


def refuse_transforms(scores: torch.Tensor, name: str) -> None:
    """Compiled code cannot look into the tensors of ``torch.func``.

    Raises:
        NotImplementedError: for a tensor on the CPU under ``torch.func.vmap``, ``grad`` and so on.
    """
    if torch.compiler.is_compiling() or scores.device.type != "cpu":
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(scores):
        raise NotImplementedError(
            f"{name} does not run under torch.func transforms (vmap, grad) on the CPU; it takes leading batch "
            "dimensions, and torch.autograd gives its gradients"
        )


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
def _eliminate(weights: Any, tops: Any, exists: Any, nodes: Any, m: int, w: Any, share: Any, via: Any) -> float:
    """Eliminate the nodes m-1, ..., 0 in linear float64; see ``_matrix_tree`` for the algorithm.

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
def matrix_tree(
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
def matrix_tree_tangent(
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
def sample_arborescences(
    first: int, stride: int, scores: Any, weights: Any, tops: Any, exists: Any, root: Any, uniform: Any, out: Any
) -> None:
    """Exact Gibbs samples into ``out [B, n, n]`` (zeroed by the caller) from ``uniform [B, n, n]``; see
    ``_matrix_tree``.
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


# --- minimum arborescences -------------------------------------------------------------------------------------------


@njit(cache=True)
def _contract(
    exists: Any,
    root: int,
    cost: Any,
    head: Any,
    members: Any,
    edge: Any,
    into: Any,
    comp: Any,
    place: Any,
    path: Any,
    best: Any,
) -> int:
    """Chu-Liu-Edmonds on ``cost[v, u]`` (of u -> v, +inf where missing; overwritten); see ``_contraction`` for the
    algorithm.

    Returns how many events there were, or -1 if a node cannot be reached.
    """
    n = exists.shape[0]
    done, fresh = -2, -1
    events: int = n
    owner = np.empty(n, np.int64)  # the event that a slot stands for
    for v in range(n):
        comp[v] = v
        owner[v] = v
        place[v] = fresh
        for u in range(n):
            members[v, u] = u == v
            head[v, u] = v
    for e in range(edge.shape[0]):
        edge[e] = -1
        into[e] = -1
    place[root] = done
    for start in range(n):
        s = comp[start]
        if place[s] != fresh:
            continue
        touches = False
        for u in range(n):
            touches = touches or exists[u, start] or exists[start, u]
        if not touches:
            continue
        length = 1
        path[0] = s
        place[s] = 0
        while True:
            s = path[length - 1]
            u = 0
            for x in range(1, n):
                if cost[s, x] < cost[s, u]:
                    u = x
            if cost[s, u] == math.inf:
                return -1
            edge[owner[s]] = u * n + head[s, u]
            best[s] = cost[s, u]
            r = comp[u]
            if place[r] == done:
                for t in range(length):
                    place[path[t]] = done
                break
            if place[r] == fresh:
                path[length] = r
                place[r] = length
                length += 1
                continue
            # A cycle: everything on the path from r on becomes one node, which takes r's slot.
            first = place[r]
            for x in range(n):
                cost[r, x] -= best[r]
                members[events, x] = members[owner[r], x]
            into[owner[r]] = events
            for t in range(first + 1, length):
                s = path[t]
                into[owner[s]] = events
                for x in range(n):
                    c = cost[s, x] - best[s]
                    if c < cost[r, x]:
                        cost[r, x] = c
                        head[r, x] = head[s, x]
                    if members[owner[s], x]:
                        members[events, x] = True
            for x in range(n):
                if members[events, x]:
                    comp[x] = r
                    cost[r, x] = math.inf
            owner[r] = events
            events += 1
            length = first + 1
    return events


@njit(cache=True, nogil=True)
def arborescence(
    first: int, stride: int, costs: Any, exists: Any, root: int, sign: float, vertex: Any, choices: Any, reached: Any
) -> None:
    """Minimum arborescences of ``sign * costs``: ``vertex [B, n, n]`` (zeroed), ``choices [B, E, 2]``,
    ``reached [B]``.
    """
    n = costs.shape[1]
    limit = choices.shape[1]
    cost = np.empty((n, n))
    head = np.empty((n, n), np.int64)
    members = np.empty((limit, n), np.bool_)
    edge = np.empty(limit, np.int64)
    into = np.empty(limit, np.int64)
    comp = np.empty(n, np.int64)
    place = np.empty(n, np.int64)
    path = np.empty(n, np.int64)
    best = np.empty(n)
    taken = np.empty(n, np.bool_)
    for b in range(first, costs.shape[0], stride):
        for u in range(n):
            for v in range(n):
                cost[v, u] = sign * costs[b, u, v] if exists[b, u, v] else math.inf
        events = _contract(exists[b], root, cost, head, members, edge, into, comp, place, path, best)
        reached[b] = events >= 0
        for e in range(limit):
            choices[b, e, 0] = edge[e]
            choices[b, e, 1] = into[e]
        taken[:] = False
        for step in range(events):
            e = events - 1 - step
            if edge[e] >= 0:
                blocked = False
                for x in range(n):
                    blocked = blocked or (members[e, x] and taken[x])
                if not blocked:
                    taken[edge[e] % n] = True
                    vertex[b, edge[e] // n, edge[e] % n] = 1.0


@njit(cache=True)
def _inside(choices: Any, n: int, members: Any) -> None:
    """Which nodes each event stands for, from the ``choices [E, 2]`` of one example."""
    for e in range(choices.shape[0]):
        for v in range(n):
            members[e, v] = e == v
    for e in range(choices.shape[0]):
        parent = choices[e, 1]
        if parent >= 0:
            for v in range(n):
                members[parent, v] = members[parent, v] or members[e, v]


@njit(cache=True, nogil=True)
def inside(first: int, stride: int, choices: Any, out: Any) -> None:
    """``out [B, E, n]``: which nodes each event stands for."""
    for b in range(first, choices.shape[0], stride):
        _inside(choices[b], out.shape[2], out[b])


@njit(cache=True, nogil=True)
def entering(first: int, stride: int, log_rates: Any, exists: Any, choices: Any, out: Any) -> None:
    """``out [B, E]``: log of the total rate of the edges that enter what an event stands for; 0 where none happened."""
    n = log_rates.shape[1]
    limit = choices.shape[1]
    members = np.empty((limit, n), np.bool_)
    for b in range(first, log_rates.shape[0], stride):
        _inside(choices[b], n, members)
        for e in range(limit):
            out[b, e] = 0.0
            if choices[b, e, 0] < 0:
                continue
            top = -math.inf
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            top = max(top, log_rates[b, u, v])
            total = 0.0
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            total += math.exp(log_rates[b, u, v] - top)
            out[b, e] = top + math.log(total)


@njit(cache=True, nogil=True)
def entering_backward(
    first: int, stride: int, log_rates: Any, exists: Any, choices: Any, value: Any, upstream: Any, out: Any
) -> None:
    """The vector-Jacobian product of :func:`entering` into ``out [B, n, n]`` (zeroed by the caller)."""
    n = log_rates.shape[1]
    limit = choices.shape[1]
    members = np.empty((limit, n), np.bool_)
    for b in range(first, log_rates.shape[0], stride):
        _inside(choices[b], n, members)
        for e in range(limit):
            if choices[b, e, 0] < 0 or upstream[b, e] == 0.0:
                continue
            for u in range(n):
                if not members[e, u]:
                    for v in range(n):
                        if members[e, v] and exists[b, u, v]:
                            out[b, u, v] += upstream[b, e] * math.exp(log_rates[b, u, v] - value[b, e])


# --- minimum spanning trees ------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def spanning_tree(
    first: int, stride: int, costs: Any, exists: Any, sign: float, vertex: Any, choices: Any, reached: Any
) -> None:
    """Minimum spanning trees of ``sign * costs`` (symmetric in use, read above the diagonal) by Prim's algorithm.

    ``vertex [B, n, n]`` (zeroed) gets both triangles, ``choices [B, n - 1]`` the edges ``i * n + j``, i < j, cheapest
    first, then -1.
    """
    n = costs.shape[1]
    nearest = np.empty(n)
    via = np.empty(n, np.int64)
    waiting = np.empty(n, np.int64)
    length = np.empty(max(n - 1, 0))
    edge = np.empty(max(n - 1, 0), np.int64)
    for b in range(first, costs.shape[0], stride):
        start = -1
        count = 0
        for v in range(n):
            touches = False
            for u in range(v):
                touches = touches or exists[b, u, v]
            for u in range(v + 1, n):
                touches = touches or exists[b, v, u]
            if touches and start < 0:
                start = v
            elif touches:
                waiting[count] = v
                nearest[v] = math.inf
                count += 1
        reached[b] = True
        new = start
        steps = 0
        while count > 0:
            at = 0
            for t in range(count):
                v = waiting[t]
                i, j = (new, v) if new < v else (v, new)
                if exists[b, i, j]:
                    c = sign * costs[b, i, j]
                    if c < nearest[v]:
                        nearest[v] = c
                        via[v] = new
                if nearest[v] < nearest[waiting[at]]:
                    at = t
            new = waiting[at]
            if nearest[new] == math.inf:
                reached[b] = False
                break
            count -= 1
            waiting[at] = waiting[count]
            i, j = (new, via[new]) if new < via[new] else (via[new], new)
            vertex[b, i, j] = 1.0
            vertex[b, j, i] = 1.0
            length[steps] = nearest[new]
            edge[steps] = i * n + j
            steps += 1
        choices[b] = -1
        order = np.argsort(length[:steps])
        for t in range(steps):
            choices[b, t] = edge[order[t]]


@njit(cache=True, nogil=True)
def joined_at(first: int, stride: int, choices: Any, n: int, out: Any) -> None:
    """``out [B, n, n]``: the step at which Kruskal's algorithm joins i and j, both ways; -1 if it never does."""
    comp = np.empty(n, np.int64)
    for b in range(first, choices.shape[0], stride):
        out[b] = -1
        for v in range(n):
            comp[v] = v
        for t in range(choices.shape[1]):
            if choices[b, t] < 0:
                break
            keep, drop = comp[choices[b, t] // n], comp[choices[b, t] % n]
            for i in range(n):
                if comp[i] == keep:
                    for j in range(n):
                        if comp[j] == drop:
                            out[b, i, j] = t
                            out[b, j, i] = t
            for j in range(n):
                if comp[j] == drop:
                    comp[j] = keep
