"""Arborescence: the contract, networkx as a second opinion, and the failures seen in public code."""

from __future__ import annotations

from typing import ClassVar

import networkx as nx
import pytest
import torch
from scipy import stats

from structgrad.structures import Arborescence, _contraction, _matrix_tree
from structgrad.structures.base import Trace
from tests.structures._trees import CoversWhatIsPresent, all_traces, random_masks, repeat
from tests.structures.template import Case, StructureContract, length_masks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sparse(n: int, root: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return random_masks(n, 3, Arborescence(root))


class TestArborescence(CoversWhatIsPresent, StructureContract):
    cases: ClassVar[list[Case]] = [
        Case(Arborescence(), (4, 4), length_masks(4, 3, 2, 1, 0) + sparse(4)),
        Case(Arborescence(root=2), (4, 4)),
        Case(Arborescence(), (5, 5), length_masks(5, 3) + sparse(5)),
        Case(Arborescence(), (1, 1)),
        Case(Arborescence(), (2, 2), length_masks(2, 1)),
    ]


STRUCTURE = Arborescence()


def weight(vertex: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return (vertex.double() * scores.double()).sum((-2, -1))


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
        torch.testing.assert_close(weight(x, s).item(), expected, rtol=1e-9, atol=1e-6)
        tree = nx.DiGraph([(int(i), int(j)) for i, j in x.nonzero()])
        assert nx.is_arborescence(tree)
        assert tree.in_degree(0) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_argmax_is_optimal_on_thousands_of_small_graphs(ties: bool) -> None:
    every = STRUCTURE.enumerate(5, 5)
    for scale in (1.0, 100.0):
        scores = torch.randn(2000, 5, 5, dtype=torch.float64) * scale
        if ties:
            scores = (scores / scale).round()
        mask = torch.rand(2000, 5, 5) < 0.8
        masked = torch.where(STRUCTURE.parts(scores, mask), scores, -1e6)
        expected = torch.einsum("vij,bij->bv", every, masked).max(1).values
        feasible = expected > -1e5
        found = STRUCTURE.argmax(scores[feasible], mask[feasible])
        torch.testing.assert_close(weight(found, masked[feasible]), expected[feasible], rtol=1e-12, atol=1e-9)


def test_top_k_is_sorted_distinct_and_beats_random_trees() -> None:
    n, k = 9, 40
    scores = torch.randn(3, n, n)
    vertices, values = STRUCTURE.top_k(scores, k)
    assert (values.diff(dim=1) <= 1e-5).all()
    for b in range(3):
        assert len(vertices[b].flatten(1).unique(dim=0)) == k
        # Gibbs samples at low temperature are good trees; none that beats the k-th may be missing from the list.
        sample = STRUCTURE.sample((4 * scores[b]).expand(5000, n, n))
        better = sample[weight(sample, scores[b]) > values[b, -1] + 1e-4].flatten(1).unique(dim=0)
        assert len(better) > 5
        listed = (better[:, None] == vertices[b].flatten(1)).all(-1).any(1)
        assert listed.all()


def cases_for_both_paths() -> tuple[torch.Tensor, torch.Tensor]:
    n = 7
    masks = torch.stack([torch.ones(n, n, dtype=torch.bool), *length_masks(n, 6, 2, 1, 0), *sparse(n)])
    scores = torch.randn(len(masks), n, n, dtype=torch.float64) * 3
    exists = STRUCTURE.parts(scores, masks)
    return torch.where(exists, scores, torch.nan), exists.contiguous()


def test_plain_torch_agrees_with_the_compiled_argmax() -> None:
    for rounded in (False, True):
        scores, exists = cases_for_both_paths()
        scores = scores.round() if rounded else scores
        vertex, choices, reached = _contraction.minimum_arborescence(scores, exists, 0)
        plain, plain_choices, plain_reached = _contraction.torch_minimum_arborescence(scores, exists, 0)
        torch.testing.assert_close(weight(plain, scores.nan_to_num()), weight(vertex, scores.nan_to_num()))
        assert torch.equal(reached, plain_reached)
        if not rounded:
            assert torch.equal(vertex, plain)
            assert torch.equal(choices, plain_choices)
        total = _contraction.log_entering(scores, exists, choices)
        torch.testing.assert_close(_contraction.torch_log_entering(scores, exists, choices), total)


def test_plain_torch_agrees_with_the_compiled_matrix_tree() -> None:
    scores, exists = cases_for_both_paths()
    root = torch.zeros(len(scores), dtype=torch.int64)
    for scale in (1.0, 40.0, 1000.0):  # the last one takes the logarithms in the compiled code
        s = (scale * scores).requires_grad_()
        mean = _matrix_tree.marginals(s, exists, root)
        plain = _matrix_tree.torch_marginals(s, exists, root)
        torch.testing.assert_close(plain, mean, rtol=1e-9, atol=1e-11)
        logz = _matrix_tree.log_partition(s, exists, root)
        torch.testing.assert_close(_matrix_tree.torch_log_partition(s, exists, root), logz)
        upstream = torch.randn_like(mean)
        (ours,) = torch.autograd.grad((mean * upstream).sum(), s)
        (other,) = torch.autograd.grad((plain * upstream).sum(), s)
        torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-9)


def test_plain_torch_samples_the_same_law() -> None:
    every = STRUCTURE.enumerate(4, 4)
    scores = torch.randn(4, 4, dtype=torch.float64)
    expected = torch.where(every > 0, scores, 0.0).sum((1, 2)).softmax(0)
    exists = STRUCTURE.parts(every[:1]).expand(40_000, 4, 4)
    repeated = scores.expand(40_000, 4, 4)
    root = torch.zeros(40_000, dtype=torch.int64)
    sample = _matrix_tree.torch_sample(repeated, exists, root, torch.rand_like(repeated))
    same = (sample.flatten(1)[:, None] == every.flatten(1)).all(-1)
    assert same.any(1).all()
    # Level 1e-4; the seed is fixed.
    assert stats.chisquare(same.sum(0).numpy(), (40_000 * expected).numpy()).pvalue > 1e-4


def test_second_derivative_of_log_partition() -> None:
    scores = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(STRUCTURE.log_partition, scores)


@pytest.mark.parametrize("std", [5.0, 10.0, 100.0])
def test_marginals_stay_probabilities(std: float) -> None:
    scores = (std * torch.randn(20, 30, 30)).clamp(-100, 100).requires_grad_()
    mean = STRUCTURE.marginals(scores)
    assert ((mean >= 0) & (mean <= 1)).all()
    torch.testing.assert_close(mean.sum(1)[:, 1:], torch.ones(20, 29), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((mean * torch.randn_like(mean)).sum(), scores)
    assert gradient.isfinite().all()


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
    for oracle in ("argmax", "log_partition", "sample", "entropy", "trace"):
        with pytest.raises(ValueError, match=r"example \(1, 2\) has no arborescence"):
            getattr(STRUCTURE, oracle)(scores.abs(), mask)


def test_bad_root() -> None:
    with pytest.raises(ValueError, match="root"):
        Arborescence(root=-1)
    with pytest.raises(ValueError, match="root 5"):
        Arborescence(root=5).argmax(torch.randn(3, 3))


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
    drawn = STRUCTURE.trace(exponentials, mask.expand(draws, 4, 4)).choices.flatten(1)
    counts = (drawn[:, None] == every.choices.flatten(1)).all(-1).sum(0)
    expected = draws * log_p.exp()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    pooled = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = pooled > 1e-9
    # Level 1e-4; the seed is fixed.
    assert stats.chisquare(observed[keep].numpy(), pooled[keep].numpy()).pvalue > 1e-4


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
            # E | T averaged over T has the law of E: exponential. Level 1e-5 for each of some twenty edges.
            scaled = fresh[:, i, j] * log_rates[0, i, j].exp()
            assert stats.kstest(scaled.numpy(), "expon").pvalue > 1e-5


def test_conditional_given_one_trace() -> None:
    """Against rejection: exponentials of the draws that happened to have that trace. Level 1e-5 for each edge."""
    draws, n = 60_000, 4
    log_rates = 0.5 * torch.randn(n, n, dtype=torch.float64).expand(draws, n, n)
    exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / log_rates.exp()
    trace = STRUCTURE.trace(exponentials)
    values, inverse, counts = trace.choices.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    # The most frequent trace with a contraction.
    contracted = (values.reshape(len(values), -1, 2)[:, n:, 0] >= 0).any(1)
    which = (counts * contracted).argmax()
    kept = (inverse == which).nonzero()[:, 0]
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
