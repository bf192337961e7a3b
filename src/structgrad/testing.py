"""Tests for your own structures and estimators; they need pytest.

**A structure.** Subclass :class:`StructureContract` in a test file and name the cases. Every oracle
of the structure is then compared with enumeration. The tests cover float64 and float32, masks that
differ by example, scores of +-100, ties, gradients (gradcheck) and shapes::

    from structgrad.testing import Case, StructureContract, vector_masks

    class TestWindow(StructureContract):
        cases = [Case(Window(2), (5,), vector_masks(5, 4, 2))]

**An estimator.** Subclass :class:`EstimatorContract` and say how it is built and over which cases.
The function :func:`assert_unbiased` compares gradients, of scores and decoder, with enumerated
ones.

To see the values in a failed assertion, let pytest rewrite the assertions: put
``pytest.register_assert_rewrite("structgrad.testing")`` into ``conftest.py``.

The tests of a structure run on the paths of computation (:data:`PATHS`) that this machine has: compiled
code and plain torch. With ``TRITON_INTERPRET=1`` they also run the kernels for GPUs, without a GPU.

For another device set ``STRUCTGRAD_TEST_DEVICE=cuda`` in the environment. Structures compute there, and
of an estimator's tests the comparison of gradients. Problems and expected values stay on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from structgrad.algorithms import eager, gpu
from structgrad.common.installing import install
from structgrad.diagnose import Distribution, Problem
from structgrad.estimators.base import Estimate, Estimator, Objective
from structgrad.structures.base import ORACLES, Structure, Trace, UnsupportedError

try:
    import pytest
    from scipy import optimize, stats
except ModuleNotFoundError as error:
    raise ImportError(f"structgrad.testing needs {error.name}: {install('testing')}") from None

__all__ = [
    "DEVICE",
    "PATHS",
    "Case",
    "Distribution",
    "EstimatorContract",
    "Problem",
    "StructureContract",
    "assert_mean",
    "assert_unbiased",
    "computing",
    "gradients",
    "length_masks",
    "moved",
    "vector_masks",
]

#: The device on which structures and estimators compute.
_ELSEWHERE = os.environ.get("STRUCTGRAD_TEST_DEVICE")
DEVICE = torch.device(_ELSEWHERE or "cpu")


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with the tensors in it on ``device``; gradients flow back."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(v, device) for v in value)
    if isinstance(value, dict):
        return {name: moved(v, device) for name, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


class _Elsewhere:
    """A structure whose oracles compute on :data:`DEVICE`, with arguments and results on the CPU."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._structure, name)
        if name == "enumerate" or name not in ORACLES:
            return found

        def oracle(*arguments: Any, **named: Any) -> Any:
            named = {key: moved(value, DEVICE) for key, value in named.items()}
            return moved(found(*moved(arguments, DEVICE), **named), torch.device("cpu"))

        return oracle


# --- paths ------------------------------------------------------------------------------------------------------------

#: The paths of computation. ``native`` is the usual one on this device. ``plain`` is plain torch,
#: without compiled code, kernels or reading of values. ``kernels`` uses the operators of a GPU, in
#: Triton's interpreter if the device is the CPU.
PATHS = ("native", "plain", "kernels")

#: Whether the kernels run on CPU tensors.
_INTERPRETED = gpu.triton is not None and os.environ.get("TRITON_INTERPRET") == "1" and not _ELSEWHERE


#: Tests that do not depend on the path, or need values that can be read.
_NATIVE_ONLY = ("test_autocast_changes_nothing", "test_bad_input_is_refused", "test_missing_oracles_say_so")

#: Tests that an interpreter, which is slow, leaves to a GPU. They combine oracles whose kernels other
#: tests call; ``test_several_samples`` has the frequencies of fewer samples.
_NOT_INTERPRETED = (
    "test_distances",
    "test_entropy_and_log_prob",
    "test_gradients_of_distances",
    "test_leading_shapes",
    "test_sample_frequencies",
    "test_sparsemap",
    "test_top_k",
    "test_top_k_is_sorted",
)


@contextlib.contextmanager
def computing(path: str) -> Iterator[None]:
    """A context in which oracles compute by the path with this name (one of :data:`PATHS`)."""
    hosts, devices = {"native": (eager.HOSTS, gpu.DEVICES), "plain": (set(), set()), "kernels": (set(), {"cpu"})}[path]
    with mock.patch.object(eager, "HOSTS", hosts), mock.patch.object(gpu, "DEVICES", devices):
        yield


