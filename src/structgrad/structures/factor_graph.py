"""Structures made of constraints: binary parts, and factors that say which subsets of them go together."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse, transformed, values_can_be_read, warn_stopped
from structgrad.algorithms.local_polytope import (
    Counts,
    Graph,
    Group,
    Pairs,
    Polytopes,
    Programme,
    along,
    best_vertices,
    solve,
)
from structgrad.algorithms.noise import wide_exponentials
from structgrad.algorithms.transforms import over_batch
from structgrad.common.private import break_graph, is_batched_gradient, untraced
from structgrad.common.ranges import check_count
from structgrad.common.text import options
from structgrad.structures.base import Structure, UnsupportedError, repeated
from structgrad.structures.derived import Gibbs, KBest
from structgrad.structures.far_scores import near_scores
from structgrad.structures.layout import Vector
from structgrad.structures.relaxation import Relaxation

#: Parts of factors: int64 ``[F, K]`` (or ``[K]``, of one factor), or lists of them; -1 stands for no part.
Parts = Tensor | Sequence[Any]

#: A larger error of a projection is warned of.
_TOLERANCE = 1e-6
#: Lists of vertices under that many masks are kept.
_MASKS = 256
#: While vertices are listed, there may be so many times more that are not ruled out yet.
_PARTIAL = 4
#: The most parts of a factor whose 0/1 vectors are all tried while vertices are listed.
_TRIED = 16


# --- factors ----------------------------------------------------------------------------------------------------------


class Factor(abc.ABC):
    """Which 0/1 values some parts may have together; several such factors at once, of one kind and size."""

    @abc.abstractmethod
    def groups(self) -> list[Group]:
        """The factors in the form that the algorithm takes, grouped by size."""

    def additional(self) -> Tensor:
        """Parts that only carry a score of others, int64 ``[N]``; none, unless the factor says otherwise."""
        return torch.zeros(0, dtype=torch.int64)

    def never(self) -> Tensor:
        """Parts that are never on, int64 ``[N]``; none, unless the factor says otherwise."""
        return torch.zeros(0, dtype=torch.int64)


def _whole(parts: Parts) -> Tensor:
    """int64; fractions are refused, not cut off."""
    index = torch.as_tensor(parts)
    if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
        raise TypeError(f"parts of factors are whole numbers; got {str(index.dtype).removeprefix('torch.')}")
    return index.long()


def _index(parts: Parts, ndim: int = 2) -> Tensor:
    """int64 with so many dimensions, the first of which counts factors."""
    index = _whole(parts)
    if index.dim() == ndim - 1:
        index = index.unsqueeze(0)
    if index.dim() != ndim:
        raise ValueError(f"parts of factors have {ndim} dimensions, or one less for a single factor; got {index.dim()}")
    return index


class Budget(Factor):
    """At most, or exactly, k of the parts are on.

    Args:
        parts: ``[F, K]``, -1 for no part.
        k: how many.
        exactly: whether there may not be fewer.
        negated: bool ``[F, K]``, parts that count where they are off; None: no part is negated.

    Raises:
        TypeError: for a k or parts that are not whole numbers.
        ValueError: for a negative k.
    """

    def __init__(self, parts: Parts, k: int, *, exactly: bool = False, negated: Parts | None = None) -> None:
        check_count("k", k, least=0)
        self.parts = _index(parts)
        self.low, self.high = (k if exactly else 0), k
        self._negate(negated)

    def _negate(self, negated: Parts | None) -> None:
        off = torch.zeros_like(self.parts) if negated is None else torch.as_tensor(negated)
        self.negated = off.bool().expand(self.parts.shape)

    def groups(self) -> list[Group]:
        """All its factors are one group."""
        return [Counts(self.parts, self.negated, self.low, min(self.high, self.parts.shape[-1]))]


class Xor(Budget):
    """Exactly one of the parts is on; with one part negated, that part is on where one of the others is.

    Args:
        parts: ``[F, K]``, -1 for no part.
        negated: bool ``[F, K]``, parts that count where they are off.
    """

    def __init__(self, parts: Parts, *, negated: Parts | None = None) -> None:
        super().__init__(parts, 1, exactly=True, negated=negated)


class AtMostOne(Budget):
    """At most one of the parts is on; arguments as for :class:`Xor`."""

    def __init__(self, parts: Parts, *, negated: Parts | None = None) -> None:
        super().__init__(parts, 1, negated=negated)


class Or(Budget):
    """At least one of the parts is on; arguments as for :class:`Xor`."""

    def __init__(self, parts: Parts, *, negated: Parts | None = None) -> None:
        super().__init__(parts, 1, negated=negated)
        self.high = self.parts.shape[-1]
        self.low = 1


class Implication(Or):
    """Where all parts but the last are on, the last is on.

    Args:
        parts: ``[F, K]``: premises, then the conclusion.
    """

    def __init__(self, parts: Parts) -> None:
        index = _index(parts)
        premise = torch.ones_like(index, dtype=torch.bool)
        premise[:, -1:] = False
        super().__init__(index, negated=premise)


class Ordered(Or):
    """Of two parts, the second is on only where the first is.

    Args:
        parts: ``[F, 2]``.

    Raises:
        ValueError: unless the parts are pairs.
    """

    def __init__(self, parts: Parts) -> None:
        index = _index(parts)
        if index.shape[-1] != 2:
            raise ValueError(f"ordered parts are pairs; got {index.shape[-1]} of them")
        super().__init__(index, negated=torch.tensor([False, True]))


class Pair(Factor):
    """The third part is on where the first two both are: its score is that of the pair, as in an Ising model.

    Args:
        parts: ``[F, 3]``.

    Raises:
        ValueError: unless there are three parts, all there.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = _index(parts)
        if self.parts.shape[-1] != 3 or bool((self.parts < 0).any()):
            raise ValueError(f"a pair has three parts, two and that of the pair; got {self.parts.tolist()}")

    def groups(self) -> list[Group]:
        """All its factors are one group."""
        return [Pairs(self.parts)]

    def additional(self) -> Tensor:
        """The third parts."""
        return self.parts[:, 2]


