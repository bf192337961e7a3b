"""The k best vertices, batched over examples: by partition of the solution space, and of bit vectors with a count."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from structgrad.common.ranges import check_count

#: ``(allowed, forced) -> vertices``: the best of ``[B, S, P]`` subproblems, bool. The result is
#: arbitrary if the subproblem has no vertex.
Solver = Callable[[Tensor, Tensor], Tensor]


def k_best(
    scores: Tensor, exists: Tensor, k: int, solve: Solver, *, same_size: bool, branches: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k best vertices of each example, exact, best first.

    The solution space is partitioned (Murty 1968; Lawler 1972). The vertices other than the best
    one, x, fall into disjoint sets. Those of set t agree with x on the first t - 1 parts and differ
    from it in part t. Each set is a smaller problem of the same kind, so k rounds of at most P
    argmaxes suffice. If all vertices have equally many parts, no other vertex contains all of x.
    Then only the parts of x count.

    Args:
        scores: ``[B, P]``.
        exists: bool ``[B, P]``, each part once.
        k: how many.
        solve: finds the best vertices that have all ``forced`` parts and none outside ``allowed``.
            Both are marked on the entries of ``exists``, as examples x subproblems, ``[B, S, P]``.
        same_size: whether all vertices of an example have equally many parts.
        branches: how many parts of a vertex determine the rest, at most P. Trees of n nodes have n
            - 1 edges, and the last entry of a matching follows from the others. None: P.

    Returns:
        bool ``[B, k, P]`` on the entries of ``exists``, and their values ``[B, k]`` in the dtype of
        the scores. The values are differentiable, and -inf if there are fewer than k vertices.

    Raises:
        TypeError: if k is not a whole number.
        ValueError: for k < 1.
    """
    check_count("k", k)
    batch, size = scores.shape
    filled = torch.where(exists, scores, 0.0)[:, None]
    gain = filled.detach().double()
    allowed, forced = exists[:, None], torch.zeros_like(exists)[:, None]
    vertex = solve(allowed, forced)
    count = vertex.sum(-1)  # of every vertex of the example, if they are of the same size: [B, 1]
    value = (gain * vertex).sum(-1)
    t = torch.arange(1, 1 + (size if branches is None else min(branches, size)), device=scores.device)[:, None]
    found, valid = [], []
    for left in reversed(range(k)):
        best = value.argmax(1)
        pick = best[:, None, None].expand(batch, 1, size)
        x, kept, must = vertex.gather(1, pick), allowed.gather(1, pick), forced.gather(1, pick)
        is_vertex = value.gather(1, best[:, None]) > -torch.inf
        found.append(x & is_vertex[..., None])
        valid.append(is_vertex)
        if not left:
            break
        free = (x if same_size else kept) & ~must
        rank = free.cumsum(-1) * free
        before, here = (rank > 0) & (rank < t), rank == t
        may, has = kept & ~(before & ~x) & ~(here & x), must | before & x | here & ~x
        more = solve(may, has)
        solved = (t[:, 0] <= free.sum(-1)) & is_vertex & ~(more & ~may).any(-1) & ~(has & ~more).any(-1)
        if same_size:  # a node that lost all of its parts counts as absent
            solved &= more.sum(-1) == count
        value = value.scatter(1, best[:, None], -torch.inf)
        value = torch.cat([value, torch.where(solved, (gain * more).sum(-1), -torch.inf)], 1)
        vertex, allowed, forced = (torch.cat(pair, 1) for pair in ((vertex, more), (allowed, may), (forced, has)))
        # Only this many of the candidates can still be among the k best.
        value, keep = value.topk(min(left, value.shape[1]), dim=1)
        keep = keep[:, :, None].expand(*keep.shape, size)
        vertex, allowed, forced = (of.gather(1, keep) for of in (vertex, allowed, forced))
    return best_first(torch.cat(found, 1), torch.cat(valid, 1), filled[:, 0])


