"""The tests of mylab: the contract of its structure, and that its estimator has no bias."""

import pytest
import torch
from mylab.exact_sum import ExactSum
from mylab.window import Window

from structgrad.structures import KSubset, UnsupportedError
from structgrad.testing import Case, Problem, StructureContract, assert_unbiased, vector_masks


class TestWindow(StructureContract):
    """Every oracle that windows have."""

    cases = (
        Case(Window(2), (5,), vector_masks(5, 4, 2)),
        Case(Window(1), (1,)),
        Case(Window(3), (3,)),
    )

    def test_oracles(self):
        """Those that are written, and those that follow."""
        assert {"marginals", "entropy", "top_k", "sparsemap"} <= Window(2).oracles
        assert "sample" not in Window(2).oracles


def test_examples_without_a_window_are_refused():
    """Too short, or torn apart by the mask."""
    for scores, mask in ((torch.zeros(2, 2), None), (torch.zeros(1, 4), torch.tensor([True, True, False, True]))):
        for oracle in ("argmax", "log_partition", "marginals"):
            with pytest.raises(ValueError, match="has no window of 3"):
                getattr(Window(3), oracle)(scores, mask)


def test_exact_sum_refuses_missing_parts():
    """Rather than to sum over vertices that do not exist."""
    with pytest.raises(UnsupportedError, match="missing parts"):
        ExactSum(Window(2))(torch.zeros(1, 4), lambda x, rows: x.sum(-1), mask=torch.arange(4)[None] < 3)


@pytest.mark.parametrize("structure", [Window(2), KSubset(2)], ids=str)
def test_exact_sum(structure):
    """Two estimates without any variance."""
    assert_unbiased(ExactSum(structure), Problem.make(structure, (4,)), "gibbs", count=2, repeats=1)
