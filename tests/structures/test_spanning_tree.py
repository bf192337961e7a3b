"""SpanningTree: the contract, networkx as a second opinion, and the failures seen in public code."""

from __future__ import annotations

import itertools
from typing import ClassVar

import networkx as nx
import pytest
import torch
from scipy import stats

from structgrad.structures import SpanningTree, _kruskal
from structgrad.structures.base import Trace
from tests.structures._trees import CoversWhatIsPresent, all_traces, random_masks, repeat
from tests.structures.template import Case, StructureContract, length_masks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sparse(n: int) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return random_masks(n, 3, SpanningTree())


class TestSpanningTree(CoversWhatIsPresent, StructureContract):
    cases: ClassVar[list[Case]] = [
        Case(SpanningTree(), (4, 4), length_masks(4, 3, 2, 1, 0) + sparse(4)),
        Case(SpanningTree(), (5, 5), length_masks(5, 3) + sparse(5)),
        Case(SpanningTree(), (1, 1)),
        Case(SpanningTree(), (2, 2), length_masks(2, 1)),
    ]


STRUCTURE = SpanningTree()


def weight(vertex: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return (vertex.double() * scores.double()).triu(1).sum((-2, -1))


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_argmax_is_optimal_says_networkx(n: int, scale: float) -> None:
    scores = torch.randn(25, n, n) * scale
    scores[10:15] = scores[10:15].round()  # ties
    found = STRUCTURE.argmax(scores)
    for s, x in zip(scores, found, strict=True):
        graph = nx.Graph()
        graph.add_weighted_edges_from((i, j, s[i, j].item()) for i in range(n) for j in range(i + 1, n))
        best = nx.maximum_spanning_tree(graph)
        expected = sum(d["weight"] for *_, d in best.edges(data=True))
        torch.testing.assert_close(weight(x, s).item(), expected, rtol=1e-9, atol=1e-6)
        assert nx.is_tree(nx.Graph([(int(i), int(j)) for i, j in x.nonzero()]))


@pytest.mark.parametrize("ties", [False, True])
def test_argmax_is_optimal_on_thousands_of_small_graphs(ties: bool) -> None:
    every = STRUCTURE.enumerate(5, 5).triu(1)
    for scale in (1.0, 100.0):
        scores = torch.randn(2000, 5, 5, dtype=torch.float64) * scale
        if ties:
            scores = (scores / scale).round()
        mask = torch.rand(2000, 5, 5) < 0.8
        mask &= mask.any((1, 2), keepdim=True)
        masked = torch.where(STRUCTURE.parts(scores, mask), scores, -1e6)
        expected = torch.einsum("vij,bij->bv", every, masked).max(1).values
        feasible = expected > -1e5
        found = STRUCTURE.argmax(scores[feasible], mask[feasible])
        torch.testing.assert_close(weight(found, masked[feasible]), expected[feasible], rtol=1e-12, atol=1e-9)


def test_top_k_is_what_networkx_lists() -> None:
    n, k = 8, 12
    scores = torch.randn(2, n, n, dtype=torch.float64)
    _, values = STRUCTURE.top_k(scores, k)
    for s, found in zip(scores, values, strict=True):
        graph = nx.Graph()
        graph.add_weighted_edges_from((i, j, s[i, j].item()) for i in range(n) for j in range(i + 1, n))
        trees = itertools.islice(nx.SpanningTreeIterator(graph, minimum=False), k)
        expected = [sum(d["weight"] for *_, d in tree.edges(data=True)) for tree in trees]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def cases_for_both_paths() -> tuple[torch.Tensor, torch.Tensor]:
    n = 7
    masks = torch.stack([torch.ones(n, n, dtype=torch.bool), *length_masks(n, 6, 2, 1, 0), *sparse(n)])
    scores = torch.randn(len(masks), n, n, dtype=torch.float64) * 3
    exists = STRUCTURE.parts(scores, masks)
    return torch.where(exists, scores, torch.nan), exists.contiguous()


def test_plain_torch_agrees_with_the_compiled_code() -> None:
    for rounded in (False, True):
        scores, exists = cases_for_both_paths()
        scores = scores.round() if rounded else scores
        vertex, choices, reached = _kruskal.minimum_spanning_tree(scores, exists)
        plain, plain_choices, plain_reached = _kruskal.torch_minimum_spanning_tree(scores, exists)
        assert torch.equal(reached, plain_reached)
        torch.testing.assert_close(weight(plain, scores.nan_to_num()), weight(vertex, scores.nan_to_num()))
        if not rounded:
            assert torch.equal(vertex, plain)
            assert torch.equal(choices, plain_choices)
        assert torch.equal(_kruskal.joined_at(choices, 7), _kruskal.torch_joined_at(choices, 7))
    broken = exists.clone()
    broken[0, :3, 3:] = False
    for function in (_kruskal.minimum_spanning_tree, _kruskal.torch_minimum_spanning_tree):
        assert function(scores, broken)[2].tolist() == [False] + [True] * (len(scores) - 1)


@pytest.mark.parametrize("std", [5.0, 10.0, 100.0])
def test_marginals_stay_probabilities(std: float) -> None:
    scores = (std * torch.randn(20, 30, 30)).clamp(-100, 100).requires_grad_()
    mean = STRUCTURE.marginals(scores)
    assert ((mean >= 0) & (mean <= 1)).all()
    torch.testing.assert_close(mean.triu(1).sum((1, 2)), torch.full((20,), 29.0), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((mean * torch.randn_like(mean)).sum(), scores)
    assert gradient.isfinite().all()


def test_marginals_at_n_400_are_probabilities() -> None:
    mean = STRUCTURE.marginals(5 * torch.randn(1, 400, 400))
    assert ((mean >= 0) & (mean <= 1)).all()
    torch.testing.assert_close(mean.sum() / 2, torch.tensor(399.0))


def test_disconnected_example_is_named() -> None:
    mask = torch.ones(2, 3, 4, 4, dtype=torch.bool)
    mask[1, 2, :2, 2:] = False
    scores = torch.randn(2, 3, 4, 4)
    for oracle in ("argmax", "log_partition", "sample", "entropy", "trace"):
        with pytest.raises(ValueError, match=r"example \(1, 2\) has no spanning tree"):
            getattr(STRUCTURE, oracle)(scores.abs(), mask)


def test_transforms_and_compilation() -> None:
    scores = torch.randn(2, 5, 5)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(STRUCTURE.marginals)(scores)
    for oracle in ("argmax", "marginals", "log_partition"):
        function = getattr(STRUCTURE, oracle)
        torch.testing.assert_close(torch.compile(function, backend="eager")(scores), function(scores))


# --- the trace --------------------------------------------------------------------------------------------------------


def test_trace_leads_to_argmax() -> None:
    scores, exists = cases_for_both_paths()
    exponentials = torch.where(exists, torch.empty_like(scores).exponential_(), torch.nan)
    trace = STRUCTURE.trace(exponentials, exists)
    assert torch.equal(trace.vertex, STRUCTURE.argmax(-exponentials, exists))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4), (2, 1, 1), (2, 0, 0), (0, 3, 4, 4)])
