"""Bracket sequences and binary trees over their tokens, as batched tensor code.

A tree is its ``parents``, int64 ``[batch, n]``: the parent of token j, j itself for the root, -1 at
padding, as in the trace of :class:`~structgrad.structures.BinaryTree`. Read from left to right (in
order), a tree gives its sequence.

Its *places* are its tokens and the ``n + 1`` missing children. In order, one missing child lies
between two neighbouring tokens, one before the first and one after the last. *Level order* lists
the places breadth first, with 0 for "no child". In it the k-th token (from 0) has its children at
places ``2 k + 1`` and ``2 k + 2``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.tasks.parentheses.data import NO_CHILD, PAD


def _levels(tokens: Tensor, types: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which brackets open ``[batch, n]``, their level (equal for both of a pair), and how many are
    open afterwards.
    """
    opens = (tokens != PAD) & (tokens <= types)
    change = torch.where(opens, 1, torch.where(tokens != PAD, -1, 0))
    after = change.cumsum(1)
    # Padding is a level of its own, above all others.
    return opens, torch.where(tokens != PAD, after - opens.long(), tokens.shape[1]), after


def _pairwise(level: Tensor) -> Tensor:
    """Positions sorted by level ``[batch, n]``, n even. Within a level they alternate, so pairs are
    side by side.
    """
    return level.argsort(dim=1, stable=True)


def is_balanced(tokens: Tensor, types: int) -> Tensor:
    """Whether brackets close in the reverse order of their opening, each by its own type.

    Args:
        tokens: int64 ``[batch, n]``, padded at the end. A sequence without tokens is balanced.
        types: number of types of brackets.

    Returns:
        bool ``[batch]``.
    """
    tokens = F.pad(tokens, (0, tokens.shape[1] % 2), value=PAD)
    if not tokens.shape[1]:
        return torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    _, level, after = _levels(tokens, types)
    closed = (after >= 0).all(1) & (after[:, -1] == 0)
    by_pair = tokens.gather(1, _pairwise(level))
    left, right = by_pair[:, ::2], by_pair[:, 1::2]
    return closed & ((right == left + types) | (left == PAD)).all(1)


def partners(tokens: Tensor, types: int) -> Tensor:
    """The position of every bracket's partner in balanced sequences.

    Args:
        tokens: int64 ``[batch, n]``, balanced, n even; padded at the end.
        types: number of types of brackets.

    Returns:
        int64 ``[batch, n]``; arbitrary at padding.
    """
    pairs = _pairwise(_levels(tokens, types)[1])
    left, right = pairs[:, ::2], pairs[:, 1::2]
    return torch.empty_like(pairs).scatter_(1, left, right).scatter_(1, right, left)


def left_to_right(tokens: Tensor) -> Tensor:
    """Parents ``[batch, n]`` of the tree with right children only: every token's parent is the one before it."""
    before = (torch.arange(tokens.shape[1], device=tokens.device) - 1).clamp_min(0)
    return torch.where(tokens != PAD, before, -1)


def smart(tokens: Tensor, types: int) -> Tensor:
    """Parents ``[batch, n]`` of the smart tree of balanced sequences.

    The smart tree of ``( A ) B`` has the root ``(``, whose right child is the partner ``)``. The
    left subtree of ``)`` is the smart tree of A, its right subtree that of B.

    Args:
        tokens: int64 ``[batch, n]``, balanced, n even; padded at the end.
        types: number of types of brackets.
    """
    opens = (tokens != PAD) & (tokens <= types)
    partner = partners(tokens, types)
    # The token before the first bracket of A is an opening one, whose partner is above A. The
    # parent of B comes before B.
    before = (torch.arange(tokens.shape[1], device=tokens.device) - 1).clamp_min(0).expand_as(tokens)
    of_opening = torch.where(opens.gather(1, before), partner.gather(1, before), before)
    of_opening[:, :1] = 0
    return torch.where(tokens != PAD, torch.where(opens, of_opening, partner), -1)


