"""Tests that orderings and binary trees share: vertices over items, one trace a vertex."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from structgrad.testing import Case, StructureContract


class RecursionContract(StructureContract):
    """The values of vertices are their log-probabilities, computed the long way by :meth:`long_log_prob`."""

    def long_log_prob(self, vertex: Tensor, scores: Tensor, items: list[int]) -> float:
        """Log-probability of a vertex by running the recursion over the present items in plain Python."""
        raise NotImplementedError

    def long_argmax(self, utility: Tensor, items: list[int]) -> Tensor:
        """The vertex of the recursion in plain Python."""
        raise NotImplementedError

    def embed(self, small: Tensor, items: list[int], n: int) -> Tensor:
        """Vertices over the present items alone, shown at full size."""
        raise NotImplementedError

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        items = mask.nonzero().flatten().tolist()
        return self.embed(case.structure.enumerate(len(items)), items, case.shape[0])

    def values(self, case: Case, vertices: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        scores, mask = scores.expand(len(vertices), *case.shape), mask.expand(len(vertices), *case.shape)
        items = [m.nonzero().flatten().tolist() for m in mask]
        log_p = map(self.long_log_prob, vertices, scores.double(), items)
        return torch.tensor(list(log_p), dtype=torch.float64)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_argmax(self, scale: float, dtype: torch.dtype) -> None:
        for case in self.cases:
            scores = self.scores(case, scale, dtype)
            for scored in (scores, scores.round()):  # the second has ties
                best = case.structure.argmax(scored, case.mask)
                assert best.dtype == dtype
                for b, mask in enumerate(case.mask):
                    expected = self.long_argmax(scored[b], mask.nonzero().flatten().tolist())
                    torch.testing.assert_close(best[b], expected.to(dtype))

    def test_entropy_and_log_prob(self) -> None:
        for case in self.cases:
            scores = self.scores(case, 2.0)
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                computed = case.structure.log_prob(vertices, scores[b].expand(len(vertices), *case.shape), mask)
                torch.testing.assert_close(computed, self.values(case, vertices, scores[b], mask))

    def test_probabilities_sum_to_one(self) -> None:
        for case in self.cases:
            scores = self.scores(case, 3.0)
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                assert len(torch.unique(vertices.flatten(1), dim=0)) == len(vertices)
                log_p = case.structure.log_prob(vertices, scores[b].expand(len(vertices), *case.shape), mask)
                torch.testing.assert_close(log_p.logsumexp(0), torch.tensor(0.0, dtype=torch.float64))

    def test_log_prob_gradients(self) -> None:
        for case in self.cases:
            scores = torch.nan_to_num(self.scores(case)).requires_grad_()
            vertex = case.structure.sample(scores, case.mask)

            def log_prob(s: Tensor, case: Case = case, vertex: Tensor = vertex) -> Tensor:
                return case.structure.log_prob(vertex, s, case.mask)

            assert torch.autograd.gradcheck(log_prob, scores)
            assert torch.autograd.gradgradcheck(log_prob, scores)

    def test_float32_log_prob_survives_large_scores(self) -> None:
        for case in self.cases:
            scores = self.scores(case, 100.0, torch.float32).clamp(-100, 100).requires_grad_()
            vertex = case.structure.sample(torch.zeros_like(scores), case.mask)
            log_p = case.structure.log_prob(vertex, scores, case.mask)
            exact = case.structure.log_prob(vertex.double(), scores.double(), case.mask)
            torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-4)
            (gradient,) = torch.autograd.grad(log_p.sum(), scores)
            assert gradient.isfinite().all()
            assert (gradient[~case.mask] == 0).all()

    def test_trace(self) -> None:
        for case in self.cases:
            exponentials = torch.empty(len(case.mask), *case.shape, dtype=torch.float64).exponential_()
            exponentials = torch.where(case.mask, exponentials, torch.nan)
            trace = case.structure.trace(exponentials, case.mask)
            assert torch.equal(trace.vertex, case.structure.argmax(-exponentials, case.mask))
            assert trace.choices.dtype == torch.int64
            assert ((trace.choices >= 0).sum(-1) == case.mask.sum(-1)).all()
            scores = torch.nan_to_num(self.scores(case))
            assert torch.equal(
                case.structure.trace_log_prob(trace, scores, case.mask),
                case.structure.log_prob(trace.vertex, scores, case.mask),
            )

    @pytest.mark.parametrize("scale", [1.0, 10.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_conditional_gives_the_trace_back(self, scale: float, dtype: torch.dtype) -> None:
        for case in self.cases:
            scores = self.scores(case, scale, dtype).repeat(200, 1)
            mask = case.mask.repeat(200, 1)
            trace = case.structure.trace(torch.rand_like(scores) + 0.1, mask)  # any trace, likely or not
            conditional = case.structure.conditional(trace, scores, mask)
            assert (conditional > 0).all()
            assert (conditional[~mask] == 1).all()
            assert torch.equal(case.structure.trace(conditional, mask).choices, trace.choices)

    def test_conditional_distribution(self) -> None:
        """T from E, then E | T, restores the distribution of E: Kolmogorov-Smirnov on every item at a level of 1e-4."""
        draws = 5000
        for case in self.cases:
            scores = torch.nan_to_num(self.scores(case, 1.5))
            for b, mask in enumerate(case.mask):
                repeated, many = scores[b].expand(draws, -1), mask.expand(draws, -1)
                exponentials = torch.empty(draws, *case.shape, dtype=torch.float64).exponential_() / repeated.exp()
                trace = case.structure.trace(exponentials, many)
                again = case.structure.conditional(trace, repeated, many)
                for item in mask.nonzero().flatten().tolist():
                    rescaled = again[:, item] * scores[b, item].exp()
                    assert stats.kstest(rescaled.numpy(), "expon").pvalue > 1e-4
                # Given one trace, by rejection: the same distribution as the conditional's.
                common = torch.unique(trace.choices, dim=0, return_counts=True)
                chosen = common[0][common[1].argmax()]
                kept = exponentials[(trace.choices == chosen).all(-1)]
                fixed = case.structure.trace(kept[:1].expand(draws, -1), many)
                fresh = case.structure.conditional(fixed, repeated, many)
                for item in mask.nonzero().flatten().tolist():
                    assert stats.ks_2samp(kept[:, item].numpy(), fresh[:, item].numpy()).pvalue > 1e-4

    def test_conditional_is_reparameterised(self) -> None:
        for case in self.cases:
            scores = torch.nan_to_num(self.scores(case)).requires_grad_()
            trace = case.structure.trace(torch.rand_like(scores) + 0.1, case.mask)

            def draw(s: Tensor, case: Case = case, trace: object = trace) -> Tensor:
                torch.manual_seed(3)
                return case.structure.conditional(trace, s, case.mask)

            assert torch.autograd.gradcheck(draw, scores)

    def test_vmap(self) -> None:
        for case in self.cases:
            scores = torch.nan_to_num(self.scores(case))
            best = torch.func.vmap(case.structure.argmax)(scores, case.mask)
            assert torch.equal(best, case.structure.argmax(scores, case.mask))
            log_p = torch.func.vmap(case.structure.log_prob)(best, scores, case.mask)
            torch.testing.assert_close(log_p, case.structure.log_prob(best, scores, case.mask))
