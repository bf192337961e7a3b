"""The contract of every structure: a finite set of vertices, known through its oracles."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from structgrad.algorithms.autocast import without_autocast
from structgrad.algorithms.eager import magnitude, refuse, values_can_be_read
from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.text import Configured, options
from structgrad.structures import reading as readings
from structgrad.structures.far_scores import keeping_digits
from structgrad.structures.layout import Layout
from structgrad.structures.lengths import mask_of, taking_lengths
from structgrad.structures.relaxation import Relaxation, half_square

#: Every oracle a structure may have, in the order in which tables show them.
ORACLES: tuple[str, ...] = (
    "argmax",
    "top_k",
    "log_partition",
    "marginals",
    "sample",
    "log_prob",
    "entropy",
    "cross_entropy",
    "kl",
    "renyi",
    "expected_hamming",
    "minimum_bayes_risk",
    "project",
    "sparsemap",
    "trace",
    "trace_log_prob",
    "conditional",
    "conditional_utility",
    "enumerate",
)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a shape broadcasts to the shape ``to``."""
    fits = (size in (1, other) for size, other in zip(reversed(shape), reversed(to), strict=False))
    return len(shape) <= len(to) and all(fits)


def repeated(scores: Tensor, n: int | None) -> Tensor:
    """The same scores n times, ``[n, ...]``, as a view; as they are for None.

    Raises:
        ValueError: for n < 1.
    """
    if n is None:
        return scores
    if n < 1:
        raise ValueError(f"n samples are to be drawn, at least 1; got {n}")
    return scores.expand(n, *scores.shape)


def drawing_several(sample: _Method) -> _Method:
    """A ``sample`` that takes n, at least 1; one that knows no n draws from the same scores n times."""
    knows = "n" in inspect.signature(sample).parameters

    @functools.wraps(sample)
    def several(
        self: Structure, scores: Tensor, mask: Tensor | None = None, n: int | None = None, **named: Any
    ) -> Tensor:
        many = repeated(scores, n)
        drawn: Tensor = sample(self, scores, mask, n, **named) if knows else sample(self, many, mask, **named)
        return drawn

    return several  # type: ignore[return-value]


def derived_from(*oracles: str) -> Callable[[_Method], _Method]:
    """Marks an oracle that is computed from others. A structure has it if it has the others (see
    :mod:`.derived`).
    """

    def mark(method: _Method) -> _Method:
        method.derived_from = oracles  # type: ignore[attr-defined]
        return method

    return mark


#: The largest number of entries of all vertices together in :meth:`Structure.enumerate`: 512 MiB.
_LISTED = 2**26


class UnsupportedError(ValueError):
    """A structure was asked for an oracle or a relaxation that it does not have."""


@dataclass(frozen=True)
class Trace:
    """The choices of a recursive algorithm with a stochastic invariant (Struminsky et al. 2021,
    section 2.2).

    Attributes:
        vertex: ``[*batch, *parts]``, the structure that follows from the choices: ``x = X(t)``.
        choices: int64 ``[*batch, *steps]``, the choices in the structure's own encoding (see its
            ``trace``). They are -1 where a step did not happen (masked or shorter examples).
    """

    vertex: Tensor
    choices: Tensor


#: Standard exponentials (float64) for a sample given a trace: one for each step of the trace,
#: ``[*batch, steps]``, and one for each part, ``[*batch, *parts]``.
Noise = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SparseDistribution:
    """A distribution over few vertices for each example, in ragged form.

    Attributes:
        vertices: ``[N, *parts]``, hard.
        rows: int64 ``[N]``, ascending: the (flattened) example of each vertex.
        weights: ``[N]``, positive; they sum to one within a row and are differentiable in the
            scores.
    """

    vertices: Tensor
    rows: Tensor
    weights: Tensor


