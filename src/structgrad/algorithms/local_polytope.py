"""Linear and quadratic programmes over a local polytope: AD3 and LP-SparseMAP.

    max_x <s, x> - sum_p c_p x_p^2 / 2    such that  x_f in conv(Z_f) for every factor f

x_f are the parts of factor f and Z_f the 0/1 vectors that it allows. With c = 0 this is the linear programme of AD3
(Martins et al. 2015, equation 10). With c = 1 on the variables it is LP-SparseMAP (Niculae & Martins 2020, equation 8).

**Steps.** The alternating directions method of multipliers (Martins et al. 2015, algorithm 1; Niculae & Martins 2020,
algorithm 1). Every factor has a copy of its parts, projected on its own polytope, and the copies are made to agree.

**The last step.** The rest is linear once the faces on which the copies lie stay the same. Then x moves in the affine
space that these faces have in common, and the multipliers move in the linear space across them. Both are found by
conjugate gradients. The pair is then verified: x is the solution exactly if every copy is the projection of itself plus
its multipliers. So the result is exact, and the steps need only find the faces.

**Gradients.** At the solution x moves in L, the directions that all faces have in common, as the minimum of the
quadratic form along L. The Jacobian is symmetric, and applying it costs conjugate gradients again. Nothing is unrolled.

Of every factor only two things are needed: the projection on its polytope, and its Jacobian, which is the orthogonal
projection on the directions of the face. Factors of one kind and size are a group. Logic factors and pairs also have
compiled code (CPU) that does an example at a time. Other polytopes need a differentiable projection, and the batch
goes through their steps together.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.capped_simplex import project_in_torch
from structgrad.algorithms.compiled import njit
from structgrad.algorithms.eager import values_can_be_read
from structgrad.algorithms.threads import run

#: Of the steps: how far each goes beyond the projection.
_RELAXATION = 1.6
#: The penalty is balanced after so many steps, and after twice as many, and so on: in the end it stays.
_BALANCED = 10
#: The last step is tried when the faces have stayed the same for so many steps, and every now and then. Compiled, it
#: costs as much as ten others, so it is not tried at once.
_SETTLED, _PATIENCE = 4, 8
#: A pair is a solution if its parts and multipliers are that exact, relative to the scores (or 1).
_EXACT = 1e-9
#: Conjugate gradients end when the residual has become that small, a bit before where each step is one as well; much
#: further, and they would go into directions that are nothing but rounding.
_SOLVED, _SOLVED_AROUND = 1e-12, 1e-10
#: A residual (squared) below this, relative to the scores, is what the conjugate gradients before left; where there
#: were none before, it is rounding.
_ROUNDING, _ROUNDING_ALONE = 1e-22, 1e-28
#: A solution that is so much longer (squared) than the right side is none: the faces are wrong.
_FAR = 1e4
#: A direction of less curvature than this is one without.
_FLAT = 1e-13

# --- plain torch ------------------------------------------------------------------------------------------------------
# Factors.

#: ``[B, F, K] -> [B, F, K]``: the part of a vector across the faces on which the factors lie.
Across = Callable[[Tensor], Tensor]


class Group(abc.ABC):
    """Factors of one kind and size.

    Attributes:
        parts: int64 ``[F, K]``, the parts of every factor; -1 for none.
    """

    parts: Tensor

    @abc.abstractmethod
    def present(self, exists: Tensor) -> Tensor:
        """Which factors there are: bool ``[B, F]``, of which parts exist, bool ``[B, F, K]`` (False for none)."""

    def takes_part(self, known: Tensor) -> Tensor:
        """Which parts have a copy in the factor, bool ``[B, F, K]``, of those whose value is known."""
        return torch.ones_like(known)

    def impossible(self, state: State) -> Tensor:
        """Which factors are seen to have no vertex: bool ``[B, F]``."""
        return torch.zeros_like(state.present)

    @abc.abstractmethod
    def project(self, target: Tensor, state: State) -> tuple[Tensor, Across]:
        """The nearest points ``[B, F, K]`` of the polytopes, and what lies across the faces where they are."""

    @abc.abstractmethod
    def best(self, direction: Tensor, state: State) -> Tensor:
        """The largest product of a vertex with the direction ``[B, F, K]``: ``[B, F]``."""

    @abc.abstractmethod
    def allows(self, vertex: Tensor, state: State) -> Tensor:
        """Whether 0/1 vectors ``[B, F, K]`` are vertices: bool ``[B, F]``; of no meaning where the factor is absent."""

    def to(self, device: torch.device) -> Group:
        """The same factors on another device."""
        out: Group = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(out, name, value.to(device) if isinstance(value, Tensor) else value)
        return out


@dataclass(frozen=True)
class State:
    """What a group is told of a batch: ``[B, F, K]`` each, 0 or False where a factor has no part.

    Attributes:
        exists: which parts exist.
        known: which have a known value; parts that do not exist are 0.
        value: of those that are known, 0 elsewhere.
        present: bool ``[B, F]``.
    """

    exists: Tensor
    known: Tensor
    value: Tensor
    present: Tensor


class Counts(Group):
    """Between ``low`` and ``high`` of the parts are on; a negated part counts where it is off.

    Args:
        parts: int64 ``[F, K]``, -1 for none.
        negated: bool ``[F, K]``.
        low: at least so many.
        high: at most so many.
    """

    def __init__(self, parts: Tensor, negated: Tensor, low: int, high: int) -> None:
        self.parts, self.negated, self.low, self.high = parts, negated & (parts >= 0), low, high
        self.plain = (parts >= 0) & ~negated

    def present(self, exists: Tensor) -> Tensor:
        """Where a part that is not negated exists, or, if all are negated, any."""
        counted = torch.where(self.plain.any(-1, keepdim=True), self.plain, self.negated)
        return (exists & counted).any(-1)

    def takes_part(self, known: Tensor) -> Tensor:
        """Known parts only change how many of the others are on."""
        return ~known

    def impossible(self, state: State) -> Tensor:
        """Where too many are known to be on, or too few are free."""
        free = (~state.known & (self.parts >= 0)).sum(-1)
        on = (state.known & (self._turn(state.value) > 0.5) & (self.parts >= 0)).sum(-1)
        return (on > self.high) | (on + free < self.low)

    def _turn(self, x: Tensor) -> Tensor:
        return torch.where(self.negated, 1.0 - x, x)

    def _bounds(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Which parts are free, and at least and at most how many of them are on ``[B, F, 1]``."""
        free = ~state.known & (self.parts >= 0)
        on = (state.known & (self._turn(state.value) > 0.5) & (self.parts >= 0)).sum(-1, keepdim=True)
        most = free.sum(-1, keepdim=True)
        low = torch.minimum((self.low - on).clamp(min=0), most)
        return free, low, torch.minimum((self.high - on).clamp(min=0), most)

    def project(self, target: Tensor, state: State) -> tuple[Tensor, Across]:
        """``clip(target)`` where that has the right sum, else the projection on the sum that it misses."""
        free, low, high = self._bounds(state)
        turned = torch.where(free, self._turn(target), 0.0)
        clipped = turned.clamp(0, 1)
        mass = clipped.sum(-1, keepdim=True)
        binds = (mass < low) | (mass > high)
        bound = project_in_torch(turned, free, torch.where(mass < low, low, high))
        point = torch.where(binds, bound, clipped)
        inside = free & (point > 0) & (point < 1)
        count = inside.sum(-1, keepdim=True).clamp(min=1)
        sign = torch.where(self.negated, -1.0, 1.0).to(target)

        def across(v: Tensor) -> Tensor:
            mean = (torch.where(inside, sign * v, 0.0).sum(-1, keepdim=True) / count) * binds
            return torch.where(inside, sign * mean, torch.where(free, v, 0.0))

        return torch.where(free, self._turn(point), state.value), across

    def best(self, direction: Tensor, state: State) -> Tensor:
        """The largest ones, as many as are to be on, and more of those that are positive."""
        free, low, high = self._bounds(state)
        gain = torch.where(free, torch.where(self.negated, -direction, direction), -torch.inf)
        order = gain.sort(dim=-1, descending=True).values
        rank = torch.arange(gain.shape[-1], device=gain.device)
        chosen = (rank < low) | ((rank < high) & (order > 0))
        off = torch.where(free & self.negated, direction, 0.0).sum(-1)
        return torch.where(chosen, order, 0.0).sum(-1) + off

    def allows(self, vertex: Tensor, state: State) -> Tensor:
        """Whether so many are on."""
        on = torch.where(self.parts >= 0, self._turn(vertex), 0.0).sum(-1)
        return (on >= self.low) & (on <= self.high)


