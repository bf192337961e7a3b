"""Cartesian trees of sequences of numbers, and the stretches below their nodes.

The smallest number is the root, the numbers on each side make its subtrees in the same way. Plain
torch compares all pairs. The CPU kernels keep the path to the last number on a stack, so a tree
takes O(n) (Vuillemin 1980).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.algorithms.compiled import njit
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.threads import run

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


def parents(keys: Tensor, exists: Tensor) -> Tensor:
    """The tree of the existing numbers; among ties the first is the smallest.

    Args:
        keys: ``[*batch, n]``, finite.
        exists: bool, in the same shape.

    Returns:
        int64 ``[*batch, n]``: the parent of each, itself for the root, and -1 where missing.
    """
    if values_can_be_read(keys, exists):
        result = torch.empty(keys.shape, dtype=torch.int64)
        flat = (t.detach().reshape(-1, keys.shape[-1]).contiguous() for t in (keys, exists))
        run(_parents, 8 * keys.numel(), *flat, result.view(-1, keys.shape[-1]))
        return result
    # The parent of a number is the deeper, that is larger, of the nearest smaller numbers on both sides.
    n = keys.shape[-1]
    place = torch.arange(n, device=keys.device)
    before = place.unsqueeze(-1) > place
    own, other = keys.unsqueeze(-1), keys.unsqueeze(-2)
    smaller = exists.unsqueeze(-2) & torch.where(before, other <= own, other < own)
    left = torch.where(smaller & before, place, -1).amax(-1)
    right = torch.where(smaller & ~before, place, n).amin(-1)
    above_left = torch.where(left >= 0, keys.gather(-1, left.clamp_min(0)), -torch.inf)
    above_right = torch.where(right < n, keys.gather(-1, right.clamp_max(n - 1)), -torch.inf)
    parent = torch.where(above_right >= above_left, right, left)
    parent = torch.where((left < 0) & (right == n), place, parent)
    return torch.where(exists, parent, -1)


def descendants(edges: Tensor) -> Tensor:
    """The nodes below each node of a binary tree, itself included: a stretch of the sequence.

    It goes from the end of the path of left children to the end of the path of right children.

    Args:
        edges: ``[*batch, n, n]``; positive at ``[i, j]`` if i is the parent of j.

    Returns:
        bool ``[*batch, n, n]``: ``[i, j]`` says that j is below i.
    """
    n = edges.shape[-1]
    if values_can_be_read(edges):
        result = torch.empty(edges.shape, dtype=torch.bool)
        flat = edges.detach().reshape(-1, n, n).contiguous()
        run(_descendants, 3 * edges.numel(), flat, result.view(flat.shape))
        return result
    # Pointer doubling: after k rounds the ends of paths of up to 2^k edges are known.
    place = torch.arange(n, device=edges.device)
    children = torch.where(edges.detach() > 0, place, place.unsqueeze(-1))
    ends = torch.stack([children.amin(-1), children.amax(-1)], -2)
    for _ in range((n - 1).bit_length()):
        ends = ends.gather(-1, ends)
    first, last = ends.unsqueeze(-1).unbind(-3)
    return (first <= place) & (place <= last)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _parents(first: int, stride: int, keys: Numbers, exists: Booleans, parent: Integers) -> None:
    n = keys.shape[1]
    path = np.empty(n, np.int64)  # from the root to the last number
    for b in range(first, len(keys), stride):
        depth = 0
        for i in range(n):
            parent[b, i] = -1
            if not exists[b, i]:
                continue
            below = -1
            while depth and keys[b, path[depth - 1]] > keys[b, i]:
                depth -= 1
                below = path[depth]
            if below >= 0:
                parent[b, below] = i
            parent[b, i] = path[depth - 1] if depth else i
            path[depth] = i
            depth += 1


@njit(nogil=True, cache=True)
def _descendants(first: int, stride: int, edges: Numbers, below: Booleans) -> None:
    n = edges.shape[1]
    left, right = np.empty(n, np.int64), np.empty(n, np.int64)
    for b in range(first, len(edges), stride):
        for i in range(n):
            left[i] = right[i] = i
            for j in range(n):
                if edges[b, i, j] > 0:
                    left[i] = min(left[i], j)
                    right[i] = max(right[i], j)
        for i in range(n):
            begin, end = i, i
            while left[begin] < begin:
                begin = left[begin]
            while right[end] > end:
                end = right[end]
            for j in range(n):
                below[b, i, j] = begin <= j <= end
