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
from structgrad.structures import KSubset, LinearChain, OneHot
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
    (block,) = re.findall(r"((?:    .*\n|\n)*    class Mine\(Estimator\):\n(?:    .*\n|\n)*)", page)
    names: dict[str, type] = {}
    exec(textwrap.dedent(block), names)
    for structure in (OneHot(), KSubset(2)):
        testing.assert_unbiased(names["Mine"](structure), Problem.make(structure, (4,)), "gibbs")


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