def parents_of(vertices: Tensor, exists: Tensor) -> Tensor:
    """Parents ``[batch, n]`` of trees in the form of :class:`~structgrad.structures.BinaryTree`'s
    adjacencies.

    Args:
        vertices: ``[batch, n, n]``, hard.
        exists: bool ``[batch, n]``, which tokens exist.
    """
    above = vertices.detach()
    own = torch.arange(exists.shape[1], device=exists.device)
    return torch.where(exists, torch.where(above.sum(1) > 0, above.argmax(1), own), -1)


def depths(parents: Tensor) -> Tensor:
    """The number of edges between every token and the root: int64 ``[batch, n]``, 0 at padding."""
    own = torch.arange(parents.shape[1], device=parents.device)
    above = torch.where(parents < 0, own, parents)
    depth = (above != own).long()
    # After k rounds: the number of edges up to the ancestor 2^k edges above, and that ancestor.
    for _ in range(max(parents.shape[1] - 1, 1).bit_length()):
        depth = depth + depth.gather(1, above)
        above = above.gather(1, above)
    return depth


def level_order(tokens: Tensor, parents: Tensor) -> Tensor:
    """The places of trees, breadth first.

    Args:
        tokens: int64 ``[batch, n]``, padded at the end.
        parents: int64 ``[batch, n]``, see above.

    Returns:
        int64 ``[batch, 2 n + 1]``: a token or 0 for "no child" at each of the first
        ``2 length + 1`` places; then 0.
    """
    n = tokens.shape[1]
    # In order, places without a child and tokens alternate. A missing child belongs to the deeper
    # of its neighbours.
    depth = torch.where(parents >= 0, depths(parents), -1)
    lacking = torch.maximum(F.pad(depth, (1, 0), value=-1), F.pad(depth, (0, 1), value=-1)) + 1
    beyond = torch.arange(n + 1, device=tokens.device) > (parents >= 0).sum(1, keepdim=True)
    lacking = torch.where(beyond, n + 1, lacking)
    depth = torch.where(parents >= 0, depth, n + 1)
    in_order_depth = torch.cat([torch.stack([lacking[:, :n], depth], 2).flatten(1), lacking[:, n:]], 1)
    in_order_tokens = F.pad(torch.stack([torch.full_like(tokens, NO_CHILD), tokens], 2).flatten(1), (0, 1))
    return in_order_tokens.gather(1, in_order_depth.argsort(dim=1, stable=True))


def in_order(places: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences of trees in level order: the inverse of :func:`level_order`.

    Args:
        places: int64 ``[batch, p]``, 0 for no child and beyond the end. Children beyond the last
            place are missing.

    Returns:
        tokens int64 ``[batch, p]``, padded with 0; and positions int64 ``[batch, p]``, where
        each place's token stands in them, -1 for places without a token.
    """
    batch, p = places.shape
    is_token = places != NO_CHILD
    # The left child; the right one is next to it. Two more places without a token serve as children
    # of childless ones.
    left = torch.where(is_token, (2 * is_token.cumsum(1) - 1).clamp_max(p), p).unsqueeze(2).unbind(1)
    size = places.new_zeros(batch, p + 2)
    for place in range(p - 1, -1, -1):
        below = size.gather(1, left[place]) + size.gather(1, left[place] + 1)
        size[:, place] = torch.where(is_token[:, place], 1 + below[:, 0], 0)
    # The first token of a subtree in the sequence, and the position of its root after its left
    # subtree.
    start, positions = places.new_zeros(batch, p + 2), torch.empty_like(places)
    for place in range(p):
        first = start[:, place, None].clone()
        own = first + size.gather(1, left[place])
        start.scatter_(1, left[place], first).scatter_(1, left[place] + 1, own + 1)
        positions[:, place] = own[:, 0]
    positions = torch.where(is_token, positions, -1)
    tokens = places.new_full((batch, p + 1), PAD)
    tokens.scatter_(1, torch.where(is_token, positions, p), places)
    return tokens[:, :p], positions
