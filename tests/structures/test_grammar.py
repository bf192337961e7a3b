"""Grammars against enumeration, torch-struct and each other."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch

from structgrad.structures import Grammar, LowRankGrammar
from structgrad.testing import Case, length_masks
from tests.structures.test_dynamic_programs import SequenceContract, holes


class TestGrammar(SequenceContract):
    cut: ClassVar[int] = 2
    cases: ClassVar[list[Case]] = [
        Case(Grammar(1, 1), (4, 4, 4), [m[..., None].expand(4, 4, 4) for m in length_masks(4, 3, 1)]),
        Case(Grammar(1, 2), (3, 3, 9), [holes(3, 3, 9, seed=1)]),
        Case(Grammar(2, 1), (2, 2, 18)),
        Case(Grammar(1, 3), (1, 1, 16)),
        Case(Grammar(1, 1), (0, 0, 4)),
    ]


class TestLowRankGrammar(SequenceContract):
    cut: ClassVar[int] = 2
    cases: ClassVar[list[Case]] = [
        Case(LowRankGrammar(1, 1, 1), (4, 4, 6), [m[..., None].expand(4, 4, 6) for m in length_masks(4, 2)]),
        Case(LowRankGrammar(1, 2, 1), (3, 3, 9), [holes(3, 3, 9, seed=2, share=0.9)]),
        Case(LowRankGrammar(2, 1, 2), (2, 2, 17)),
        Case(LowRankGrammar(1, 2, 3), (1, 1, 23)),
        Case(LowRankGrammar(1, 1, 1), (0, 0, 6)),
    ]


def test_uses_of_rules_against_torch_struct() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_struct: Any = pytest.importorskip(
            "torch_struct", reason="needs torch-struct (make .venv/installed-bench)"
        )
    torch.manual_seed(0)
    structure, n = Grammar(3, 2), 6
    rules = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    emissions = torch.randn(4, n, 2, dtype=torch.float64, requires_grad=True)
    roots = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 4, 2, 5])
    mask = torch.stack(length_masks(n, *lengths.tolist()))[..., None]
    ours = structure.log_partition(structure.scores(rules, emissions, roots, lengths), mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_struct.SentCFG((emissions * 1, rules * 1, roots * 1), lengths).partition
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(theirs.sum(), [rules, emissions, roots])
    found = torch.autograd.grad(ours.sum(), [rules, emissions, roots])
    torch.testing.assert_close(found, expected)
    mean = structure.marginals(structure.scores(rules, emissions, roots, lengths), mask)
    torch.testing.assert_close(structure.counts(mean), expected[0])


def test_low_rank_is_the_grammar_of_its_rules() -> None:
    torch.manual_seed(0)
    small, full = LowRankGrammar(2, 3, 4), Grammar(2, 3)
    head, left, right = (torch.randn(3, size, 4, dtype=torch.float64) for size in (2, 5, 5))
    emissions, roots = torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 1])
    mask = torch.stack(length_masks(5, *lengths.tolist()))[..., None]
    torch.testing.assert_close(
        small.log_partition(small.scores(head, left, right, emissions, roots, lengths), mask),
        full.log_partition(full.scores(small.rules(head, left, right), emissions, roots, lengths), mask),
    )


@pytest.mark.parametrize("low_rank", [False, True])
def test_labels_of_trees(low_rank: bool) -> None:
    torch.manual_seed(0)
    structure = LowRankGrammar(2, 3, 2) if low_rank else Grammar(2, 3)
    scores = torch.randn(50, *structure.shape(5))
    mask = torch.stack(length_masks(5, *[1 + b % 5 for b in range(50)]))[..., None]
    labels = structure.labels(structure.sample(scores, mask))
    for b, found in enumerate(labels):
        n = 1 + b % 5
        words = found.diagonal()
        assert ((words[:n] >= 2) & (words[:n] < 5)).all()
        assert int((found >= 0).sum()) == 2 * n - 1
        assert ((found.triu(1) < 2) | (found < 0)).all()
        assert found[0, n - 1] >= 0


def test_what_is_no_grammar_is_refused() -> None:
    for make in (lambda: Grammar(0, 1), lambda: Grammar(1, 0), lambda: LowRankGrammar(1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            make()
    for structure in (Grammar(1, 1), LowRankGrammar(1, 1, 1)):
        with pytest.raises(ValueError, match="have shape"):
            structure.argmax(torch.zeros(3, 3, 3))
