"""The contract of every configured estimator with every structure that it accepts."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig
from scipy import stats
from torch import Tensor

from structgrad.diagnose import FEATURES, Problem
from structgrad.estimators import (
    REBAR,
    RELAX,
    RODEO,
    SST,
    Deterministic,
    DisARM,
    ImportanceWeighted,
    Marginalize,
    MuProp,
    Reinforce,
    SurrogateGradient,
)
from structgrad.estimators.base import Estimator
from structgrad.structures import (
    Arborescence,
    KSubset,
    LinearChain,
    Matching,
    OneHot,
    SpanningTree,
    Structure,
    Subset,
    UnsupportedError,
)
from structgrad.testing import DEVICE, Case, EstimatorContract, gradients
from tests.cases import CASES, problem

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "estimator").glob("*.yaml") if path.stem != "none")
#: Estimators without noise: they name no distribution.
WITHOUT_KL = {
    "identity_st",
    "blackbox",
    "spigot",
    "sparsemax_attention",
    "entmax",
    "softmax_st",
    "sparsemap_st",
    "vector_quantization",
}


@functools.cache
def configuration(preset: str) -> DictConfig:
    """The configuration of that name, for contexts and vectors of tiny sizes."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = [f"+estimator={preset}", f"+context_size={FEATURES}", "+task.size=4"]
        return hydra.compose(overrides=overrides).estimator


class TestPresets(EstimatorContract):
    """Every configuration over every structure that it accepts: all that the table says works."""

    cases = tuple(CASES.values())

    @pytest.fixture(autouse=True, params=NAMES)
    def preset(self, request: pytest.FixtureRequest) -> None:
        self.variant = request.param
        self.evaluates_vertices = self.variant != "vector_quantization"
        self.weights_sum_to_one = self.variant != "sum_and_sample"

    def build(self, structure: Structure) -> Estimator:
        try:
            return hydra.utils.instantiate(configuration(self.variant), structure=structure)
        except hydra.errors.InstantiationException as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise

    def mask(self, case: Case) -> Tensor:
        """Lists of vertices are of one size for the whole batch."""
        return torch.ones_like(case.mask) if self.variant in ("dense", "sparsemax") else case.mask

    def test_without_noise_there_is_no_kl(self) -> None:
        if self.variant in WITHOUT_KL:
            assert all(estimator.kl_over is None for estimator, _ in self.each())


@pytest.fixture(params=NAMES)
def built(request: pytest.FixtureRequest) -> tuple[str, list[tuple[Estimator, Problem]]]:
    """A configuration, and what it builds over every structure that it accepts."""
    contract = TestPresets()
    contract.variant = request.param
    return request.param, list(contract.each())


def run(estimator: Estimator, p: Problem, objective: Any = None) -> Any:
    return TestPresets().run(estimator, p, objective)