class Structure(Configured):
    """A finite set X of 0/1 vertices over parts, and the computations on it.

    **Shapes.** Scores, utilities, masks and vertices are ``[*batch, *parts]`` with an arbitrary
    leading ``*batch`` shape. :attr:`layout` says how the parts lie. ``mask`` is bool, broadcastable
    to the scores, and False where a part is missing. A missing part is 0 in every vertex. Its score
    is never read, so it may be anything (NaN and infinity included), and its gradient is 0.
    Examples of one batch may have different masks. Scores are finite.

    **Absent nodes and positions.** In a graph, a node that touches no existing part is absent. In a
    sequence, whose parts join neighbouring positions, a position that touches no existing part is
    absent. Absent positions are the last ones, so that a mask says a length. In both cases an
    example without any part (one node, one position, or none) has one vertex, the empty one, and
    ``log_partition`` 0. Some examples have no vertex: a graph that falls apart, a sequence with a
    gap, fewer parts than must be chosen. They are a ``ValueError`` in eager CPU code.

    **Gibbs distribution.** For scores ``s`` it is ``p(x) = exp(<x, s>) / sum_y exp(<y, s>)``. ``<x,
    s>`` counts each part once.

    **Oracles.** A subclass implements the oracles that exist for it and nothing else. Any other
    oracle raises :class:`UnsupportedError`, and :meth:`require` raises it before any data is
    touched. A structure may also have relaxations: methods ``(utility, mask=None) -> relaxed
    vertex`` that :attr:`relaxations` describes. Other properties of all its vertices
    (:attr:`constant_size`, :attr:`is_ordinal`, ...) are traits. Estimators choose by traits and
    never by class.

    **Precision.** Scores are float32 or float64; :meth:`check` refuses other types by name, and
    estimators widen half precision. Oracles are exempt from autocast. Scores of +-100, masks, ties
    and lengths 0, 1 and 2 are right, and no value is clamped silently. Derivatives are right to
    second order, or raise. In eager CPU code this is also so if parts have the lowest or the highest
    number of the format. Far scores of several sizes are refused there if all vertices need one
    (see :mod:`.far_scores`). Elsewhere use a mask, as sums with such numbers lose digits.

    Everything is batched, differentiable where that makes sense, and runs on the device of the
    scores. Shapes are always checked. Values (NaN, empty sets) are checked where reading them is
    free, in eager mode on the CPU.
    """

    #: False for the stand-ins ``structure=none`` and ``structure=ground_truth``, which take no
    #: estimator.
    is_latent: ClassVar[bool] = True

    #: Whether all vertices of an example have equally many parts. Then a constant added to all
    #: scores changes nothing.
    constant_size: ClassVar[bool] = False

    #: Whether the data give the true structure to the model: ``structure=ground_truth``.
    is_given: ClassVar[bool] = False

    #: Whether a vertex is one part chosen from all.
    is_categorical: ClassVar[bool] = False

    #: Whether the parts are n items in a row, followed by the n - 1 pairs of neighbours:
    #: ``[2n - 1]``.
    has_neighbour_pairs: ClassVar[bool] = False

    #: Whether a vertex is a binary tree over items in a row, shown as edges from parents to
    #: children, ``[n, n]``. The in-order traversal of the tree is the row.
    is_binary_tree: ClassVar[bool] = False

    #: Whether parts are chosen independently: the argmax is ``utility > 0``, and parts of a Gibbs
    #: sample are independent.
    is_independent: ClassVar[bool] = False

    #: Whether only the order of the utilities decides the argmax. This is so for bases of a matroid
    #: (the greedy algorithm finds them) and for sorting. ``trace(E).vertex`` is then ``argmax(-E)``
    #: and ``argmax(-log E)``.
    is_ordinal: ClassVar[bool] = False

    #: Whether the vertex of a trace is the argmax: ``trace(E).vertex = argmax(-E)``.
    trace_is_argmax: ClassVar[bool] = True

    #: Name of the noise for which ``argmax(scores + noise)`` is a sample of the Gibbs distribution, if there is one.
    noise: ClassVar[str | None] = None

    #: How the parts lie in the scores.
    layout: Layout

    @property
    def vertex_layout(self) -> Layout:
        """The layout of vertices. It differs from :attr:`layout` only if a vertex is not linear in
        the scores.
        """
        return self.layout

    def __init_subclass__(cls, **options: Any) -> None:
        """Every oracle is exempt from autocast. Oracles and relaxations take ``lengths`` beside ``mask``, and
        ``sample`` takes ``n``.
        """
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            if name in ORACLES:
                method = keeping_digits(name, method)
                method = drawing_several(method) if name == "sample" else method
                setattr(cls, name, without_autocast(taking_lengths(method)))
            elif inspect.isfunction(method) and not (name.startswith("_") or hasattr(Structure, name)):
                setattr(cls, name, taking_lengths(method))

    # --- what the structure has -----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The class name, for messages and tables."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.name}({options(self)})"

    @property
    def oracles(self) -> frozenset[str]:
        """Names of the oracles of this structure: those that it overrides and those that follow
        from them.
        """

        def has(oracle: str) -> bool:
            method = getattr(type(self), oracle)
            return method is not getattr(Structure, oracle) and all(map(has, getattr(method, "derived_from", ())))

        return frozenset(filter(has, ORACLES)) - self.missing_oracles()

    def missing_oracles(self) -> frozenset[str]:
        """Oracles of the class that this structure does not have, by its options. Most have all."""
        return frozenset()

    @property
    def relaxations(self) -> dict[str, Relaxation]:
        """Relaxations of the argmax, by name: those that follow from oracles, and the structure's
        own.
        """
        general = {
            "exp_family": Relaxation("marginals", symmetric=True),
            "euclidean": Relaxation("project", regularizer=half_square, symmetric=True),
        }
        derived = {name: relaxation for name, relaxation in general.items() if relaxation.method in self.oracles}
        return derived | self.own_relaxations()

    def own_relaxations(self) -> dict[str, Relaxation]:
        """Relaxations that do not follow from oracles. A structure that has any overrides this."""
        return {}

    @property
    def is_linear(self) -> bool:
        """Whether a vertex has one entry for each score, so that its value is ``<x, scores>``."""
        return self.vertex_layout is self.layout

    @property
    def perturbs_all_parts(self) -> bool:
        """Whether random utilities perturb every part; see :meth:`noisy_parts`."""
        return type(self).noisy_parts is Structure.noisy_parts

    def require(self, *oracles: str, by: str) -> None:
        """Raise unless all ``oracles`` exist.

        Args:
            oracles: names from :data:`ORACLES`.
            by: who asks, for the message, e.g.
                ``"estimator marginalize (distribution=sparsemap)"``.

        Raises:
            UnsupportedError: one line that says which oracles are missing and which exist.
        """
        missing = [o for o in oracles if o not in self.oracles]
        if missing:
            have = ", ".join(o for o in ORACLES if o in self.oracles)
            raise UnsupportedError(f"{by} needs {', '.join(missing)}, which {self.name} lacks; it has {have}")

    def require_linear(self, *, by: str) -> None:
        """Raise :class:`UnsupportedError` unless a vertex has one entry for each score."""
        if not self.is_linear:
            raise UnsupportedError(f"{by} needs vertices with one entry a score, which {self.name} lacks")

    def require_relaxation(
        self,
        name: str,
        *,
        by: str,
        one_draw: bool = False,
        symmetric: bool = False,
        regularized: bool = False,
    ) -> Relaxation:
        """The relaxation with this name, if it has the requested properties.

        Args:
            name: a key of :attr:`relaxations`.
            by: who asks, for the message.
            one_draw: it must take one utility, not several.
            symmetric: its Jacobian must be symmetric.
            regularized: its regularizer must be known.

        Raises:
            UnsupportedError: one line that says what is missing and which relaxations would do.
        """
        asked = {
            "of one utility": lambda relaxation: not one_draw or relaxation.draws is None,
            "with a symmetric Jacobian": lambda relaxation: not symmetric or relaxation.symmetric,
            "with a known regularizer": lambda relaxation: not regularized or relaxation.regularizer is not None,
        }
        found = self.relaxations
        usable = [key for key, relaxation in found.items() if all(holds(relaxation) for holds in asked.values())]
        if name in usable:
            return found[name]
        have = ", ".join(usable) or "none"
        if name not in found:
            raise UnsupportedError(f"{by} needs relaxation {name!r}, which {self.name} lacks; it has {have}")
        lacks = " and ".join(what for what, holds in asked.items() if not holds(found[name]))
        raise UnsupportedError(f"{by} needs a relaxation {lacks}, and {name!r} of {self.name} is none; it has {have}")

    @without_autocast
    def relax(
        self,
        relaxation: str,
        utility: Tensor,
        mask: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Apply a relaxation: a point of conv(X) (or its substitute), differentiable in
        ``utility``.

        Args:
            relaxation: a key of :attr:`relaxations`.
            utility: ``[*batch, *parts]``, already divided by the temperature. For relaxations of
                several utilities it is ``[draws, *batch, *parts]``.
            mask: which parts exist.
            temperature: the divisor of the utility, a number or one an example, ``[*batch]``. A few
                relaxations need it because they are not a function of the quotient alone.
            lengths: in the place of a mask, see :meth:`length_mask`.

        Raises:
            UnsupportedError: if this structure lacks it.
        """
        mask = self.mask_from(mask, lengths, utility)
        found = self.relaxations.get(relaxation) or self.require_relaxation(relaxation, by="relax")
        if isinstance(temperature, Tensor) and temperature.dim() == utility.dim() - self.layout.ndim - bool(
            found.draws
        ):
            temperature = temperature.reshape(*temperature.shape, *[1] * self.layout.ndim)
        options = {"temperature": temperature} if found.takes_temperature else {}
        relaxed: Tensor = getattr(self, found.method)(utility, mask, **options)
        return relaxed

    def noisy_parts(self, scores: Tensor) -> Tensor:
        """The parts that random utilities perturb. The utility of the others is their score (Paulus
        et al. 2020, B.5).

        Returns:
            bool, broadcastable to ``scores``: all parts, unless the structure says otherwise.
        """
        return torch.ones((), dtype=torch.bool, device=scores.device)

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape of the parts at size n: n parts, n rows and columns, n nodes, or what the
        structure calls n.

        Raises:
            UnsupportedError: for a layout of the structure's own, if the structure does not
                override this.
        """
        if not {*self.layout.dimensions} <= {"n", "m"}:
            raise UnsupportedError(
                f"{self.name} does not say the shape of its parts ({', '.join(self.layout.dimensions)}) at size {n}; "
                "it has to override shape"
            )
        return (n,) * self.layout.ndim

    # --- helpers for implementations and users --------------------------------------------------------------------

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The entries of the scores that are existing parts, each counted once: bool ``[*batch,
        *parts]``.
        """
        return self.layout.parts(scores, mask)

    def restrict(self, vertices: Tensor, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The vertices of :meth:`enumerate` that remain under a mask, and how they are shown there.

        By default these are the vertices that use no missing part. Vertices that must cover all
        existing nodes (trees of fewer nodes) are not among them; such structures override this.

        Args:
            vertices: ``[V, *parts]``, of the full size.
            scores: ``[*batch, *parts]``; only shape and device are used.
            mask: which parts exist.

        Returns:
            vertices, broadcastable to ``[*batch, V, *parts]``, and bool ``[*batch, V]``.
        """
        exists, flat = self.layout.flatten(self.parts(scores, mask)), self.layout.flatten(vertices)
        if mask is None:
            return vertices, exists.new_ones(()).expand(*exists.shape[:-1], len(flat))
        return vertices, (~exists).to(flat) @ flat.T == 0

    def inner(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``<x, scores>`` over existing parts, each counted once: ``[*batch]``."""
        parts = self.parts(scores, mask)
        product = torch.where(parts, vertex, 0.0) * torch.where(parts, scores, 0.0)
        return product.flatten(-self.layout.ndim).sum(-1)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """Refuse inputs that no oracle can answer: a wrong shape, precision or mask, NaN or
        infinity.

        Raises:
            TypeError: unless scores are float32 or float64 and the mask is bool. (Estimators widen
                half precision.)
            ValueError: for a shape that does not fit, or (eager CPU code only) a NaN or an infinity
                in an existing part.
        """
        self.layout.check(scores)
        if scores.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"scores must be floating point (float32 or float64); got {scores.dtype}")
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool; got {mask.dtype}")
            if not _broadcasts(mask.shape, scores.shape):
                raise ValueError(f"mask {list(mask.shape)} does not broadcast to scores {list(scores.shape)}")
        if values_can_be_read(scores) and not magnitude(scores) < math.inf:
            bad = ~scores.isfinite() & self.parts(scores, mask)
            if bool(bad.any()):
                where = bad.nonzero()[0].tolist()
                raise ValueError(f"scores must be finite; the entry at {where} is {scores[tuple(where)].item()}")

    def check_vertex(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> None:
        """Refuse a tensor that is not a vertex, where reading values is free.

        Among all 0/1 vectors y, a 0/1 vector x is the only one that maximises ``<2 x - 1, y>``. So
        it is a vertex if and only if the structure's argmax finds it.

        Raises:
            ValueError: with the first bad example; or for another shape.
        """
        self._check_shown(vertex, scores.shape)
        if values_can_be_read(vertex):
            x = vertex.detach().to(scores.dtype).expand(scores.shape)
            direction = torch.where(x.isfinite(), 2 * x - 1, 0.0)
            wrong = self.argmax(direction, mask) != x
            refuse(wrong.flatten(-self.layout.ndim).any(-1), f"is no vertex of {self.name}")

    def _check_shown(self, vertex: Tensor, shape: Sequence[int]) -> None:
        """Refuse vertices of another shape than ``[*batch, *vertex]``, unless they broadcast to it."""
        ndim = self.vertex_layout.ndim
        if vertex.shape[-ndim:] != shape[-ndim:] or not _broadcasts(vertex.shape, shape):
            several = _broadcasts(shape, vertex.shape)
            hint = f"; several vertices of an example need scores.expand({list(vertex.shape)})" if several else ""
            raise ValueError(
                f"vertices of {self.name} have shape {list(shape)} for these scores; got {list(vertex.shape)}{hint}"
            )

    def check_listable(self, count: int, *shape: int) -> None:
        """For :meth:`enumerate`: refuse a list that would not fit into memory, before anything is
        allocated.

        Args:
            count: the number of vertices.
            shape: the shape of one vertex.

        Raises:
            ValueError: with the number of vertices.
        """
        if count * max(1, math.prod(shape)) > _LISTED:
            raise ValueError(f"{self.name} has {count:,} vertices of shape {list(shape)}, too many to be listed")

    # --- lengths --------------------------------------------------------------------------------------------------

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """The mask of examples of the first so many items (positions, nodes, parts of a vector).

        Oracles, relaxations, estimators and losses take ``lengths=`` in the place of ``mask=`` and ask for this mask.

        Args:
            lengths: int64 ``[*batch]``; ``[*batch, 2]`` for parts ``[n, m]`` of two sequences.
            scores: ``[*batch, *parts]``; only shape and device are used.

        Returns:
            bool, broadcastable to the scores.

        Raises:
            UnsupportedError: if lengths do not say which parts exist.
            TypeError: unless the lengths are integers.
            ValueError: for lengths below 0 or too large for the scores (in eager CPU code).
        """
        mask = mask_of(self.layout, lengths, scores, self.name)
        if mask is None:
            parts = ", ".join(self.layout.dimensions)
            raise UnsupportedError(f"{self.name} takes a mask, not lengths: its parts [{parts}] are no n items")
        return mask

    def mask_from(self, mask: Tensor | None, lengths: Tensor | None, scores: Tensor) -> Tensor | None:
        """The mask, or that of the lengths.

        Raises:
            TypeError: for lengths that are no tensor.
            ValueError: if both are given.
        """
        if lengths is None:
            return mask
        if mask is not None:
            raise ValueError("mask and lengths both say which parts exist; give one of them")
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be an int64 tensor; got {type(lengths).__name__}")
        return self.length_mask(lengths, scores)

    # --- vertices as integers -------------------------------------------------------------------------------------

    def read(self, vertex: Tensor) -> Tensor:
        """The parts of a vertex, in ascending order: int64 ``[*batch, m]``.

        For parts of several dimensions it is ``[*batch, m, ndim]``. m is the largest number of
        parts in an example; -1 fills up the others. Structures with a more natural reading (heads,
        tags, an order, ...) return that.

        Args:
            vertex: ``[*batch, *parts]``, 0/1, in the form of the oracles.
        """
        layout = self.vertex_layout
        on = vertex.detach() > 0
        shape = on.shape[on.dim() - layout.ndim :]
        if layout.is_mirrored:  # each part once
            on = on & layout.parts(vertex)
        found = readings.members(on.flatten(-layout.ndim))
        return found if layout.ndim == 1 else readings.coordinates(found, shape)

    def write(
        self,
        reading: Tensor | Sequence[Any],
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The vertex whose reading this is: ``[*batch, *parts]``, 0/1, no gradient. The inverse of
        :meth:`read`.

        Args:
            reading: integers in the form of :meth:`read`, a tensor or nested lists.
            shape: shape of the parts of one vertex, e.g. ``scores.shape[-2:]`` or
                ``structure.shape(n)``. None: the reading determines it, as heads of n nodes do.
            mask: which parts exist. Without it, items that are not in the reading are absent, if
                the structure has absent items.

        Raises:
            TypeError: for numbers that are not integers.
            ValueError: if the shape is missing or does not fit; in eager CPU code, if the reading
                is not that of a vertex.
        """
        given = readings.numbers(reading)
        said = self._shape_of(given)
        wanted = said if shape is None else tuple(shape)
        if wanted is None:
            raise ValueError(f"what {self.name} reads does not say the shape of the parts: write needs shape=")
        if said is not None and wanted != tuple(said):
            raise ValueError(f"the reading is of parts {list(said)}, and shape is {list(wanted)}")
        index = self._entries(given, torch.Size(wanted))
        layout = self.vertex_layout
        batch, shown = index.shape[:-1], self._shown(torch.Size(wanted))
        scores = torch.zeros(*batch, *wanted, device=given.device)
        on = readings.vertices(index, shown.numel()).reshape(*batch, *shown)
        if self.is_linear:
            exists = self.parts(scores, mask)
            refuse((on & ~exists).flatten(-layout.ndim).any(-1), f"has parts that {self.name} does not have here")
        vertex = layout.mirror(on.to(scores.dtype))
        self.check_vertex(vertex, scores, self.covered(vertex) if mask is None else mask)
        return vertex

    def _shape_of(self, reading: Tensor) -> tuple[int, ...] | None:
        """The shape of the parts, if a reading determines it."""
        return None

    def _shown(self, shape: torch.Size) -> torch.Size:
        """The shape of one vertex over parts of this shape."""
        return shape

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        """The entries of the flattened vertex in a reading: int64 ``[*batch, m]``, -1 for none."""
        return reading if len(shape) == 1 else readings.entries(reading, shape)

    def covered(self, vertex: Tensor) -> Tensor | None:
        """The parts among items that a vertex covers: bool, broadcastable to the scores.

        It is None if a vertex need not cover any.
        """
        return None

    # --- oracles --------------------------------------------------------------------------------------------------

    def conditional_noise(self, trace: Trace, log_rates: Tensor) -> Noise:
        """The noise of :meth:`conditional`. The same noise gives the same sample at other
        log-rates.
        """
        batch = log_rates.shape[: log_rates.dim() - self.layout.ndim]
        steps = (*batch, trace.choices.shape[len(batch)])
        return wide_exponentials(log_rates, steps), wide_exponentials(log_rates)

    def _lacks(self) -> UnsupportedError:
        oracle = inspect.stack()[1].function
        return UnsupportedError(
            f"{self.name} has no {oracle}; it has {', '.join(o for o in ORACLES if o in self.oracles)}"
        )

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A vertex of highest utility, exact: ``[*batch, *parts]``, 0/1 in the dtype of
        ``utility``, no gradient.

        Ties are decided by the indices of the parts alone, in favour of earlier ones if vertices
        are subsets. So equal utilities give the same vertex, whatever other examples are in the
        batch. (Utilities that a network computes may themselves depend on the batch, by rounding.)
        """
        raise self._lacks()

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best distinct vertices, best first.

        Returns:
            vertices ``[*batch, k, *parts]`` and their values ``<x, scores>`` ``[*batch, k]``
            (differentiable). Where an example has fewer than k vertices, the surplus vertices are 0
            and their values -inf.

        Raises:
            TypeError: if k is not a whole number.
            ValueError: for k < 1.
        """
        raise self._lacks()

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log sum_x exp(<x, scores>)``: ``[*batch]``, differentiable."""
        raise self._lacks()

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of the Gibbs distribution, the exponential-family relaxation: ``[*batch, *parts]``,
        differentiable.
        """
        raise self._lacks()

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """Exact samples of the Gibbs distribution: ``[*batch, *parts]``, 0/1, no gradient.

        With ``n`` there are so many independent ones of each example, ``[n, *batch, *parts]``, from the
        tables of one.
        """
        raise self._lacks()

    def log_prob(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log p(vertex)`` under the Gibbs distribution: ``[*batch]``, differentiable in the
        scores.

        Raises:
            ValueError: in eager CPU code, if ``vertex`` is not a vertex. Elsewhere the result is
                then arbitrary.
        """
        raise self._lacks()

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Entropy of the Gibbs distribution in nats: ``[*batch]``, differentiable."""
        raise self._lacks()

    def cross_entropy(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``-sum_x p(x) log q(x)`` of the Gibbs distributions of two scores, in nats: ``[*batch]``.

        It is differentiable in both scores.

        Args:
            p_scores: ``[*batch, *parts]``.
            q_scores: scores of the same parts; their batch broadcasts against that of ``p_scores``.
            mask: which parts exist, for both: p and q have the same support.

        Raises:
            ValueError: if the parts of the scores have different shapes.
            TypeError: if the scores differ in precision.
        """
        raise self._lacks()

    def kl(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Kullback-Leibler divergence ``KL(p || q) = sum_x p(x) log p(x) / q(x)`` in nats:
        ``[*batch]``.

        It is differentiable in both scores. Arguments and errors are those of
        :meth:`cross_entropy`. For the reverse divergence swap the scores.
        """
        raise self._lacks()

    def renyi(self, p_scores: Tensor, q_scores: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
        """Renyi divergence ``log(sum_x p(x)^alpha q(x)^(1 - alpha)) / (alpha - 1)`` in nats:
        ``[*batch]``.

        It is differentiable in both scores. Arguments are those of :meth:`cross_entropy`.

        Raises:
            ValueError: for ``alpha <= 0`` or ``alpha = 1``, whose limit is :meth:`kl`.
        """
        raise self._lacks()

    def expected_hamming(self, p_scores: Tensor, q_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Expected number of parts in which independent samples of p and q differ: ``[*batch]``.

        It is differentiable in both scores. Arguments and errors are those of
        :meth:`cross_entropy`.
        """
        raise self._lacks()

    def minimum_bayes_risk(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """A vertex with the least expected Hamming distance from a Gibbs sample: ``[*batch,
        *parts]``, no gradient.
        """
        raise self._lacks()

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Euclidean projection of the scores on conv(X): ``[*batch, *parts]``, differentiable."""
        raise self._lacks()

    def sparsemap(self, scores: Tensor, mask: Tensor | None = None) -> SparseDistribution:
        """A sparse distribution over vertices whose mean is :meth:`project`; ``*batch`` is flattened into rows."""
        raise self._lacks()

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Run the structure's recursive algorithm, smallest first, on ``exponentials``
        ``[*batch, *parts]`` > 0.

        With ``E ~ Exp(rate)`` the trace is a sample of the distribution of :meth:`trace_log_prob`.
        Its vertex is ``argmax(-E)``, unless the structure says otherwise.
        """
        raise self._lacks()

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log P(T = trace)`` when ``E ~ Exp(exp(log_rates))``: ``[*batch]``, differentiable.

        Struminsky et al. (2021), Algorithm 3.
        """
        raise self._lacks()

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """A fresh sample of ``E | T = trace``, reparameterised in ``log_rates`` (Struminsky et al.,
        Algorithm 6).

        Args:
            trace: the trace of exponentials with these rates.
            log_rates: ``[*batch, *parts]``.
            mask: which parts exist.
            noise: the noise of the sample, see :meth:`conditional_noise`; None draws it.

        Returns:
            ``[*batch, *parts]``, positive where a part exists and 1 elsewhere. It is float64,
            because rates of different orders would overflow float32, and finite for log-rates
            within +-600. :meth:`trace` of it gives the trace back.
        """
        raise self._lacks()

    def conditional_utility(
        self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A fresh sample of the utilities ``U`` given ``argmax(U) = vertex``, reparameterised in
        the scores.

        It is for structures whose Gibbs sample is the argmax of independent utilities, and whose
        trace says no more than the vertex.

        Args:
            vertex: ``[*batch, *parts]``.
            scores: ``[*batch, *parts]``.
            mask: which parts exist.
            noise: standard exponentials, one for each part, float64 ``[*batch, *parts]``; None
                draws them.

        Returns:
            ``[*batch, *parts]``, 0 where no part exists.
        """
        raise self._lacks()

    def enumerate(self, *shape: int) -> Tensor:
        """Every vertex of a tiny size, for tests.

        Args:
            shape: the shape of the parts, e.g. ``(4, 4)``.

        Returns:
            ``[V, *parts]``, float64, distinct.

        Raises:
            ValueError: for sets that are too large to list, with their size.
        """
        raise self._lacks()