def test_trace_shapes(shape: tuple[int, ...]) -> None:
    exponentials = torch.empty(shape).exponential_()
    trace = STRUCTURE.trace(exponentials)
    assert trace.vertex.shape == shape
    assert trace.choices.shape[: len(shape) - 2] == shape[:-2]
    assert STRUCTURE.trace_log_prob(trace, exponentials).shape == shape[:-2]
    assert STRUCTURE.conditional(trace, exponentials).shape == shape
    assert (trace.vertex.sum((-1, -2)) == STRUCTURE.argmax(exponentials).sum((-1, -2))).all()


@pytest.mark.parametrize("masked", [False, True])
def test_trace_probabilities_sum_to_one_and_match_frequencies(masked: bool) -> None:
    mask = length_masks(4, 3)[0] if masked else torch.ones(4, 4, dtype=torch.bool)
    every = all_traces(STRUCTURE, 4, mask)
    log_rates = 0.5 * torch.randn(4, 4, dtype=torch.float64)
    count = len(every.choices)
    log_p = STRUCTURE.trace_log_prob(every, log_rates.expand(count, 4, 4), mask.expand(count, 4, 4))
    torch.testing.assert_close(log_p.exp().sum().item(), 1.0, rtol=1e-9, atol=1e-9)
    draws = 20_000
    exponentials = torch.empty(draws, 4, 4, dtype=torch.float64).exponential_() / log_rates.exp()
    drawn = STRUCTURE.trace(exponentials, mask.expand(draws, 4, 4)).choices
    counts = (drawn[:, None] == every.choices).all(-1).sum(0)
    # Level 1e-4; the seed is fixed.
    assert stats.chisquare(counts.numpy(), (draws * log_p.exp()).numpy()).pvalue > 1e-4