class Pairs(Group):
    """The third part is on where the first two both are.

    Args:
        parts: int64 ``[F, 3]``.
    """

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    def present(self, exists: Tensor) -> Tensor:
        """Where the third part exists."""
        return exists[..., 2]

    def project(self, target: Tensor, state: State) -> tuple[Tensor, Across]:
        """On the tetrahedron of the four vertices: of its faces the one that the conditions of optimality name."""
        points = torch.as_tensor(_POINT, device=target.device)
        shift = torch.as_tensor(_POINT_SHIFT, device=target.device)
        fit, fit_shift = (torch.as_tensor(a, device=target.device) for a in (_FIT, _FIT_SHIFT))
        slack = (fit * target[..., None, None, :]).sum(-1) + fit_shift
        face = slack.amin(-1).argmax(-1)
        point = (points[face] * target[..., None, :]).sum(-1) + shift[face]
        complement = torch.eye(3, dtype=target.dtype, device=target.device) - points[face]

        def across(v: Tensor) -> Tensor:
            return (complement * v[..., None, :]).sum(-1)

        return point.clamp(0, 1), across

    def best(self, direction: Tensor, state: State) -> Tensor:
        """Of four."""
        one, other, _ = direction.unbind(-1)
        return torch.stack([torch.zeros_like(one), one, other, direction.sum(-1)]).amax(0)

    def allows(self, vertex: Tensor, state: State) -> Tensor:
        """Whether the third is the product."""
        return vertex[..., 2] == vertex[..., 0] * vertex[..., 1]


