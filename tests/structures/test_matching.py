"""Matchings against enumeration, scipy and the definition of the greedy trace."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from scipy import stats
from torch import Tensor

from structgrad.algorithms import sinkhorn
from structgrad.structures import Matching, Trace, matching
from structgrad.testing import Case, StructureContract


def sizes(n: int, *present: int) -> list[Tensor]:
    """Masks of the first so many rows and the last so many columns."""
    return [(torch.arange(n) < m)[:, None] & (torch.arange(n) >= n - m) for m in present]


def holes() -> Tensor:
    """A mask with missing parts between present rows and columns."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = mask[3, 0] = mask[3, 3] = False
    return mask


class TestMatching(StructureContract):
    cases: ClassVar[list[Case]] = [
        Case(Matching(), (4, 4), [*sizes(4, 3, 1, 0), holes()]),
        Case(Matching(), (1, 1)),
        Case(Matching(), (2, 2)),
    ]
    complete: ClassVar[list[Case]] = [Case(Matching(), (3, 3), sizes(3, 2, 1, 0)), Case(Matching(), (1, 1))]

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        small = case.structure.enumerate(len(rows), len(rows))
        every = small.new_zeros(len(small), *case.shape)
        every[:, rows[:, None], columns[None]] = small
        return every[((every == 0) | mask).flatten(1).all(-1)]

    def test_impossible_masks_are_refused(self) -> None:
        mask = torch.ones(2, 3, 3, dtype=torch.bool)
        mask[1, :2, 1:] = False
        with pytest.raises(ValueError, match="example 1 has no perfect matching"):
            Matching().argmax(torch.randn(2, 3, 3), mask)
        with pytest.raises(ValueError, match="example 1"):
            Matching().trace(torch.rand(2, 3, 3), mask)
        mask[1] = True
        mask[1, 0] = False  # two rows, three columns
        with pytest.raises(ValueError, match="example 1 has no perfect matching"):
            Matching().argmax(torch.randn(2, 3, 3), mask)
        with pytest.raises(ValueError, match=r"\[\.\.\., n, n\]"):
            Matching().argmax(torch.randn(2, 3))

    def test_where_values_are_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The path of other devices, on the CPU."""
        exists = sizes(5, 5, 3)
        mask, scores = torch.stack(exists), torch.randn(2, 5, 5)
        best, top = Matching().argmax(scores, mask), Matching().top_k(scores, 8, mask)
        soft = Matching().sinkhorn(scores, mask)
        for module in (matching, sinkhorn):
            monkeypatch.setattr(module, "values_can_be_read", lambda *tensors: False)
        torch.testing.assert_close(Matching().argmax(scores, mask), best)
        torch.testing.assert_close(Matching().top_k(scores, 8, mask), top)
        torch.testing.assert_close(Matching().sinkhorn(scores, mask), soft, atol=1e-5, rtol=1e-4)

    # --- sinkhorn -------------------------------------------------------------------------------------------------

    def test_sinkhorn(self) -> None:
        """Doubly stochastic and of the form exp(u + f + g): the optimality conditions of the entropic problem."""
        structure = Matching(tolerance=1e-12, max_iterations=100_000)
        for case in self.cases:
            scores = self.scores(case)
            point = structure.relax("sinkhorn", scores, case.mask)
            torch.testing.assert_close(point.sum(-1), case.mask.any(-1).double())
            torch.testing.assert_close(point.sum(-2), case.mask.any(-2).double())
            assert (point[~case.mask] == 0).all()
        scores = torch.randn(3, 5, 5, dtype=torch.float64)
        residual = structure.sinkhorn(scores).log() - scores
        centred = residual - residual.mean(-1, keepdim=True)
        torch.testing.assert_close(centred, centred.mean(-2, keepdim=True).expand_as(centred))

    def test_sinkhorn_gradient(self) -> None:
        structure = Matching(tolerance=1e-13, max_iterations=100_000)
        for case in self.complete:
            scores = torch.nan_to_num(self.scores(case, 2.0)).requires_grad_()
            assert torch.autograd.gradcheck(lambda s, m=case.mask: structure.sinkhorn(s, m), scores, atol=1e-6)

    def test_sinkhorn_survives_large_scores(self) -> None:
        scores = (100 * torch.randn(8, 6, 6)).requires_grad_()
        point = Matching().sinkhorn(scores)
        assert point.dtype == torch.float32
        assert ((point >= 0) & (point <= 1 + 1e-5)).all()
        torch.testing.assert_close(point.sum(-2), torch.ones(8, 6))
        (gradient,) = torch.autograd.grad((point * torch.randn_like(point)).sum(), scores)
        assert gradient.isfinite().all()
        torch.testing.assert_close(
            Matching().sinkhorn(1e4 * scores.detach()), Matching().argmax(scores), atol=1e-5, rtol=0
        )

    # --- the greedy trace -----------------------------------------------------------------------------------------

    def all_traces(self, n: int, rows: list[int], columns: list[int]) -> list[list[int]]:
        if not rows:
            return [[]]
        return [
            [i * n + j, *rest]
            for i in rows
            for j in columns
            for rest in self.all_traces(n, [r for r in rows if r != i], [c for c in columns if c != j])
        ]

    def traces(self, case: Case, mask: Tensor) -> Trace:
        n = case.shape[0]
        found = self.all_traces(n, mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist())
        choices = torch.tensor([t + [-1] * (n - len(t)) for t in found])
        vertex = torch.zeros(len(choices), n * n + 1, dtype=torch.float64)
        vertex.scatter_(1, choices % (n * n + 1), 1.0)
        return Trace(vertex[:, :-1].reshape(-1, n, n), choices)

    def long_log_prob(self, choices: list[int], scores: Tensor, mask: Tensor) -> float:
        left, total, n = mask.clone(), 0.0, len(scores)
        for choice in choices:
            if choice >= 0:
                i, j = divmod(choice, n)
                total += float(scores[i, j] - scores[left].logsumexp(0))
                left[i], left[:, j] = False, False
        return total

    def test_trace_takes_the_least_entry(self) -> None:
        exponentials = torch.tensor([[1.0, 2.0, 9.0], [1.5, 90.0, 8.0], [7.0, 6.0, 5.0]])
        trace = Matching().trace(exponentials)
        assert trace.choices.tolist() == [0, 8, 4]
        assert not torch.equal(trace.vertex, Matching().argmax(-exponentials)), "the greedy matching is not the best"
        assert Matching().trace(torch.ones(2, 2)).choices.tolist() == [0, 3]

    def test_trace_probabilities(self) -> None:
        """Sum to one, agree with the definition, and with frequencies (chi-squared at a level of 1e-4)."""
        for case in self.complete:
            scores = self.scores(case, 1.0)
            for b, mask in enumerate(case.mask):
                traces = self.traces(case, mask)
                repeated = scores[b].expand_as(traces.vertex)
                log_p = Matching().trace_log_prob(traces, repeated, mask)
                expected = [self.long_log_prob(t, scores[b], mask) for t in traces.choices.tolist()]
                torch.testing.assert_close(log_p, torch.tensor(expected, dtype=torch.float64))
                torch.testing.assert_close(log_p.logsumexp(0), torch.tensor(0.0, dtype=torch.float64))
                if len(log_p) == 1:
                    continue
                repeated = scores[b].expand(20_000, *case.shape)
                drawn = Matching().trace(torch.empty_like(repeated).exponential_() / repeated.exp(), mask)
                counts = (drawn.choices[:, None] == traces.choices).all(-1).sum(0)
                assert counts.sum() == 20_000
                statistic = ((counts - 20_000 * log_p.exp()) ** 2 / (20_000 * log_p.exp())).sum().item()
                assert stats.chi2.sf(statistic, len(log_p) - 1) > 1e-4

    def test_trace_gradients(self) -> None:
        for case in self.complete:
            scores = torch.nan_to_num(self.scores(case)).requires_grad_()
            trace = Matching().trace(torch.rand_like(scores) + 0.1, case.mask)

            def log_prob(s: Tensor, case: Case = case, trace: Trace = trace) -> Tensor:
                return Matching().trace_log_prob(trace, s, case.mask)

            def conditional(s: Tensor, case: Case = case, trace: Trace = trace) -> Tensor:
                torch.manual_seed(5)
                return Matching().conditional(trace, s, case.mask)

            assert torch.autograd.gradcheck(log_prob, scores)
            assert torch.autograd.gradgradcheck(log_prob, scores)
            assert torch.autograd.gradcheck(conditional, scores)

    def test_float32_trace_survives_large_scores(self) -> None:
        scores = (100 * torch.randn(6, 5, 5)).clamp(-100, 100).requires_grad_()
        trace = Matching().trace(torch.rand(6, 5, 5))
        log_p = Matching().trace_log_prob(trace, scores)
        exact = Matching().trace_log_prob(trace, scores.double())
        torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-4)
        assert torch.autograd.grad(log_p.sum(), scores)[0].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_conditional_gives_the_trace_back(self, dtype: torch.dtype) -> None:
        for case in self.complete:
            scores = self.scores(case, 3.0, dtype).repeat(200, 1, 1)
            mask = case.mask.repeat(200, 1, 1)
            trace = Matching().trace(torch.rand_like(scores) + 0.1, mask)
            conditional = Matching().conditional(trace, scores, mask)
            assert (conditional > 0).all()
            assert (conditional[~mask] == 1).all()
            assert torch.equal(Matching().trace(conditional, mask).choices, trace.choices)

    def test_conditional_distribution(self) -> None:
        """Kolmogorov-Smirnov on every entry at a level of 1e-4: marginal distribution restored, conditional right."""
        draws, scores = 6000, torch.tensor([[0.5, -1.0], [1.0, 0.3]], dtype=torch.float64)
        repeated = scores.expand(draws, 2, 2)
        exponentials = torch.empty_like(repeated).exponential_() / repeated.exp()
        trace = Matching().trace(exponentials)
        again = Matching().conditional(trace, repeated)
        kept = exponentials[(trace.choices == torch.tensor([2, 1])).all(-1)]
        fresh = Matching().conditional(Matching().trace(kept[:1].expand(draws, 2, 2)), repeated)
        for i in range(2):
            for j in range(2):
                assert stats.kstest((again[:, i, j] * scores[i, j].exp()).numpy(), "expon").pvalue > 1e-4
                assert stats.ks_2samp(kept[:, i, j].numpy(), fresh[:, i, j].numpy()).pvalue > 1e-4
