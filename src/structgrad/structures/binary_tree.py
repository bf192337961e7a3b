"""Binary trees over the tokens of a sequence: the smallest token is the root, and each side is a
subtree.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.cartesian_tree import descendants, parents
from structgrad.structures import reading as readings
from structgrad.structures.family_item_recursions import ItemRecursion
from structgrad.structures.layout import Directed, Layout, Vector


class BinaryTree(ItemRecursion):
    """Binary trees whose in-order traversal is the sequence, made by a recursive algorithm.

    See Struminsky et al. (2021, section 2.3). The token of largest utility (smallest exponential)
    becomes the root. The tokens to its left make its left subtree, those to its right its right
    subtree, recursively. The result is the Cartesian tree of the sequence. Among ties the leftmost
    token wins.

    Scores are ``[*batch, n]``. Vertices are adjacencies ``[*batch, n, n]`` with ``x[i, j] = 1`` if
    i is the parent of j. A child j < i is the left child. Missing tokens (``mask`` bool ``[*batch,
    n]``, usually a length) are skipped. A tree over one token has no edge.

    Trace and tree correspond one to one. ``choices[j]`` is the parent of token j, j itself for the
    root, and -1 for a missing token. Every oracle takes O(n^2) work in O(log n) batched steps. The
    result of ``argmax`` is the limit of small noise. It need not be the most probable tree, because
    the distribution favours balanced trees.
    """

    is_binary_tree: ClassVar[bool] = True
    layout = Vector()
    vertex_layout: ClassVar[Layout] = Directed()

    def _recurse(self, keys: Tensor, exists: Tensor) -> Tensor:
        return parents(keys, exists) if keys.shape[-1] else torch.zeros_like(keys, dtype=torch.int64)

    def _show(self, choices: Tensor) -> Tensor:
        token = torch.arange(choices.shape[-1], device=choices.device)
        return (choices.unsqueeze(-2) == token.unsqueeze(-1)) & (token.unsqueeze(-1) != token)

    def _within(self, vertex: Tensor) -> Tensor:
        # S(v) is the subtree of v.
        return descendants(vertex) if vertex.shape[-1] else vertex > 0

    def read(self, vertex: Tensor) -> Tensor:
        """The parent of every token: int64 ``[*batch, n]``, -1 for the root and for missing tokens."""
        return readings.heads(vertex)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        return readings.entries_of_heads(reading)

    def covered(self, vertex: Tensor) -> Tensor:
        on = vertex > 0
        return on.any(-1) | on.any(-2)

    def enumerate(self, *shape: int) -> Tensor:
        """All binary trees over n tokens: ``[Catalan(n), n, n]``, float64; ``shape`` is ``(n,)``."""
        (n,) = shape
        self.check_listable(math.comb(2 * n, n) // (n + 1), n, n)

        def trees(first: int, last: int) -> list[tuple[int, list[tuple[int, int]]]]:
            """Roots and edges of all trees over the tokens of ``range(first, last)``; root -1 for
            no tokens.
            """
            if first == last:
                return [(-1, [])]
            found = []
            for root in range(first, last):
                for left, left_edges in trees(first, root):
                    for right, right_edges in trees(root + 1, last):
                        own = [(root, child) for child in (left, right) if child >= 0]
                        found.append((root, own + left_edges + right_edges))
            return found

        every = trees(0, n)
        vertices = torch.zeros(len(every), n, n, dtype=torch.float64)
        for index, (_, edges) in enumerate(every):
            for parent, child in edges:
                vertices[index, parent, child] = 1.0
        return vertices