def best_first(vertices: Tensor, real: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Vertices and their values, sorted by value: rounding may change the order in which they were
    found.

    Args:
        vertices: bool ``[*batch, k, n]``.
        real: bool ``[*batch, k]``, whether the vertex exists.
        scores: ``[*batch, n]``, finite.

    Returns:
        the vertices, equal values in the order of the input; and their values ``[*batch, k]`` in
        the dtype of the scores. The values are differentiable, and -inf where a vertex does not
        exist.
    """
    values = torch.where(vertices, scores.double()[..., None, :], 0.0).sum(-1).masked_fill(~real, -math.inf)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return vertices.gather(-2, order[..., None].expand(vertices.shape)), values.to(scores.dtype)


def largest(scores: Tensor, k: int) -> Tensor:
    """Marks the k largest entries of ``[*batch, n]``, among ties the first: bool, in O(n)."""
    least = scores.topk(k, dim=-1).values[..., -1:]
    above, equal = scores > least, scores == least
    return above | equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True))


def best_of_cardinality(
    scores: Tensor, exists: Tensor, k: int, size: Tensor, most: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """The k best 0/1 vectors with a bound on the number of ones, exact.

    Sort the parts; the best vector is then the first ``size`` of them. Consider a vector that
    leaves out a part more than k places before that point, or uses one more than k places after it.
    At least k vectors are better. So only 2k parts are open. Over these, a dynamic program keeps
    the k best partial vectors for every count: O(n log n + k^2 min(k, most)).

    Args:
        scores: ``[*batch, n]``, finite.
        exists: ``[*batch, n]``.
        k: how many vectors.
        size: int64 ``[*batch]``, the number of ones of the best vector.
        most: an upper bound on the number of ones.
        exact: whether all vectors have ``size`` ones, rather than at most ``most``.

    Returns:
        bool ``[*batch, k, n]``, best first, and which of them are real, bool ``[*batch, k]``.
    """
    check_count("k", k)
    n = scores.shape[-1]
    ordered, origin = torch.where(exists, scores.detach().double(), -math.inf).sort(dim=-1, descending=True)
    if not n:
        first = torch.arange(k, device=scores.device) == 0  # the empty set, and no other
        return scores.new_zeros(*scores.shape[:-1], k, 0, dtype=torch.bool), first.expand(*scores.shape[:-1], k)
    present = exists.sum(-1, keepdim=True)
    place = size[..., None] + torch.arange(-k, k, device=scores.device)
    is_open = (place >= 0) & (place < present)
    index = place.clamp(0, max(n - 1, 0))
    gains = torch.where(is_open, ordered.gather(-1, index), -math.inf)
    settled = (size - k).clamp(min=0)
    rows = min(2 * k, most, n) + 1
    best = ordered.new_full((*scores.shape[:-1], rows, k), -math.inf)
    best[..., 0, 0] = 0
    taken = torch.zeros(*best.shape, 2 * k, dtype=torch.bool, device=scores.device)
    for step in range(2 * k):
        with_it = torch.nn.functional.pad(best[..., :-1, :], (0, 0, 1, 0), value=-math.inf)
        both = torch.cat([best, with_it + gains[..., step, None, None]], -1)
        best, source = both.topk(k, dim=-1)
        before = torch.nn.functional.pad(taken[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
        before[..., step] = True
        candidates = torch.cat([taken, before], -2)
        taken = candidates.gather(-2, source[..., None].expand_as(taken))
    count = torch.arange(rows, device=scores.device)
    room = (size if exact else torch.full_like(size, most)) - settled
    allowed = count == room[..., None] if exact else count <= room[..., None]
    values, source = best.masked_fill(~allowed[..., None], -math.inf).flatten(-2).topk(k, dim=-1)
    real = values > -math.inf
    taken = taken.flatten(-3, -2).gather(-2, source[..., None].expand(*source.shape, 2 * k)) & is_open[..., None, :]
    position = torch.arange(n, device=scores.device) < settled[..., None]
    vertices = position[..., None, :].expand(*real.shape, n).clone()
    vertices = vertices.long().scatter_add(-1, index[..., None, :].expand_as(taken), taken.long())
    vertices = torch.zeros_like(vertices).scatter(-1, origin[..., None, :].expand_as(vertices), vertices)
    return (vertices > 0) & real[..., None], real
