"""The tests of mylab: the contract of its structure, and that its estimator has no bias."""

import pytest
import torch
from mylab.exact_sum import ExactSum
from mylab.mirrored import Mirrored
from mylab.teams import Teams
from mylab.window import Window
from mylab.windows import Windows
from mylab.worst_case import WorstCase

from structgrad.estimators import SST, GumbelRao, Reinforce, SurrogateGradient
from structgrad.structures import KSubset, Subset, UnsupportedError
from structgrad.testing import Case, EstimatorContract, Problem, StructureContract, assert_unbiased, vector_masks


class TestWindow(StructureContract):
    """Every oracle that windows have."""

    cases = (
        Case(Window(2), (5,), vector_masks(5, 4, 2)),
        Case(Window(1), (1,)),
        Case(Window(3), (3,)),
    )

    def test_oracles(self):
        """The oracles that are written, and those that follow from them."""
        assert {"marginals", "entropy", "top_k", "sparsemap"} <= Window(2).oracles
        assert "sample" not in Window(2).oracles


class TestTeams(StructureContract):
    """Your own matroid."""

    cases = (Case(Teams(2), (4,), [torch.tensor([True, True, False, True])]), Case(Teams(1), (3,)))


class TestMirrored(StructureContract):
    """A layout of one's own, under structures of the library."""

    cases = (
        Case(Subset(Mirrored()), (5,), [torch.arange(5) != 1]),
        Case(KSubset(2, Mirrored()), (6,), [torch.arange(6) != 0]),
    )


class TestWorstCase(EstimatorContract):
    """A baseline of one's own, over one's own matroid and layout."""

    cases = (Case(Teams(2), (4,)), Case(Subset(Mirrored()), (5,)))
    unbiased = "gibbs"

    def build(self, structure):
        """The score function with it."""
        return Reinforce(structure, baseline=WorstCase(), n_samples=2)


def test_the_baseline_learns():
    """Its share of the worst case goes to where it explains the objective."""
    problem = Problem.make(Teams(2), (4,))
    estimator = Reinforce(Teams(2), baseline=WorstCase()).double()
    estimator(problem.scores, problem.decoder).surrogate.mean().backward()
    assert estimator.baseline.share.grad.abs() > 0


def test_gumbel_rao_over_a_matroid_of_ones_own():
    """Its mean is that of straight-through SST: within 4.5 standard errors in every coordinate; the seed is fixed."""
    torch.manual_seed(0)
    problem = Problem.make(Teams(2), (4,))
    gradients = [
        torch.stack(list(problem.estimates(estimator.double(), 60, 100)))
        for estimator in (SST(Teams(2), straight_through=True), GumbelRao(Teams(2), 4))
    ]
    error = sum(g.var(0) / len(g) for g in gradients).sqrt()
    assert ((gradients[0].mean(0) - gradients[1].mean(0)).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("method", ["identity", "spigot", "blackbox"])
def test_surrogate_gradients_over_a_layout_of_ones_own(method):
    """Equal to those of the parts alone, whose objective shows them itself."""
    layout, step = Mirrored(), None if method == "identity" else 5.0
    weights, parts = torch.linspace(-1, 2, 5), torch.tensor([[0.3, -0.2, 0.4]])
    mirrored = torch.cat([parts, torch.zeros(1, 2)], 1).requires_grad_()
    plain = parts.clone().requires_grad_()
    SurrogateGradient(Subset(layout), method, step)(mirrored, lambda x, rows: x @ weights).surrogate.sum().backward()
    SurrogateGradient(Subset(), method, step)(
        plain, lambda x, rows: layout.unflatten(x, torch.Size([5])) @ weights
    ).surrogate.sum().backward()
    torch.testing.assert_close(mirrored.grad, torch.cat([plain.grad, torch.zeros(1, 2)], 1))
    assert plain.grad.abs().sum() > 0


class TestWindows(StructureContract):
    """Every oracle that several windows have."""

    cases = (
        Case(Windows(2, 2), (6,), vector_masks(6, 5, 4)),
        Case(Windows(1, 3), (3,)),
        Case(Windows(3, 1), (4,)),
    )


def test_one_window_is_a_window():
    """The same set by another program."""
    scores = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(Windows(1, 3).log_partition(scores), Window(3).log_partition(scores))
    with pytest.raises(ValueError, match="has no vertex"):
        Windows(2, 2).argmax(torch.zeros(1, 3))


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
