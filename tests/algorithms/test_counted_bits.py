"""Counted bits: the plain torch version, a tree of polynomial products, against the compiled one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from structgrad.algorithms import counted_bits
from structgrad.algorithms.counted_bits import Chain
from structgrad.structures import CorrelatedKSubset, KSubset
from tests.kernels import by_operators, compiled, needs_triton, quiet


def chain(n: int, low: int, high: int, pairs: bool, scale: float, batch: tuple[int, ...] = (2, 3)) -> Chain:
    """A random one with missing bits, never fewer than ``low``."""
    exists = torch.rand(*batch, n) < 0.7
    exists[exists.sum(-1) < low] = True
    unary = scale * torch.randn(*batch, n, dtype=torch.float64)
    pair = scale * torch.randn(*batch, max(n - 1, 0), dtype=torch.float64) if pairs else None
    return Chain(unary.requires_grad_(), None if pair is None else pair.requires_grad_(), exists, low, high)


def counts(n: int) -> list[tuple[int, int]]:
    """Fewest and most ones."""
    some = min(2, n)
    return sorted({(0, 0), (0, some), (some, some), (0, n), (n, n), (min(1, n), max(n - 1, min(1, n)))})


def scores(given: Chain) -> list[Tensor]:
    return [given.unary] if given.pair is None else [given.unary, given.pair]


def differentiate(given: Chain, outputs: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
    # Not linear, so that what comes from upstream depends on the scores as well.
    total = sum(((o.sin() * w).sum() for o, w in zip(outputs, weights, strict=True)), start=torch.zeros(()))
    return torch.autograd.grad(total, scores(given), create_graph=True, allow_unused=True, materialize_grads=True)


CHAINS = [
    (n, low, high, pairs, scale)
    for n, pairs, scale in itertools.product((0, 1, 2, 5, 8), (False, True), (1.0, 100.0))
    for low, high in counts(n)
]


@pytest.mark.parametrize(("n", "low", "high", "pairs", "scale"), CHAINS)
def test_the_tree_agrees_with_the_compiled_kernels(n: int, low: int, high: int, pairs: bool, scale: float) -> None:
    given = chain(n, low, high, pairs, scale)
    compiled, plain = given.moments(), counted_bits._moments_in_torch(given)
    torch.testing.assert_close(plain, compiled, rtol=1e-9, atol=1e-9)
    weights = [torch.randn_like(o) for o in compiled]
    first, again = differentiate(given, compiled, weights), differentiate(given, plain, weights)
    torch.testing.assert_close(again, first, rtol=1e-7, atol=1e-7)
    for second in differentiate(given, again, [torch.randn_like(g) for g in again]):
        assert second.isfinite().all()


@pytest.mark.parametrize(("n", "low", "high", "pairs", "scale"), CHAINS)
def test_its_samples_and_maxima_are_vertices(n: int, low: int, high: int, pairs: bool, scale: float) -> None:
    given = chain(n, low, high, pairs, scale)
    best, expected = counted_bits._argmax_in_torch(given), given.argmax()
    for bits in (best, counted_bits._sample_in_torch(given)):
        assert bits.shape == given.unary.shape
        assert ((bits == 0) | (bits == 1)).all()
        assert not bits[~given.exists].any()
        assert (bits.sum(-1) >= low).all()
        assert (bits.sum(-1) <= high).all()
    assert torch.equal(best, expected)  # no ties among normal scores


@pytest.mark.parametrize("pairs", [False, True])
def test_samples_have_the_law_of_the_moments(pairs: bool) -> None:
    torch.manual_seed(0)
    draws = 20_000
    given = chain(5, 1, 3, pairs, 1.0, batch=(1,))
    many = Chain(
        given.unary.expand(draws, 5),
        None if given.pair is None else given.pair.expand(draws, 4),
        given.exists.expand(draws, 5),
        1,
        3,
    )
    sample = counted_bits._sample_in_torch(many)
    _, mean, both = (m[0] for m in given.moments())
    pair_mean = (sample[:, 1:] * sample[:, :-1]).mean(0)[: len(both)]
    # 5 standard errors: 6e-6 for all entries together.
    for found, exact in ((sample.mean(0), mean), (pair_mean, both)):
        assert ((found - exact).abs() <= 5 * (exact * (1 - exact) / draws).clamp_min(0).sqrt() + 1e-12).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_second_derivatives_of_the_tree(pairs: bool) -> None:
    given = chain(4, 1, 2, pairs, 1.0, batch=(1,))

    def moments(unary: Tensor, *pair: Tensor) -> tuple[Tensor, ...]:
        found = counted_bits._moments_in_torch(Chain(unary, pair[0] if pair else None, given.exists, 1, 2))
        return found if pair else found[:2]

    assert torch.autograd.gradgradcheck(moments, tuple(scores(given)))


def by_operator(given: Chain, oracle: str) -> Any:
    def ask(unary: Tensor, exists: Tensor, *pair: Tensor) -> Any:
        return getattr(Chain(unary, pair[0] if pair else None, exists, given.low, given.high), oracle)()

    return by_operators(ask, given.unary, given.exists, *scores(given)[1:])


@needs_triton
@quiet
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    ("n", "low", "high", "batch", "scale"),
    [(5, 1, 3, (2, 2), 1.0), (5, 2, 2, (3,), 100.0), (4, 0, 4, (2,), 1.0), (1, 1, 1, (2,), 1.0), (2, 0, 0, (1,), 1.0)],
)
def test_gpu_kernels_agree_with_the_cpu(
    n: int, low: int, high: int, batch: tuple[int, ...], scale: float, pairs: bool
) -> None:
    given = chain(n, low, high, pairs, scale, batch)
    expected, ours = given.moments(), by_operator(given, "moments")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(o) for o in expected]
    once = [differentiate(given, moments, weights) for moments in (ours, expected)]
    torch.testing.assert_close(*once, rtol=1e-9, atol=1e-10)
    directions = [torch.randn_like(g) for g in once[0]]
    twice = [differentiate(given, gradients, directions) for gradients in once]
    torch.testing.assert_close(*twice, rtol=1e-7, atol=1e-8)
    assert torch.equal(by_operator(given, "argmax"), given.argmax())
    torch.manual_seed(1)
    sample = given.sample()
    torch.manual_seed(1)
    assert torch.equal(by_operator(given, "sample"), sample)


@needs_triton
@quiet
@pytest.mark.parametrize(("n", "batch"), [(0, (2,)), (3, (0,))])
def test_gpu_kernels_of_nothing(n: int, batch: tuple[int, ...]) -> None:
    given = chain(n, 0, min(n, 1), True, 1.0, batch)
    torch.testing.assert_close(by_operator(given, "moments"), given.moments())
    assert by_operator(given, "sample").shape == by_operator(given, "argmax").shape == (*batch, n)


@pytest.mark.parametrize("structure", [KSubset(2), CorrelatedKSubset(2)], ids=str)
def test_operators_under_compile_and_torch_func(structure: KSubset | CorrelatedKSubset) -> None:
    rates = torch.randn(3, 7, device="meta", requires_grad=True)

    def everything(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return structure.log_partition(s), structure.marginals(s), structure.sample(s)

    log_z, mean, sample = torch.compile(everything, backend="aot_eager", fullgraph=True)(rates)
    (log_z.sum() + (mean * mean).sum()).backward()
    assert rates.grad is not None
    assert rates.grad.shape == mean.shape == sample.shape
    assert torch.func.vmap(torch.func.grad(structure.log_partition))(rates.detach()).shape == rates.shape


@needs_triton
def test_gpu_kernels_compile_for_a_gpu() -> None:
    done = compiled("""
import torch
from structgrad.algorithms import counted_bits as bits
for states in (1, 2):
    unary, pair = torch.ones(2, 9, dtype=torch.float64), torch.ones(2, 8 * (states - 1), dtype=torch.float64)
    _, mean, both, ratio = bits._moments_operator(unary, pair, unary > 0, 4, 4, states)
    bits._covariance_operator(unary, pair, unary > 0, ratio, mean, both, 4, 4, states)
    bits._bits_operator(unary, pair, unary > 0, unary, 4, 4, states)
    bits._bits_operator(unary, pair, unary > 0, None, 4, bits.LARGEST, states)
""")
    names = [line.split()[0] for line in done.splitlines()]
    assert names == ["_gpu_chain", "_gpu_chain_covariance", "_gpu_chain", "_gpu_chain"] * 2
