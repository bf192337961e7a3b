"""Second derivatives of every oracle and relaxation: right, or loud however they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structgrad.algorithms.derivatives import first_order_only
from structgrad.estimators import Perturbed, SurrogateGradient
from structgrad.structures import OneHot, Structure, Subset
from tests import cases

CASES = {name: (case.plain, case.shape) for name, case in cases.CASES.items()}
Function = Callable[[Tensor], Tensor]


def functions(structure: Structure, shape: tuple[int, ...], mask: Tensor | None) -> dict[str, Function]:
    """Everything that is differentiable in the scores, by name."""
    torch.manual_seed(1)
    example = torch.randn(2, *shape, dtype=torch.float64)
    vertex = structure.argmax(example, mask)
    out: dict[str, Function] = {
        oracle: lambda s, name=oracle: getattr(structure, name)(s, mask)  # type: ignore[misc]
        for oracle in ("log_partition", "marginals", "entropy", "project")
        if oracle in structure.oracles
    }
    if "log_prob" in structure.oracles:
        out["log_prob"] = lambda s: structure.log_prob(vertex, s, mask)
    if "trace_log_prob" in structure.oracles:
        trace = structure.trace(example.exp(), mask)
        noise = structure.conditional_noise(trace, example)
        out["trace_log_prob"] = lambda s: structure.trace_log_prob(trace, s, mask)
        out["conditional"] = lambda s: structure.conditional(trace, s, mask, noise)
    if "conditional_utility" in structure.oracles:
        given = torch.rand_like(example) + 0.1
        out["conditional_utility"] = lambda s: structure.conditional_utility(vertex, s, mask, given)
    if "top_k" in structure.oracles:
        out["top_k"] = lambda s: structure.top_k(s, 2, mask)[1]
    if "sparsemap" in structure.oracles:
        out["sparsemap"] = lambda s: structure.sparsemap(s, mask).weights
    for relaxation, described in structure.relaxations.items():
        draws = described.draws
        if draws is not None:
            shifts = torch.randn(draws, *[1] * example.dim(), dtype=torch.float64) * example
            out[relaxation] = lambda s, r=relaxation, d=shifts: structure.relax(r, s + d, mask)  # type: ignore[misc]
        elif relaxation not in ("exp_family", "euclidean"):
            out[relaxation] = lambda s, r=relaxation: structure.relax(r, s, mask, 0.7)  # type: ignore[misc]
    if isinstance(structure, OneHot):
        alpha = torch.tensor(1.4, dtype=torch.float64)
        out["entmax15"] = lambda s: structure.entmax(s, 1.5, mask)
        out["entmax"] = lambda s: structure.entmax(s, alpha, mask)
        out["entmax3"] = lambda s: structure.entmax(s, 3.0, mask)
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str, masked: bool) -> None:
    """Against central differences of the first ones, in a direction, for what is linear and what is not."""
    structure, shape = CASES[name]
    mask = cases.CASES[name].mask if masked else None
    torch.manual_seed(2)
    scores = torch.randn(2, *shape, dtype=torch.float64)
    direction = torch.randn_like(scores)
    for what, function in functions(structure, shape, mask).items():
        weights = torch.randn_like(function(scores))

        def value(s: Tensor, function: Function = function, weights: Tensor = weights) -> Tensor:
            out = function(s)
            finite = torch.where(out.isfinite(), out, 0.0)
            return (weights * (finite + finite.square())).sum()

        def first(s: Tensor, value: Function = value) -> Tensor:
            s = s.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(value(s), s)
            return gradient

        leaf = scores.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        step = 1e-5
        expected = (first(scores + step * direction) - first(scores - step * direction)) / (2 * step)
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", [n for n, (s, _) in CASES.items() if {"log_partition", "enumerate"} <= s.oracles])
def test_however_it_is_asked(name: str) -> None:
    """The Hessian of log Z is the covariance of the vertices: ``hessian``, ``.backward()``, ``torch.func``."""
    structure, shape = CASES[name]
    torch.manual_seed(3)
    scores = torch.randn(shape, dtype=torch.float64)
    every = structure.enumerate(*shape)
    flat = structure.layout.flatten(every)
    p = structure.inner(every, scores.expand(every.shape)).softmax(0)
    covariance = flat.T @ (p[:, None] * flat) - torch.outer(p @ flat, p @ flat)
    size = scores.numel()
    parts = structure.parts(scores).flatten()
    if structure.layout.name == "undirected":
        row, column = torch.triu_indices(*shape, offset=1)
        expected = torch.zeros(size, size, dtype=torch.float64)
        index = row * shape[1] + column
        expected[index[:, None], index] = covariance
    else:
        expected = covariance * parts[:, None] * parts
    hessian = torch.autograd.functional.hessian(structure.log_partition, scores)
    torch.testing.assert_close(hessian.reshape(size, size), expected)

    leaf = scores.clone().requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(structure.log_partition(leaf * scale), leaf, create_graph=True)
    gradient.sum().backward()
    assert scale.grad is not None
    expected_scale = (structure.marginals(scores) * structure.parts(scores)).sum() + (expected @ scores.flatten()).sum()
    torch.testing.assert_close(scale.grad, expected_scale)

    try:
        functional = torch.func.hessian(structure.log_partition)(scores)
    except NotImplementedError as error:
        assert "torch.func" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(functional.reshape(size, size), expected)


def test_what_has_a_first_derivative_only_says_so() -> None:
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    for estimator in (
        Perturbed(OneHot()),
        SurrogateGradient(OneHot()),
        SurrogateGradient(OneHot(), "spigot", step=1.0),
        SurrogateGradient(OneHot(), "blackbox", step=1.0),
        SurrogateGradient(OneHot(), "imle", step=1.0),
    ):
        estimate = estimator(scores * parameter, lambda x, rows: (parameter * x).square().sum(1))
        (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores, create_graph=True)
        for ask in (
            lambda g=gradient: torch.autograd.grad(g.sum(), parameter, retain_graph=True),
            lambda g=gradient: torch.autograd.grad(g.sum(), scores, retain_graph=True),
            lambda g=gradient: g.sum().backward(retain_graph=True),
        ):
            with pytest.raises(NotImplementedError, match="first derivative only"):
                ask()
    with torch.no_grad():
        assert first_order_only(scores, "nothing") is scores


def test_entropy_of_bits_at_zero() -> None:
    """Where networks start."""
    scores = torch.zeros(3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(Subset().entropy, scores)
    torch.testing.assert_close(hessian, -0.25 * torch.eye(3, dtype=torch.float64))
