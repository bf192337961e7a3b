"""Common code of the tests of both tree structures."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

from structgrad.structures.base import Structure, Trace
from structgrad.testing import Case, StructureContract, length_masks
from tests.kernels import by_operators


class TreeContract(StructureContract):
    """The contract of a structure whose vertices are trees and which has a trace.

    Inherit and set :attr:`cases` and :attr:`structure`; write :meth:`check_totals`.
    """

    #: Tested at sizes beyond those of the cases.
    structure: Structure

    def check_totals(self, mean: Tensor) -> None:
        """Fails unless marginals ``[batch, n, n]`` have the sums that all trees share."""
        raise NotImplementedError

    def telling(self, choices: Tensor, n: int) -> Tensor:
        """Which traces, ``[count, entries]`` of graphs of n nodes, are worth a test of their own: bool ``[count]``."""
        return torch.ones(len(choices), dtype=torch.bool)

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        """Trees of the present nodes, found by enumerating the smaller graph."""
        structure, n = case.structure, case.shape[-1]
        parts = structure.parts(torch.zeros(case.shape), mask)
        present = (parts.any(0) | parts.any(1)).nonzero()[:, 0]
        if not len(present):
            return torch.zeros(1, n, n, dtype=torch.float64)
        # The root has to keep its name.
        assert getattr(structure, "root", 0) == 0 or len(present) == n
        small = structure.enumerate(len(present), len(present))
        full = torch.zeros(len(small), n, n, dtype=torch.float64)
        full[:, present[:, None], present[None, :]] = small
        exists = structure.layout.mirror(parts.double())
        return full[((full == 0) | (exists > 0)).flatten(1).all(-1)]

    # --- the tests ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ties", [False, True])
    def test_argmax_is_optimal_on_thousands_of_small_graphs(self, ties: bool) -> None:
        every = self.structure.layout.flatten(self.structure.enumerate(5, 5))
        for scale in (1.0, 100.0):
            scores = torch.randn(2000, 5, 5, dtype=torch.float64) * scale
            if ties:
                scores = (scores / scale).round()
            mask = torch.rand(2000, 5, 5) < 0.8
            masked = torch.where(self.structure.parts(scores, mask), scores, -1e6)
            expected = (self.structure.layout.flatten(masked) @ every.T).max(1).values
            feasible = expected > -1e5
            found = self.structure.argmax(scores[feasible], mask[feasible])
            value = weight(self.structure, found, masked[feasible])
            torch.testing.assert_close(value, expected[feasible], rtol=1e-12, atol=1e-9)

    @pytest.mark.parametrize("std", [5.0, 10.0, 100.0])
    def test_marginals_stay_probabilities(self, std: float) -> None:
        scores = (std * torch.randn(20, 30, 30)).clamp(-100, 100).requires_grad_()
        mean = self.structure.marginals(scores)
        assert ((mean >= 0) & (mean <= 1)).all()
        self.check_totals(mean)
        (gradient,) = torch.autograd.grad((mean * torch.randn_like(mean)).sum(), scores)
        assert gradient.isfinite().all()

    def test_transforms_and_compilation(self) -> None:
        scores = torch.randn(2, 5, 5)
        for oracle in ("argmax", "marginals", "log_partition"):
            function = getattr(self.structure, oracle)
            torch.testing.assert_close(torch.compile(function, backend="eager")(scores), function(scores))

    def test_trace_leads_to_argmax(self) -> None:
        scores, exists = cases_for_both_paths(self.structure)
        exponentials = torch.where(exists, torch.empty_like(scores).exponential_(), torch.nan)
        trace = self.structure.trace(exponentials, exists)
        assert torch.equal(trace.vertex, self.structure.argmax(-exponentials, exists))

    @pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4), (2, 1, 1), (2, 0, 0), (0, 3, 4, 4)])
    def test_trace_shapes(self, shape: tuple[int, ...]) -> None:
        exponentials = torch.empty(shape).exponential_()
        trace = self.structure.trace(exponentials)
        assert trace.vertex.shape == shape
        assert trace.choices.shape[: len(shape) - 2] == shape[:-2]
        assert self.structure.trace_log_prob(trace, exponentials).shape == shape[:-2]
        assert self.structure.conditional(trace, exponentials).shape == shape
        assert (trace.vertex.sum((-1, -2)) == self.structure.argmax(exponentials).sum((-1, -2))).all()

    @pytest.mark.parametrize("masked", [False, True])
    def test_trace_probabilities(self, masked: bool) -> None:
        mask = length_masks(4, 3)[0] if masked else torch.ones(4, 4, dtype=torch.bool)
        every = all_traces(self.structure, 4, mask)
        log_rates = 0.5 * torch.randn(4, 4, dtype=torch.float64)
        count = len(every.choices)
        log_p = self.structure.trace_log_prob(every, log_rates.expand(count, 4, 4), mask.expand(count, 4, 4))
        torch.testing.assert_close(log_p.exp().sum().item(), 1.0, rtol=1e-9, atol=1e-9)
        draws = 20_000
        exponentials = torch.empty(draws, 4, 4, dtype=torch.float64).exponential_() / log_rates.exp()
        drawn = self.structure.trace(exponentials, mask.expand(draws, 4, 4)).choices.flatten(1)
        counts = (drawn[:, None] == every.choices.flatten(1)).all(-1).sum(0)
        expected = draws * log_p.exp()
        common = expected >= 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        pooled = torch.cat([expected[common], expected[~common].sum()[None]])
        keep = pooled > 1e-9
        # Level 1e-4; the seed is fixed.
        assert stats.chisquare(observed[keep].numpy(), pooled[keep].numpy()).pvalue > 1e-4

    def test_conditional_distribution(self) -> None:
        draws, n = 20_000, 5
        log_rates = torch.randn(n, n, dtype=torch.float64).expand(draws, n, n)
        mask = length_masks(n, 4)[0].expand(draws, n, n)
        for m in (torch.ones_like(mask), mask):
            exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / log_rates.exp()
            trace = self.structure.trace(exponentials, m)
            fresh = self.structure.conditional(trace, log_rates, m)
            assert torch.equal(self.structure.trace(fresh, m).choices, trace.choices)
            parts = self.structure.parts(fresh, m)[0]
            assert (fresh[:, ~parts] == 1).all()
            for i, j in parts.nonzero():
                # E | T averaged over T is distributed as E: exponential, of the right mean. Level 1e-5 for each of at
                # most twenty edges.
                scaled = fresh[:, i, j] * log_rates[0, i, j].exp()
                assert stats.kstest(scaled.numpy(), "expon").pvalue > 1e-5
                assert abs(scaled.mean() - 1) < 4.5 * draws**-0.5

    def test_conditional_given_one_trace(self) -> None:
        """Against rejection: exponentials of the draws that happened to have that trace. Level 1e-5 for each edge."""
        draws, n = 60_000, 4
        log_rates = 0.5 * torch.randn(n, n, dtype=torch.float64).expand(draws, n, n)
        exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / log_rates.exp()
        trace = self.structure.trace(exponentials)
        values, inverse, counts = trace.choices.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
        kept = (inverse == (counts * self.telling(values, n)).argmax()).nonzero()[:, 0]
        one = Trace(trace.vertex[kept[0]], trace.choices[kept[0]])
        fresh = self.structure.conditional(repeat(one, 5000), log_rates[:5000])
        for i, j in self.structure.parts(fresh)[0].nonzero():
            assert stats.ks_2samp(fresh[:, i, j].numpy(), exponentials[kept, i, j].numpy()).pvalue > 1e-5

    def test_conditional_of_an_improbable_edge(self) -> None:
        """It adds no time of its own, so that exp(800), which is infinite, is not needed."""
        trace = self.structure.trace(torch.rand(10, 4, 4, dtype=torch.float64))
        vertex = trace.vertex > 0
        edge = torch.zeros(10, 16).scatter(1, vertex.flatten(1).int().argmax(1)[:, None], 1.0).reshape(10, 4, 4) > 0
        edge = edge | (edge.mT & vertex)  # an undirected one has two entries
        log_rates = torch.where(edge, -800.0, torch.zeros(10, 4, 4)).requires_grad_()
        times = self.structure.conditional(trace, log_rates)
        assert times.isfinite().all()
        assert torch.autograd.grad(times.log().sum(), log_rates)[0].isfinite().all()

    def test_trace_gradients(self) -> None:
        scores, exists = cases_for_both_paths(self.structure)
        exponentials = torch.empty_like(scores).exponential_()
        trace = self.structure.trace(exponentials, exists)
        inputs = scores.nan_to_num().requires_grad_()

        def conditional(log_rates: Tensor) -> Tensor:
            torch.manual_seed(3)
            return self.structure.conditional(trace, log_rates, exists)

        assert torch.autograd.gradcheck(lambda s: self.structure.trace_log_prob(trace, s, exists), inputs)
        assert torch.autograd.gradcheck(conditional, (0.2 * inputs.detach()).requires_grad_())
        spoilt = torch.where(exists, scores, torch.nan).requires_grad_()
        log_p = self.structure.trace_log_prob(trace, spoilt, exists)
        for value in (log_p, self.structure.conditional(trace, spoilt, exists)):
            (gradient,) = torch.autograd.grad(value.sum(), spoilt)
            assert gradient.isfinite().all()
            assert (gradient[~exists] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_trace_log_prob_at_large_rates(self, dtype: torch.dtype) -> None:
        log_rates = (100 * torch.randn(10, 8, 8, dtype=dtype)).clamp(-100, 100).requires_grad_()
        trace = self.structure.trace(torch.rand(10, 8, 8, dtype=dtype))
        log_p = self.structure.trace_log_prob(trace, log_rates)
        (gradient,) = torch.autograd.grad(log_p.sum(), log_rates)
        assert (log_p <= 0).all()
        assert log_p.isfinite().all()
        assert gradient.isfinite().all()


def all_traces(structure: Structure, n: int, mask: Tensor, draws: int = 20_000) -> Trace:
    """Distinct traces of random exponentials on one example, of very different rates so that rare ones turn up."""
    rates = torch.exp(1.5 * torch.randn(draws, n, n, dtype=torch.float64))
    exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / rates
    trace = structure.trace(exponentials, mask.expand(draws, n, n))
    flat = trace.choices.flatten(1)
    _, first = flat.unique(dim=0, return_inverse=True)
    representative = torch.full((int(first.max()) + 1,), draws).scatter_reduce(0, first, torch.arange(draws), "amin")
    return Trace(trace.vertex[representative], trace.choices[representative])


def repeat(trace: Trace, times: int) -> Trace:
    """One trace for a batch of that size."""
    return Trace(trace.vertex.expand(times, *trace.vertex.shape), trace.choices.expand(times, *trace.choices.shape))


def sparse_masks(structure: Structure, n: int) -> list[Tensor]:
    """Three random sparse masks under which a tree exists."""
    torch.manual_seed(7)
    masks: list[Tensor] = []
    for density in itertools.cycle((0.4, 0.6, 0.8)):
        if len(masks) == 3:
            return masks
        mask = torch.rand(n, n) < density
        try:
            structure.argmax(torch.zeros(n, n), mask)
        except ValueError:
            continue
        masks.append(mask)
    raise AssertionError


def cases_for_both_paths(structure: Structure) -> tuple[Tensor, Tensor]:
    """Scores, NaN where a part is missing, and the parts that exist, of graphs of up to 7 nodes."""
    n = 7
    masks = torch.stack([torch.ones(n, n, dtype=torch.bool), *length_masks(n, 6, 2, 1, 0), *sparse_masks(structure, n)])
    scores = torch.randn(len(masks), n, n, dtype=torch.float64) * 3
    exists = structure.parts(scores, masks)
    return torch.where(exists, scores, torch.nan), exists.contiguous()


def weight(structure: Structure, vertex: Tensor, scores: Tensor) -> Tensor:
    """``<x, s>`` in float64, every edge counted once."""
    product = vertex.double() * scores.double()
    return (product.triu(1) if structure.layout.name == "undirected" else product).sum((-2, -1))


def assert_same_traces(structure: Structure, shape: tuple[int, int, int]) -> None:
    """Fails unless the GPU operators give traces, their log-probabilities and conditionals as the CPU does."""
    exponentials, log_rates = torch.rand(shape), torch.randn(shape, requires_grad=True)

    def run(e: Tensor) -> tuple[Tensor, Tensor]:
        trace = structure.trace(e)
        return trace.vertex, trace.choices

    trace = structure.trace(exponentials)
    vertex, choices = by_operators(run, exponentials)
    assert torch.equal(vertex, trace.vertex)
    assert torch.equal(choices, trace.choices)

    def log_prob(vertex: Tensor, choices: Tensor, rates: Tensor) -> Tensor:
        return structure.trace_log_prob(Trace(vertex, choices), rates)

    value, expected = by_operators(log_prob, vertex, choices, log_rates), log_prob(vertex, choices, log_rates)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), log_rates)[0] for v in (value, expected)))

    def conditional(vertex: Tensor, choices: Tensor, rates: Tensor, *noise: Tensor) -> Tensor:
        return structure.conditional(Trace(vertex, choices), rates, noise=(noise[0], noise[1]))

    arguments = vertex, choices, log_rates, *structure.conditional_noise(trace, log_rates)
    value, expected = by_operators(conditional, *arguments), conditional(*arguments)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), log_rates)[0] for v in (value, expected)))