class Polytopes(Group):
    """Polytopes of any kind, by their projection and their argmax.

    Args:
        parts: int64 ``[F, K]``, -1 for none.
        projection: ``(target [N, K], exists [N, K]) -> [N, K]``, differentiable, its Jacobian the orthogonal projection
            on the directions of the face.
        argmax: ``(direction [N, K], exists [N, K]) -> [N, K]``.
    """

    def __init__(
        self,
        parts: Tensor,
        projection: Callable[[Tensor, Tensor], Tensor],
        argmax: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.parts, self.projection, self.argmax = parts, projection, argmax

    def present(self, exists: Tensor) -> Tensor:
        """Where any part exists."""
        return exists.any(-1)

    def takes_part(self, known: Tensor) -> Tensor:
        """Where the polytope has a part."""
        return (self.parts >= 0).expand(known.shape)

    def _exists(self, state: State) -> Tensor:
        """Parts that exist; all of them where the factor is absent, and what comes of it is not looked at."""
        return torch.where(state.present.unsqueeze(-1), state.exists, self.parts >= 0).flatten(0, 1)

    def project(self, target: Tensor, state: State) -> tuple[Tensor, Across]:
        """By the polytope's own projection."""
        exists = self._exists(state)
        with torch.enable_grad():
            leaf = torch.where(exists, target.detach().flatten(0, 1), 0.0).requires_grad_()
            point = self.projection(leaf, exists)

        def across(v: Tensor) -> Tensor:
            (along,) = torch.autograd.grad(point, leaf, v.flatten(0, 1), retain_graph=True)
            return v - along.reshape(v.shape)

        return point.detach().reshape(target.shape), across

    def best(self, direction: Tensor, state: State) -> Tensor:
        """By the argmax."""
        exists = self._exists(state)
        flat = torch.where(exists, direction.flatten(0, 1), 0.0)
        return (self.argmax(flat, exists) * flat).sum(-1).reshape(direction.shape[:-1])

    def allows(self, vertex: Tensor, state: State) -> Tensor:
        """A 0/1 vector is a vertex exactly if it is the best one in its own direction."""
        exists = self._exists(state)
        flat = torch.where(exists, vertex.flatten(0, 1), 0.0)
        return (self.argmax(2 * flat - 1, exists) == flat).all(-1).reshape(vertex.shape[:-1])


# The tetrahedron: its four vertices are (0, 0, 0), (1, 0, 0), (0, 1, 0) and (1, 1, 1), and g x + b >= 0 holds inside.
_INWARD = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
_OFFSET = np.array([0.0, 0.0, 0.0, 1.0])


def _faces() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every face, on which at most three constraints hold with equality: the nearest point ``J t + j`` of its hull.

    With it come four numbers ``A t + a``. None is negative exactly if that point is the nearest of the tetrahedron.
    They are the multipliers of the constraints that hold with equality, and the slack of the others.
    """
    points, shifts, fits, fit_shifts = [], [], [], []
    for count in range(4):
        for chosen in itertools.combinations(range(4), count):
            normal, offset = _INWARD[list(chosen)], _OFFSET[list(chosen)]
            inverse = np.linalg.inv(normal @ normal.T)
            point, shift = np.eye(3) - normal.T @ inverse @ normal, -normal.T @ inverse @ offset
            fit, fit_shift = _INWARD @ point, _INWARD @ shift + _OFFSET
            fit[list(chosen)], fit_shift[list(chosen)] = -inverse @ normal, -inverse @ offset
            points.append(point)
            shifts.append(shift)
            fits.append(fit)
            fit_shifts.append(fit_shift)
    return np.stack(points), np.stack(shifts), np.stack(fits), np.stack(fit_shifts)


_POINT, _POINT_SHIFT, _FIT, _FIT_SHIFT = _faces()

# The graph.


class Graph:
    """Factors over so many parts.

    Args:
        size: P.
        groups: the factors.
    """

    def __init__(self, size: int, groups: Sequence[Group]) -> None:
        self.size = size
        self.groups = tuple(groups)
        flat = [group.parts.flatten() for group in self.groups]
        self.part = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64)
        self.valid = self.part >= 0
        self.at = self.part.clamp(min=0)
        self._elsewhere: dict[torch.device, Graph] = {}
        self._compiled: tuple[Tensor, ...] | None = None

    def on(self, device: torch.device) -> Graph:
        """The same graph on another device."""
        if device == self.part.device:
            return self
        if device not in self._elsewhere:
            with torch.inference_mode(False):  # training must be able to use it as well
                self._elsewhere[device] = Graph(self.size, [group.to(device) for group in self.groups])
        return self._elsewhere[device]

    def split(self, entries: Tensor) -> list[Tensor]:
        """``[B, E]``, the parts of all factors one after the other: ``[B, F, K]`` of each group."""
        sizes = [group.parts.numel() for group in self.groups]
        pieces = entries.split(sizes, dim=-1)
        return [piece.unflatten(-1, group.parts.shape) for piece, group in zip(pieces, self.groups, strict=True)]

    def gather(self, x: Tensor) -> Tensor:
        """``[B, P] -> [B, E]``, 0 or False where a factor has no part."""
        return torch.where(self.valid, x[:, self.at], torch.zeros((), dtype=x.dtype, device=x.device))

    def scatter(self, entries: Tensor) -> Tensor:
        """``[B, E] -> [B, P]``: sums over the factors of a part."""
        return entries.new_zeros(len(entries), self.size).index_add(1, self.at, entries)

    def states(self, exists: Tensor, known: Tensor, value: Tensor) -> list[State]:
        """What every group is told of a batch; ``[B, P]`` each."""
        gathered = [self.split(self.gather(x)) for x in (exists, known | ~exists, value)]
        return [
            State(there, fixed, at, group.present(there))
            for group, there, fixed, at in zip(self.groups, *gathered, strict=True)
        ]

    def allows(self, vertices: Tensor, exists: Tensor) -> Tensor:
        """Whether 0/1 vectors ``[B, P]`` are vertices: bool ``[B]``."""
        states = self.states(exists, ~exists, torch.zeros_like(vertices))
        good = (vertices * ~exists == 0).all(-1)
        for group, x, state in zip(self.groups, self.split(self.gather(vertices)), states, strict=True):
            good = good & (group.allows(x, state) | ~state.present).all(-1)
        return good

    @property
    def compiled(self) -> tuple[Tensor, ...] | None:
        """The arrays of compiled code; None if a group has none."""
        if self._compiled is None and all(isinstance(group, Counts | Pairs) for group in self.groups):
            self._compiled = self._arrays()
        return self._compiled

    def _arrays(self) -> tuple[Tensor, ...]:
        start, signs, kinds, low, high = [0], [], [], [], []
        for group in self.groups:
            factors, width = group.parts.shape
            start += [start[-1] + width * (f + 1) for f in range(factors)]
            counts = isinstance(group, Counts)
            signs.append(
                torch.where(group.negated, -1.0, 1.0).flatten()
                if isinstance(group, Counts)
                else torch.ones(factors * width)
            )
            kinds += [_COUNTS if counts else _PAIR] * factors
            low += [group.low if isinstance(group, Counts) else 0] * factors
            high += [group.high if isinstance(group, Counts) else 0] * factors
        sign = torch.cat([*signs, torch.zeros(0)]).double()
        bounds = [torch.tensor(b, dtype=torch.float64) for b in (low, high)]
        tables = [torch.from_numpy(table) for table in (_POINT, _POINT_SHIFT, _FIT, _FIT_SHIFT)]
        return torch.tensor(start), self.part, sign, torch.tensor(kinds, dtype=torch.int64), *bounds, *tables


@dataclass(frozen=True)
class Programme:
    """One programme an example.

    Attributes:
        scores: s, float64 ``[B, P]``, 0 where a part does not exist.
        weight: c, float64 ``[P]``, 0 or 1.
        exists: bool ``[B, P]``.
        known: bool ``[B, P]``: parts whose value is given; those that do not exist are among them.
        value: float64 ``[B, P]``, of those, 0 elsewhere.
    """

    scores: Tensor
    weight: Tensor
    exists: Tensor
    known: Tensor
    value: Tensor

    @staticmethod
    def of(scores: Tensor, exists: Tensor, weight: Tensor) -> Programme:
        """With no known parts but those that do not exist."""
        return Programme(torch.where(exists, scores, 0.0), weight, exists, ~exists, torch.zeros_like(scores))

    def select(self, rows: Tensor) -> Programme:
        """Those of some examples."""
        return Programme(self.scores[rows], self.weight, self.exists[rows], self.known[rows], self.value[rows])


@dataclass(frozen=True)
class Solution:
    """Of every example.

    Attributes:
        point: x, ``[B, P]``.
        target: ``[B, E]``, copies plus multipliers: x is the solution where their projections are the copies.
        error: ``[B]``, how far x is from that.
        bound: ``[B]``, no vertex has a larger ``<s, x>``; of linear programmes only. -inf if there is none.
    """

    point: Tensor
    target: Tensor
    error: Tensor
    bound: Tensor


def solve(graph: Graph, programme: Programme, max_iterations: int) -> Solution:
    """The solutions, exact where ``error`` is small; without derivatives.

    Args:
        graph: on the device of the scores.
        programme: what is to be solved.
        max_iterations: steps at most.
    """
    with torch.no_grad():
        if graph.compiled is not None and values_can_be_read(programme.scores):
            return _solve_compiled(graph, programme, max_iterations)
        states = graph.states(programme.exists, programme.known, programme.value)
        impossible = torch.zeros(len(programme.scores), dtype=torch.bool, device=programme.scores.device)
        for group, state in zip(graph.groups, states, strict=True):
            impossible |= (group.impossible(state) & state.present).any(-1)
        found = _solve_in_torch(graph, _solve_lone(programme, _is_lone(graph, programme, states)), max_iterations)
        error = found.error.masked_fill(impossible, torch.inf)
        return Solution(found.point, found.target, error, found.bound.masked_fill(impossible, -torch.inf))


def along(graph: Graph, programme: Programme, target: Tensor, vector: Tensor) -> Tensor:
    """How the solution moves when the scores move by ``vector`` ``[B, P]``: ``[B, P]``.

    Args:
        graph: on the device of the scores.
        programme: what was solved.
        target: of the solution.
        vector: anything.
    """
    with torch.no_grad():
        if graph.compiled is not None and values_can_be_read(programme.scores):
            return _along_compiled(graph, programme, target, vector)
        states = graph.states(programme.exists, programme.known, programme.value)
        lone = _is_lone(graph, programme, states)
        inside = lone & (programme.scores > 0) & (programme.scores < 1) & (programme.weight > 0)
        moving = torch.where(inside, vector, 0.0)
        programme = _solve_lone(programme, lone)
        together = torch.zeros_like(vector)
        if len(graph.part):
            together = _Faces.at(graph, programme, target)[1].along(vector)
        return torch.where(programme.known, moving, together)


def _is_lone(graph: Graph, programme: Programme, states: list[State]) -> Tensor:
    """Which parts have no factor: bool ``[B, P]``."""
    if not len(graph.part):
        return ~programme.known
    return ~programme.known & (graph.scatter(_copies(graph, states).double()) == 0)


def _solve_lone(programme: Programme, lone: Tensor) -> Programme:
    """The programme with parts that have no factor solved, and known."""
    alone = torch.where(programme.weight > 0, programme.scores.clamp(0, 1), (programme.scores > 0).double())
    value = torch.where(lone, alone, programme.value)
    return Programme(programme.scores, programme.weight, programme.exists, programme.known | lone, value)


def _copies(graph: Graph, states: list[State]) -> Tensor:
    """Which entries are copies of parts: bool ``[B, E]``."""
    taken = [
        (group.takes_part(state.known) & state.present.unsqueeze(-1)).flatten(1)
        for group, state in zip(graph.groups, states, strict=True)
    ]
    return torch.cat(taken, -1) & graph.valid


# The steps.


class _Faces:
    """The faces on which the copies of a batch lie."""

    def __init__(self, graph: Graph, programme: Programme, copies: Tensor, across: list[Across]) -> None:
        self.graph, self.programme, self.copies, self._across = graph, programme, copies, across

    @staticmethod
    def at(graph: Graph, programme: Programme, target: Tensor) -> tuple[Tensor, _Faces]:
        """Of the projections of a target ``[B, E]``, which are ``[B, E]``."""
        states = graph.states(programme.exists, programme.known, programme.value)
        found = [
            group.project(t, state) for group, t, state in zip(graph.groups, graph.split(target), states, strict=True)
        ]
        points = torch.cat([point.flatten(1) for point, _ in found], -1)
        return points, _Faces(graph, programme, _copies(graph, states), [across for _, across in found])

    def entries(self, v: Tensor) -> Tensor:
        """What of ``[B, E]`` lies across the faces: ``[B, E]``."""
        pieces = [across(piece) for across, piece in zip(self._across, self.graph.split(v), strict=True)]
        return torch.where(self.copies, torch.cat([piece.flatten(1) for piece in pieces], -1), 0.0)

    def free(self, v: Tensor) -> Tensor:
        """``[B, P]``, 0 where the value of a part is known."""
        return torch.where(self.programme.known, 0.0, v)

    def across(self, v: Tensor) -> Tensor:
        """The sum over factors of what lies across their faces, ``[B, P]``: 0 exactly in the common directions L."""
        return self.free(self.graph.scatter(self.entries(self.graph.gather(v))))

    def into(self, v: Tensor) -> Tensor:
        """The orthogonal projection on L: ``[B, P]``."""
        v = self.free(v)
        # Of a vector that lies in L, only rounding is across.
        floor = _ROUNDING_ALONE * v.square().sum(-1, keepdim=True)
        return v - _conjugate_gradients(self.across, self.across(v), floor=floor)

    def along(self, v: Tensor) -> Tensor:
        """Where ``<v, d> - sum c d^2 / 2`` is largest in L: ``[B, P]``."""
        weight = self.programme.weight
        v = self.into(v)
        if bool((weight == 1).all()):
            return v
        return _conjugate_gradients(lambda d: self.into(weight * d), v, _SOLVED_AROUND, _FAR)


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    solved: float = _SOLVED,
    far: float = torch.inf,
    floor: Tensor | float = 0.0,
) -> Tensor:
    """The smallest solution of a symmetric system without negative eigenvalues that has one: ``[B, P]``.

    An example ends by itself, so that none depends on others.
    """
    x, residual, direction = torch.zeros_like(right), right, right
    size = (residual * residual).sum(-1, keepdim=True)
    enough, longest = (solved**2 * size).clamp(min=floor), far * size.clamp(min=1.0)
    for _ in range(3 * right.shape[-1] + 20):
        going = (size > enough) & ((x * x).sum(-1, keepdim=True) < longest)
        if not bool(going.any()):
            break
        image = operator(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = going & (curvature > _FLAT * (direction * direction).sum(-1, keepdim=True))
        length = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        x = x + length * direction
        residual = torch.where(going, residual - length * image, 0.0)
        new = (residual * residual).sum(-1, keepdim=True)
        direction = residual + torch.where(going, new / torch.where(going, size, 1.0), 0.0) * direction
        size = new
    return x


def _scale(programme: Programme) -> Tensor:
    """Of the scores, at least 1: ``[B, 1]``."""
    largest = programme.scores.abs().amax(-1, keepdim=True) if programme.scores.shape[-1] else programme.scores
    return largest.clamp(min=1.0)


def _solve_in_torch(graph: Graph, programme: Programme, max_iterations: int) -> Solution:
    batch = len(programme.scores)
    everybody = torch.arange(batch, device=programme.scores.device)
    out = Solution(
        programme.value.clone(),
        programme.scores.new_zeros(batch, len(graph.part)),
        programme.scores.new_zeros(batch),
        programme.scores.new_full((batch,), torch.inf),
    )
    if not len(graph.part):
        out.bound[:] = (programme.scores * programme.value).sum(-1)
        return out
    steps, rows, tried = _Steps(graph, programme), everybody, 1
    linear = not bool(programme.weight.any())
    for count in range(1, max_iterations + 1):
        z, faces = steps.step()
        if count in (tried, max_iterations):
            tried = _next_try(tried)
            now, multipliers = steps.programme, steps.normal * steps.penalty
            point, target, error = _last_step(faces, z, multipliers)
            solved = (error <= _EXACT).unsqueeze(-1)
            target = torch.where(solved, target, torch.where(steps.copies, graph.gather(steps.x) + multipliers, 0.0))
            point, error = torch.where(solved, point, steps.x), torch.where(solved[:, 0], error, steps.error(z))
            bound = _bound(graph, now, target, point) if linear else torch.full_like(error, torch.inf)
            done = solved[:, 0] | (bound < _lowest(now)) | (count == max_iterations)
            at = rows[done]
            out.point[at], out.target[at] = point[done], target[done]
            out.error[at], out.bound[at] = error[done], bound[done]
            rows, z = rows[~done], z[~done]
            if not len(rows):
                break
            steps.select(~done)
        steps.agree(z)
        if count in _BALANCING:
            steps.balance(z)
    return out


def _next_try(tried: int) -> int:
    """The steps after which the last one is tried: more and more of them."""
    return max(tried + _SETTLED, tried * 5 // 4)


_BALANCING = frozenset(_BALANCED * 2**i for i in range(20))


class _Steps:
    """The state of the method of multipliers for a batch."""

    def __init__(self, graph: Graph, programme: Programme) -> None:
        self.graph, self.programme = graph, programme
        states = graph.states(programme.exists, programme.known, programme.value)
        self.copies = _copies(graph, states)
        self.degree = graph.scatter(self.copies.double())
        weight, known, scores = programme.weight, programme.known, programme.scores
        self.x = torch.where(known, programme.value, torch.where(weight > 0, scores, (scores > 0).double()))
        self.u = scores.new_zeros(len(scores), len(graph.part))
        self.normal, self.moved = self.u, self.x
        self.penalty = _first_penalty(programme)

    def select(self, rows: Tensor) -> None:
        """Go on with some examples."""
        self.programme = self.programme.select(rows)
        for name in ("copies", "degree", "x", "u", "normal", "moved", "penalty"):
            setattr(self, name, getattr(self, name)[rows])

    def step(self) -> tuple[Tensor, _Faces]:
        """Project the copies."""
        target = self.graph.gather(self.x) - self.u
        z, faces = _Faces.at(self.graph, self.programme, target)
        self.normal = torch.where(self.copies, target - z, 0.0)
        return z, faces

    def agree(self, z: Tensor) -> None:
        """Make the copies agree."""
        now = self.programme
        reach = _RELAXATION * z + (1 - _RELAXATION) * self.graph.gather(self.x)
        total = self.graph.scatter(torch.where(self.copies, reach + self.u, 0.0))
        new = (now.scores + self.penalty * total) / (now.weight + self.penalty * self.degree)
        new = torch.where(now.known, now.value, new)
        self.u = torch.where(self.copies, self.u + reach - self.graph.gather(new), 0.0)
        self.x, self.moved = new, new - self.x

    def error(self, z: Tensor) -> Tensor:
        """How far copies are apart, and parts from where they were: ``[B]``."""
        apart = torch.where(self.copies, z - self.graph.gather(self.x), 0.0).abs().amax(-1)
        return torch.maximum(apart, self.moved.abs().amax(-1))

    def balance(self, z: Tensor) -> None:
        """Make the two residuals alike, relative to what they are residuals of."""
        apart = torch.where(self.copies, z - self.graph.gather(self.x), 0.0).abs().amax(-1, keepdim=True)
        moved = self.penalty * self.moved.abs().amax(-1, keepdim=True) / _scale(self.programme)
        known = (apart > 0) & (moved > 0)
        factor = torch.where(known, apart / torch.where(known, moved, 1.0), 1.0).sqrt().clamp(0.1, 10.0)
        self.penalty = self.penalty * factor
        self.u = self.u / factor


def _first_penalty(programme: Programme) -> Tensor:
    """``[B, 1]``: of the size of the scores, as the parts are of size 1."""
    free = ~programme.known
    square = torch.where(free, programme.scores, 0.0).square().sum(-1, keepdim=True)
    size = (square / free.sum(-1, keepdim=True).clamp(min=1)).sqrt()
    return torch.where(programme.weight.any(), size.clamp(min=1.0), torch.where(size > 0, size, 1.0))


def _last_step(faces: _Faces, z: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The solution if the faces are right, ``[B, P]``, copies plus multipliers ``[B, E]``, and how far the copies are
    from being the projections of these ``[B]``.
    """
    graph, now = faces.graph, faces.programme
    degree = graph.scatter(faces.copies.double()).clamp(min=1)
    x = torch.where(now.known, now.value, graph.scatter(torch.where(faces.copies, z, 0.0)) / degree)
    apart = torch.where(faces.copies, z - graph.gather(x), 0.0)
    x = x + _conjugate_gradients(faces.across, faces.free(graph.scatter(faces.entries(apart))))
    if bool(now.weight.any()):
        x = x + faces.along(now.scores - now.weight * x)
    missing = faces.free(now.scores - now.weight * x - graph.scatter(multipliers))
    rounding = _ROUNDING * now.scores.square().sum(-1, keepdim=True).clamp(min=1.0)
    multipliers = multipliers + faces.entries(graph.gather(_conjugate_gradients(faces.across, missing, floor=rounding)))
    # What is left of the condition on their sum is an error as well.
    left = faces.free(now.scores - now.weight * x - graph.scatter(multipliers))
    copies = torch.where(faces.copies, graph.gather(x), 0.0)
    target = copies + torch.where(faces.copies, multipliers, 0.0)
    again, _ = _Faces.at(graph, now, target)
    error = torch.where(faces.copies, again - copies, 0.0).abs().amax(-1)
    error = torch.maximum(error, (left / _scale(now)).abs().amax(-1))
    return x, target, error.nan_to_num(torch.inf)


def _lowest(programme: Programme) -> Tensor:
    """Less than any ``<s, x>``: ``[B]``; a bound below says that there is no vertex."""
    free = torch.where(programme.known, 0.0, programme.scores.clamp(max=0)).sum(-1)
    given = (programme.scores * programme.value).sum(-1)
    size = programme.scores.abs().sum(-1)
    return free + given - 1e-6 * (1 + size)


def _bound(graph: Graph, programme: Programme, target: Tensor, point: Tensor) -> Tensor:
    """By duality: multipliers, moved so that their sums are the scores, bound every ``<s, x>``: ``[B]``."""
    states = graph.states(programme.exists, programme.known, programme.value)
    copies = _copies(graph, states)
    multipliers = torch.where(copies, target - graph.gather(point), 0.0)
    degree = graph.scatter(copies.double()).clamp(min=1)
    left = programme.scores - graph.scatter(multipliers)
    spread = torch.where(programme.known, 0.0, left / degree)
    multipliers = torch.where(copies, multipliers + graph.gather(spread), 0.0)
    total = torch.where(programme.known, left * programme.value, 0.0).sum(-1)
    for group, direction, state in zip(graph.groups, graph.split(multipliers), states, strict=True):
        total = total + torch.where(state.present, group.best(direction, state), 0.0).sum(-1)
    return total


# The best vertex.

#: A bound above the value by no more than this, relative to the sum of the scores (or 1), proves it.
_PROOF = 1e-9


def best_vertices(
    graph: Graph, scores: Tensor, exists: Tensor, known: Tensor, value: Tensor, max_iterations: int, max_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The vertices of largest ``<s, x>``, by branch and bound on the linear programmes (Das et al. 2012).

    Args:
        graph: on the device of the scores.
        scores: float64 ``[B, P]``, 0 where a part does not exist.
        exists: bool ``[B, P]``.
        known: bool ``[B, P]``, parts whose value is given; those that do not exist are among them.
        value: float64 ``[B, P]``, of those, 0 elsewhere.
        max_iterations: steps of a programme at most.
        max_nodes: programmes of an example at most, up to those of the last round.

    Returns:
        the best vertices that were found ``[B, P]``, 0 where none was; their values ``[B]``, -inf where none was; what
        no vertex exceeds ``[B]``, -inf where there is none; and whether they are proved to be the best, bool ``[B]``.
    """
    batch, device = len(scores), scores.device
    best, top = torch.zeros_like(scores), scores.new_full((batch,), -torch.inf)
    given_up, spent = top.clone(), torch.zeros(batch, dtype=torch.int64, device=device)
    slack = _PROOF * scores.abs().sum(-1).clamp(min=1.0)
    owner, weight = torch.arange(batch, device=device), scores.new_zeros(scores.shape[-1])
    while len(owner):
        s, there = scores[owner], exists[owner]
        found = solve(graph, Programme(s, weight, there, known, value), max_iterations)
        rounded = torch.where(known, value, (found.point > 0.5).double())
        gain = torch.where(graph.allows(rounded, there), (s * rounded).sum(-1), -torch.inf)
        new = top.scatter_reduce(0, owner, gain, "amax")
        better = (gain == new[owner]) & (gain > top[owner])
        first = torch.full_like(spent, len(owner)).scatter_reduce(
            0, owner[better], better.nonzero()[:, 0], "amin", include_self=True
        )
        improved = first < len(owner)
        best[improved], top = rounded[first[improved]], new
        spent = spent.index_add(0, owner, torch.ones_like(owner))
        is_open = (found.bound > top[owner] + slack[owner]) & ~known.all(-1)
        too_many = is_open & (spent[owner] >= max_nodes)
        given_up = given_up.scatter_reduce(0, owner[too_many], found.bound[too_many], "amax")
        is_open &= ~too_many
        # The part that is least decided is decided, both ways.
        undecided = torch.where(known, torch.inf, (found.point - 0.5).abs()).argmin(-1, keepdim=True)[is_open]
        owner = owner[is_open].repeat(2)
        known = known[is_open].scatter(-1, undecided, True).repeat(2, 1)
        value = torch.cat([value[is_open].scatter(-1, undecided, on) for on in (1.0, 0.0)])
    return best, top, torch.maximum(top, given_up), (top > -torch.inf) & (given_up <= top + slack)


# --- CPU kernels ------------------------------------------------------------------------------------------------------
# Of one example. ``x [P]`` are parts, ``e [E]`` copies; ``graph`` is (start of the copies of factor f [F + 1], part of
# a copy [E], -1 if it is negated [E], kind [F], least and greatest count [F], tables of the tetrahedron). A face is
# said by which copies are inside ``inside [E]`` and by a number ``face [F]``: whether the count binds; which of the
# faces of the tetrahedron.

_COUNTS, _PAIR = 0, 1
#: So many steps of Newton's method find a threshold: it ends after a few, and halves a bracket otherwise.
_NEWTON_STEPS = 100


def _kernel_arguments(graph: Graph, programme: Programme) -> tuple[Tensor, ...]:
    arrays = graph.compiled
    assert arrays is not None
    here = (programme.scores, programme.exists, programme.known, programme.value)
    return *arrays, programme.weight.contiguous(), *(part.contiguous() for part in here)


def _solve_compiled(graph: Graph, programme: Programme, max_iterations: int) -> Solution:
    batch, entries = len(programme.scores), len(graph.part)
    point, target = torch.empty_like(programme.scores), programme.scores.new_empty(batch, entries)
    error, bound = programme.scores.new_empty(batch), programme.scores.new_empty(batch)
    arguments = _kernel_arguments(graph, programme)
    run(_solve_rows, 3000 * batch * entries, *arguments, max_iterations, point, target, error, bound)
    return Solution(point, target, error, bound)


def _along_compiled(graph: Graph, programme: Programme, target: Tensor, vector: Tensor) -> Tensor:
    moves = torch.empty_like(programme.scores)
    arguments = _kernel_arguments(graph, programme)
    run(_along_rows, 300 * target.numel(), *arguments, target.contiguous(), vector.contiguous(), moves)
    return moves


@njit(cache=True, nogil=True)
def _begin(graph, weight, scores, exists, known, value, present, copied, degree):  # type: ignore[no-untyped-def]
    """Which factors are there, what is a copy, and of how many a part has one; parts without any are solved, and known.

    Returns whether no factor is seen to have no vertex.
    """
    start, part, sign, kind, low, high = graph[:6]
    possible = True
    for f in range(len(kind)):
        first, last = start[f], start[f + 1]
        if kind[f] == _PAIR:
            present[f] = exists[part[last - 1]]
        else:
            plain, some_plain, some_negated, on, free = False, False, False, 0.0, 0
            for e in range(first, last):
                p = part[e]
                if p < 0:
                    continue
                if sign[e] > 0:
                    plain = True
                    some_plain |= exists[p]
                else:
                    some_negated |= exists[p]
                if known[p]:
                    on += value[p] if sign[e] > 0 else 1.0 - value[p]
                else:
                    free += 1
            present[f] = some_plain if plain else some_negated
            if present[f] and (on > high[f] or on + free < low[f]):
                possible = False
        if present[f]:
            for e in range(first, last):
                p = part[e]
                if p >= 0 and not (known[p] and kind[f] == _COUNTS):
                    copied[e] = True
                    degree[p] += 1.0
    for p in range(len(scores)):
        if not known[p] and degree[p] == 0.0:
            known[p] = True
            if weight[p] > 0.0:
                value[p] = min(max(scores[p], 0.0), 1.0)
            else:
                value[p] = 1.0 if scores[p] > 0.0 else 0.0
    return possible


@njit(cache=True, nogil=True)
def _project(graph, known, value, present, target, z, inside, face):  # type: ignore[no-untyped-def]
    """All copies; returns whether a face is another one than before."""
    start, part, sign, kind, low, high, point, point_shift, fit, fit_shift = graph
    changed = False
    for f in range(len(kind)):
        if not present[f]:
            continue
        first, last = start[f], start[f + 1]
        if kind[f] == _PAIR:
            before = face[f]
            t0, t1, t2 = target[first], target[first + 1], target[first + 2]
            best, worst = before, -np.inf
            for trial in range(-1, len(point)):
                g = before if trial < 0 else trial
                least = np.inf
                for r in range(4):
                    slack = fit[g, r, 0] * t0 + fit[g, r, 1] * t1 + fit[g, r, 2] * t2 + fit_shift[g, r]
                    least = min(least, slack)
                if least > worst:
                    best, worst = g, least
                if least >= 0.0:
                    break
            for r in range(3):
                found = point[best, r, 0] * t0 + point[best, r, 1] * t1 + point[best, r, 2] * t2
                z[first + r] = min(max(found + point_shift[best, r], 0.0), 1.0)
            face[f] = best
            changed |= best != before
            continue
        lowest, highest, mass, free = low[f], high[f], 0.0, 0
        least, most = np.inf, -np.inf
        for e in range(first, last):
            p = part[e]
            if p < 0:
                continue
            if known[p]:
                on = value[p] if sign[e] > 0 else 1.0 - value[p]
                lowest -= on
                highest -= on
                z[e] = value[p]
            else:
                t = target[e] if sign[e] > 0 else 1.0 - target[e]
                mass += min(max(t, 0.0), 1.0)
                least, most = min(least, t), max(most, t)
                free += 1
        bound = -1.0
        if mass < lowest:
            bound = min(max(lowest, 0.0), free)
        elif mass > highest:
            bound = max(min(highest, free), 0.0)
        shift = 0.0
        if bound >= 0.0 and free > 0:
            below, above = least - 1.0, most
            shift = min(max(0.0, below), above)
            for _ in range(_NEWTON_STEPS):
                total, moving = 0.0, 0
                for e in range(first, last):
                    p = part[e]
                    if p >= 0 and not known[p]:
                        t = (target[e] if sign[e] > 0 else 1.0 - target[e]) - shift
                        if t >= 1.0:
                            total += 1.0
                        elif t > 0.0:
                            total += t
                            moving += 1
                excess = total - bound
                if excess >= 0:
                    below = shift
                else:
                    above = shift
                if abs(excess) <= 1e-14 * max(1.0, bound) or above - below <= 1e-15 * max(1.0, abs(below)):
                    break
                step = shift + excess / moving if moving > 0 else np.inf
                shift = step if below < step < above else 0.5 * (below + above)
        binds = 1 if bound >= 0.0 else 0
        changed |= face[f] != binds
        face[f] = binds
        for e in range(first, last):
            p = part[e]
            if p >= 0 and not known[p]:
                t = (target[e] if sign[e] > 0 else 1.0 - target[e]) - shift
                within = 0.0 < t < 1.0
                t = min(max(t, 0.0), 1.0)
                z[e] = t if sign[e] > 0 else 1.0 - t
                changed |= inside[e] != within
                inside[e] = within
    return changed


@njit(cache=True, nogil=True)
def _entries_across(graph, known, present, inside, face, v, out):  # type: ignore[no-untyped-def]
    """What of ``[E]`` lies across the face of each factor: ``[E]``."""
    start, part, sign, kind, _, _, point, _, _, _ = graph
    out[:] = 0.0
    for f in range(len(kind)):
        if not present[f]:
            continue
        first, last = start[f], start[f + 1]
        if kind[f] == _PAIR:
            for r in range(3):
                along = 0.0
                for c in range(3):
                    along += point[face[f], r, c] * v[first + c]
                out[first + r] = v[first + r] - along
            continue
        mean, count = 0.0, 0
        if face[f]:
            for e in range(first, last):
                if inside[e]:
                    mean += sign[e] * v[e]
                    count += 1
            mean /= max(count, 1)
        for e in range(first, last):
            if part[e] >= 0 and not known[part[e]]:
                out[e] = sign[e] * mean if inside[e] else v[e]


@njit(cache=True, nogil=True)
def _sum_free(graph, known, entries, out):  # type: ignore[no-untyped-def]
    """``[E] -> [P]``: sums over the factors of a part, 0 where its value is known."""
    part = graph[1]
    out[:] = 0.0
    for e in range(len(part)):
        if part[e] >= 0 and not known[part[e]]:
            out[part[e]] += entries[e]


@njit(cache=True, nogil=True)
def _across(graph, known, present, inside, face, v, one, other, out):  # type: ignore[no-untyped-def]
    """The sum over factors of what of a vector ``[P]`` lies across their faces; ``one`` and ``other [E]`` are room."""
    part = graph[1]
    for e in range(len(part)):
        one[e] = v[part[e]] if part[e] >= 0 else 0.0
    _entries_across(graph, known, present, inside, face, one, other)
    _sum_free(graph, known, other, out)


@njit(cache=True, nogil=True)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True)
def _conjugate_step(x, residual, direction, image, curvature, length):  # type: ignore[no-untyped-def]
    """One step of conjugate gradients, in place. Returns the new squared length of the residual."""
    step = length / curvature
    for p in range(len(x)):
        x[p] += step * direction[p]
        residual[p] -= step * image[p]
    new = _dot(residual, residual)
    ratio = new / length
    for p in range(len(x)):
        direction[p] = residual[p] + ratio * direction[p]
    return new


@njit(cache=True, nogil=True)
def _invert(graph, known, present, inside, face, right, floor, x):  # type: ignore[no-untyped-def]
    """Conjugate gradients: the smallest x with :func:`_across` of it the right side."""
    size, entries = len(right), len(graph[1])
    residual, direction, image = right.copy(), right.copy(), np.empty(size)
    one, other = np.empty(entries), np.empty(entries)
    x[:] = 0.0
    length = _dot(residual, residual)
    enough = max(_SOLVED * _SOLVED * length, floor)
    for _ in range(3 * size + 20):
        if not length > enough:
            break
        _across(graph, known, present, inside, face, direction, one, other, image)
        curvature = _dot(direction, image)
        if not curvature > _FLAT * _dot(direction, direction):
            break
        length = _conjugate_step(x, residual, direction, image, curvature, length)


@njit(cache=True, nogil=True)
def _into(graph, known, present, inside, face, v, out):  # type: ignore[no-untyped-def]
    """The orthogonal projection of a vector on the common directions of the faces."""
    size, entries = len(v), len(graph[1])
    right, one, other = np.empty(size), np.empty(entries), np.empty(entries)
    _across(graph, known, present, inside, face, v, one, other, right)
    # Of a vector that lies there, only rounding is across.
    _invert(graph, known, present, inside, face, right, _ROUNDING_ALONE * _dot(v, v), out)
    for p in range(size):
        out[p] = 0.0 if known[p] else v[p] - out[p]


@njit(cache=True, nogil=True)
def _along(graph, known, present, inside, face, weight, v, out):  # type: ignore[no-untyped-def]
    """Where ``<v, d> - sum c d^2 / 2`` is largest in the common directions of the faces."""
    size, euclidean = len(v), True
    weighted = np.empty(size)
    for p in range(size):
        weighted[p] = 0.0 if known[p] else v[p]
        euclidean &= weight[p] == 1.0
    _into(graph, known, present, inside, face, weighted, out)
    if euclidean:
        return
    residual, direction, image = out.copy(), out.copy(), np.empty(size)
    out[:] = 0.0
    length = _dot(residual, residual)
    far = _FAR * max(1.0, length)
    enough = _SOLVED_AROUND * _SOLVED_AROUND * length
    for _ in range(3 * size + 20):
        if not length > enough or not _dot(out, out) < far:
            break
        for p in range(size):
            weighted[p] = 0.0 if known[p] else weight[p] * direction[p]
        _into(graph, known, present, inside, face, weighted, image)
        curvature = _dot(direction, image)
        if not curvature > _FLAT * _dot(direction, direction):
            break
        length = _conjugate_step(out, residual, direction, image, curvature, length)


@njit(cache=True, nogil=True)
def _finish_euclidean(  # type: ignore[no-untyped-def]
    graph, known, value, present, copied, scores, z, inside, face, multipliers, x, target
):
    """:func:`_last_step` where all weights are 1, by one system in place of three; returns the error.

    Parts are then the scores less the sums of multipliers. What lies across the faces of copies less z is 0; that is a
    system in the multipliers, whose operator has the same eigenvalues as :func:`_across`.
    """
    part = graph[1]
    size, entries = len(scores), len(part)
    residual, direction, image = np.zeros(entries), np.zeros(entries), np.empty(entries)
    moves, gathered = np.empty(size), np.zeros(entries)
    length = 1.0
    _sum_free(graph, known, multipliers, moves)
    for p in range(size):
        x[p] = value[p] if known[p] else scores[p] - moves[p]
        length += scores[p] * scores[p]
    for e in range(entries):
        if copied[e]:
            gathered[e] = x[part[e]] - z[e]
    _entries_across(graph, known, present, inside, face, gathered, residual)
    direction[:] = residual
    square = _dot(residual, residual)
    enough = _ROUNDING_ALONE * length
    for _ in range(3 * size + 20):
        if not square > enough:
            break
        _sum_free(graph, known, direction, moves)
        for e in range(entries):
            gathered[e] = moves[part[e]] if copied[e] else 0.0
        _entries_across(graph, known, present, inside, face, gathered, image)
        curvature = _dot(moves, moves)
        if not curvature > _FLAT * _dot(direction, direction):
            break
        step = square / curvature
        for p in range(size):
            x[p] -= step * moves[p]
        square = _conjugate_step(multipliers, residual, direction, image, curvature, square)
    for e in range(entries):
        target[e] = x[part[e]] + multipliers[e] if copied[e] else 0.0
    return _how_far(graph, known, value, present, copied, inside, face, x, target)


@njit(cache=True, nogil=True)
def _how_far(graph, known, value, present, copied, inside, face, x, target):  # type: ignore[no-untyped-def]
    """The largest difference of parts and the projections of a target: inf where it is no number."""
    part = graph[1]
    z = np.empty(len(part))
    _project(graph, known, value, present, target, z, inside.copy(), face.copy())
    error = 0.0
    for e in range(len(part)):
        if copied[e]:
            apart = abs(z[e] - x[part[e]])
            error = max(error, apart) if apart == apart else np.inf
    return error


@njit(cache=True, nogil=True)
def _finish(  # type: ignore[no-untyped-def]
    graph, known, value, present, copied, degree, scores, weight, linear, z, inside, face, multipliers, x, target
):
    """:func:`_last_step`: x and the target are written; returns the error."""
    part = graph[1]
    size, entries = len(scores), len(part)
    change, right = np.empty(size), np.empty(size)
    one, other = np.zeros(entries), np.empty(entries)
    for p in range(size):
        x[p] = value[p] if known[p] else 0.0
    for e in range(entries):
        if copied[e] and not known[part[e]]:
            x[part[e]] += z[e] / degree[part[e]]
    scale, length = 1.0, 1.0
    for p in range(size):
        scale = max(scale, abs(scores[p]))
        length += scores[p] * scores[p]
    for e in range(entries):
        if copied[e]:
            one[e] = z[e] - x[part[e]]
    _entries_across(graph, known, present, inside, face, one, other)
    _sum_free(graph, known, other, right)
    _invert(graph, known, present, inside, face, right, 0.0, change)
    for p in range(size):
        x[p] += change[p]
        right[p] = scores[p] - weight[p] * x[p]
    if not linear:
        _along(graph, known, present, inside, face, weight, right, change)
        for p in range(size):
            x[p] += change[p]
    _sum_free(graph, known, multipliers, right)
    for p in range(size):
        right[p] = 0.0 if known[p] else scores[p] - weight[p] * x[p] - right[p]
    _invert(graph, known, present, inside, face, right, _ROUNDING * length, change)
    for e in range(entries):
        one[e] = change[part[e]] if part[e] >= 0 else 0.0
    _entries_across(graph, known, present, inside, face, one, other)
    _sum_free(graph, known, other, change)
    error = 0.0
    for p in range(size):
        error = max(error, abs(right[p] - change[p]) / scale)
    for e in range(entries):
        multipliers[e] += other[e]
        target[e] = x[part[e]] + multipliers[e] if copied[e] else 0.0
    error = max(error, _how_far(graph, known, value, present, copied, inside, face, x, target))
    return error if error == error else np.inf


@njit(cache=True, nogil=True)
def _dual_bound(graph, known, value, present, copied, degree, scores, x, target):  # type: ignore[no-untyped-def]
    """:func:`_bound`."""
    start, part, sign, kind, low, high = graph[:6]
    left = scores.copy()
    for e in range(len(part)):
        if copied[e]:
            left[part[e]] -= target[e] - x[part[e]]
    total = 0.0
    for p in range(len(scores)):
        if known[p]:
            total += left[p] * value[p]
    for f in range(len(kind)):
        if not present[f]:
            continue
        gain, count = np.empty(start[f + 1] - start[f]), 0
        lowest, highest = low[f], high[f]
        for e in range(start[f], start[f + 1]):
            p = part[e]
            if p < 0:
                continue
            if not copied[e]:
                on = value[p] if sign[e] > 0 else 1.0 - value[p]
                lowest -= on
                highest -= on
                continue
            multiplier = target[e] - x[p]
            if not known[p]:
                multiplier += left[p] / degree[p]
            if sign[e] < 0:
                total += multiplier
            # In descending order: there are few of them.
            at, g = count, sign[e] * multiplier
            count += 1
            while kind[f] == _COUNTS and at > 0 and gain[at - 1] < g:
                gain[at] = gain[at - 1]
                at -= 1
            gain[at] = g
        if kind[f] == _PAIR:
            total += max(0.0, gain[0], gain[1], gain[0] + gain[1] + gain[2])
            continue
        for i in range(count):
            if i < lowest or (i < highest and gain[i] > 0.0):
                total += gain[i]
    return total


@njit(cache=True, nogil=True)
def _solve_rows(  # type: ignore[no-untyped-def]
    first, stride, start, part, sign, kind, low, high, points, point_shift, fit, fit_shift,
    weight, scores, exists, known, value, max_iterations, point, target, error, bound,
):  # fmt: skip
    graph = (start, part, sign, kind, low, high, points, point_shift, fit, fit_shift)
    linear, euclidean = True, True
    for p in range(len(weight)):
        linear &= weight[p] == 0.0
        euclidean &= weight[p] == 1.0
    for b in range(first, len(scores), stride):
        _solve_one(
            graph, weight, scores[b], exists[b], known[b].copy(), value[b].copy(), max_iterations, linear, euclidean,
            point[b], target[b], error[b : b + 1], bound[b : b + 1],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _solve_one(  # type: ignore[no-untyped-def]
    graph, weight, s, exists, known, value, max_iterations, linear, euclidean, point, target, error, bound
):
    part, kind = graph[1], graph[3]
    size, entries = len(s), len(part)
    present, copied, degree = np.empty(len(kind), np.bool_), np.zeros(entries, np.bool_), np.zeros(size)
    if not _begin(graph, weight, s, exists, known, value, present, copied, degree):
        point[:], target[:], error[0], bound[0] = value, 0.0, np.inf, -np.inf
        return
    scale, square, free, size_of_all, lowest = 1.0, 0.0, 0, 0.0, 0.0
    for p in range(size):
        scale = max(scale, abs(s[p]))
        size_of_all += abs(s[p])
        if known[p]:
            lowest += s[p] * value[p]
        else:
            square += s[p] * s[p]
            free += 1
            lowest += min(s[p], 0.0)
    lowest -= 1e-6 * (1.0 + size_of_all)
    penalty = np.sqrt(square / max(free, 1))
    if not linear:
        penalty = max(penalty, 1.0)
    elif penalty == 0.0:
        penalty = 1.0
    x, u, total = np.empty(size), np.zeros(entries), np.empty(size)
    for p in range(size):
        if known[p]:
            x[p] = value[p]
        elif weight[p] > 0.0:
            x[p] = s[p]
        else:
            x[p] = 1.0 if s[p] > 0.0 else 0.0
    trial, z, multipliers = np.zeros(entries), np.zeros(entries), np.zeros(entries)
    inside, face = np.zeros(entries, np.bool_), np.zeros(len(kind), np.int64)
    settled, wait, tried, balancing, moved = _SETTLED, _SETTLED, _PATIENCE, _BALANCED, np.inf
    error[0], bound[0] = np.inf, np.inf
    for count in range(1, max_iterations + 1):
        for e in range(entries):
            if part[e] >= 0:
                trial[e] = x[part[e]] - u[e]
        if _project(graph, known, value, present, trial, z, inside, face):
            settled, wait = 0, _SETTLED
        else:
            settled += 1
        if settled == wait or count in (tried, max_iterations):
            wait *= 2
            if count == tried:
                tried = max(tried + _PATIENCE, tried * 5 // 4)
            for e in range(entries):
                multipliers[e] = penalty * (trial[e] - z[e]) if copied[e] else 0.0
            if euclidean:
                error[0] = _finish_euclidean(
                    graph, known, value, present, copied, s, z, inside, face, multipliers, point, target
                )
            else:
                error[0] = _finish(
                    graph, known, value, present, copied, degree, s, weight, linear, z, inside, face, multipliers,
                    point, target,
                )  # fmt: skip
            if linear:
                bound[0] = _dual_bound(graph, known, value, present, copied, degree, s, point, target)
            if error[0] <= _EXACT or bound[0] < lowest:
                return
            if count == max_iterations:
                error[0] = moved
                for p in range(size):
                    point[p] = x[p]
                for e in range(entries):
                    target[e] = x[part[e]] + penalty * (trial[e] - z[e]) if copied[e] else 0.0
                    if copied[e]:
                        error[0] = max(error[0], abs(z[e] - x[part[e]]))
                if linear:
                    bound[0] = _dual_bound(graph, known, value, present, copied, degree, s, point, target)
                return
        total[:] = 0.0
        for e in range(entries):
            if copied[e]:
                z[e] = _RELAXATION * z[e] + (1.0 - _RELAXATION) * x[part[e]]
                total[part[e]] += z[e] + u[e]
        moved = 0.0
        for p in range(size):
            if not known[p]:
                new = (s[p] + penalty * total[p]) / (weight[p] + penalty * degree[p])
                moved = max(moved, abs(new - x[p]))
                x[p] = new
        apart = 0.0
        for e in range(entries):
            if copied[e]:
                left = z[e] - x[part[e]]
                apart = max(apart, abs(left))
                u[e] += left
        if count == balancing:
            balancing *= 2
            if apart > 0.0 and moved > 0.0:
                factor = min(max(np.sqrt(apart * scale / (moved * penalty)), 0.1), 10.0)
                penalty *= factor
                u /= factor


@njit(cache=True, nogil=True)
def _along_rows(  # type: ignore[no-untyped-def]
    first, stride, start, part, sign, kind, low, high, points, point_shift, fit, fit_shift,
    weight, scores, exists, known, value, target, vector, moves,
):  # fmt: skip
    graph = (start, part, sign, kind, low, high, points, point_shift, fit, fit_shift)
    size, entries = len(weight), len(part)
    inside, face, z = np.zeros(entries, np.bool_), np.zeros(len(kind), np.int64), np.zeros(entries)
    present, copied, degree = np.empty(len(kind), np.bool_), np.empty(entries, np.bool_), np.empty(size)
    for b in range(first, len(scores), stride):
        inside[:], copied[:], degree[:] = False, False, 0.0
        given, point = known[b].copy(), value[b].copy()
        _begin(graph, weight, scores[b], exists[b], given, point, present, copied, degree)
        _project(graph, given, point, present, target[b], z, inside, face)
        _along(graph, given, present, inside, face, weight, vector[b], moves[b])
        for p in range(size):
            if given[p]:
                # A part without a factor moves by itself, between 0 and 1.
                lone = not known[b, p] and weight[p] > 0.0 and 0.0 < scores[b, p] < 1.0
                moves[b, p] = vector[b, p] if lone else 0.0
