"""Arborescence: the contract, networkx as a second opinion, and the failures seen in public code."""

from __future__ import annotations

from typing import ClassVar

import networkx as nx
import pytest
import torch

from structgrad.structures import Arborescence, UnsupportedError
from structgrad.testing import Case, StructureContract, computing, length_masks
from tests.structures._trees import TreeContract, sparse_masks, weight


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


STRUCTURE = Arborescence()


class TestArborescence(TreeContract):
    structure = STRUCTURE
    cases: ClassVar[list[Case]] = [
        Case(Arborescence(), (4, 4), length_masks(4, 3, 2, 1, 0) + sparse_masks(STRUCTURE, 4)),
        Case(Arborescence(root=2), (4, 4)),
        Case(Arborescence(), (5, 5), length_masks(5, 3) + sparse_masks(STRUCTURE, 5)),
        Case(Arborescence(), (1, 1)),
        Case(Arborescence(), (2, 2), length_masks(2, 1)),
    ]

    def check_totals(self, mean: torch.Tensor) -> None:
        torch.testing.assert_close(mean.sum(1)[:, 1:], torch.ones(20, 29), rtol=1e-5, atol=1e-5)

    def telling(self, choices: torch.Tensor, n: int) -> torch.Tensor:
        """Those with a contraction."""
        return (choices.reshape(len(choices), -1, 2)[:, n:, 0] >= 0).any(1)


SINGLE = Arborescence(single_root=True)


class TestSingleRoot(StructureContract):
    """One edge out of the root: the contract, and determinants as a second opinion."""

    structure = SINGLE
    cases: ClassVar[list[Case]] = [
        Case(SINGLE, (4, 4), length_masks(4, 3, 2, 1) + sparse_masks(SINGLE, 4)[:2]),
        Case(Arborescence(1, single_root=True), (3, 3)),
        Case(SINGLE, (1, 1)),
    ]
    vertices = TreeContract.vertices
    test_argmax_is_optimal = TreeContract.test_argmax_is_optimal_on_thousands_of_small_graphs

    @pytest.mark.parametrize("scale", [1.0, 10.0])
    def test_against_determinants(self, scale: float) -> None:
        """Koo et al. (2007, section 3.2): the first row of the Laplacian holds the weights of the root."""
        scores = scale * torch.randn(5, 30, 30, dtype=torch.float64)
        weights = scores[:, 1:, 1:].exp() * (1 - torch.eye(29, dtype=torch.float64))
        laplacian = torch.diag_embed(weights.sum(1)) - weights
        laplacian[:, 0] = scores[:, 0, 1:].exp()
        expected = laplacian.slogdet()[1]
        torch.testing.assert_close(SINGLE.log_partition(scores), expected, rtol=1e-6, atol=1e-6)
        marginals = SINGLE.marginals(scores)
        torch.testing.assert_close(marginals[:, 0].sum(-1), torch.ones(5, dtype=torch.float64))
        assert (SINGLE.sample(scores)[:, 0].sum(-1) == 1).all()

    def test_two_edges_out_of_the_root_are_refused(self) -> None:
        apart = torch.zeros(4, 4, dtype=torch.bool)
        apart[0, 1], apart[0, 2], apart[2, 3] = True, True, True
        for oracle in ("argmax", "log_partition", "marginals", "sample", "entropy", "project"):
            with pytest.raises(ValueError, match="one edge out of root 0"):
                getattr(SINGLE, oracle)(torch.randn(2, 4, 4), apart)
        for path in ("plain", "native"):
            with computing(path):
                assert SINGLE.top_k(torch.randn(3, 3), 9)[1].isfinite().sum() == 2

    def test_scores_that_spread_too_far(self) -> None:
        with pytest.raises(ValueError, match="spread over"):
            SINGLE.log_partition(1e9 * torch.randn(4, 4))

    def test_there_is_no_trace(self) -> None:
        with pytest.raises(UnsupportedError, match="no trace"):
            SINGLE.trace(torch.rand(4, 4))
        assert not {"trace", "trace_log_prob", "conditional"} & SINGLE.oracles


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_argmax_is_optimal_says_networkx(n: int, scale: float) -> None:
    scores = torch.randn(25, n, n) * scale
    scores[10:15] = scores[10:15].round()  # ties
    found = STRUCTURE.argmax(scores)
    for s, x in zip(scores, found, strict=True):
        graph = nx.DiGraph()
        graph.add_weighted_edges_from((i, j, s[i, j].item()) for i in range(n) for j in range(1, n) if i != j)
        best = nx.maximum_spanning_arborescence(graph)
        expected = sum(d["weight"] for *_, d in best.edges(data=True))
        torch.testing.assert_close(weight(STRUCTURE, x, s).item(), expected, rtol=1e-9, atol=1e-6)
        tree = nx.DiGraph([(int(i), int(j)) for i, j in x.nonzero()])
        assert nx.is_arborescence(tree)
        assert tree.in_degree(0) == 0