class LabelPair(Factor):
    """Scores of pairs of labels, as in a conditional random field: part ``pairs[f, c, d]`` is on where the first
    variable has label c and the second has label d.

    Each variable has one of its labels, which an :class:`Xor` over them says. The polytope is that of the two
    marginals: sums of rows and of columns of the pairs are the labels.

    Args:
        first: ``[F, C]``, the labels of the first variable.
        second: ``[F, D]``, those of the second.
        pairs: ``[F, C, D]``.

    Raises:
        ValueError: for another shape.
    """

    def __init__(self, first: Parts, second: Parts, pairs: Parts) -> None:
        self.first, self.second, self.pairs = _index(first), _index(second), _index(pairs, 3)
        if self.pairs.shape != (*self.first.shape, self.second.shape[-1]):
            raise ValueError(
                f"pairs of {list(self.first.shape)} and {list(self.second.shape)} labels have shape "
                f"{[*self.first.shape, self.second.shape[-1]]}; got {list(self.pairs.shape)}"
            )

    def groups(self) -> list[Group]:
        """One group a side. A label is on if one of its pairs is."""
        sides = ((self.first, self.pairs), (self.second, self.pairs.transpose(1, 2)))
        return [_sums(label.flatten(), pair.flatten(0, 1)) for label, pair in sides]

    def additional(self) -> Tensor:
        """The pairs."""
        return self.pairs.flatten()


def _sums(wholes: Tensor, parts: Tensor) -> Counts:
    """A whole ``[F]`` is on where exactly one of its parts ``[F, K]`` is."""
    index = torch.cat([wholes[:, None], parts], 1)
    negated = torch.zeros_like(index, dtype=torch.bool)
    negated[:, 0] = True
    return Counts(index, negated, 1, 1)


class StructureFactor(Factor):
    """The parts are a vertex of a structure: a tree, a sequence, a matching, another factor graph.

    Args:
        structure: has ``argmax`` and ``project``, and vertices with one entry a score.
        parts: ``[F, *shape]`` of the structure's parts (or ``shape``, of one factor); -1 where the score of a part is
            no part here, which is then never on. A part where the structure has none, such as the diagonal of a graph,
            is never on either. Edges without a direction are read above the diagonal.

    Raises:
        UnsupportedError: if the structure lacks that.
        ValueError: for another shape.
    """

    def __init__(self, structure: Structure, parts: Parts) -> None:
        structure.require("argmax", "project", by="a structure in a FactorGraph")
        structure.require_linear(by="a structure in a FactorGraph")
        self.structure = structure
        self.parts = _index(parts, structure.layout.ndim + 1)
        self.shape = self.parts.shape[1:]
        structure.layout.check(torch.empty(self.parts.shape))
        # Each part once: undirected edges are shown twice.
        counted = structure.parts(torch.empty(self.parts.shape), self.parts >= 0)
        shown = structure.layout.mirror(torch.where(counted, self.parts + 1, 0)) - 1
        self._never = self.parts[(self.parts >= 0) & ~counted & (self.parts != shown)]
        self.parts = torch.where(counted, self.parts, -1)

    def never(self) -> Tensor:
        """Parts at places where the structure has none."""
        return self._never

    def groups(self) -> list[Group]:
        """All its factors are one group."""
        return [Polytopes(self.parts.flatten(1), self.project, self.argmax)]

    def project(self, target: Tensor, exists: Tensor) -> Tensor:
        """Project flat parts ``[N, K]`` as the structure does."""
        point = self.structure.project(target.unflatten(-1, self.shape), exists.unflatten(-1, self.shape))
        return torch.where(exists, point.flatten(1), 0.0)

    def argmax(self, direction: Tensor, exists: Tensor) -> Tensor:
        """Maximise over flat parts ``[N, K]`` as the structure does."""
        vertex = self.structure.argmax(direction.unflatten(-1, self.shape), exists.unflatten(-1, self.shape))
        return torch.where(exists, vertex.flatten(1), 0.0)

    def vertices(self, exists: Tensor) -> Tensor:
        """All of them, ``[V, K]``, under the mask ``[K]``.

        Raises:
            ValueError: where there are too many.
        """
        every, scores = self.structure.enumerate(*self.shape), torch.zeros(self.shape, dtype=torch.float64)
        mask = exists.reshape(self.shape)
        shown, real = self.structure.restrict(every, scores, mask)
        found = shown[real]
        if not len(found) and "top_k" in self.structure.oracles:  # items are absent, which full vertices cannot show
            best, value = self.structure.top_k(scores, len(every), mask)
            found = best[value > -torch.inf]
        return torch.where(exists, found.flatten(1), 0.0)


