"""The traits of a structure are true, and missing oracles are named in one line."""

from __future__ import annotations

import pytest
import torch

from structgrad.structures import KSubset, Matching, Permutation, Structure, UnsupportedError
from structgrad.structures.relaxation import Relaxation
from tests.cases import CASES

RELAXED = [(name, relaxation) for name, case in CASES.items() for relaxation in case.plain.relaxations]


def example(name: str) -> tuple[Structure, torch.Tensor, torch.Tensor]:
    """A structure, random scores of two examples, and their mask."""
    case = CASES[name]
    torch.manual_seed(0)
    return case.plain, torch.randn(2, *case.shape, dtype=torch.float64), case.mask


@pytest.mark.parametrize(("name", "relaxation"), RELAXED)
def test_a_jacobian_is_symmetric_where_it_is_said_to_be(name: str, relaxation: str) -> None:
    """Over parts, each counted once."""
    structure, scores, mask = example(name)
    described = structure.relaxations[relaxation]
    if described.draws is not None or not structure.is_linear:
        assert not described.symmetric
        return
    flatten = structure.layout.flatten

    def relaxed(s: torch.Tensor) -> torch.Tensor:
        return flatten(structure.relax(relaxation, s, mask[0], 0.7))

    jacobian = flatten(torch.autograd.functional.jacobian(relaxed, scores[0]))
    off = (jacobian - jacobian.T).abs().max()
    # Sinkhorn's iterations stop at sums within 1e-6.
    assert bool(off < 1e-5) == described.symmetric, f"{off}"


@pytest.mark.parametrize("name", CASES)
def test_traits(name: str) -> None:
    structure, scores, mask = example(name)
    vertex = structure.argmax(scores, mask)
    exists = structure.parts(scores, mask)
    if structure.is_categorical:
        assert (vertex.flatten(1).sum(1) == 1).all()
    if structure.is_independent:
        chosen = torch.where(exists, scores > 0, False)
        assert torch.equal(structure.layout.mirror(chosen.double()), vertex)
    # A strictly increasing function leaves the order as it is.
    moved = [structure.argmax((scores + shift).exp(), mask) for shift in (-3.0, 3.0)]
    if structure.is_ordinal:
        assert all(torch.equal(m, vertex) for m in moved)
    if structure.is_binary_tree:
        assert structure.layout.ndim == 1
        assert structure.vertex_layout.is_graph
        assert (vertex.sum(1) <= 1).all()
        assert (vertex.triu(1).sum(2) <= 1).all()
        assert (vertex.tril(-1).sum(2) <= 1).all()
    if structure.has_neighbour_pairs:
        items, pairs = vertex.split((vertex.shape[-1] + 1) // 2, -1)
        assert torch.equal(pairs, items[:, 1:] * items[:, :-1])
    if "trace" in structure.oracles:
        torch.manual_seed(1)
        many = torch.rand(200, *scores.shape, dtype=torch.float64) + 0.01
        same = torch.equal(structure.trace(many, mask).vertex, structure.argmax(-many, mask))
        assert same == structure.trace_is_argmax


def test_what_lacks_is_said_in_one_line() -> None:
    with pytest.raises(UnsupportedError, match=r"^a test needs relaxation 'sinkhorn', which KSubset lacks; it has exp"):
        KSubset(2).require_relaxation("sinkhorn", by="a test")
    message = "needs a relaxation of one utility, and 'l2x' of KSubset is none; it has exp_family, .*binary, softsub$"
    with pytest.raises(UnsupportedError, match=message):
        KSubset(2).require_relaxation("l2x", by="a test", one_draw=True)
    with pytest.raises(UnsupportedError, match="with a symmetric Jacobian and with a known regularizer, and 'neural"):
        Permutation().require_relaxation("neuralsort", by="a test", symmetric=True, regularized=True)
    with pytest.raises(UnsupportedError, match="relax needs relaxation 'exp_family', which Matching lacks; it has euc"):
        Matching().relax("exp_family", torch.zeros(2, 2))
    assert KSubset(3).require_relaxation("l2x", by="a test") == Relaxation("l2x", draws=3)
