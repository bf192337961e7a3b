"""Structures whose parts have labels, e.g. dependency trees with labelled arcs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.base import ORACLES, Structure, repeated
from structgrad.structures.derived import ActiveSetProjection, Gibbs, KBest
from structgrad.structures.layout import AVERAGE, Directed, Layout, Matrix, Undirected


class Labelled(Gibbs, KBest, ActiveSetProjection):
    """The vertices of another structure with one of L labels on each of their parts.

    Scores, masks and vertices are ``[*parts, L]``: ``[..., l]`` is a part with label l. In a vertex
    every chosen part has one label. So ``Labelled(Arborescence(), labels=L)`` are dependency trees
    with labelled arcs, ``[n, n, L]`` (Dozat and Manning 2017; Koo et al. 2007 for the sums). A part
    exists if one of its labels does.

    Labels of different parts are independent given the parts. The log-partition is that of the
    unlabelled structure at the log-sum-exp over labels; the argmax is that at the maximum over
    labels. A sample draws the parts first, then their labels. So every oracle costs as much as
    without labels, plus O(L) a part. ``top_k`` and ``project`` follow from the argmax. There is no
    trace.

    Args:
        structure: the structure whose parts are labelled. Its vertices have one entry a part, and
            random utilities perturb all parts.
        labels: L, at least 1.

    Raises:
        TypeError: if labels is not a whole number.
        ValueError: for no label or for a structure of another kind; from every oracle, for scores of
            another shape or scores that the structure refuses.
    """

    def __init__(self, structure: Structure, labels: int) -> None:
        check_count("labels", labels)
        structure.require_linear(by="Labelled")
        if not structure.perturbs_all_parts:
            raise ValueError(f"the parts of {structure.name} cannot be labelled: some follow from others")
        self.structure, self.labels = structure, labels
        self.layout = _LabelledLayout(structure.layout)
        self.constant_size = structure.constant_size  # type: ignore[misc]

    def missing_oracles(self) -> frozenset[str]:
        """Those for which the unlabelled structure lacks what they need."""
        has = self.structure.oracles
        needs = {"top_k": "argmax", "project": "argmax", "sparsemap": "argmax"}
        return frozenset([oracle for oracle in ORACLES if needs.get(oracle, oracle) not in has])

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape of the structure at size n, and L."""
        return (*self.structure.shape(n), self.labels)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure and those of the unlabelled one; the last dimension must be L."""
        self.layout.check(scores)
        if scores.shape[-1] != self.labels:
            expected = ", ".join(("...", *self.structure.layout.dimensions, str(self.labels)))
            raise ValueError(
                f"scores over parts with {self.labels} labels have shape [{expected}]; got {list(scores.shape)}"
            )
        super().check(scores, mask)
        self.structure.check(torch.zeros_like(scores[..., 0]))

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The parts of the structure, with every label that exists."""
        if mask is None:
            return self.structure.parts(scores[..., 0])[..., None].expand(scores.shape)
        exists = mask.expand(scores.shape)
        return self.structure.parts(scores[..., 0], exists.any(-1))[..., None] & exists

    def length_mask(self, lengths: Tensor, scores: Tensor) -> Tensor:
        """As without labels, which all exist."""
        return self.structure.length_mask(lengths, scores[..., 0])[..., None]

    # --- the best one ---------------------------------------------------------------------------------------------

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """A best vertex: ``[*batch, *parts, L]``; ties of labels go to the first."""
        self.check(utility, mask)
        known, exists, some = self._read(utility.detach(), mask)
        best, label = known.max(-1)
        return self._show(self.structure.argmax(best, some), label, exists)

    # --- the Gibbs distribution -----------------------------------------------------------------------------------

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The log-partition of the structure at the log-sum-exp over labels: ``[*batch]``, differentiable."""
        self.check(scores, mask)
        known, _, some = self._read(scores.double(), mask)
        return self.structure.log_partition(known.logsumexp(-1), some).to(scores.dtype)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """One exact sample an example, the parts first, then their labels: ``[*batch, *parts, L]``, no gradient."""
        self.check(scores, mask)
        known, exists, some = self._read(scores.detach().double(), mask)
        drawn = self.structure.sample(known.logsumexp(-1), some, n)
        known = repeated(known, n)
        label = (known - wide_exponentials(known).log()).argmax(-1)
        return self._show(drawn, label, exists).to(scores.dtype)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        known, exists, some = self._read(scores, mask)
        total = known.logsumexp(-1)
        mean = torch.where(exists, self.structure.marginals(total, some)[..., None] * known.softmax(-1), 0.0)
        return self.structure.log_partition(total, some), self.layout.mirror(mean)

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores, -inf if a label is missing and 0 if all are; the labels that exist; the mask of parts."""
        exists = self.parts(scores, mask)
        some = exists.any(-1)
        known = torch.where(exists, scores, 0.0).masked_fill(some[..., None] & ~exists, -torch.inf)
        return known, exists, None if mask is None else some

    def _show(self, chosen: Tensor, label: Tensor, exists: Tensor) -> Tensor:
        """Chosen parts ``[*batch, *parts]`` with their labels: ``[*batch, *parts, L]``."""
        number = torch.arange(self.labels, device=chosen.device)
        on = (label[..., None] == number) & (chosen > 0)[..., None] & exists
        return self.layout.mirror(on.to(chosen.dtype))

    # --- vertices as integers -------------------------------------------------------------------------------------

    @property
    def _names_parts(self) -> bool:
        """Whether every entry of an unlabelled reading names one part, to which the label can be added."""
        return isinstance(self.structure.layout, Matrix | Directed | Undirected)

    def read(self, vertex: Tensor) -> Tensor:
        """The reading of the structure without labels, with the label of every entry: for trees
        int64 ``[*batch, n, 2]`` (head, label), for pairs ``[*batch, m, 3]``.

        Roots and absent nodes are -1. For other layouts it is the parts and their labels.
        """
        if not self._names_parts:
            return super().read(vertex)
        on = vertex.detach() > 0
        bare = self.structure.read(on.any(-1).to(vertex.dtype))
        index = self.structure._entries(bare, on.shape[on.dim() - self.layout.ndim : -1])
        labels = on.int().argmax(-1).flatten(1 - self.layout.ndim) if on.numel() else on.new_zeros(index.shape).long()
        label = torch.where(index < 0, -1, labels.gather(-1, index.clamp_min(0)))
        return torch.cat([bare if bare.dim() > index.dim() else bare[..., None], label[..., None]], -1)

    def _bare(self, reading: Tensor) -> Tensor:
        return reading[..., 0] if reading.shape[-1] == 2 else reading[..., :-1]

    def _shape_of(self, reading: Tensor) -> tuple[int, ...] | None:
        said = self.structure._shape_of(self._bare(reading)) if self._names_parts else None
        return None if said is None else (*said, self.labels)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        if not self._names_parts:
            return super()._entries(reading, shape)
        index, label = self.structure._entries(self._bare(reading), shape[:-1]), reading[..., -1]
        readings.in_range(label, self.labels, "labels")
        fits = (index >= 0) == (label >= 0)
        return torch.where(fits, torch.where(index < 0, index, index * self.labels + label), readings.NO_PART)

    def covered(self, vertex: Tensor) -> Tensor | None:
        """The parts among the items that a vertex covers, with all labels."""
        bare = self.structure.covered(vertex.any(-1))
        return None if bare is None else bare[..., None]

    # --- the tests' oracle ----------------------------------------------------------------------------------------

    def enumerate(self, *shape: int) -> Tensor:
        """All vertices with all labels: ``[V, *parts, L]``."""
        bare = self.structure.enumerate(*shape[:-1])
        layout = self.structure.layout
        once = (bare > 0) & layout.parts(bare)
        chosen = [part.nonzero() for part in once]
        self.check_listable(sum(self.labels ** len(parts) for parts in chosen), *shape)
        found = []
        for parts in chosen:
            for labels in itertools.product(range(self.labels), repeat=len(parts)):
                vertex = torch.zeros(shape, dtype=torch.float64)
                vertex[(*parts.T, torch.tensor(labels, dtype=torch.int64))] = 1
                found.append(self.layout.mirror(vertex))
        return torch.stack(found) if found else torch.zeros(0, *shape, dtype=torch.float64)


