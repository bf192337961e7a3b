"""``lengths=`` beside ``mask=``, and several samples, of every structure."""

from __future__ import annotations

import math

import pytest
import torch

from structgrad import losses
from structgrad.algorithms import matrix_tree
from structgrad.estimators import SST
from structgrad.structures import (
    Alignment,
    Arborescence,
    Ctc,
    DagPath,
    FactorGraph,
    LinearChain,
    OneHot,
    Subset,
    UnsupportedError,
)
from structgrad.testing import computing
from tests.cases import CASES

#: Structures of which lengths do not say all.
WITHOUT = ("ctc", "dag_path", "factor_graph")


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT])
def test_lengths_are_smaller_problems(name: str) -> None:
    """As many vertices as at that size, and every oracle as with the mask."""
    torch.manual_seed(0)
    structure = CASES[name].plain
    two = structure.layout.dimensions == ("n", "m") and name == "alignment"
    counted = 0
    for size in range(5):
        shape = structure.shape(4)
        scores = torch.randn(2, *shape)
        length = torch.tensor([4, size])
        length = torch.stack([length, length], -1) if two else length
        mask = structure.length_mask(length, scores)
        try:
            expected = structure.enumerate(*structure.shape(size))
            best = structure.argmax(scores, mask)
        except (ValueError, IndexError):  # too small for the structure
            continue
        assert torch.equal(structure.argmax(scores, lengths=length), best)
        if "log_partition" in structure.oracles and size > 1:
            zeros = torch.zeros_like(scores)
            count = structure.log_partition(zeros, lengths=length)[1].exp().item()
            assert round(count) == len(expected), f"{structure} of {size}"
            counted += 1
        for oracle in {"marginals", "entropy", "project"} & structure.oracles:
            function = getattr(structure, oracle)
            torch.testing.assert_close(function(scores, None, lengths=length), function(scores, mask))
        with pytest.raises(ValueError, match="give one of them"):
            structure.argmax(scores, mask, lengths=length)
    assert counted or "log_partition" not in structure.oracles


def test_lengths_of_two_sequences() -> None:
    scores = torch.zeros(2, 4, 5)
    count = Alignment().log_partition(scores, lengths=torch.tensor([[4, 5], [2, 3]])).exp()
    torch.testing.assert_close(count, torch.tensor([129.0, 5.0]))  # Delannoy numbers
    with pytest.raises(ValueError, match="rows and columns"):
        Alignment().argmax(scores, lengths=torch.tensor([4, 5, 2]))


def test_what_takes_no_lengths_says_why() -> None:
    for structure, shape in (
        (Ctc(), (4, 3, 3)),
        (DagPath([[0, 1], [0, 1]]), (2,)),
        (FactorGraph.ising_grid(1, 2), (3,)),
    ):
        with pytest.raises(UnsupportedError, match="takes a mask, not lengths: "):
            structure.argmax(torch.randn(shape), lengths=torch.tensor(2))


def test_bad_lengths_are_refused() -> None:
    scores = torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match="from 0 to 4 for these scores; got 5"):
        LinearChain(2).argmax(scores, lengths=torch.tensor([4, 5]))
    with pytest.raises(TypeError, match="integers; got torch"):
        LinearChain(2).argmax(scores, lengths=torch.tensor([4.0, 2.0]))
    assert torch.equal(
        LinearChain(2).argmax(scores, lengths=torch.tensor([3])), LinearChain(2).argmax(scores, lengths=torch.tensor(3))
    )


def test_relaxations_estimators_and_losses() -> None:
    structure, lengths = LinearChain(3), torch.tensor([5, 2])
    scores = torch.randn(2, 4, 3, 3, requires_grad=True)
    mask = structure.length_mask(lengths, scores)
    expected = structure.relax("exp_family", scores, mask)
    assert torch.equal(structure.relax("exp_family", scores, lengths=lengths), expected)
    relaxed = OneHot().entmax(scores[:, 0, 0], 1.5, lengths=torch.tensor([3, 2]))
    assert relaxed[1, 2] == 0
    estimate = {}
    for key, given in (("mask", mask), ("lengths", lengths)):
        torch.manual_seed(1)
        estimator = SST(structure)
        estimate[key] = estimator(scores, lambda x, rows: x.square().flatten(1).sum(1), **{key: given}).surrogate
    assert torch.equal(estimate["mask"], estimate["lengths"])
    target = structure.write([[0, 1, 2, 1, 0], [2, 1, -1, -1, -1]])
    for loss in (losses.NegativeLogLikelihood, losses.SparseMAPLoss, losses.StructuredHingeLoss):
        torch.testing.assert_close(
            loss(structure)(scores, target, lengths=lengths), loss(structure)(scores, target, mask)
        )
    classes = losses.SparsemaxLoss()(torch.randn(2, 4), torch.tensor([0, 1]), lengths=torch.tensor([4, 2]))
    assert math.isfinite(classes)


@pytest.mark.parametrize("name", [name for name in CASES if "sample" in CASES[name].plain.oracles])
def test_one_of_several_samples_is_a_sample(name: str) -> None:
    """The same numbers from the same seed; batch dimensions stay behind the first."""
    case = CASES[name]
    scores = torch.randn(2, 3, *case.shape)
    torch.manual_seed(5)
    alone = case.plain.sample(scores)
    torch.manual_seed(5)
    assert torch.equal(case.plain.sample(scores, n=1)[0], alone)
    assert case.plain.sample(scores, n=4).shape == (4, *alone.shape)
    assert case.plain.sample(scores[:0], n=4).shape == (4, 0, *alone.shape[1:])
    assert len(case.plain.sample(torch.zeros(case.shape), n=50).unique(dim=0)) > 1


def test_a_structure_of_ones_own_needs_no_n() -> None:
    class Own(Subset):
        def sample(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
            return super().sample(scores, mask)

    assert Own().sample(torch.zeros(2, 3), n=4).shape == (4, 2, 3)
    assert Own().sample(torch.zeros(2, 3), lengths=torch.tensor([3, 1]), n=9)[:, 1, 1:].sum() == 0


@pytest.mark.parametrize("path", ["native", "plain"])
def test_the_tables_are_made_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One elimination of an arborescence for all samples, which follow its law (5 standard errors)."""
    eliminated = []
    eliminate = matrix_tree.eliminate
    monkeypatch.setattr(matrix_tree, "eliminate", lambda s, *more: eliminated.append(len(s)) or eliminate(s, *more))
    torch.manual_seed(0)
    scores = torch.randn(1, 6, 6)
    with computing(path):
        drawn = Arborescence().sample(scores, n=2000)
    assert eliminated == ([1] if path == "plain" else [])
    torch.testing.assert_close(drawn.mean(0), Arborescence().marginals(scores), rtol=0, atol=5 * 0.5 / 2000**0.5)
