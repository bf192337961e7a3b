"""Semiring parsing: every dynamic program is an acyclic hypergraph, and every oracle is one pass
over it.

A node stands for a set of partial structures. Each hyperedge into it builds one of them from
members of two earlier nodes (its tails) and at most one part. So the value of a node is

    value(v) = plus over edges e into v of value(left_e) + value(right_e) + score(part_e),

with ``plus`` a maximum, a log-sum, or a merge of k best lists (Goodman 1999; Klein and Manning
2001; Huang 2008). Paths in a DAG are the case of one tail (Niculae et al. 2025, section 2.3.3). A
derivation of the goal uses no node twice, and every vertex has exactly one derivation. The code
that builds a graph must guarantee both.

Let ``p_e = exp(score_e - value(v))`` be the share of an edge in its node. One pass upwards and one
downwards give

- ``log Z`` and the marginals (inside and outside scores): the downward pass adds up ``p_e`` times
  the share of the node in the goal;
- the product of the covariance of the vertices with a vector, which is the derivative of the
  marginals: the same two passes, differentiated in that direction;
- a best vertex and exact samples: one edge is followed from every node that is used (Huang 2008);
- the k best vertices: every node keeps k edges with the ranks of their tails (Huang and Chiang
  2005, algorithm 1).

Time is linear in the number of edges. On the CPU these passes are compiled and run in parallel over
the batch. Elsewhere, and for derivatives of higher order, plain torch goes through the graph level
by level. Both compute in float64; :data:`IMPOSSIBLE` is far below any sum of float32 scores.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from structgrad.algorithms.active_set import FULL, GOING, Pricing, Slots, residual_of, step
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.derivatives import gradients, twin_needed
from structgrad.algorithms.eager import transformed
from structgrad.algorithms.gradients import value_and_gradient
from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation, log_sum
from structgrad.algorithms.threads import run

Index = npt.NDArray[np.int64]

#: The node that is built from nothing in one way; its value is 0.
ONE = 0
#: The node that cannot be built.
ZERO = 1
_NUMBERS = itertools.count()
_NUMBERED: weakref.WeakValueDictionary[int, Hypergraph] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Level:
    """Nodes whose tails are all on earlier levels.

    Arrays are ``[H, K]`` for H nodes of up to K edges. Padding edges have the left tail
    :data:`ZERO`.

    Attributes:
        left: one tail.
        right: the other, :data:`ONE` for edges with one tail.
        part: index of the part in the flattened scores, -1 for none.
    """

    left: Index
    right: Index
    part: Index


@dataclass(frozen=True, eq=False)
class Hypergraph:
    """A dynamic program for scores of one shape.

    Attributes:
        levels: in topological order; their nodes are numbered from 2 on.
        goals: int64 ``[sizes]``, the node that stands for all vertices of an example of that size.
    """

    levels: tuple[Level, ...]
    goals: Index

    @cached_property
    def compiled(self) -> tuple[Any, ...]:
        """The graph for the kernels: ``first [nodes + 1]`` and ``left``, ``right``, ``part``
        ``[edges]``, and the number of nodes up to the last tail.

        The edges of node v are ``first[v]``, ..., ``first[v + 1] - 1``. No node needs those behind
        the last tail; they are goals, of which an example has one.
        """
        counts = [np.zeros(2, np.int64), *((level.left != ZERO).sum(1) for level in self.levels)]
        ends = np.concatenate([[0], np.concatenate(counts).cumsum()])
        columns = [
            np.concatenate(
                [np.zeros(0, np.int64), *(getattr(level, name)[level.left != ZERO] for level in self.levels)]
            )
            for name in ("left", "right", "part")
        ]
        # Compiled code uses an unsigned index as it is; a signed one might count from the end.
        kinds = (np.uint32, np.uint32, np.uint32, np.int32)
        first, left, right, part = (a.astype(t) for a, t in zip((ends, *columns), kinds, strict=True))
        tails = max(2, *(1 + int(column.max(initial=ONE)) for column in columns[:2]))
        return first, left, right, part, tails

    @cached_property
    def nodes(self) -> int:
        """The number of nodes."""
        return 2 + sum(len(level.left) for level in self.levels)

    @cached_property
    def depth(self) -> int:
        """The largest number of nodes in a derivation."""
        size = np.zeros(self.nodes, np.int64)
        start = 2
        for level in self.levels:
            stop = start + len(level.left)
            size[start:stop] = 1 + (size[level.left] + size[level.right]).max(1, initial=0)
            start = stop
        return int(size.max())

    def count(self, goal: int) -> int:
        """The exact number of vertices of a goal."""
        ways = np.array([1, 0], dtype=object)
        for level in self.levels:
            ways = np.concatenate([ways, (ways[level.left] * ways[level.right]).sum(1)])
        return int(ways[goal])

    # --- any device -----------------------------------------------------------------------------------------------

    def goal(self, size: Tensor) -> Tensor:
        """The goals of examples of these sizes: int64 ``[*batch]``, on the device of ``size``."""
        goals = self._on(size.device)[0]
        return goals.gather(0, size.flatten()).view(size.shape)  # which torch.func can do with one size, too

    def _on(self, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The goals, and ``left``, ``right`` and ``part`` of every level, copied to a device once."""
        if device in self._copies:
            return self._copies[device]
        arrays = ((level.left, level.right, level.part) for level in self.levels)
        with torch.inference_mode(False):  # training must be able to use them as well
            copies = [tuple(torch.from_numpy(a).to(device) for a in level) for level in arrays]
            goals = torch.from_numpy(self.goals).to(device)
        if not transformed(goals):  # what is made under torch.func belongs to that call
            self._copies[device] = goals, copies
        return goals, copies

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, list[tuple[Tensor, ...]]]]:
        return {}

    def total(self, scores: Tensor, goal: Tensor, plus: Aggregation) -> Tensor:
        """The aggregate of all vertices: ``[*batch]``, differentiable as often as ``plus``.

        Args:
            scores: ``[*batch, P]``, ``IMPOSSIBLE`` where a part is missing.
            goal: int64 ``[*batch]``.
            plus: aggregates alternatives along a dimension.
        """
        batch = scores.shape[:-1]
        extended = torch.cat([scores, scores.new_zeros(*batch, 1)], -1)
        # The zero times the scores connects the total of a graph without levels to autograd as
        # well.
        value = torch.cat([extended[..., -1:], scores.new_full((*batch, 1), IMPOSSIBLE)], -1)
        for left, right, part in self._on(scores.device)[1]:
            new = plus(_take(value, left) + _take(value, right) + _take(extended, part % extended.shape[-1]), -1)
            # Otherwise sums of impossible values would grow without bound.
            new = torch.where(new < IMPOSSIBLE / 2, IMPOSSIBLE, new)
            value = torch.cat([value, new], -1)
        return value.gather(-1, goal[..., None])[..., 0]

    def best_totals(self, scores: Tensor, goal: Tensor, k: int) -> Tensor:
        """Values of the k best vertices: ``[*batch, k]``, near ``IMPOSSIBLE`` if there are fewer.

        The gradient of each value is its vertex. The arguments are those of :meth:`total`.
        """
        batch = scores.shape[:-1]
        # Combine the i-th best of one tail with the j-th of the other: (i + 1) (j + 1) - 1
        # combinations are at least as good.
        ranks = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
        i, j = torch.tensor(ranks, device=scores.device).T
        extended = torch.cat([scores, scores.new_zeros(*batch, 1)], -1)
        value = scores.new_full((*batch, k, 2), IMPOSSIBLE)
        value = torch.cat([scores.new_zeros(*batch, 1, 2), value[..., 1:, :]], -2)
        value = torch.cat([value[..., :1], torch.full_like(value[..., :1], IMPOSSIBLE)], -1)
        for left, right, part in self._on(scores.device)[1]:
            both = _take(value, left).index_select(-3, i) + _take(value, right).index_select(-3, j)
            every = both + _take(extended, part % extended.shape[-1]).unsqueeze(-3)
            new = every.movedim(-3, -1).flatten(-2).topk(k, -1).values.movedim(-1, -2)
            value = torch.cat([value, torch.where(new < IMPOSSIBLE / 2, IMPOSSIBLE, new)], -1)
        return value.gather(-1, goal[..., None, None].expand(*batch, k, 1))[..., 0]

    @cached_property
    def number(self) -> int:
        """The number by which operators know this graph, as long as the graph is alive."""
        number = next(_NUMBERS)
        _NUMBERED[number] = self
        return number


