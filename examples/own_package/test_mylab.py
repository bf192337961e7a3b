"""The tests of mylab: the contract of its structure, and that its estimator has no bias."""

import pytest
from mylab.exact_sum import ExactSum
from mylab.window import Window

from structgrad.structures import KSubset
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


@pytest.mark.parametrize("structure", [Window(2), KSubset(2)], ids=str)
def test_exact_sum(structure):
    """Two estimates without any variance."""
    assert_unbiased(ExactSum(structure), Problem.make(structure, (4,)), "gibbs", count=2, repeats=1)
