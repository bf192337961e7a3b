"""The shipped tests on another device: what is asked of a structure is computed there."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from structgrad import testing
from structgrad.estimators import Reinforce
from structgrad.structures import CorrelatedKSubset, KSubset, LinearChain, OneHot
from structgrad.testing import DEVICE, Case, Problem


def test_oracles_are_asked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "_ELSEWHERE", "cpu")
    case, scores = Case(OneHot(), (4,)), torch.randn(3, 4, requires_grad=True)
    assert case.structure is not OneHot
    sparse, expected = case.structure.sparsemap(scores), OneHot().sparsemap(scores)
    assert torch.equal(sparse.rows, expected.rows)
    (gradient,) = torch.autograd.grad(case.structure.marginals(scores, mask=None)[:, 0].sum(), scores)
    assert (gradient != 0).any()
    assert case.structure.oracles == OneHot().oracles
    monkeypatch.setattr(testing, "DEVICE", torch.device("meta"))
    with pytest.raises(NotImplementedError, match="meta"):  # where they were, and no value comes back from there
        case.structure.marginals(scores)


def test_a_problem_moves() -> None:
    problem = Problem.make(OneHot(), (4,))
    assert problem.to(torch.device("cpu")) is problem
    there = problem.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (*there.variables, there.mask, there.context)} == {"meta"}
    assert all(variable.requires_grad for variable in there.variables)
    assert problem.decoder.first.device.type == "cpu"
    assert DEVICE.type in ("cpu", "cuda")


def test_the_estimator_of_the_page_has_no_bias(root: Path) -> None:
    page = (root / "docs" / "your_own.md").read_text()
    mine = class_of(page, "Mine")
    for structure in (OneHot(), KSubset(2)):
        testing.assert_unbiased(mine(structure), Problem.make(structure, (4,)), "gibbs")


def class_of(page: str, name: str) -> type:
    """A class of a page, in a block with its imports."""
    (block,) = re.findall(rf"((?:    .*\n|\n)*    class {name}\(Estimator\):\n(?:    .*\n|\n)*)", page)
    names: dict[str, type] = {}
    exec(textwrap.dedent(block), names)
    return names[name]


def test_the_noisy_estimator_of_the_page(root: Path) -> None:
    """Its samples have the distribution that it names: 4,000 draws, each share within 5 standard errors (> 99.99 %)."""
    noisy = class_of((root / "docs" / "your_own.md").read_text(), "Noisy")
    torch.manual_seed(0)
    scores = torch.tensor([0.0, 1.0, -1.0]).expand(4000, 3).clone().requires_grad_()
    estimate = noisy(OneHot())(scores, lambda x, rows: x @ torch.tensor([1.0, 2.0, 4.0]))
    share, expected = estimate.vertices.detach().mean(0), scores[0].detach().softmax(0)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()
    estimate.surrogate.sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([1.0, 2.0, 4.0]).expand(4000, 3))
    pairs = CorrelatedKSubset(1)
    scores = torch.tensor([[0.0, 0, 0, 9, -9]]).expand(50, 5)
    mask = torch.tensor([True, True, False, True, False]).expand(50, 5)
    estimate = noisy(pairs)(scores, lambda x, rows: x.sum(1), mask=mask)
    assert not estimate.vertices[:, [2, 4]].any()
    assert estimate.kl.shape == (50,)


def test_scores_of_the_wrong_shape_are_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"\[batch, n - 1, C, C\], with exactly one batch dimension"):
        Reinforce(LinearChain(2))(torch.zeros(3, 2, 2), lambda x, rows: x.sum((1, 2, 3)))


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    spec = importlib.util.spec_from_file_location("a_copy_of_testing", testing.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"needs pytest: pip install '\.\[testing\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