class Builder:
    """Builds a :class:`Hypergraph` level by level."""

    def __init__(self) -> None:
        self._levels: list[Level] = []
        self._size = 2

    def level(self, left: npt.ArrayLike, right: npt.ArrayLike = ONE, part: npt.ArrayLike = -1) -> Index:
        """Add nodes, one for each row.

        Args:
            left: node numbers that broadcast to ``[H, K]``; :data:`ZERO` for a missing edge.
            right: the same; :data:`ONE` for edges with one tail.
            part: part numbers; -1 for none.

        Returns:
            the numbers of the nodes, ``[H]``.
        """
        arrays = np.broadcast_arrays(*(np.asarray(a, np.int64) for a in (left, right, part)))
        self._levels.append(Level(*(np.array(a) for a in arrays)))
        numbers = np.arange(self._size, self._size + len(arrays[0]))
        self._size += len(arrays[0])
        return numbers

    def build(self, goals: Sequence[int] | Index) -> Hypergraph:
        """The graph; ``goals[size]`` is the node that stands for all vertices of that size."""
        return Hypergraph(tuple(self._levels), np.asarray(goals, np.int64))


def filled(scores: Tensor, exists: Tensor) -> Tensor:
    """Scores in float64, ``IMPOSSIBLE`` where a part is missing."""
    return torch.where(exists, scores.double(), IMPOSSIBLE)