def test_top_k_is_sorted_distinct_and_beats_random_trees() -> None:
    n, k = 9, 40
    scores = torch.randn(3, n, n)
    vertices, values = STRUCTURE.top_k(scores, k)
    assert (values.diff(dim=1) <= 1e-5).all()
    for b in range(3):
        assert len(vertices[b].flatten(1).unique(dim=0)) == k
        # Gibbs samples at low temperature are good trees; none that beats the k-th may be missing from the list.
        sample = STRUCTURE.sample((4 * scores[b]).expand(5000, n, n))
        better = sample[weight(STRUCTURE, sample, scores[b]) > values[b, -1] + 1e-4].flatten(1).unique(dim=0)
        assert len(better) > 5
        listed = (better[:, None] == vertices[b].flatten(1)).all(-1).any(1)
        assert listed.all()


def test_second_derivative_of_log_partition() -> None:
    scores = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(STRUCTURE.log_partition, scores)


def test_shift_into_a_node_changes_nothing() -> None:
    scores = torch.randn(3, 6, 6, dtype=torch.float64)
    shifted = scores + 1000 * torch.randn(3, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(STRUCTURE.marginals(shifted), STRUCTURE.marginals(scores), rtol=1e-9, atol=1e-9)


def test_marginals_where_linear_weights_underflow() -> None:
    """A chain that climbs 200 nats at every step: log Z = -200 (n - 1), one tree, although each node prefers its
    successor."""
    n = 12
    mask = torch.zeros(n, n, dtype=torch.bool)
    scores = torch.zeros(n, n)
    for i in range(n - 1):
        mask[i, i + 1] = mask[i + 1, i] = True
        scores[i, i + 1], scores[i + 1, i] = -100.0, 100.0
    expected = torch.diag(torch.ones(n - 1), 1)
    torch.testing.assert_close(STRUCTURE.marginals(scores, mask), expected)
    torch.testing.assert_close(STRUCTURE.log_partition(scores, mask).item(), -100.0 * (n - 1))
    assert torch.equal(STRUCTURE.sample(scores, mask), expected)


def test_unreachable_node_is_named() -> None:
    mask = torch.ones(2, 3, 4, 4, dtype=torch.bool)
    mask[1, 2, :, 3] = False
    scores = torch.randn(2, 3, 4, 4)
    for oracle in ("argmax", "log_partition", "marginals", "sample", "entropy", "trace"):
        with pytest.raises(ValueError, match=r"example \(1, 2\) has no arborescence"):
            getattr(STRUCTURE, oracle)(scores.abs(), mask)


def test_bad_root() -> None:
    with pytest.raises(ValueError, match="root"):
        Arborescence(root=-1)
    with pytest.raises(ValueError, match="root 5"):
        Arborescence(root=5).argmax(torch.randn(3, 3))
