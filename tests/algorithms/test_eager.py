"""Warnings of iterative oracles that stop before their solution."""

from __future__ import annotations

import warnings

import pytest
import torch

from structgrad.algorithms import eager
from structgrad.algorithms.eager import StoppedEarly
from structgrad.structures import Arborescence, Matching
from structgrad.structures.derived import sparsemap


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_STOPPED", set())


def test_sinkhorn_says_how_far_its_sums_are_off_once() -> None:
    scores = 20 * torch.randn(2, 6, 6)
    structure = Matching(max_iterations=1)
    with pytest.warns(StoppedEarly):
        off = (structure.sinkhorn(scores).sum(-1) - 1).abs().sum(-1).max()
    eager._STOPPED.clear()
    with pytest.warns(StoppedEarly, match=rf"Matching.sinkhorn stopped early: row sums are off by {float(off):.2g}"):
        structure.sinkhorn(scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure.sinkhorn(scores)
        Matching().sinkhorn(scores)


def test_the_active_set_method_says_how_far_it_is() -> None:
    scores = torch.randn(3, 5, 5)
    with pytest.warns(StoppedEarly, match="the active-set method stopped early: a vertex is further"):
        sparsemap(Arborescence(), scores, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsemap(Arborescence(), scores, max_iterations=2)
        eager._STOPPED.clear()
        sparsemap(Arborescence(), scores)
        sparsemap(Arborescence(), scores, max_iterations=1000)