# --- structures -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A structure at a tiny size.

    Attributes:
        structure: the structure under test.
        shape: the shape of the parts.
        masks: bool tensors of that shape, one for each example; the whole batch is tested together.
        plain: the structure as it was given, for estimators; ``structure`` may compute on another
            device.
    """

    structure: Structure
    shape: tuple[int, ...]
    masks: list[Tensor] = field(default_factory=list)
    plain: Structure = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.structure
        if _ELSEWHERE:
            self.structure = cast(Structure, _Elsewhere(self.structure))

    def __str__(self) -> str:
        return f"{self.structure.name}{list(self.shape)}"

    @property
    def mask(self) -> Tensor:
        """``[batch, *shape]``."""
        return torch.stack([torch.ones(self.shape, dtype=torch.bool), *self.masks])


def length_masks(n: int, *lengths: int) -> list[Tensor]:
    """Masks of graphs on the first nodes of n; each length is a number of nodes."""
    present = [torch.arange(n) < length for length in lengths]
    return [p[:, None] & p[None, :] for p in present]


def vector_masks(n: int, *lengths: int) -> list[Tensor]:
    """Masks of vectors with the first entries of n; each length is a number of entries."""
    return [torch.arange(n) < length for length in lengths]


class StructureContract:
    """Inherit from this class and set :attr:`cases`.

    If enumeration cannot be filtered by a mask, override :meth:`vertices`.
    """

    cases: Sequence[Case]
    #: Largest absolute score at which float32 is compared with float64.
    extreme = 100.0
    #: The path (one of :data:`PATHS`) of the current test.
    path = "native"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The tests of the contract on every path. Some skip interpreted kernels; so do tests of a
        subclass, which may draw any number.
        """
        name = metafunc.function.__name__
        if not hasattr(StructureContract, name) or name in _NATIVE_ONLY:
            return
        inherited = metafunc.function is getattr(StructureContract, name)
        interpreted = _INTERPRETED and inherited and name not in _NOT_INTERPRETED
        paths = [path for path in PATHS if path != "kernels" or interpreted]
        metafunc.parametrize("_path", paths, indirect=True)

    @pytest.fixture(autouse=True)
    def _path(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Every test starts from the same seed, on its path."""
        self.path = getattr(request, "param", "native")
        torch.manual_seed(0)
        with computing(self.path):
            if self.path == "kernels" and not self._has_kernels():
                pytest.skip(f"{self.cases[0].structure.name} has no kernels")
            yield

    def _has_kernels(self) -> bool:
        """Whether an oracle of the first case calls a kernel."""
        case = self.cases[0]
        scores = torch.rand(1, *case.shape) + 1.0
        with mock.patch.object(gpu, "takes", return_value=False) as asked:
            for oracle in ("argmax", "marginals", "project", "trace"):
                if oracle in case.structure.oracles:
                    getattr(case.structure, oracle)(scores)
        return asked.called

    def fewer(self, count: int) -> int:
        """``count`` on the native path, fewer on the others, which are slower."""
        return count // {"native": 1, "plain": 10, "kernels": 200}[self.path]

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        """All vertices of one example under its mask: those of the full size that use no missing
        part.

        This is right for subsets. Structures whose vertices must cover all existing parts (trees,
        matchings) override it.
        """
        every = case.structure.enumerate(*case.shape)
        exists = case.structure.layout.mirror(case.structure.parts(every[0], mask).to(every))
        return every[((every == 0) | (exists > 0)).flatten(1).all(-1)]

    def each(self, *needs: str) -> list[Case]:
        """The cases whose structure has these oracles, fewer of them for kernels. It skips the test
        if there are none.
        """
        found = [c for c in self.cases if set(needs) <= c.structure.oracles]
        if self.path == "kernels":  # an interpreter is slow
            found = [replace(c, masks=c.masks[::3]) for c in found[:1]]
        if not found:
            pytest.skip(f"{self.cases[0].structure.name} has no {', '.join(needs)}")
        return found

    def scores(self, case: Case, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random scores for the batch. They are NaN where a part is missing, so that reading one is
        noticed.
        """
        scores = scale * torch.randn(len(case.mask), *case.shape, dtype=dtype)
        return torch.where(case.structure.parts(scores, case.mask), scores, torch.nan)

    def values(self, case: Case, vertices: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """``<x, s>`` of every vertex, computed directly. Override it if a vertex has another value."""
        if not case.structure.is_linear:
            pytest.skip(f"{case} has vertices of another shape than its scores")
        parts = case.structure.parts(scores, mask)
        return (vertices.double() * torch.where(parts, scores.double(), 0.0)).flatten(1).sum(-1)

    # --- the tests ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_argmax(self, scale: float, dtype: torch.dtype) -> None:
        for case in self.each("argmax", "enumerate"):
            scores = self.scores(case, scale, dtype)
            best = case.structure.argmax(scores, case.mask)
            assert best.shape == scores.shape or not case.structure.is_linear
            assert best.dtype == dtype
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                values = self.values(case, vertices, scores[b], mask)
                assert (vertices == best[b].double()).flatten(1).all(-1).any(), f"{case} example {b}: not a vertex"
                value = self.values(case, best[b][None], scores[b], mask)[0]
                torch.testing.assert_close(value, values.max(), rtol=1e-6, atol=1e-6)

    def test_ties_do_not_depend_on_the_batch(self) -> None:
        for case in self.each("argmax"):
            scores = torch.nan_to_num(self.scores(case)).round()
            scores, mask = torch.cat([scores, torch.zeros_like(scores)]), case.mask.repeat(2, *[1] * len(case.shape))
            together = case.structure.argmax(scores, mask)
            assert torch.equal(case.structure.argmax(scores.flip(0), mask.flip(0)).flip(0), together)
            for alone, s, m in zip(together, scores, mask, strict=True):
                assert torch.equal(case.structure.argmax(s, m), alone), f"{case}"

    @pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
    def test_log_partition_and_marginals(self, scale: float) -> None:
        for case in self.each("log_partition", "marginals", "enumerate"):
            scores = self.scores(case, scale)
            logz = case.structure.log_partition(scores, case.mask)
            mean = case.structure.marginals(scores, case.mask)
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                values = self.values(case, vertices, scores[b], mask)
                torch.testing.assert_close(logz[b], values.logsumexp(0), rtol=1e-9, atol=1e-9)
                expected = torch.tensordot(values.softmax(0), vertices, 1)
                torch.testing.assert_close(mean[b], expected, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
    def test_float32_survives_large_scores(self, scale: float) -> None:
        for case in self.each("marginals", "log_partition"):
            scores = self.scores(case, scale, torch.float32).clamp(-self.extreme, self.extreme)
            scores.requires_grad_()
            mean = case.structure.marginals(scores, case.mask)
            exact = case.structure.marginals(scores.detach().double(), case.mask)
            assert mean.dtype == torch.float32
            assert ((mean >= 0) & (mean <= 1)).all()
            torch.testing.assert_close(mean.double(), exact, rtol=1e-3, atol=2e-5)
            (gradient,) = torch.autograd.grad((mean * torch.randn_like(mean)).sum(), scores)
            assert gradient.isfinite().all()
            assert (gradient[~case.structure.parts(scores, case.mask)] == 0).all()
            logz = case.structure.log_partition(scores, case.mask)
            exact_logz = case.structure.log_partition(scores.detach().double(), case.mask)
            torch.testing.assert_close(logz.double(), exact_logz, rtol=1e-5, atol=1e-4)
            (gradient,) = torch.autograd.grad(logz.sum(), scores)
            shown = torch.where(case.structure.parts(scores, case.mask), exact, 0.0)
            torch.testing.assert_close(gradient.double(), shown, rtol=1e-3, atol=2e-5)

    @pytest.mark.parametrize("oracle", ["log_partition", "marginals", "entropy", "project"])
    def test_gradcheck(self, oracle: str) -> None:
        if self.path == "kernels" and oracle == "entropy":
            pytest.skip("it is made of the others")
        for case in self.each(oracle):
            scores = torch.nan_to_num(self.scores(case)).requires_grad_()
            function = getattr(case.structure, oracle)
            assert torch.autograd.gradcheck(
                lambda s, f=function, m=case.mask: f(s, m),
                scores,
                eps=1e-6,
                atol=1e-5,
                rtol=1e-4,
                fast_mode=self.path != "native",
            )

    def test_entropy_and_log_prob(self) -> None:
        for case in self.each("log_prob", "enumerate"):
            scores = self.scores(case, 2.0)
            entropy = case.structure.entropy(scores, case.mask) if "entropy" in case.structure.oracles else None
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                log_p = self.values(case, vertices, scores[b], mask).log_softmax(0)
                repeated = scores[b].expand_as(vertices)
                computed = case.structure.log_prob(vertices, repeated, mask.expand_as(repeated))
                torch.testing.assert_close(computed, log_p, rtol=1e-8, atol=1e-8)
                if entropy is not None:
                    torch.testing.assert_close(entropy[b], -(log_p.exp() * log_p).sum(), rtol=1e-8, atol=1e-8)

    def test_distances(self) -> None:
        """Compare with sums over all vertices, in both directions, and for a batch against one
        example.
        """
        for case in self.each("kl", "enumerate"):
            structure, mask = case.structure, case.mask
            p, q = self.scores(case, 2.0), self.scores(case, 2.0)
            computed = {
                "cross_entropy": structure.cross_entropy(p, q, mask),
                "kl": structure.kl(p, q, mask),
                "renyi": structure.renyi(p, q, 0.7, mask),
                "expected_hamming": structure.expected_hamming(p, q, mask),
            }
            risks = structure.minimum_bayes_risk(p, mask) if "argmax" in structure.oracles else None
            for b, own in enumerate(mask):
                vertices = self.vertices(case, own)
                log_p, log_q = (self.values(case, vertices, s[b], own).log_softmax(0) for s in (p, q))
                ones = torch.ones_like(p[b])
                apart = self.values(case, (vertices[:, None] != vertices).flatten(0, 1), ones, own)
                apart = apart.reshape(len(vertices), len(vertices))
                expected = {
                    "cross_entropy": -(log_p.exp() * log_q).sum(),
                    "kl": (log_p.exp() * (log_p - log_q)).sum(),
                    "renyi": (0.7 * log_p + 0.3 * log_q).logsumexp(0) / (0.7 - 1),
                    "expected_hamming": log_p.exp() @ apart @ log_q.exp(),
                }
                for name, value in expected.items():
                    torch.testing.assert_close(computed[name][b], value, rtol=1e-8, atol=1e-8, msg=name)
                if risks is not None:
                    risk = apart @ log_p.exp()
                    chosen = int((vertices == risks[b]).flatten(1).all(-1).int().argmax())
                    assert (vertices[chosen] == risks[b]).all(), f"{case} example {b}: no vertex"
                    torch.testing.assert_close(risk[chosen], risk.min())
            same = structure.kl(p, p, mask)
            torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
            one = torch.nan_to_num(q[0])  # e.g. a learnt prior of all examples
            torch.testing.assert_close(structure.kl(p, one, mask), structure.kl(p, one.expand_as(p), mask))

    def test_gradients_of_distances(self) -> None:
        for case in self.each("kl"):
            small = replace(case, masks=case.masks[:1])
            p, q = (torch.nan_to_num(self.scores(small)).requires_grad_() for _ in range(2))
            for name in ("cross_entropy", "kl", "expected_hamming"):
                function = getattr(case.structure, name)

                def distance(p: Tensor, q: Tensor, f: Any = function, m: Tensor = small.mask) -> Any:
                    return f(p, q, m)

                assert torch.autograd.gradcheck(distance, (p, q), atol=1e-5, rtol=1e-4, fast_mode=True)
            assert torch.autograd.gradgradcheck(
                lambda p, q, f=case.structure.kl, m=small.mask: f(p, q, m), (p, q), atol=1e-4, rtol=1e-3, fast_mode=True
            )

    def test_distances_refuse_other_parts(self) -> None:
        for case in self.each("kl"):
            p = torch.randn(2, *case.shape)
            with pytest.raises(ValueError, match=r"same parts|shape"):
                case.structure.kl(p, torch.randn(2, *[size + 1 for size in case.shape]))
            with pytest.raises(TypeError, match="precision"):
                case.structure.kl(p, p.double())

    def test_sample_frequencies(self) -> None:
        """Chi-squared test against the Gibbs distribution, one for each example, at a level of
        1e-4.

        The seed is fixed.
        """
        draws = self.fewer(20_000)
        for case in self.each("sample", "enumerate"):
            scores = self.scores(case)
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                log_p = self.values(case, vertices, scores[b], mask).log_softmax(0)
                repeated = scores[b].expand(draws, *case.shape)
                sample = case.structure.sample(repeated, mask.expand_as(repeated)).double()
                same = (sample.flatten(1)[:, None] == vertices.flatten(1)[None]).all(-1)
                assert same.any(1).all(), f"{case} example {b}: a sample is not a vertex"
                assert chi_squared(same.sum(0).double(), draws * log_p.exp()) > 1e-4, f"{case} example {b}"

    def test_several_samples(self) -> None:
        """With n, as many independent ones of each example: chi-squared at a level of 1e-4 an example of one case."""
        draws = self.fewer(5_000)
        for case in self.each("sample", "enumerate", "log_prob")[:1]:
            scores = self.scores(case)
            drawn = case.structure.sample(scores, case.mask, n=draws)
            assert drawn.shape == (draws, *scores.shape[:1], *drawn.shape[2:])
            assert not drawn.requires_grad
            for b, mask in enumerate(case.mask):
                vertices = self.vertices(case, mask)
                repeated = scores[b].expand(len(vertices), *case.shape)
                log_p = case.structure.log_prob(vertices, repeated, mask.expand_as(repeated))
                same = (drawn[:, b].double().flatten(1)[:, None] == vertices.flatten(1)).all(-1)
                assert same.any(1).all(), f"{case} example {b}: a sample is not a vertex"
                assert chi_squared(same.sum(0).double(), draws * log_p.exp()) > 1e-4, f"{case} example {b}"
            with pytest.raises(ValueError, match="at least 1"):
                case.structure.sample(scores, case.mask, n=0)

    @pytest.mark.parametrize("k", [1, 3, 7])
    def test_top_k(self, k: int) -> None:
        for case in self.each("top_k", "enumerate"):
            for scale in (0.0, 1.0, 100.0):
                scores = self.scores(case, scale)
                vertices, values = case.structure.top_k(scores, k, case.mask)
                assert vertices.shape == (len(scores), k, *case.shape)
                for b, mask in enumerate(case.mask):
                    every = self.vertices(case, mask)
                    expected = self.values(case, every, scores[b], mask).sort(descending=True).values[:k]
                    torch.testing.assert_close(values[b, : len(expected)], expected, rtol=1e-7, atol=1e-7)
                    assert (values[b, len(expected) :] == -math.inf).all()
                    found = vertices[b, : len(expected)].double()
                    same = (found.flatten(1)[:, None] == found.flatten(1)).all(-1)
                    assert int(same.sum()) == len(found), "a vertex is repeated"
                    torch.testing.assert_close(
                        self.values(case, found, scores[b], mask), expected, rtol=1e-7, atol=1e-7
                    )

    def test_top_k_is_sorted(self) -> None:
        """The order holds even where values are equal up to the order in which they are summed."""
        for case in self.each("top_k"):
            scores = torch.nan_to_num(self.scores(case, 10.0, torch.float32)).round() / 10
            _, values = case.structure.top_k(scores, 9, case.mask)
            assert (values[:, :-1] >= values[:, 1:]).all(), f"{case}"

    @pytest.mark.parametrize("scale", [0.3, 1.0, 100.0])
    def test_project(self, scale: float) -> None:
        for case in self.each("project", "enumerate"):
            scores = self.scores(case, scale)
            projected = case.structure.project(scores, case.mask)
            for b, mask in enumerate(case.mask):
                parts = case.structure.parts(scores[b], mask).flatten()
                corners = self.vertices(case, mask).flatten(1)[:, parts]
                target = scores[b].flatten()[parts]
                point = projected[b].flatten()[parts]
                # Optimal exactly if no vertex lies beyond the tangent plane: <x - p, s - p> <= 0 for all x in X
                # (projection theorem) ...
                assert ((corners - point) @ (target - point)).max() <= 1e-5 * max(1.0, scale), f"{case} example {b}"
                # ... and p is in the convex hull.
                if len(target):
                    rows = torch.cat([corners.T, torch.ones(1, len(corners), dtype=torch.float64)]).numpy()
                    hull = optimize.nnls(rows, torch.cat([point, torch.ones(1, dtype=torch.float64)]).numpy())
                    assert hull[1] < 1e-5

    def test_sparsemap(self) -> None:
        for case in self.each("sparsemap", "project", "enumerate"):
            scores = torch.nan_to_num(self.scores(case)).requires_grad_()
            sparse = case.structure.sparsemap(scores, case.mask)
            assert (sparse.rows.diff() >= 0).all()
            assert (sparse.weights > 0).all()
            shape = (len(scores), *case.shape)
            weighted = sparse.vertices * sparse.weights.reshape(-1, *[1] * len(case.shape))
            mean = torch.zeros(shape, dtype=torch.float64).index_add(0, sparse.rows, weighted)
            direct = case.structure.project(scores, case.mask)
            torch.testing.assert_close(mean, direct, rtol=1e-6, atol=1e-6)
            for b, mask in enumerate(case.mask):
                every = self.vertices(case, mask)
                for vertex in sparse.vertices[sparse.rows == b]:
                    assert (every == vertex).flatten(1).all(-1).any(), f"{case} example {b}: not a vertex"
            upstream = torch.randn(shape, dtype=torch.float64)
            (through_weights,) = torch.autograd.grad((mean * upstream).sum(), scores)
            (through_mean,) = torch.autograd.grad((direct * upstream).sum(), scores)
            torch.testing.assert_close(through_weights, through_mean, rtol=1e-5, atol=1e-5)

    # --- the trace ------------------------------------------------------------------------------------------------

    def exponentials(self, log_rates: Tensor) -> Tensor:
        """``E ~ Exp(exp(log_rates))``."""
        return torch.empty_like(log_rates).exponential_() / log_rates.exp()

    def test_trace_probabilities(self) -> None:
        """Check the probabilities of all traces that occur in many draws.

        Together they are at most one. They equal frequencies (chi-squared at a level of 1e-4 an
        example, with all other traces in one cell).
        """
        draws = self.fewer(20_000)
        for case in self.each("trace", "trace_log_prob"):
            scores = torch.nan_to_num(self.scores(case))
            for b, mask in enumerate(case.mask):
                repeated = scores[b].expand(draws, *case.shape)
                trace = case.structure.trace(self.exponentials(repeated), mask.expand_as(repeated))
                _, which, counts = trace.choices.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
                first = torch.full((len(counts),), draws).scatter_reduce(0, which, torch.arange(draws), "amin")
                found = Trace(trace.vertex[first], trace.choices[first])
                log_p = case.structure.trace_log_prob(
                    found, repeated[: len(first)], mask.expand(len(first), *case.shape)
                )
                rest = 1 - log_p.exp().sum()
                assert rest >= -1e-9, f"{case} example {b}: the probabilities sum to {1 - rest}"
                expected = draws * torch.cat([log_p.exp(), rest.clamp_min(0)[None]])
                assert chi_squared(torch.cat([counts, counts.new_zeros(1)]).double(), expected) > 1e-4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_conditional_gives_the_trace_back(self, dtype: torch.dtype) -> None:
        for case in self.each("trace", "conditional"):
            times = [self.fewer(200)] + [1] * len(case.shape)
            scores, mask = self.scores(case, 3.0, dtype).repeat(times), case.mask.repeat(times)
            trace = case.structure.trace(torch.rand_like(scores) + 0.1, mask)  # any trace, likely or not
            again = case.structure.conditional(trace, scores, mask)
            exists = case.structure.layout.mirror(case.structure.parts(scores, mask).to(dtype)) > 0
            assert (again > 0).all()
            assert (again[~exists] == 1).all()
            assert torch.equal(case.structure.trace(again, mask).choices, trace.choices)

    def test_conditional_distribution(self) -> None:
        """Sampling T from E and then E | T restores the distribution of E.

        Given the most frequent trace, E | T has the distribution of the draws that led to it. The
        test is Kolmogorov-Smirnov at a level of 1e-5 for every part.
        """
        draws = self.fewer(20_000)
        for case in self.each("trace", "conditional"):
            scores = torch.nan_to_num(self.scores(case))
            for b, mask in enumerate(case.mask):
                repeated, many = scores[b].expand(draws, *case.shape), mask.expand(draws, *case.shape)
                drawn = self.exponentials(repeated)
                trace = case.structure.trace(drawn, many)
                again = case.structure.conditional(trace, repeated, many)
                choices, counts = trace.choices.unique(dim=0, return_counts=True)
                same = (trace.choices == choices[counts.argmax()]).flatten(1).all(-1)
                one = int(same.int().argmax())
                again_and_again = [one] * (draws // 4)
                fixed = Trace(trace.vertex[again_and_again], trace.choices[again_and_again])
                fresh = case.structure.conditional(fixed, repeated[: draws // 4], many[: draws // 4])
                for part in case.structure.parts(scores[b], mask).nonzero().tolist():
                    at = (slice(None), *part)
                    rescaled = again[at] * scores[(b, *part)].exp()
                    assert stats.kstest(rescaled.numpy(), "expon").pvalue > 1e-5, f"{case} example {b} part {part}"
                    assert stats.ks_2samp(fresh[at].numpy(), drawn[same][at].numpy()).pvalue > 1e-5

    def test_trace_gradients(self) -> None:
        for case in self.each("trace", "trace_log_prob", "conditional"):
            scores = torch.nan_to_num(self.scores(case)).requires_grad_()
            trace = case.structure.trace(torch.rand_like(scores) + 0.1, case.mask)

            def log_prob(s: Tensor, case: Case = case, trace: Trace = trace) -> Tensor:
                return case.structure.trace_log_prob(trace, s, case.mask)

            def conditional(s: Tensor, case: Case = case, trace: Trace = trace) -> Tensor:
                torch.manual_seed(5)
                return case.structure.conditional(trace, s, case.mask)

            assert torch.autograd.gradcheck(log_prob, scores, fast_mode=self.path != "native")
            assert torch.autograd.gradcheck(conditional, scores, fast_mode=self.path != "native")

    # --- vertices as integers -------------------------------------------------------------------------------------

    def test_write_is_the_inverse_of_read(self) -> None:
        """Check all vertices of all examples, one by one and together, with and without the mask."""
        for case in self.each("enumerate"):
            read, write = case.structure.read, case.structure.write
            every = [self.vertices(case, mask) for mask in case.mask]
            for vertices, mask in zip(every, case.mask, strict=True):
                reading = read(vertices)
                assert reading.dtype == torch.int64
                again = write(reading, case.shape, mask.expand(len(vertices), *mask.shape))
                assert torch.equal(again.double(), vertices), f"{case}: {reading}"
                for vertex in vertices[-1:]:
                    assert torch.equal(write(read(vertex), case.shape, mask).double(), vertex)
            # Without a mask the absent items are known if the structure says what a vertex covers.
            says = type(case.plain).covered is not Structure.covered
            together = torch.cat(every if says else every[:1])
            assert torch.equal(write(read(together), case.shape).double(), together), f"{case}"

    def test_write_refuses_what_is_no_vertex(self) -> None:
        for case in self.each("enumerate"):
            reading = case.structure.read(case.structure.enumerate(*case.shape))
            if not reading.numel():
                continue
            with pytest.raises(TypeError, match="integers"):
                case.structure.write(reading.double(), case.shape)
            if self.path == "native":
                with pytest.raises(ValueError, match="example"):
                    case.structure.write(reading + 1000, case.shape)

    # --- shapes and refusals --------------------------------------------------------------------------------------

    def test_leading_shapes(self) -> None:
        for case in self.cases:
            structure = case.structure
            scores = torch.randn(2, 3, *case.shape, dtype=torch.float64)
            for oracle in ("argmax", "marginals", "log_partition", "entropy", "sample", "project"):
                if oracle not in structure.oracles:
                    continue
                function = getattr(structure, oracle)
                torch.manual_seed(1)
                batched = function(scores)
                if oracle != "sample":
                    torch.testing.assert_close(batched[1, 2], function(scores[1, 2]))
                assert batched.shape[:2] == (2, 3)
                empty = function(scores[:0])
                assert empty.shape[:2] == (0, 3)

    def test_autocast_changes_nothing(self) -> None:
        for case in self.cases:
            scores = torch.nan_to_num(self.scores(case, dtype=torch.float32))
            for oracle in ("argmax", "log_partition", "marginals", "entropy", "project"):
                if oracle in case.structure.oracles:
                    function = getattr(case.structure, oracle)
                    with torch.autocast(DEVICE.type, torch.bfloat16):
                        within = function(scores, case.mask)
                    assert torch.equal(within, function(scores, case.mask)), f"{case} {oracle}"

    def test_bad_input_is_refused(self) -> None:
        if DEVICE.type != "cpu":
            pytest.skip("only the CPU reads values")
        case = self.cases[0]
        oracle = next(o for o in ("argmax", "sample", "log_partition") if o in case.structure.oracles)
        function = getattr(case.structure, oracle)
        good = torch.randn(2, *case.shape)
        bad = good.clone()
        bad[(1, *torch.nonzero(case.structure.parts(good))[0, 1:])] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            function(bad)
        with pytest.raises(TypeError, match="floating"):
            function(torch.ones(2, *case.shape, dtype=torch.int64))
        with pytest.raises(ValueError, match="broadcast"):
            function(good, torch.ones(7, *case.shape, dtype=torch.bool))
        with pytest.raises(ValueError, match="shape"):
            function(torch.randn(()))

    def test_vertices_are_listed(self) -> None:
        """Without a list nothing would be compared, and all tests would be skipped."""
        for case in self.cases:
            if "enumerate" not in case.structure.oracles:
                pytest.fail(
                    f"{case} has no enumerate, with whose vertices oracles are compared; write it for tiny sizes"
                )

    def test_missing_oracles_say_so(self) -> None:
        structure = self.cases[0].structure
        for oracle in set(ORACLES) - structure.oracles:
            with pytest.raises(UnsupportedError, match=oracle):
                structure.require(oracle, by="a test")


def chi_squared(counts: Tensor, expected: Tensor) -> float:
    """The p-value of counts ``[V]`` under their expectations ``[V]``.

    Rare outcomes are pooled, because the approximation needs expected counts of 5 or more.
    """
    rare = expected < 5
    pooled = torch.cat([counts[~rare], counts[rare].sum()[None]])
    means = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = means > 1e-9
    if bool((pooled[~keep] > 0).any()):
        return 0.0
    statistic = ((pooled - means)[keep] ** 2 / means[keep]).sum().item()
    return 1.0 if int(keep.sum()) < 2 else float(stats.chi2.sf(statistic, int(keep.sum()) - 1))


# --- estimators -------------------------------------------------------------------------------------------------------


def gradients(estimator: Estimator, problem: Problem, count: int = 60, repeats: int = 200) -> Tensor:
    """``[count, D]`` independent gradient estimates (scores, then decoder), each a mean over
    ``repeats`` copies.

    ``repeats`` times their variance is the variance of one estimate.
    """
    there = problem.to(DEVICE)
    return torch.stack([estimate.cpu() for estimate in there.estimates(estimator.to(DEVICE), count, repeats)])


def assert_mean(samples: Tensor, expected: Tensor, confidence: float = 0.999) -> None:
    """Every coordinate of the mean of ``samples`` ``[count, D]`` agrees with ``expected`` ``[D]``.

    Every coordinate has a t-test. They share the error probability ``1 - confidence`` (Bonferroni).
    So a right estimator fails with probability at most ``1 - confidence``; with a fixed seed it
    always or never fails. Coordinates without any variance must agree to 1e-9.
    """
    count, size = samples.shape
    error = samples.std(0) / count**0.5
    bound = stats.t.ppf(1 - (1 - confidence) / size / 2, count - 1) * error + 1e-9
    off = (samples.mean(0) - expected).abs()
    worst = int((off / bound).argmax())
    assert (off <= bound).all(), (
        f"{int((off > bound).sum())} of {size} coordinates; worst {worst}: mean {samples.mean(0)[worst]:.5f} "
        f"expected {expected[worst]:.5f} bound {bound[worst]:.5f}"
    )


def assert_unbiased(
    estimator: Estimator,
    problem: Problem,
    distribution: Distribution,
    count: int = 60,
    repeats: int = 200,
    confidence: float = 0.999,
) -> Tensor:
    """Check that score and decoder gradients, and the reported objective, agree with the enumerated
    ones; return the samples ``[count, D]`` of the gradients.
    """
    objectives: list[Tensor] = []
    with estimator.register_forward_hook(lambda *call: objectives.append(call[2].objective.sum().cpu() / repeats)):
        samples = gradients(estimator, problem, count, repeats)
    expected = problem.expected(distribution)
    assert_mean(samples, problem.gradient(expected), confidence)
    assert_mean(torch.stack(objectives)[:, None], expected.detach()[None], confidence)
    return samples


class EstimatorContract:
    """Tests that hold for every estimator. Inherit from this class, set :attr:`cases` and override
    :meth:`build`.

    Cases whose structure the estimator cannot use are left out. At least one must remain::

        class TestMine(EstimatorContract):
            cases = [Case(OneHot(), (4,), vector_masks(4, 3)), Case(SpanningTree(), (4, 4), length_masks(4, 3))]
            unbiased = "gibbs"

            def build(self, structure):
                return Mine(structure)
    """

    cases: Sequence[Case]

    #: The distribution for which the gradient of the expected objective is claimed to be unbiased;
    #: or None.
    unbiased: Distribution | None = None

    #: Whether the objective gets vertices of the structure, rather than the estimator's own
    #: embeddings.
    evaluates_vertices: bool = True

    #: Whether the weights of every estimate sum to one, and not only their mean over many.
    weights_sum_to_one: bool = True

    #: Which estimator of this class is tested, if it builds several.
    variant: str = ""

    def build(self, structure: Structure) -> Estimator:
        """The estimator over a structure.

        Raises:
            UnsupportedError, ValueError: if the estimator does not accept the structure.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which estimator it is about")

    def mask(self, case: Case) -> Tensor:
        """Which parts exist. Override it for estimators that accept no examples with missing parts."""
        return case.mask

    def each(self) -> Iterator[tuple[Estimator, Problem]]:
        """The estimators that can be built, in training, and a problem for each."""
        built: dict[str, list[tuple[Estimator, Problem]]] = type(self).__dict__.get("_built") or {}
        type(self)._built = built  # type: ignore[attr-defined]
        if self.variant not in built:
            found = built[self.variant] = []
            for case in self.cases:
                torch.manual_seed(0)
                try:
                    estimator = self.build(case.plain).double()
                except ValueError:  # UnsupportedError is one
                    continue
                found.append((estimator, Problem.make(case.plain, case.shape, len(case.mask), self.mask(case))))
        assert built[self.variant], "the estimator cannot be built over any case"
        for estimator, problem in built[self.variant]:
            yield copy.deepcopy(estimator).train(), problem

    def run(
        self,
        estimator: Estimator,
        problem: Problem,
        objective: Objective | None = None,
        prior_scores: Tensor | None = None,
    ) -> Estimate:
        """One call, from a fixed seed."""
        torch.manual_seed(0)
        estimate: Estimate = estimator(
            problem.scores,
            objective or problem.decoder,
            mask=problem.mask,
            context=problem.context,
            prior_scores=prior_scores,
        )
        return estimate

    def test_estimate(self) -> None:
        """Check shapes, dtypes, weights that sum to one (see :attr:`weights_sum_to_one`), rows in range,
        and the objective that they give.
        """
        for estimator, problem in self.each():
            estimate = self.run(estimator, problem)
            batch = len(problem.scores)
            assert estimate.surrogate.shape == estimate.objective.shape == (batch,)
            assert not estimate.objective.requires_grad
            assert estimate.rows.dtype == torch.int64
            assert len(estimate.rows) == len(estimate.vertices) == len(estimate.weights)
            if self.weights_sum_to_one:
                total = estimate.mean(torch.ones_like(estimate.weights))
                torch.testing.assert_close(
                    total, torch.ones_like(total), msg=f"{problem.structure.name}: weights sum to {total}"
                )
            losses = problem.decoder(estimate.vertices.detach(), estimate.rows)
            torch.testing.assert_close(estimate.mean(losses).detach(), estimate.objective, check_dtype=False)
            torch.testing.assert_close(estimate.loss.detach(), estimate.objective)

    def test_evaluation_is_hard(self) -> None:
        """Evaluation gives one vertex an example without gradient, or the whole of an exact
        distribution.
        """
        for estimator, problem in self.each():
            estimate = self.run(estimator.eval(), problem)
            assert not estimate.vertices.requires_grad
            assert estimate.exact or len(estimate.rows) == len(problem.scores)
            if self.evaluates_vertices:
                assert ((estimate.vertices == 0) | (estimate.vertices == 1)).all()

    def test_kl(self) -> None:
        """``kl`` is over what the estimator says, at least 0, and over vertices at most that of a
        point mass.
        """
        for estimator, problem in self.each():
            estimate = self.run(estimator, problem)
            assert (estimate.divergence and estimate.divergence.over) == estimator.kl_over
            if estimate.divergence is None:
                with pytest.raises(UnsupportedError, match="no KL divergence"):
                    _ = estimate.kl
                continue
            assert estimate.kl.shape == problem.scores.shape[:1]
            assert (estimate.kl >= -1e-12).all()
            if estimator.kl_over == "vertex":
                sizes = [math.log(len(problem.vertices(example))) for example in range(len(problem.scores))]
                assert (estimate.kl <= torch.tensor(sizes) + 1e-9).all()

    def test_prior(self) -> None:
        """The KL from a prior with other scores, and its gradient in these; the uniform prior has
        scores 0.
        """
        for estimator, problem in self.each():
            exists = problem.structure.parts(problem.scores, problem.mask)
            zeros = torch.zeros_like(problem.scores)
            if estimator.kl_over is None:
                with pytest.raises(UnsupportedError, match="prior_scores would change nothing"):
                    self.run(estimator, problem, prior_scores=zeros)
                continue
            uniform = self.run(estimator, problem).kl
            torch.testing.assert_close(self.run(estimator, problem, prior_scores=zeros).kl, uniform)
            prior = torch.where(exists, torch.randn_like(problem.scores), math.nan).requires_grad_()
            estimate = self.run(estimator, problem, prior_scores=prior)
            (gradient,) = torch.autograd.grad(estimate.kl.sum(), prior)
            assert (gradient[~exists] == 0).all()
            if estimator.kl_over == "parts":
                same = torch.where(exists, problem.scores.detach(), math.nan)
                kl = self.run(estimator, problem, prior_scores=same).kl
                torch.testing.assert_close(kl, torch.zeros_like(kl))
                continue
            for b in range(len(problem.scores)):
                vertices = problem.vertices(b)
                known = torch.where(exists[b], torch.stack([problem.scores[b], prior[b]]).detach(), 0.0)
                log_q, log_p = (vertices.flatten(1) @ known.flatten(1).T).log_softmax(0).T
                q = log_q.exp()
                if estimate.exact:  # weights of its own
                    own = estimate.rows == b
                    same_vertex = (estimate.vertices[own].detach().flatten(1)[:, None] == vertices.flatten(1)).all(-1)
                    q = estimate.weights[own] @ same_vertex.to(q)
                    log_q = q.clamp_min(1e-300).log()
                torch.testing.assert_close(estimate.kl[b].detach(), (q * (log_q - log_p)).sum())
                moved = torch.einsum("v,v...->...", log_p.exp() - q, vertices)
                torch.testing.assert_close(gradient[b], torch.where(exists[b], moved, 0.0))

    def test_missing_parts_have_no_gradient(self) -> None:
        """Missing parts are never read either: NaN there changes nothing."""
        for estimator, problem in self.each():
            exists = problem.structure.parts(problem.scores, problem.mask)
            scores = torch.where(problem.mask, problem.scores.detach(), math.nan).requires_grad_()
            torch.manual_seed(0)
            estimate = estimator(scores, problem.decoder, mask=problem.mask, context=problem.context)
            (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
            assert gradient.isfinite().all(), f"{problem.structure.name}: {gradient}"
            assert (gradient[~exists] == 0).all(), f"{problem.structure.name}: {gradient}"

    def test_state_is_assigned(self) -> None:
        """State that is written in place would be read again, with the wrong value, in a compiled
        backward pass.
        """
        for estimator, problem in self.each():
            before = {name: (buffer, buffer.clone()) for name, buffer in estimator.named_buffers()}
            (self.run(estimator, problem).surrogate.sum() + 0.0).backward()
            assert all(torch.equal(buffer, value) for buffer, value in before.values())

    def test_one_batch_dimension(self) -> None:
        """More or fewer batch dimensions are an error with a message."""
        for estimator, problem in self.each():
            for scores in (problem.scores[0], problem.scores[None]):
                with pytest.raises(ValueError, match="exactly one batch dimension"):
                    estimator(scores, problem.decoder)

    def test_what_no_estimator_takes(self) -> None:
        """Integers have no gradient. A mask must be bool and have the scores' shape."""
        for estimator, problem in self.each():
            scores, context = problem.scores, problem.context
            for wrong, mask, error, message in (
                (scores.detach().long(), None, TypeError, "must be floating point"),
                (scores, torch.ones_like(scores), TypeError, "mask must be bool"),
                (scores, torch.ones(7, *scores.shape[1:]).bool(), ValueError, r"mask \[7, .* does not broadcast"),
            ):
                with pytest.raises(error, match=message):
                    estimator(wrong, problem.decoder, mask=mask, context=context)

    def test_an_objective_that_cannot_be_differentiated(self) -> None:
        """It is an error for estimators that differentiate the objective, and none for the others."""
        weight = torch.ones((), requires_grad=True)

        def constant(vertices: Tensor, rows: Tensor) -> Tensor:
            return (vertices > 0.5).flatten(1).sum(1).double()

        def elsewhere(vertices: Tensor, rows: Tensor) -> Tensor:  # a gradient, but not there
            return weight * constant(vertices, rows)

        for estimator, problem in self.each():
            for objective in (constant, elsewhere):
                if not estimator.needs_differentiable_objective:
                    self.run(estimator, problem, objective)
                    continue
                with pytest.raises(ValueError, match="do not depend on the vertices differentiably"):
                    self.run(estimator, problem, objective)

    def test_a_batch_without_examples(self) -> None:
        """An empty batch teaches nothing: averages over steps stay the same."""
        for estimator, problem in self.each():
            self.run(estimator, problem).surrogate.sum().backward()
            before = {name: value.clone() for name, value in estimator.state_dict().items()}
            estimate = estimator(
                problem.scores[:0], problem.decoder, mask=problem.mask[:0], context=problem.context[:0]
            )
            assert estimate.surrogate.shape == (0,)
            estimate.surrogate.sum().backward()
            for name, value in estimator.state_dict().items():
                assert torch.equal(value, before[name]) or name.endswith("step"), f"{problem.structure.name}: {name}"

    def test_precisions(self) -> None:
        """Scores may be float64 with float32 parameters. Half precision is widened, and its
        gradient is narrow again.
        """
        for estimator, problem in self.each():
            estimator = estimator.float()
            estimate = self.run(estimator, problem)
            assert estimate.vertices.dtype == estimate.surrogate.dtype == torch.float64
            scores = problem.scores.detach().bfloat16().requires_grad_()
            context = problem.context.float()
            estimate = estimator(
                scores, lambda x, rows: x.square().flatten(1).sum(1), mask=problem.mask, context=context
            )
            assert estimate.vertices.dtype == torch.float32
            (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
            assert gradient.dtype == torch.bfloat16

    def test_unbiased(self) -> None:
        """Gradients of scores and decoder agree with the enumerated ones, if the class claims it."""
        if self.unbiased is None:
            pytest.skip("no claim")
        for estimator, problem in self.each():
            torch.manual_seed(0)
            assert_unbiased(estimator, problem, self.unbiased)
