"""Tree operations of the parentheses task against plain recursion over single sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from structgrad.structures import BinaryTree
from structgrad.tasks.parentheses import trees
from structgrad.tasks.parentheses.data import NO_CHILD

TYPES = 2

#: A tree by recursion: the position of its root's token, and both subtrees.
Node = tuple[int, "Node", "Node"] | None


def padded(rows: list[list[int]], length: int) -> Tensor:
    return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), length)


def balanced(row: list[int]) -> bool:
    """By a stack."""
    stack = []
    for token in row:
        if token <= TYPES:
            stack.append(token)
        elif not stack or stack.pop() + TYPES != token:
            return False
    return not stack


def by_parents(parents: list[int]) -> Node:
    def subtree(position: int) -> Node:
        children = [j for j, above in enumerate(parents) if above == position and j != position]
        left, right = ([j for j in children if (j < position) == side] for side in (True, False))
        assert len(left) <= 1
        assert len(right) <= 1
        return position, subtree(left[0]) if left else None, subtree(right[0]) if right else None

    roots = [j for j, above in enumerate(parents) if above == j]
    assert len(roots) == 1
    return subtree(roots[0])


def flatten(node: Node) -> list[int]:
    """Positions in order."""
    return [] if node is None else [*flatten(node[1]), node[0], *flatten(node[2])]


def breadth_first(node: Node, row: list[int]) -> list[int]:
    places, queue = [], [node]
    while queue:
        first = queue.pop(0)
        places.append(NO_CHILD if first is None else row[first[0]])
        if first is not None:
            queue += [first[1], first[2]]
    return places


def smart(row: list[int], offset: int = 0) -> Node:
    """``( A ) B``: the opening bracket above the closing one above A and B."""
    if not row:
        return None
    end = next(j for j in range(2, len(row) + 1) if balanced(row[:j])) - 1
    return offset, None, (offset + end, smart(row[1:end], offset + 1), smart(row[end + 1 :], offset + end + 1))


def every_row(length: int) -> list[list[int]]:
    return [list(row) for row in itertools.product(range(1, 2 * TYPES + 1), repeat=length)]


EVERY_BALANCED = [row for length in (2, 4, 6) for row in every_row(length) if balanced(row)]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5])
def test_balance_of_every_sequence(length: int) -> None:
    rows = every_row(length)
    expected = [balanced(row) for row in rows]
    assert trees.is_balanced(padded(rows, length), TYPES).tolist() == expected
    assert trees.is_balanced(padded(rows, length + 3), TYPES).tolist() == expected
    assert any(expected) == (length % 2 == 0)


def test_partners_and_smart_trees_of_every_balanced_sequence() -> None:
    assert len(EVERY_BALANCED) == 2 + 2 * 4 + 5 * 8
    tokens = padded(EVERY_BALANCED, 8)
    partners, parents = trees.partners(tokens, TYPES), trees.smart(tokens, TYPES)
    for row, partner, above in zip(EVERY_BALANCED, partners.tolist(), parents.tolist(), strict=True):
        n = len(row)
        for i, j in enumerate(partner[:n]):
            assert partner[j] == i
            assert balanced(row[min(i, j) + 1 : max(i, j)])
        assert above[n:] == [-1] * (8 - n)
        assert by_parents(above[:n]) == smart(row)


def test_left_to_right_has_right_children_only() -> None:
    parents = trees.left_to_right(padded([[1, 3], [1, 3, 2, 4]], 4))
    assert parents.tolist() == [[0, 0, -1, -1], [0, 0, 1, 2]]
    assert by_parents(parents[1].tolist()) == (0, None, (1, None, (2, None, (3, None, None))))
    assert trees.left_to_right(torch.ones(3, 1, dtype=torch.int64)).tolist() == [[0]] * 3


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_level_order_of_every_tree_and_back(n: int) -> None:
    vertices = BinaryTree().enumerate(n)
    # Two more places of padding, of which nothing may be seen.
    wide = torch.nn.functional.pad(vertices, (0, 2, 0, 2))
    tokens = torch.zeros(len(vertices), n + 2, dtype=torch.int64)
    tokens[:, :n] = torch.randint(1, 2 * TYPES + 1, (len(vertices), n))
    parents = trees.parents_of(wide, tokens > 0)
    places = trees.level_order(tokens, parents)
    again, positions = trees.in_order(places)
    assert torch.equal(again[:, : n + 2], tokens)
    assert not again[:, n + 2 :].any()
    for i in range(len(vertices)):
        node = by_parents(parents[i, :n].tolist())
        row = tokens[i].tolist()
        assert flatten(node) == list(range(n))
        assert places[i].tolist() == [*breadth_first(node, row), *[0] * 4]
        # Positions lead back from a place to its token.
        order = positions[i][positions[i] >= 0]
        assert sorted(order.tolist()) == list(range(n))
        assert tokens[i, order].tolist() == [token for token in places[i].tolist() if token]
    depth = trees.depths(parents)
    assert not depth[:, n:].any()
    ancestors = torch.linalg.matrix_power(vertices + torch.eye(n), n).gt(0).sum(1) - 1
    assert torch.equal(depth[:, :n], ancestors)


def test_trees_that_are_cut_off_are_read_as_far_as_they_go() -> None:
    # A root with two children of which each has two, but only five of the seven tokens are there.
    tokens, positions = trees.in_order(torch.tensor([[1, 2, 3, 4, 2]]))
    assert tokens.tolist() == [[4, 2, 2, 1, 3]]
    assert positions.tolist() == [[3, 1, 4, 0, 2]]


def test_batches_of_nothing() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert trees.smart(none, TYPES).shape == trees.left_to_right(none).shape == (0, 4)
    assert trees.level_order(none, none).shape == (0, 9)
    assert trees.is_balanced(none, TYPES).shape == (0,)