class _LabelledLayout(Layout):
    """Another layout with labels in a further, last dimension."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(f"labelled {layout.name}", (*layout.dimensions, "labels"))
        self._layout = layout

    @property
    def is_full(self) -> bool:
        """The same as without labels."""
        return self._layout.is_full

    @property
    def is_mirrored(self) -> bool:
        """The same as without labels."""
        return self._layout.is_mirrored

    def _each(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """``function``, applied to every label."""
        return function(values.movedim(-1, 0)).movedim(0, -1)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :class:`Layout`."""
        exist = self._layout.parts(scores[..., 0])[..., None]
        return (exist if mask is None else exist & mask).expand(scores.shape)

    def mirror(self, parts: Tensor) -> Tensor:
        """See :class:`Layout`."""
        return self._each(self._layout.mirror, parts)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """See :class:`Layout`."""
        return self._each(self._layout.pull_back, gradient)

    def symmetrize(self, scores: Tensor, weights: tuple[float, float] = AVERAGE) -> Tensor:
        """See :class:`Layout`."""
        return self._each(lambda of_label: self._layout.symmetrize(of_label, weights), scores)

    def flatten(self, parts: Tensor) -> Tensor:
        """``[*batch, *parts, L]`` -> ``[*batch, P L]``, each part once."""
        return self._each(self._layout.flatten, parts).flatten(-2)

    def unflatten(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`flatten`, in the layout of a vertex."""
        labelled = flat.reshape(*flat.shape[:-1], flat.shape[-1] // shape[-1], shape[-1])
        return self._each(lambda values: self._layout.unflatten(values, shape[:-1]), labelled)