def test_training_after_an_evaluation_in_inference_mode(built: tuple[str, list[tuple[Estimator, Problem]]]) -> None:
    """Lightning validates in that mode before it trains. What an estimator or a structure keeps must serve both."""
    for estimator, p in built[1][::4]:
        with torch.inference_mode():
            run(estimator.eval(), p)
        torch.autograd.grad(run(estimator.train(), p).surrogate.sum(), p.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_losses_of_another_kind_are_the_same_numbers(
    built: tuple[str, list[tuple[Estimator, Problem]]], dtype: torch.dtype
) -> None:
    """Half precision, as under autocast, and counts and truths of black boxes."""
    for estimator, p in built[1][::4]:

        def losses(vertices: Tensor, rows: Tensor) -> Tensor:
            if dtype == torch.bfloat16:
                return 200 + vertices.flatten(1).sum(1).mul(3).bfloat16()  # where one is a step
            return (vertices.flatten(1).sum(1) > 1.5).to(dtype)

        if dtype != torch.bfloat16 and estimator.needs_differentiable_objective:
            continue
        found, expected = (
            run(copy.deepcopy(estimator).train(), p, objective)
            for objective in (losses, lambda vertices, rows: losses(vertices, rows).to(vertices.dtype))
        )
        for ours, theirs in ((found.objective, expected.objective), (found.surrogate, expected.surrogate)):
            assert ours.dtype == p.scores.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        grads = [torch.autograd.grad(e.surrogate.sum(), p.scores, allow_unused=True)[0] for e in (found, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_spoils_one_step_of_one_example(
    built: tuple[str, list[tuple[Estimator, Problem]]],
) -> None:
    """A loop that skips the step goes on as before, as running means and critics have not seen it."""
    for estimator, p in built[1][::4]:
        if estimator.mixes_examples:
            continue

        def bad(vertices: Tensor, rows: Tensor) -> Tensor:
            return p.decoder(vertices, rows) + torch.where(rows == 0, math.nan, 0.0)  # noqa: B023

        estimator.train()
        (gradient,) = torch.autograd.grad(run(estimator, p, bad).surrogate.sum(), p.scores)
        assert gradient[1:].isfinite().all(), p.structure.name
        assert all(buffer.isfinite().all() for buffer in estimator.buffers()), p.structure.name
        (gradient,) = torch.autograd.grad(run(estimator, p).surrogate.sum(), p.scores)
        assert gradient.isfinite().all(), p.structure.name


def test_training_mode_in_inference_mode_works_or_says_why_not(
    built: tuple[str, list[tuple[Estimator, Problem]]],
) -> None:
    for estimator, p in built[1][::4]:
        refuses = isinstance(estimator, REBAR | RELAX | RODEO | MuProp)
        says = pytest.raises(RuntimeError, match="inference_mode") if refuses else contextlib.nullcontext()
        with torch.inference_mode(), says:
            run(estimator.train(), p)


@pytest.mark.gpu
def test_the_same_mean_gradient_on_every_device(built: tuple[str, list[tuple[Estimator, Problem]]]) -> None:
    """Biased estimators as well: means of two samples of estimates, Welch's t in every coordinate at 1e-5 in all."""
    name, pairs = built
    for estimator, p in pairs[:: 1 if DEVICE.type != "cpu" else len(pairs)]:
        there = copy.deepcopy(estimator)  # before either has state
        torch.manual_seed(1)
        ours, theirs = (
            gradients(there.train(), p, 30, 20),
            torch.stack(list(p.estimates(estimator.train(), 30, 20))),
        )
        error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
        bound = stats.t.ppf(1 - 1e-5 / 2 / len(error), 29) * error + 1e-7
        off = (ours.mean(0) - theirs.mean(0)).abs()
        assert (off <= bound).all(), f"{name} over {p.structure.name}: {off - bound}"


def test_the_objective_returns_one_number_a_vertex() -> None:
    with pytest.raises(TypeError, match="losses must be real"):
        Reinforce(OneHot())(torch.zeros(2, 3), lambda vertices, rows: vertices.sum(1) + 0j)
    with pytest.raises(ValueError, match=r"one number a vertex, \[2\]; got \[\]"):
        Reinforce(OneHot())(torch.zeros(2, 3), lambda vertices, rows: vertices.sum())
    with pytest.raises(ValueError, match=r"one number a vertex, \[2\]; got \[2, 1\]"):
        Reinforce(OneHot())(torch.zeros(2, 3), lambda vertices, rows: vertices.sum(1, keepdim=True))


def test_messages_show_the_shape() -> None:
    for structure, shape in (
        (OneHot(), "[batch, n]"),
        (Arborescence(), "[batch, n, n]"),
        (Matching(), "[batch, n, m]"),
        (LinearChain(3), "[batch, n - 1, C, C]"),
    ):
        with pytest.raises(ValueError, match=shape.replace("[", r"\[")):
            SurrogateGradient(structure)(
                torch.zeros([6] * (structure.layout.ndim + 2)), lambda vertices, rows: vertices.flatten(1).sum(1)
            )


TRACES = ("t_reinforce", "t_reinforce_plus", "e_reinforce", "e_reinforce_plus", "gumbel_rao", "relax", "rebar")


def test_what_a_trace_cannot_hold_is_said(built: tuple[str, list[tuple[Estimator, Problem]]]) -> None:
    """Scores beyond +-600: an error that names the limit, never one that calls finite scores infinite."""
    name, pairs = built
    for estimator, p in pairs:
        if name in TRACES and "conditional_utility" not in p.structure.oracles:
            far = replace(p, scores=(2000 * p.scores.detach()).requires_grad_())
            with pytest.raises(ValueError, match=r"example \[\d\] has scores beyond \+-600: as log-rates"):
                run(estimator.train(), far)


TEMPERED = ("sst", "sst_st", "softmax_st", "simple", "gumbel_rao", "reinmax", "gapped_st", "l2x", "softsub")


def test_a_temperature_for_every_example(built: tuple[str, list[tuple[Estimator, Problem]]]) -> None:
    """Equals each example with its own temperature in a batch of one temperature."""
    name, pairs = built
    if name not in TEMPERED:
        return
    temperature = torch.tensor([0.3, 2.0], dtype=torch.float64)
    for estimator, p in pairs:
        estimator = copy.deepcopy(estimator).train()
        estimator.temperature = temperature
        both = p.gradient(run(estimator, p).surrogate.sum())
        one = torch.zeros_like(both)
        for example in range(2):
            estimator.temperature = temperature[example].item()
            one += p.gradient(run(estimator, p).surrogate[example])
        torch.testing.assert_close(both, one)
        estimator.temperature = temperature[:1]
        with pytest.raises(ValueError, match="temperature has 1 numbers, one an example; the batch has 2"):
            run(estimator, p)


def test_a_temperature_is_learnt_if_it_is_a_parameter() -> None:
    p = problem("one_hot")
    estimator = SST(OneHot(), temperature=torch.nn.Parameter(torch.tensor(0.7)), n_samples=2)
    run(estimator, p).surrogate.sum().backward()
    assert estimator.temperature.grad.abs() > 0
    samples = SST(OneHot(), temperature=torch.tensor([0.3, 2.0]), n_samples=3)
    assert run(samples, p).vertices.shape == (6, 4)
    for wrong, error, message in (
        (torch.ones(2, 1), ValueError, r"one an example, \[batch\]; got \[2, 1\]"),
        (torch.tensor([1.0, 0.0]), ValueError, r"must be positive and finite; got \[1.0, 0.0\]"),
        ("warm", TypeError, "temperature must be a number; got str"),
    ):
        with pytest.raises(error, match=message):
            SST(OneHot(), temperature=wrong)
    with pytest.raises(TypeError, match="temperature must be a number; got Tensor"):
        REBAR(OneHot(), temperature=torch.ones(2))


def test_weights_are_as_precise_as_the_vertices() -> None:
    p = problem("one_hot")
    for estimator in (Reinforce(OneHot(), n_samples=3), SST(OneHot(), n_samples=3), ImportanceWeighted(OneHot(), 3)):
        estimate = run(estimator.double(), p)
        assert estimate.weights.dtype == torch.float64
        losses = p.decoder(estimate.vertices, estimate.rows)
        torch.testing.assert_close(estimate.mean(losses).detach(), estimate.objective, rtol=0, atol=1e-12)
    for estimator in (DisARM(Subset(), 3), RODEO(Subset(), 3)):
        assert run(estimator.double(), problem("subset")).weights.dtype == torch.float64


def test_graphs_without_nodes() -> None:
    scores = torch.zeros(2, 0, 0, requires_grad=True)
    for estimator in (SST(Arborescence(), clip_range=15.0), RELAX(Arborescence()), REBAR(Arborescence())):
        estimate = estimator(scores, lambda vertices, rows: vertices.flatten(1).sum(1))
        estimate.surrogate.sum().backward()
        assert estimate.objective.tolist() == [0, 0]


def test_a_gibbs_kl_is_refused_for_vertices_of_another_distribution() -> None:
    for structure, utility in ((SpanningTree(), "gumbel"), (KSubset(2), "gumbel"), (Subset(), "gaussian")):
        with pytest.raises(UnsupportedError, match="use kl=utility"):
            SST(structure, utility=utility, kl="distribution")  # type: ignore[arg-type]
    SST(Subset(), utility="logistic", kl="distribution")


def test_the_argmax_of_structured_attention_has_no_kl() -> None:
    p = problem("spanning_tree")
    estimator = Deterministic(p.structure)
    assert estimator(p.scores, p.decoder, mask=p.mask).kl.shape == (2,)
    assert estimator.eval()(p.scores, p.decoder, mask=p.mask).divergence is None


def test_what_cannot_be_counted_has_no_kl() -> None:
    assert Marginalize(Matching(), "sparsemap").kl_over is None
    p = problem("matching")
    dense = Marginalize(Matching(), "softmax")(p.scores.detach()[:1], p.decoder)
    expected = math.log(6) + (dense.weights * dense.weights.log()).sum()
    torch.testing.assert_close(dense.kl, expected[None])


def test_the_average_of_the_elbo() -> None:
    """Signal: objective + weight * kl, less the average of that (Paulus et al. 2020, C.1)."""
    p = problem("one_hot")
    estimator = Reinforce(OneHot(), baseline="elbo", decay=0.5).double()
    for step in range(3):
        before = estimator.baseline.running.mean.clone()
        torch.manual_seed(step)
        estimate = estimator(p.scores, p.decoder, mask=p.mask, kl_weight=0.3)
        loss = (estimate.objective + 0.3 * estimate.kl).detach()
        log_prob = OneHot().log_prob(estimate.vertices, p.scores, p.mask)
        expected = p.gradient(((loss - before) * log_prob + p.decoder(estimate.vertices, estimate.rows)).sum())
        torch.testing.assert_close(p.gradient(estimate.surrogate.sum()), expected)
        means = [loss.mean()] if step == 0 else [*means, loss.mean()]  # noqa: F821
        weights = torch.tensor([0.5 ** (step - i) for i in range(step + 1)], dtype=torch.float64)
        torch.testing.assert_close(
            estimator.baseline.running.mean, (weights * torch.stack(means)).sum() / weights.sum()
        )