def pricing(exists: Tensor, size: Tensor, graph: int) -> Pricing:
    """The argmax for the active-set method."""
    program = _NUMBERED[graph]
    goal, rows = program.goal(size).contiguous(), exists.contiguous()

    def advance(target: Tensor, slots: Slots, status: Tensor, steps: Tensor, enough: Tensor, limit: int) -> None:
        work = 200 * len(target) * len(program.compiled[1])
        arrays = *program.compiled, target.contiguous(), rows, goal, *slots.arrays()
        run(_active_set_pass, work, *arrays, status, steps, enough, limit)

    return Pricing(min(exists.shape[1], program.depth), advance)


# --- plain torch ------------------------------------------------------------------------------------------------------


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]`` with a fast derivative."""
    taken = values.index_select(-1, index.flatten())
    return taken.reshape(*values.shape[:-1], *index.shape)


# --- CPU kernels ------------------------------------------------------------------------------------------------------
# Each kernel does the examples first, first + stride, ... and writes to its last arguments. It adds
# to vertices, means and products. Arrays: start [nodes + 1], left, right, part [edges] of the
# graph; scores [B, P]; goal [B]. Of the nodes from ``tails`` on an example needs its goal only.


@njit(nogil=True, cache=True)
def _inside(start, left, right, part, tails, scores, goal, value, share):  # type: ignore[no-untyped-def]
    """Upwards through the graph of one example: values [nodes], and the shares [edges] of edges in their nodes."""
    value[ONE] = 0.0
    value[ZERO] = IMPOSSIBLE
    for i in range(2, min(goal, tails) + 1):
        v = i if i < tails else goal
        top = IMPOSSIBLE
        for e in range(start[v], start[v + 1]):
            term = value[left[e]] + value[right[e]]
            if part[e] >= 0:
                term += scores[part[e]]
            share[e] = term
            top = max(top, term)
        if top <= IMPOSSIBLE / 2:
            value[v] = IMPOSSIBLE
            share[start[v] : start[v + 1]] = 0.0
            continue
        total = 0.0
        for e in range(start[v], start[v + 1]):
            # The exponential is most of the work, and one of them is known.
            share[e] = 1.0 if share[e] == top else np.exp(share[e] - top)
            total += share[e]
        value[v] = top + np.log(total)
        inverse = 1.0 / total
        for e in range(start[v], start[v + 1]):
            share[e] *= inverse


@njit(nogil=True, cache=True)
def _log_partition_pass(first, stride, start, left, right, part, tails, scores, goal, log_z):  # type: ignore[no-untyped-def]
    """One pass upwards."""
    value, share = np.empty(len(start) - 1), np.empty(len(left))
    for b in range(first, len(scores), stride):
        _inside(start, left, right, part, tails, scores[b], goal[b], value, share)
        log_z[b] = value[goal[b]]


@njit(nogil=True, cache=True)
def _moments_pass(first, stride, start, left, right, part, tails, scores, goal, log_z, mean):  # type: ignore[no-untyped-def]
    """One pass upwards; then downwards the probabilities of edges, added up for each part."""
    value, share = np.empty(len(start) - 1), np.empty(len(left))
    probability = np.empty(len(start) - 1)
    for b in range(first, len(scores), stride):
        into = mean[b]
        _inside(start, left, right, part, tails, scores[b], goal[b], value, share)
        log_z[b] = value[goal[b]]
        probability[: goal[b]] = 0.0
        probability[goal[b]] = 1.0
        for v in range(goal[b], 1, -1):
            if probability[v] == 0.0:
                continue
            for e in range(start[v], start[v + 1]):
                here = probability[v] * share[e]
                probability[left[e]] += here
                if right[e] != ONE:  # two additions to one place would wait for each other
                    probability[right[e]] += here
                if part[e] >= 0:
                    into[part[e]] += here


@njit(nogil=True, cache=True)
def _covariance_pass(first, stride, start, left, right, part, tails, scores, goal, direction, product):  # type: ignore[no-untyped-def]
    """Both passes and their derivatives in a direction."""
    nodes = len(start) - 1
    value, share, change = np.empty(nodes), np.empty(len(left)), np.empty(len(left))
    moved = np.zeros(nodes)
    probability, slope = np.empty(nodes), np.empty(nodes)
    for b in range(first, len(scores), stride):
        along, into = direction[b], product[b]
        _inside(start, left, right, part, tails, scores[b], goal[b], value, share)
        for i in range(2, min(goal[b], tails) + 1):
            v = i if i < tails else goal[b]
            expected = 0.0
            for e in range(start[v], start[v + 1]):
                step = moved[left[e]] + moved[right[e]]
                if part[e] >= 0:
                    step += along[part[e]]
                change[e] = step
                expected += share[e] * step
            moved[v] = expected
        probability[: goal[b]] = 0.0
        slope[: goal[b] + 1] = 0.0
        probability[goal[b]] = 1.0
        for v in range(goal[b], 1, -1):
            if probability[v] == 0.0 and slope[v] == 0.0:
                continue
            for e in range(start[v], start[v + 1]):
                here = probability[v] * share[e]
                tilt = share[e] * slope[v] + here * (change[e] - moved[v])
                probability[left[e]] += here
                slope[left[e]] += tilt
                if right[e] != ONE:
                    probability[right[e]] += here
                    slope[right[e]] += tilt
                if part[e] >= 0:
                    into[part[e]] += tilt


@njit(nogil=True, cache=True)
def _best(start, left, right, part, tails, scores, goal, value, choice, used, found):  # type: ignore[no-untyped-def]
    """The highest value of one example, and the number of parts (``found``) of its vertex.

    The pass upwards computes maxima, the pass downwards follows the edges that attain them.
    """
    value[ONE], value[ZERO] = 0.0, IMPOSSIBLE
    for i in range(2, min(goal, tails) + 1):
        v = i if i < tails else goal
        top = IMPOSSIBLE
        pick = start[v]
        for e in range(start[v], start[v + 1]):
            term = value[left[e]] + value[right[e]]
            if part[e] >= 0:
                term += scores[part[e]]
            if term > top:
                top = term
                pick = e
        value[v] = top
        choice[v] = pick
    used[: goal + 1] = False
    used[goal] = value[goal] > IMPOSSIBLE / 2
    count = 0
    for v in range(goal, 1, -1):
        if used[v]:
            e = choice[v]
            used[left[e]] = True
            used[right[e]] = True
            if part[e] >= 0:
                found[count] = part[e]
                count += 1
    return value[goal], count


@njit(nogil=True, cache=True)
def _argmax_pass(first, stride, start, left, right, part, tails, scores, goal, best, vertex):  # type: ignore[no-untyped-def]
    """Best vertices."""
    nodes = len(start) - 1
    value, choice, used = np.empty(nodes), np.empty(nodes, np.int32), np.empty(nodes, np.bool_)
    found = np.empty(nodes, np.int32)
    for b in range(first, len(scores), stride):
        best[b], count = _best(start, left, right, part, tails, scores[b], goal[b], value, choice, used, found)
        for t in range(count):
            vertex[b, found[t]] = 1.0


@njit(nogil=True, cache=True)
def _active_set_pass(  # type: ignore[no-untyped-def]
    first,
    stride,
    start,
    left,
    right,
    part,
    tails,
    target,
    exists,
    goal,
    ones,
    count,
    weights,
    system,
    factor,
    status,
    steps,
    enough,
    limit,
):
    """The active-set method: continue every unfinished example until it is done or needs more
    slots.
    """
    nodes, size = len(start) - 1, target.shape[1]
    value, choice, used = np.empty(nodes), np.empty(nodes, np.int32), np.empty(nodes, np.bool_)
    found, vertex = np.empty(nodes, np.int32), np.empty(ones.shape[2], np.int32)
    residual, scores = np.empty(size), np.empty(size)
    for b in range(first, len(target), stride):
        while status[b] == GOING and steps[b] < limit:
            residual_of(target[b], ones[b], count[b], weights[b], residual)
            for p in range(size):
                scores[p] = residual[p] if exists[b, p] else IMPOSSIBLE
            _, parts = _best(start, left, right, part, tails, scores, goal[b], value, choice, used, found)
            vertex[:parts] = found[:parts]
            vertex[parts:] = size
            arrays = ones[b], count[b : b + 1], weights[b], system[b], factor[b]
            status[b] = step(residual, vertex, *arrays, enough[b])
            steps[b] += status[b] != FULL


@njit(nogil=True, cache=True)
def _sample_pass(first, stride, start, left, right, part, tails, scores, goal, uniform, log_z, vertex):  # type: ignore[no-untyped-def]
    """One pass upwards; then one downwards for each sample, one edge of every node that is used."""
    value, share = np.empty(len(start) - 1), np.empty(len(left))
    used = np.empty(len(start) - 1, np.bool_)
    for b in range(first, len(scores), stride):
        _inside(start, left, right, part, tails, scores[b], goal[b], value, share)
        log_z[b] = value[goal[b]]
        for draw in range(len(uniform)):
            used[: goal[b] + 1] = False
            used[goal[b]] = log_z[b] > IMPOSSIBLE / 2
            drawn = 0
            for v in range(goal[b], 1, -1):
                if not used[v]:
                    continue
                left_over = uniform[draw, b, drawn]
                drawn += 1
                pick = start[v]
                for e in range(start[v], start[v + 1]):
                    if share[e] > 0.0:  # rounding may leave a remainder after the last edge, which is then taken
                        pick = e
                        left_over -= share[e]
                        if left_over < 0.0:
                            break
                used[left[pick]] = True
                used[right[pick]] = True
                if part[pick] >= 0:
                    vertex[draw, b, part[pick]] = 1.0


@njit(nogil=True, cache=True)
def _top_k_pass(first, stride, start, left, right, part, tails, scores, goal, k, best, vertex):  # type: ignore[no-untyped-def]
    """The k best edges of every node upwards, with the ranks of their tails; then downwards along
    them.

    ``best`` is -inf at the start.
    """
    nodes = len(start) - 1
    count = np.zeros(nodes, np.int32)
    value = np.empty((nodes, k))
    origin = np.empty((nodes, k, 3), np.int32)
    pending = np.empty((nodes + 2, 2), np.int32)
    count[ONE] = 1
    value[ONE, 0] = 0.0
    for b in range(first, len(scores), stride):
        own = scores[b]
        for i in range(2, min(goal[b], tails) + 1):
            v = i if i < tails else goal[b]
            kept = 0
            for e in range(start[v], start[v + 1]):
                u, w = left[e], right[e]
                gain = own[part[e]] if part[e] >= 0 else 0.0
                if gain <= IMPOSSIBLE / 2:
                    continue
                for i in range(count[u]):
                    enough = False
                    for j in range(count[w]):
                        term = value[u, i] + value[w, j] + gain
                        if kept == k and term <= value[v, k - 1]:
                            enough = j == 0
                            break
                        place = kept if kept < k else k - 1
                        while place > 0 and value[v, place - 1] < term:
                            value[v, place] = value[v, place - 1]
                            origin[v, place] = origin[v, place - 1]
                            place -= 1
                        value[v, place] = term
                        origin[v, place, 0], origin[v, place, 1], origin[v, place, 2] = e, i, j
                        kept = min(kept + 1, k)
                    if enough:
                        break
            count[v] = kept
        for r in range(count[goal[b]]):
            best[b, r] = value[goal[b], r]
            pending[0, 0], pending[0, 1] = goal[b], r
            size = 1
            while size:
                size -= 1
                v, rank = pending[size, 0], pending[size, 1]
                if v < 2:
                    continue
                e, i, j = origin[v, rank, 0], origin[v, rank, 1], origin[v, rank, 2]
                if part[e] >= 0:
                    vertex[b, r, part[e]] = 1.0
                pending[size, 0], pending[size, 1] = left[e], i
                pending[size + 1, 0], pending[size + 1, 1] = right[e], j
                size += 2


# --- operators --------------------------------------------------------------------------------------------------------
# The operands are scores [B, P] on the CPU, bool exists [B, P], int64 sizes [B] and the number of a
# graph. Values are near IMPOSSIBLE for examples without a vertex.


@torch.library.custom_op("structgrad::hypergraph_moments", mutates_args=())
def moments(scores: Tensor, exists: Tensor, size: Tensor, graph: int, with_mean: bool) -> tuple[Tensor, Tensor]:
    """``log Z`` ``[B]`` and ``E[x]`` ``[B, P]`` (``[B, 0]`` if not ``with_mean``), in float64.

    Both are differentiable to any order; the first derivative is compiled.
    """
    log_z, mean = _wide(scores, len(scores)), _wide(scores, len(scores), scores.shape[1] if with_mean else 0)
    if with_mean:
        _run(_moments_pass, 12, graph, scores, exists, size, log_z, mean.zero_())
    else:
        _run(_log_partition_pass, 10, graph, scores, exists, size, log_z)
    return log_z, mean


@moments.register_fake
def _moments_fake(scores: Tensor, exists: Tensor, size: Tensor, graph: int, with_mean: bool) -> tuple[Tensor, Tensor]:
    parts = scores.shape[1] if with_mean else 0
    return _wide(scores, len(scores)), _wide(scores, len(scores), parts)


def _wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


@torch.library.custom_op("structgrad::hypergraph_covariance", mutates_args=())
def _covariance(scores: Tensor, exists: Tensor, size: Tensor, graph: int, direction: Tensor) -> Tensor:
    """The covariance of the parts times ``direction`` ``[B, P]``: the Jacobian of the marginals, which is symmetric."""
    product = torch.zeros_like(direction, memory_format=torch.contiguous_format)
    _run(_covariance_pass, 18, graph, scores, exists, size, direction.contiguous(), product)
    return product


@_covariance.register_fake
def _covariance_fake(scores: Tensor, exists: Tensor, size: Tensor, graph: int, direction: Tensor) -> Tensor:
    return direction.new_empty(direction.shape)


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, exists, size, ctx.graph, ctx.with_mean = inputs
    ctx.held = _NUMBERED[ctx.graph]
    ctx.save_for_backward(scores, exists, size, output[1])
    ctx.set_materialize_grads(False)


def _moments_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    scores, exists, size, mean = ctx.saved_tensors
    of_value, of_mean = upstream
    if twin_needed(*upstream):
        graph: Hypergraph = ctx.held

        def twin(scores: Tensor) -> tuple[Tensor, ...]:
            return value_and_gradient(lambda s: graph.total(s, graph.goal(size), log_sum), filled(scores, exists))

        return *gradients(twin, [scores], upstream), None, None, None, None
    gradient = None if of_value is None else of_value[:, None] * mean
    if of_mean is not None:
        moved = _covariance(scores, exists, size, ctx.graph, of_mean)
        gradient = moved if gradient is None else gradient + moved
    return None if gradient is None else gradient.to(scores.dtype), None, None, None, None


moments.register_autograd(_moments_backward, setup_context=_save_moments)


@torch.library.custom_op("structgrad::hypergraph_argmax", mutates_args=())
def argmax(scores: Tensor, exists: Tensor, size: Tensor, graph: int) -> tuple[Tensor, Tensor]:
    """The highest values ``[B]`` and vertices ``[B, P]`` that attain them, float64."""
    value, vertex = _wide(scores, len(scores)), _wide(scores, *scores.shape)
    _run(_argmax_pass, 4, graph, scores, exists, size, value, vertex.zero_())
    return value, vertex


@argmax.register_fake
def _argmax_fake(scores: Tensor, exists: Tensor, size: Tensor, graph: int) -> tuple[Tensor, Tensor]:
    return _wide(scores, len(scores)), _wide(scores, *scores.shape)


@torch.library.custom_op("structgrad::hypergraph_sample", mutates_args=())
def sample(scores: Tensor, exists: Tensor, size: Tensor, graph: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """``log Z`` ``[B]`` and d samples of each example ``[d, B, P]``, both float64.

    The samples are a function of the noise ``uniform``, float64 ``[d, B, depth]``.
    """
    log_z, vertex = _sample_fake(scores, exists, size, graph, uniform)
    _run(_sample_pass, 10, graph, scores, exists, size, uniform.contiguous(), log_z, vertex.zero_())
    return log_z, vertex


@sample.register_fake
def _sample_fake(scores: Tensor, exists: Tensor, size: Tensor, graph: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    return _wide(scores, len(scores)), _wide(scores, len(uniform), *scores.shape)


@torch.library.custom_op("structgrad::hypergraph_top_k", mutates_args=())
def top_k(scores: Tensor, exists: Tensor, size: Tensor, graph: int, k: int) -> tuple[Tensor, Tensor]:
    """Values ``[B, k]``, best first (-inf if there are fewer), and vertices ``[B, k, P]``, float64."""
    value, vertex = _top_k_fake(scores, exists, size, graph, k)
    _run(_top_k_pass, 4 * k, graph, scores, exists, size, k, value.fill_(-torch.inf), vertex.zero_())
    return value, vertex


@top_k.register_fake
def _top_k_fake(scores: Tensor, exists: Tensor, size: Tensor, graph: int, k: int) -> tuple[Tensor, Tensor]:
    return _wide(scores, len(scores), k), _wide(scores, len(scores), k, scores.shape[1])


def _run(kernel: Any, operations: int, graph: int, scores: Tensor, exists: Tensor, size: Tensor, *others: Any) -> None:
    program = _NUMBERED[graph]
    arrays = *program.compiled, filled(scores, exists).contiguous(), program.goal(size).contiguous()
    run(kernel, operations * len(scores) * len(program.compiled[1]), *arrays, *others)