def test_conditional_keeps_the_trace_and_the_law() -> None:
    draws, n = 20_000, 5
    log_rates = torch.randn(n, n, dtype=torch.float64).expand(draws, n, n)
    mask = length_masks(n, 4)[0].expand(draws, n, n)
    for m in (torch.ones_like(mask), mask):
        exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / log_rates.exp()
        trace = STRUCTURE.trace(exponentials, m)
        fresh = STRUCTURE.conditional(trace, log_rates, m)
        assert torch.equal(STRUCTURE.trace(fresh, m).choices, trace.choices)
        parts = STRUCTURE.parts(fresh, m)[0]
        assert (fresh[:, ~parts] == 1).all()
        for i, j in parts.nonzero():
            # E | T averaged over T has the law of E: exponential, of the right mean. Level 1e-5 for each of ten edges.
            scaled = fresh[:, i, j] * log_rates[0, i, j].exp()
            assert stats.kstest(scaled.numpy(), "expon").pvalue > 1e-5
            assert abs(scaled.mean() - 1) < 4.5 * draws**-0.5


def test_conditional_given_one_trace() -> None:
    """Against rejection: exponentials of the draws that happened to have that trace. Level 1e-5 for each edge."""
    draws, n = 60_000, 4
    log_rates = 0.5 * torch.randn(n, n, dtype=torch.float64).expand(draws, n, n)
    exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / log_rates.exp()
    trace = STRUCTURE.trace(exponentials)
    _, inverse, counts = trace.choices.unique(dim=0, return_inverse=True, return_counts=True)
    kept = (inverse == counts.argmax()).nonzero()[:, 0]
    one = Trace(trace.vertex[kept[0]], trace.choices[kept[0]])
    fresh = STRUCTURE.conditional(repeat(one, 5000), log_rates[:5000])
    for i, j in STRUCTURE.parts(fresh)[0].nonzero():
        assert stats.ks_2samp(fresh[:, i, j].numpy(), exponentials[kept, i, j].numpy()).pvalue > 1e-5


def test_trace_gradients() -> None:
    scores, exists = cases_for_both_paths()
    exponentials = torch.empty_like(scores).exponential_()
    trace = STRUCTURE.trace(exponentials, exists)
    inputs = scores.nan_to_num().requires_grad_()

    def conditional(log_rates: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return STRUCTURE.conditional(trace, log_rates, exists)

    assert torch.autograd.gradcheck(lambda s: STRUCTURE.trace_log_prob(trace, s, exists), inputs)
    assert torch.autograd.gradcheck(conditional, (0.2 * inputs.detach()).requires_grad_())
    spoilt = torch.where(exists, scores, torch.nan).requires_grad_()
    for value in (STRUCTURE.trace_log_prob(trace, spoilt, exists), STRUCTURE.conditional(trace, spoilt, exists)):
        (gradient,) = torch.autograd.grad(value.sum(), spoilt)
        assert gradient.isfinite().all()
        assert (gradient[~exists] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_log_prob_at_large_rates(dtype: torch.dtype) -> None:
    log_rates = (100 * torch.randn(10, 8, 8, dtype=dtype)).clamp(-100, 100).requires_grad_()
    trace = STRUCTURE.trace(torch.rand(10, 8, 8, dtype=dtype))
    log_p = STRUCTURE.trace_log_prob(trace, log_rates)
    (gradient,) = torch.autograd.grad(log_p.sum(), log_rates)
    assert (log_p <= 0).all()
    assert log_p.isfinite().all()
    assert gradient.isfinite().all()