# --- the structure ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestVertex:
    """A vertex, and what is known of how good it is.

    Attributes:
        vertex: ``[*batch, P]``, 0/1; 0 where none was found.
        value: ``<vertex, scores>`` ``[*batch]``; -inf where none was found.
        bound: no vertex has a larger value ``[*batch]``; -inf where there is none at all.
        proved: bool ``[*batch]``, whether value and bound are the same up to rounding: then the vertex is a best one.
    """

    vertex: Tensor
    value: Tensor
    bound: Tensor
    proved: Tensor


class FactorGraph(Gibbs, KBest):
    """Binary parts, and factors over subsets of them that say which go together (Martins et al. 2015; Niculae & Martins
    2020).

    Parts are a vector ``[P]``; a vertex is a 0/1 vector that every factor allows. Scores of pairs are parts of their
    own, so that a vertex is linear in its scores.

    - :meth:`argmax` looks at all vertices where there are few. Elsewhere it is AD3, the linear programme over the
      *local polytope*. That is the intersection of the factors' polytopes. Branch and bound follows where the solution
      is fractional. :meth:`best_vertex` also returns the dual bound, and whether the vertex is proved to be a best one.
    - :meth:`project` is LP-SparseMAP, the Euclidean projection on the local polytope. **The local polytope is
      larger than conv(X)** wherever factors share parts in loops, and so is what the relaxations return.
    - Relaxations: ``euclidean`` (:meth:`project`), and ``lp`` (:meth:`lp_sparsemap`), which has no quadratic term of
      additional parts, as in the paper.
    - Only where there are few vertices, samples, log-partition, marginals and what follows from them exist, as sums
      over all vertices.

    **Masks.** A missing part is 0. A factor all of whose parts (but negated ones) are missing is absent; a pair is
    absent where its third part is missing, a structure where all its parts are.

    Args:
        size: P, the number of parts.
        factors: see the classes of this module.
        additional: parts without a quadratic term in ``lp``, beside those that factors name (of pairs).
        max_iterations: steps of a programme at most; :class:`~structgrad.algorithms.eager.StoppedEarly` says where they
            were not enough.
        max_nodes: programmes of an argmax at most.
        listed: up to so many vertices are listed.

    Raises:
        TypeError: for sizes or parts that are not whole numbers.
        ValueError: for sizes below their least; for parts that there are not, or that are twice in a factor; from every
            oracle for scores of another shape, or (eager CPU code) if an example has no vertex.
    """

    def __init__(
        self,
        size: int,
        factors: Iterable[Factor],
        *,
        additional: Parts = (),
        max_iterations: int = 2000,
        max_nodes: int = 1000,
        listed: int = 4096,
    ) -> None:
        check_count("size", size, least=0)
        check_count("max_iterations", max_iterations)
        check_count("max_nodes", max_nodes)
        check_count("listed", listed, least=0)
        self.size = size
        self.factors = tuple(factors)
        self.max_iterations, self.max_nodes, self.listed = max_iterations, max_nodes, listed
        self.layout = Vector()
        for factor in self.factors:
            for group in factor.groups():
                _check_parts(group.parts, size)
        self.graph = Graph(size, [group for factor in self.factors for group in factor.groups() if group.parts.numel()])
        more = _whole(additional).flatten()
        _check_parts(more.unsqueeze(-1), size)
        named = torch.cat([more, *self._named()])
        self.variable = torch.ones(size, dtype=torch.float64).index_fill(0, named[named >= 0], 0.0)
        self._possible = torch.ones(size, dtype=torch.bool)
        for factor in self.factors:
            self._possible[factor.never()] = False
        self._has_impossible = not bool(self._possible.all())
        self._lists: dict[bytes, Tensor | None] = {}

    def _named(self) -> list[Tensor]:
        return [factor.additional() for factor in self.factors]

    def __repr__(self) -> str:
        counts = sum(group.parts.shape[0] for group in self.graph.groups)
        rest = options(self, without=["size", "factors", "additional"])
        return f"FactorGraph({self.size} parts, {counts} factors, {rest})"

    # --- presets --------------------------------------------------------------------------------------------------

    @classmethod
    def ising_grid(cls, height: int, width: int, **options: Any) -> FactorGraph:
        """An Ising model on a grid: ``height * width`` nodes, row by row, then its edges to the right, row by row, then
        those downwards.
        """
        node = torch.arange(height * width).reshape(height, width)
        right = torch.stack([node[:, :-1].flatten(), node[:, 1:].flatten()], 1)
        down = torch.stack([node[:-1].flatten(), node[1:].flatten()], 1)
        edges = torch.cat([right, down])
        pair = node.numel() + torch.arange(len(edges))
        return cls(node.numel() + len(edges), [Pair(torch.cat([edges, pair[:, None]], 1))], **options)

    @classmethod
    def partial_matching(cls, rows: int, columns: int, **options: Any) -> FactorGraph:
        """Every row has at most one column, every column at most one row: parts are ``rows * columns``, row by row."""
        cell = torch.arange(rows * columns).reshape(rows, columns)
        return cls(cell.numel(), [AtMostOne(cell), AtMostOne(cell.T)], **options)

    @classmethod
    def windows(cls, n: int, length: int, k: int, **options: Any) -> FactorGraph:
        """K windows of so many of n positions that do not overlap: part i is the window that starts at position i.

        Raises:
            ValueError: where they do not fit.
        """
        if length < 1 or k < 1 or k * length > n:
            raise ValueError(f"{k} windows of length {length} do not fit into {n} positions")
        count = n - length + 1
        covers = torch.arange(n)[:, None] - torch.arange(length)
        covers = torch.where((covers >= 0) & (covers < count), covers, -1)
        return cls(count, [AtMostOne(covers), Budget(torch.arange(count), k, exactly=True)], **options)

    @classmethod
    def agreement(cls, n: int, labels: int, **options: Any) -> FactorGraph:
        """Two taggers that agree. Parts are first the labels ``n * C``, position by position. Then come the
        transitions ``(n - 1) * C * C`` of the first :class:`LinearChain`, and those of the second. They are additional.

        Raises:
            ValueError: for fewer than two positions.
        """
        from structgrad.structures.linear_chain import LinearChain

        if n < 2:
            raise ValueError(f"taggers have at least two positions; got {n}")
        label = torch.arange(n * labels).reshape(n, labels)
        steps = torch.arange((n - 1) * labels**2).reshape(n - 1, labels, labels)
        chains = [label.numel() + steps, label.numel() + steps.numel() + steps]
        factors: list[Factor] = [Xor(label), StructureFactor(LinearChain(labels), torch.stack(chains))]
        for chain in chains:
            for whole, parts in ((label[0], chain[0]), (label[1:].flatten(), chain.transpose(1, 2).flatten(0, 1))):
                index = torch.cat([whole[:, None], parts], 1)
                factors.append(Xor(index, negated=(torch.arange(labels + 1) == 0)))
        size = label.numel() + 2 * steps.numel()
        return cls(size, factors, additional=torch.arange(label.numel(), size), **options)

    # --- what it has ----------------------------------------------------------------------------------------------

    @property
    def oracles(self) -> frozenset[str]:
        """The oracles; those of the Gibbs distribution exist only if all vertices are listed."""
        found = super().oracles
        return found if self._is_listed else found - _OF_ALL_VERTICES

    @property
    def _is_listed(self) -> bool:
        return self._list(self._possible) is not None

    def own_relaxations(self) -> dict[str, Relaxation]:
        """``lp``: of the local polytope, as ``euclidean`` is."""
        return {"lp": Relaxation("lp_sparsemap", symmetric=True)}

    def shape(self, n: int) -> tuple[int, ...]:
        """``(P,)`` for every n."""
        return (self.size,)

    def _shape_of(self, reading: Tensor) -> tuple[int, ...]:
        return (self.size,)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Those of the mask, without the parts that a factor never allows."""
        exist = super().parts(scores, mask)
        return exist & self._possible.to(exist.device) if self._has_impossible else exist

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure, and that there are P parts."""
        self.layout.check(scores)
        if scores.shape[-1] != self.size:
            raise ValueError(f"scores over {self.size} parts have shape [..., {self.size}]; got {list(scores.shape)}")
        super().check(scores, mask)

    def check_vertex(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> None:
        """Refuse what a factor does not allow, where looking is free."""
        self._check_shown(vertex, scores.shape)
        if values_can_be_read(vertex):
            x = vertex.detach().double().expand(scores.shape).reshape(-1, self.size)
            binary = ((x == 0) | (x == 1)).all(-1)
            exists = self.parts(scores, mask).reshape(x.shape)
            allowed = self.graph.allows(torch.where(binary[:, None], x, 0.0), exists) & binary
            refuse(~allowed.reshape(scores.shape[:-1]), f"is no vertex of {self.name}")

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """Refused: factors over parts that do not exist stay as they are, so the first parts are no smaller graph."""
        raise UnsupportedError(
            "FactorGraph takes a mask, not lengths: the first so many parts are no graph of their own"
        )

    # --- the best vertex ------------------------------------------------------------------------------------------

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A best vertex: ``[*batch, P]``, 0/1, no gradient.

        Where branch and bound ends before it has proved that (``max_nodes``), the best vertex that it has found is
        returned, and :class:`~structgrad.algorithms.eager.StoppedEarly` is warned, once. :meth:`best_vertex` says for
        which examples.

        Raises:
            ValueError: in eager CPU code, if an example has no vertex, or none was found within ``max_nodes``.
        """
        best = self.best_vertex(utility, mask)
        none = best.value == -torch.inf
        refuse(none & (best.bound == -torch.inf), f"has no vertex: the factors of {self.name} allow none")
        refuse(none, f"may have a vertex of {self.name}, but none was found; raise max_nodes")
        gap = torch.where(best.proved, 0.0, best.bound - best.value)
        warn_stopped(gap, 0.0, "argmax of FactorGraph", "a better vertex is not ruled out, by")
        return best.vertex

    def best_vertex(self, utility: Tensor, mask: Tensor | None = None) -> BestVertex:
        """The best vertex that was found, with its certificate: a bound by duality, and whether that proves it."""
        self.check(utility, mask)
        exists = self.parts(utility, mask)
        utility = torch.where(exists, utility.detach(), 0.0)
        if self._is_listed and not transformed(exists):
            vertices, real = self._tables(utility, mask)
            if not real.shape[-1]:
                none = torch.full(utility.shape[:-1], -torch.inf, dtype=torch.float64, device=utility.device)
                return BestVertex(torch.zeros_like(utility), none, none, none > -torch.inf)
            values = torch.where(real, torch.matmul(vertices, utility.double().unsqueeze(-1)).squeeze(-1), -torch.inf)
            value, index = values.max(-1)
            found = vertices.expand(*values.shape, self.size).gather(
                -2, index[..., None, None].expand(*index.shape, 1, self.size)
            )
            vertex = torch.where((value > -torch.inf).unsqueeze(-1), found.squeeze(-2), 0.0)
            return BestVertex(vertex.to(utility.dtype), value, value, value > -torch.inf)
        if torch.compiler.is_compiling():
            break_graph(f"the argmax of {self.name} looks at values in every step")
        vertex, value, bound, proved = _best(self, utility, exists, ~exists, torch.zeros_like(utility))
        return BestVertex(vertex.to(utility.dtype), value, bound, proved)

    def _branch(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Branch and bound, of utilities, existing and known parts and their values ``[*batch, P]``."""
        batch = tensors[0].shape[:-1]
        scores, exists, known, value = (t.reshape(-1, self.size) for t in tensors)
        found = best_vertices(
            self.graph.on(scores.device),
            scores.double(),
            exists,
            known,
            value.double(),
            self.max_iterations,
            self.max_nodes,
        )
        return tuple(part.reshape((*batch, *part.shape[1:])) for part in found)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best vertices: of all where they are listed, else by k rounds of :meth:`argmax` with some parts
        given.
        """
        check_count("k", k)
        if not self._is_listed or transformed(scores):
            return super().top_k(scores, k, mask)
        self.check(scores, mask)
        vertices, values = self._all_values(scores, mask)
        most = min(k, values.shape[-1])
        best, index = values.topk(most, dim=-1)
        found = vertices.gather(-2, index.unsqueeze(-1).expand(*index.shape, self.size))
        real = best > -torch.inf
        found = torch.where(real.unsqueeze(-1), found, 0.0)
        pad = torch.nn.functional.pad
        return (
            pad(found, (0, 0, 0, k - most)).to(scores.dtype),
            pad(best, (0, k - most), value=-math.inf).to(scores.dtype),
        )

    def _constrained_argmax(self, scores: Tensor, allowed: Tensor, forced: Tensor, mask: Tensor | None) -> Tensor:
        exists = self.parts(scores, mask)
        known = ~exists | ~allowed | forced
        given = torch.where(exists, scores, 0.0), exists, known, (forced & exists).to(scores.dtype)
        vertex, value = _best(self, *given)[:2]
        # Where there is none, what breaks the constraints.
        return torch.where((value > -torch.inf).unsqueeze(-1), vertex > 0, ~allowed & exists).to(scores.dtype)

    # --- relaxations ----------------------------------------------------------------------------------------------

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Euclidean projection on the local polytope, LP-SparseMAP: ``[*batch, P]``, differentiable."""
        return self._relax(scores, mask, torch.ones_like(self.variable))

    def lp_sparsemap(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """``argmax_x <x, u> - sum_p x_p^2 / 2`` over the local polytope, p all parts but additional ones (Niculae &
        Martins 2020, equation 8): ``[*batch, P]``, differentiable. Without additional parts this is :meth:`project`.
        """
        return self._relax(utility, mask, self.variable)

    def _relax(self, scores: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
        self.check(scores, mask)
        exists, weight = self.parts(scores, mask), weight.to(scores.device)
        if torch.compiler.is_compiling():
            break_graph(f"the projection of {self.name} looks at values in every step")
        elif not transformed(scores):
            scores = near_scores(self, scores, mask)
        point, target, error = _relaxed(self, scores.detach(), exists, weight)
        if values_can_be_read(error) and bool((error > _TOLERANCE).any()):
            nothing = torch.zeros_like(point)
            bound = self._programme(nothing, exists, torch.zeros_like(weight))[2]
            refuse(bound.reshape(error.shape) == -torch.inf, f"has no vertex: the factors of {self.name} allow none")
        warn_stopped(error, _TOLERANCE, "project of FactorGraph", "copies of parts differ by")
        moving: Tensor = _Moving.apply(scores, point, target, exists, self, weight)
        return moving

    def _programme(self, scores: Tensor, exists: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Points, targets and, for linear programmes, -inf where there is nothing, else errors: ``[*batch, ...]``."""
        batch = scores.shape[:-1]
        programme = Programme.of(scores.reshape(-1, self.size).double(), exists.reshape(-1, self.size), weight)
        found = solve(self.graph.on(scores.device), programme, self.max_iterations)
        third = found.error
        if not bool(weight.any()):
            third = torch.where(found.bound < -_TOLERANCE, -torch.inf, 0.0)
        parts = (found.point, found.target, third)
        return tuple(part.reshape((*batch, *part.shape[1:])) for part in parts)

    # --- all vertices ---------------------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The log-sum over all vertices, where they are few: ``[*batch]``, differentiable.

        Raises:
            UnsupportedError: where there are more than ``listed``.
        """
        self._require_list()
        self.check(scores, mask)
        return self._all_values(scores, mask)[1].logsumexp(-1).to(scores.dtype)

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``-sum_x p(x) log p(x)`` over all vertices, where they are few: ``[*batch]``, differentiable.

        Raises:
            UnsupportedError: where there are more than ``listed``.
        """
        self._require_list()
        self.check(scores, mask)
        log_p = self._all_values(scores, mask)[1].log_softmax(-1)
        # No difference of log Z and a mean, both of which grow with what all scores have in common.
        there = log_p > -torch.inf
        log_p = torch.where(there, log_p, 0.0)
        return -torch.where(there, log_p.exp() * log_p, 0.0).sum(-1).to(scores.dtype)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """Exact Gibbs samples, of all vertices, where they are few: ``[*batch, P]``, or ``[n, *batch, P]``.

        Raises:
            UnsupportedError: where there are more than ``listed``.
        """
        self._require_list()
        self.check(scores, mask)
        vertices, values = self._all_values(repeated(scores.detach(), n), mask)
        chosen = (values - wide_exponentials(values).log()).argmax(-1)
        found = vertices.gather(-2, chosen[..., None, None].expand(*chosen.shape, 1, self.size)).squeeze(-2)
        return found.to(scores.dtype)

    def restrict(self, vertices: Tensor, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All vertices under each mask, some of which are no vertices without it (of factors that are absent)."""
        tables, real = self._tables(scores, mask)
        batch = scores.shape[:-1]
        return tables.to(vertices).expand(*batch, *tables.shape[-2:]), real.expand(*batch, real.shape[-1])

    def enumerate(self, *shape: int) -> Tensor:
        """All vertices, by joining what the factors allow: ``[V, P]``."""
        if shape != (self.size,):
            raise ValueError(f"{self!r} has vertices of shape [{self.size}]; got {list(shape)}")
        most = 2**26 // max(1, self.size)
        found = self._join(self._possible, most)
        if found is None:
            raise ValueError(f"{self.name} has vertices of shape {list(shape)}, too many to be listed")
        return found

    def _require_list(self) -> None:
        if not self._is_listed:
            raise UnsupportedError(f"{self.name} has Gibbs oracles only up to {self.listed:,} vertices; there are more")

    def _all_values(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All vertices ``[*batch, V, P]`` and their values, float64 ``[*batch, V]``; -inf where one is none."""
        vertices, real = self._tables(scores, mask)
        known = torch.where(self.parts(scores, mask), scores, 0.0).double()
        values = torch.matmul(vertices, known.unsqueeze(-1)).squeeze(-1)
        refuse(~real.any(-1).expand(values.shape[:-1]), f"has no vertex: the factors of {self.name} allow none")
        return vertices.expand(*values.shape, self.size), torch.where(real, values, -torch.inf)

    def _tables(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertices under every mask, float64 ``[*mask, V, P]``, and which are there, bool ``[*mask, V]``."""
        if mask is None:
            every = self._list(self._possible)
            assert every is not None
            return every.to(scores.device), torch.ones(len(every), dtype=torch.bool, device=scores.device)
        if transformed(mask):
            raise NotImplementedError(f"vertices of {self.name} are listed for each mask, which vmap cannot be over")
        exists = mask.expand(*mask.shape[:-1], self.size) & self._possible.to(mask.device)
        masks, which = exists.reshape(-1, self.size).cpu().unique(dim=0, return_inverse=True)
        lists = [self._list(one) for one in masks]
        if any(vertices is None for vertices in lists):
            raise UnsupportedError(f"{self.name} has more than {self.listed:,} vertices under a mask, too many to list")
        found = [vertices for vertices in lists if vertices is not None]
        padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True) if found else torch.zeros(0, 1, self.size)
        real = torch.arange(padded.shape[1]) < torch.tensor([len(vertices) for vertices in found])[:, None]
        shape = exists.shape[:-1]
        return (
            padded.double()[which].reshape(*shape, *padded.shape[1:]).to(scores.device),
            real[which].reshape(*shape, padded.shape[1]).to(scores.device),
        )

    def _list(self, exists: Tensor) -> Tensor | None:
        """All vertices under a mask ``[P]``, if they are few."""
        key = bytes(exists.to(torch.uint8).tolist())
        if key not in self._lists:
            if len(self._lists) == _MASKS:  # the first is the oldest
                del self._lists[next(iter(self._lists))]
            with torch.inference_mode(False):  # training must be able to use them as well
                self._lists[key] = self._join(exists, self.listed)
        return self._lists[key]

    def _join(self, exists: Tensor, most: int) -> Tensor | None:
        """All vertices under a mask ``[P]``, in the order in which earlier parts are on first; None for more than
        ``most``.
        """
        tables: list[tuple[Tensor, Tensor]] = []
        for factor in self.factors:
            for group in factor.groups():
                here = (group.parts >= 0) & exists[group.parts.clamp(min=0)]
                for f in group.present(here[None])[0].nonzero()[:, 0].tolist():
                    table = _allowed(factor, group, f, here[f], _PARTIAL * most)
                    if table is None:
                        return None
                    tables.append((group.parts[f][group.parts[f] >= 0], table))
        rows, decided = torch.zeros(1, self.size, dtype=torch.bool), ~exists
        while tables:
            # The factor with the fewest undecided parts first.
            left = [int((~decided[parts]).sum()) for parts, _ in tables]
            parts, table = tables.pop(left.index(min(left)))
            common = decided[parts]
            same = (rows[:, None, parts[common]] == table[None][..., common]).all(-1)
            row, choice = same.nonzero(as_tuple=True)
            if len(row) > _PARTIAL * most:
                return None
            rows = rows[row]
            rows[:, parts] = table[choice]
            decided = decided.scatter(0, parts, True)
        free = (~decided).nonzero()[:, 0]
        if len(rows) * 2 ** len(free) > most:
            return None
        rows = rows.repeat_interleave(2 ** len(free), 0)
        rows[:, free] = _all_bits(len(free)).repeat(len(rows) // 2 ** len(free), 1)
        order = sorted(range(len(rows)), key=(~rows).tolist().__getitem__)
        return rows[order].double()


def _check_parts(parts: Tensor, size: int) -> None:
    """Refuse parts that there are not, or that are twice in a factor."""
    if parts.numel() and (int(parts.max()) >= size or int(parts.min()) < -1):
        raise ValueError(
            f"parts are numbers from 0 to {size - 1}, or -1 for none; got {int(parts.min())} to {parts.max()}"
        )
    ordered = parts.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"a factor has a part twice: {parts[twice.any(-1)][0].tolist()}")


def _all_bits(count: int) -> Tensor:
    """Bool ``[2^count, count]``."""
    return (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).bool()


def _allowed(factor: Factor, group: Group, f: int, here: Tensor, most: int) -> Tensor | None:
    """What factor f of a group allows of its parts, bool ``[V, K]``, of which ``here`` exist; None for too many."""
    kept = group.parts[f] >= 0
    if isinstance(factor, StructureFactor):
        try:
            return factor.vertices(here)[:, kept].bool()
        except ValueError:
            return None
    count = int(here.sum())
    if count <= _TRIED:
        chosen = _all_bits(count)
    elif isinstance(group, Counts) and not bool(group.negated[f].any()):
        sizes = range(group.low, min(group.high, count) + 1)
        if sum(math.comb(count, size) for size in sizes) > most:
            return None
        every = [combination for size in sizes for combination in itertools.combinations(range(count), size)]
        chosen = torch.zeros(len(every), count, dtype=torch.bool)
        for row, combination in enumerate(every):
            chosen[row, list(combination)] = True
    else:
        return None
    full = torch.zeros(len(chosen), len(here), dtype=torch.bool)
    full[:, here] = chosen
    if isinstance(group, Counts):
        on = (full ^ group.negated[f])[:, kept].sum(-1)
        good = (on >= group.low) & (on <= group.high)
    else:
        good = full[:, 2] == (full[:, 0] & full[:, 1])
    return full[good][:, kept]


# --- what differentiates ----------------------------------------------------------------------------------------------


def _solve_all(graph: FactorGraph, scores: Tensor, exists: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Points, targets and errors ``[*batch, ...]``."""
    return over_batch(lambda s, there: graph._programme(s, there, weight), scores, exists)


def _branch_all(graph: FactorGraph, *tensors: Tensor) -> tuple[Tensor, ...]:
    """See :meth:`FactorGraph._branch`."""
    return over_batch(graph._branch, *tensors)


_relaxed, _best = untraced(_solve_all), untraced(_branch_all)


class _Moving(torch.autograd.Function):
    """A solution, which moves with the scores along the faces on which it lies."""

    @staticmethod
    def forward(
        scores: Tensor, point: Tensor, target: Tensor, exists: Tensor, graph: FactorGraph, weight: Tensor
    ) -> Tensor:
        return point.to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, _, target, exists, ctx.graph, ctx.weight = inputs
        ctx.save_for_backward(scores, target, exists)
        ctx.save_for_forward(scores, target, exists)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _pull_back(upstream, *ctx.saved_tensors, ctx.graph, ctx.weight), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        moved: Tensor = _Along.apply(tangent, *ctx.saved_tensors, ctx.graph, ctx.weight)
        return moved

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _Moving.apply(*_batched(info, dims[:4], *inputs[:4]), *inputs[4:]), 0


class _Along(torch.autograd.Function):
    """The Jacobian of the solution times a vector: linear and symmetric in the vector, and constant in the scores."""

    @staticmethod
    def forward(
        vector: Tensor, scores: Tensor, target: Tensor, exists: Tensor, graph: FactorGraph, weight: Tensor
    ) -> Tensor:
        size = graph.size
        programme = Programme.of(scores.reshape(-1, size).double(), exists.reshape(-1, size), weight)
        flat = torch.where(exists, vector, 0.0).reshape(-1, size).double()
        entries = target.reshape(len(flat), target.shape[-1])
        moved = along(graph.graph.on(scores.device), programme, entries, flat)
        return moved.reshape(vector.shape).to(vector.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, scores, target, exists, ctx.graph, ctx.weight = inputs
        ctx.save_for_backward(scores, target, exists)
        ctx.save_for_forward(scores, target, exists)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _pull_back(upstream, *ctx.saved_tensors, ctx.graph, ctx.weight), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        moved: Tensor = _Along.apply(tangent, *ctx.saved_tensors, ctx.graph, ctx.weight)
        return moved

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _Along.apply(*_batched(info, dims[:4], *inputs[:4]), *inputs[4:]), 0


def _pull_back(upstream: Tensor, *solved: Any) -> Tensor:
    """The (symmetric) Jacobian times an upstream gradient; of those of a vectorised Jacobian, as a matrix."""
    if not is_batched_gradient(upstream):
        moved: Tensor = _Along.apply(upstream, *solved)
        return moved
    scores = solved[0].detach()
    directions = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    columns = [_Along.apply(direction.expand(scores.shape), scores, *solved[1:]) for direction in directions]
    return (torch.stack(columns, -1) * upstream.unsqueeze(-2)).sum(-1)


def _batched(info: Any, dims: Sequence[int | None], *tensors: Tensor) -> list[Tensor]:
    """The examples of ``vmap`` as one more leading dimension of all."""
    return [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]


#: Oracles that are sums over all vertices.
_OF_ALL_VERTICES = frozenset(
    [
        *("log_partition", "marginals", "sample", "log_prob", "entropy", "cross_entropy", "kl", "renyi"),
        *("expected_hamming", "minimum_bayes_risk"),
    ]
)
