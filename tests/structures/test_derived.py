"""Oracles that follow from others, on a structure whose parts have a shape of their own, under the whole contract."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from structgrad.algorithms.semirings import IMPOSSIBLE, Aggregation
from structgrad.structures import Layout, Structure, Subset, UnsupportedError, Vector
from structgrad.structures.derived import ActiveSetProjection, DynamicProgram, Gibbs, KBest
from structgrad.testing import Case, StructureContract


class Labels(DynamicProgram, KBest, ActiveSetProjection):
    """Sequences of C labels; the parts are transitions ``[n - 1, C, C]``, so that one position has no part."""

    constant_size = True

    def __init__(self, labels: int) -> None:
        self.labels, self.layout = labels, Layout("transitions", ("n - 1", "C", "C"))

    def shape(self, n: int) -> tuple[int, ...]:
        """n positions."""
        return (max(n - 1, 0), self.labels, self.labels)

    def _total(self, scores: Tensor, exists: Tensor, plus: Aggregation) -> Tensor:
        steps = scores.shape[-3]
        there = exists.flatten(-2).any(-1)
        # What comes after a label: nothing at the end, and no gap before it.
        value = torch.zeros_like(scores[..., 0]).sum(-2) if steps else scores.sum((-3, -2))
        ended = torch.ones_like(value[..., 0], dtype=torch.bool)
        for t in reversed(range(steps)):
            here = there[..., t]
            gap = ~here & ~ended
            value = torch.where(here[..., None], plus(scores[..., t, :, :] + value[..., None, :], -1), value)
            value = torch.where(gap[..., None], IMPOSSIBLE, value)
            ended = ended & ~here
        first = plus(value, -1)
        return torch.where(ended, 0.0, first)

    def enumerate(self, *shape: int) -> Tensor:
        """All sequences."""
        every = torch.tensor(list(itertools.product(range(self.labels), repeat=shape[0] + 1)))
        one_hot = torch.nn.functional.one_hot(every, self.labels).double()
        vertices = one_hot[:, :-1, :, None] * one_hot[:, 1:, None, :]
        return vertices if shape[0] else vertices[:1]


class OnlyArgmax(Gibbs, KBest, ActiveSetProjection):
    """Subsets known by their argmax."""

    def __init__(self) -> None:
        self.layout = Vector()

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The positive ones."""
        return Subset().argmax(utility, mask)

    def enumerate(self, *shape: int) -> Tensor:
        """All of them."""
        return Subset().enumerate(*shape)


def transition_masks(steps: int, labels: int, *lengths: int) -> list[Tensor]:
    """Sequences of the first so many positions."""
    return [(torch.arange(steps) < length - 1)[:, None, None].expand(steps, labels, labels) for length in lengths]


def without(steps: int, labels: int, position: int, label: int) -> Tensor:
    """All transitions but those through one label at one position."""
    mask = torch.ones(steps, labels, labels, dtype=torch.bool)
    mask[position - 1, :, label] = mask[position, label] = False
    return mask


class TestLabels(StructureContract):
    cases: ClassVar[list[Case]] = [
        Case(Labels(2), (3, 2, 2), [*transition_masks(3, 2, 3, 2, 1), without(3, 2, 1, 0)]),
        Case(Labels(3), (2, 3, 3), [*transition_masks(2, 3, 2, 1), without(2, 3, 1, 2)]),
        Case(Labels(1), (2, 1, 1)),
        Case(Labels(2), (0, 2, 2)),
    ]

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        steps = int(mask.flatten(1).any(-1).sum())
        small = case.structure.enumerate(steps, *case.shape[1:])
        full = small.new_zeros(len(small), *case.shape)
        full[:, :steps] = small
        return full[((full == 0) | mask).flatten(1).all(-1)]

    def test_second_derivatives(self) -> None:
        scores = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        for oracle in ("log_partition", "marginals", "entropy"):
            assert torch.autograd.gradgradcheck(getattr(Labels(3), oracle), scores)

    def test_inference_mode(self) -> None:
        structure, mask = Labels(3), torch.stack(transition_masks(2, 3, 3, 2))
        scores = torch.randn(2, 2, 3, 3)
        expected = structure.marginals(scores, mask), structure.argmax(scores, mask)
        with torch.inference_mode():
            scores, mask = scores.clone(), mask.clone()
            torch.testing.assert_close((structure.marginals(scores, mask), structure.argmax(scores, mask)), expected)
            assert structure.sample(scores, mask).sum((1, 2, 3)).tolist() == [2, 1]

    def test_what_has_no_vertex_is_refused(self) -> None:
        gap = torch.ones(2, 3, 2, 2, dtype=torch.bool)
        gap[1, 1] = False
        for oracle in ("argmax", "log_partition", "marginals", "sample", "project"):
            with pytest.raises(ValueError, match=r"example \[1\] has no vertex"):
                getattr(Labels(2), oracle)(torch.randn(2, 3, 2, 2), gap)

    def test_the_layout(self) -> None:
        structure = Labels(2)
        with pytest.raises(ValueError, match=r"over transitions parts have shape \[..., n - 1, C, C\]"):
            structure.argmax(torch.randn(3, 2, 4))
        assert structure.shape(5) == (4, 2, 2)
        assert structure.inner(torch.ones(7, 4, 2, 2), torch.ones(7, 4, 2, 2)).tolist() == [16] * 7


class TestOnlyArgmax(StructureContract):
    """k best of a set in which vertices contain each other, and projections, from nothing but an argmax."""

    cases: ClassVar[list[Case]] = [
        Case(OnlyArgmax(), (4,), [torch.arange(4) < m for m in (3, 1, 0)]),
        Case(OnlyArgmax(), (1,)),
    ]

    def test_oracles_tell_the_truth(self) -> None:
        structure = OnlyArgmax()
        assert structure.oracles == {"argmax", "enumerate", "project", "sparsemap", "top_k"}
        for oracle in ("marginals", "entropy"):
            with pytest.raises(UnsupportedError, match="OnlyArgmax has no log_partition"):
                getattr(structure, oracle)(torch.zeros(3))
        assert "exp_family" not in structure.relaxations


def test_a_structure_of_another_shape_has_to_say_it() -> None:
    class Silent(Structure):
        layout = Layout("spans", ("n", "n", "K"))

    with pytest.raises(UnsupportedError, match="has to override shape"):
        Silent().shape(4)
    assert Subset("undirected").shape(4) == (4, 4)
