"""The k best trees by partition of the solution space (Lawler 1972), batched over examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: ``(allowed, forced) -> trees``: best trees of ``[B, S, n, n]`` subproblems; anything where there is none.
Solver = Callable[[Tensor, Tensor], Tensor]


def k_best_trees(scores: Tensor, exists: Tensor, k: int, solve: Solver) -> tuple[Tensor, Tensor]:
    """The k best trees of each example, exact, best first.

    The trees that are left after the best one x, with edges ``e_1, ..., e_m``, fall into m disjoint sets: set t has
    ``e_1, ..., e_(t-1)`` and not ``e_t``. Each is a smaller problem of the same kind, so k rounds of at most n - 1
    argmaxes do.

    Args:
        scores: ``[B, n, n]``.
        exists: bool ``[B, n, n]``, each part once.
        k: how many.
        solve: finds best trees with all ``forced`` edges and none outside ``allowed``, marked on the entries of
            ``exists``; examples x subproblems, ``[B, S, n, n]``.

    Returns:
        bool ``[B, k, n, n]`` on the entries of ``exists``, and bool ``[B, k]``: whether there are that many.
    """
    batch, n = scores.shape[:2]
    values = torch.where(exists, scores.detach().double(), 0.0)[:, None]
    allowed, forced = exists[:, None], torch.zeros_like(exists)[:, None]
    tree = solve(allowed, forced)
    size = tree.sum((-2, -1))  # of every tree of the example: [B, 1]
    value = (values * tree).sum((-2, -1))
    found, valid = [], []
    for left in reversed(range(k)):
        best = value.argmax(1)
        pick = best[:, None, None, None].expand(batch, 1, n, n)
        x, kept, must = tree.gather(1, pick), allowed.gather(1, pick), forced.gather(1, pick)
        top = value.gather(1, best[:, None])
        found.append(x & (top > -torch.inf)[..., None, None])
        valid.append(top > -torch.inf)
        # Subproblem t: without the t-th edge of x that was not forced before, with those before it.
        free = x & ~must
        rank = free.flatten(-2).cumsum(-1).reshape(free.shape) * free
        t = torch.arange(1, n, device=scores.device)[:, None, None]
        children = kept & (rank != t), must | ((rank > 0) & (rank < t))
        trees = solve(*children)
        # A tree is a solution if it has all its edges (a node that lost all of its edges counts as absent).
        solved = (trees.sum((-2, -1)) == size) & (t.flatten() <= free.sum((-2, -1))) & valid[-1]
        solved &= ~(trees & ~children[0]).flatten(-2).any(-1) & ~(children[1] & ~trees).flatten(-2).any(-1)
        value = value.scatter(1, best[:, None], -torch.inf)
        value = torch.cat([value, torch.where(solved, (values * trees).sum((-2, -1)), -torch.inf)], 1)
        tree = torch.cat([tree, trees], 1)
        allowed, forced = torch.cat([allowed, children[0]], 1), torch.cat([forced, children[1]], 1)
        # Only so many of the candidates can still be among the k best.
        value, keep = value.topk(min(max(left, 1), value.shape[1]), dim=1)
        keep = keep[:, :, None, None].expand(*keep.shape, n, n)
        tree, allowed, forced = tree.gather(1, keep), allowed.gather(1, keep), forced.gather(1, keep)
    return torch.cat(found, 1), torch.cat(valid, 1)
