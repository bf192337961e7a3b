"""RELAX and REBAR: unbiased for any critic, less variance than T-REINFORCE once the critic is trained, no leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from structgrad.estimators import REBAR, RELAX, RODEO, Reinforce, SizeMismatchError
from structgrad.estimators.control_variates import ControlVariate
from structgrad.structures import Arborescence, OneHot, Permutation, SpanningTree, Structure, Subset, UnsupportedError
from structgrad.testing import Distribution, Problem, assert_unbiased
from tests.cases import problem
from tests.estimators.test_score_function import CASES as ALL
from tests.estimators.test_score_function import measured_variance

#: What RELAX takes.
CASES = {
    name: case
    for name, case in ALL.items()
    if "conditional_utility" in case[0].oracles or {"trace_log_prob", "conditional"} <= case[0].oracles
}
#: RELAX reads the trace's own distribution; that of bits is Gibbs.
TRUTH: dict[str, Distribution] = {name: "gibbs" if s.is_independent else "trace" for name, (s, *_) in CASES.items()}


def train(estimator: ControlVariate, case: Problem, steps: int = 300, repeats: int = 10) -> None:
    """Train the critic alone."""
    optimizer = torch.optim.Adam([p for p in estimator.parameters() if p.requires_grad], lr=1e-2)
    tile = [repeats] + [1] * (case.scores.dim() - 1)
    scores, mask = case.scores.detach().repeat(tile), case.mask.repeat(tile)
    for _ in range(steps):
        optimizer.zero_grad()
        estimator(scores, case.decoder, mask=mask).surrogate.mean().backward()
        optimizer.step()
    case.decoder.zero_grad()


def relax(name: str, critic: Any, **options: Any) -> RELAX:
    """RELAX with random critic parameters, so that the critic does something."""
    structure, shape, _ = CASES[name]
    estimator = RELAX(structure, critic, shape if critic == "flat" else None, **options).double()
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return estimator


@pytest.mark.gpu
@pytest.mark.parametrize("critic", ["flat", "parts"])
@pytest.mark.parametrize("name", CASES)
def test_relax_is_unbiased_for_any_critic(name: str, critic: str) -> None:
    n_samples = 2 if name == "one_hot" else 1
    assert_unbiased(relax(name, critic, n_samples=n_samples), problem(name), TRUTH[name])


@pytest.mark.parametrize("critic", ["flat", "parts"])
def test_a_critic_may_read_the_context(critic: str) -> None:
    """The estimate stays unbiased; another context changes it, and none is refused."""
    case = problem("one_hot")
    size = case.context.shape[1]
    estimator = relax("one_hot", critic, context_size=size)
    assert_unbiased(estimator, case, TRUTH["one_hot"])
    gradients = []
    for context in (case.context, case.context + 1):
        torch.manual_seed(0)
        out = estimator(case.scores, case.decoder, mask=case.mask, context=context)
        gradients.append(torch.autograd.grad(out.surrogate.sum(), case.scores)[0])
    assert not torch.allclose(*gradients)
    with pytest.raises(SizeMismatchError, match=f"context_size {size}; the task passes none"):
        estimator(case.scores, case.decoder, mask=case.mask)
    with pytest.raises(SizeMismatchError, match=f"context_size {size}; the context has 1 features"):
        estimator(case.scores, case.decoder, mask=case.mask, context=case.context[:, :1])
    with pytest.raises(TypeError, match=r"context_size must be a whole number; got 2\.5"):
        RELAX(OneHot(), context_size=2.5)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "relaxation"),
    [("one_hot", "exp_family"), ("subset", "exp_family"), ("undirected_edges", "binary"), ("k_subset", "exp_family")],
)
def test_rebar_is_unbiased(name: str, relaxation: str) -> None:
    estimator = REBAR(CASES[name][0], relaxation, n_samples=2 if name == "one_hot" else 1).double()
    assert_unbiased(estimator, problem(name), TRUTH[name])


@pytest.mark.parametrize("name", CASES)
def test_relax_has_less_variance_once_trained(name: str) -> None:
    """Than T-REINFORCE (X for bits), where it starts."""
    case = problem(name)
    with torch.no_grad():
        case.decoder.last += 2
    estimator = RELAX(case.structure, hidden_size=16).double()
    plain = Reinforce(case.structure, action="X" if TRUTH[name] == "gibbs" else "T")
    before = measured_variance(plain, case, 4000)
    assert measured_variance(estimator, case, 4000) == pytest.approx(before, rel=0.2)
    # Trees over four tokens leave little to explain.
    train(estimator, case, steps=800 if name == "binary_tree" else 300)
    assert measured_variance(estimator, case, 4000) < 0.9 * before


def test_rebar_learns() -> None:
    case = problem("one_hot")
    estimator = REBAR(OneHot(), temperature=3.0, eta=0.1).double()
    before = measured_variance(estimator, case, 4000)
    train(estimator, case)
    assert measured_variance(estimator, case, 4000) < 0.9 * before
    assert estimator.eta > 0.3
    assert estimator.log_temperature.exp() < 2.9
    fixed = REBAR(OneHot(), learn_temperature=False).double()
    train(fixed, case, steps=3)
    assert fixed.log_temperature.exp() == pytest.approx(0.5)
    assert fixed.eta != 1


def test_the_critic_gets_the_gradient_of_the_squared_gradient() -> None:
    """By finite differences with the noise held fixed."""
    case = problem("k_subset")
    estimator = relax("k_subset", "flat", n_samples=2)

    def squared_gradient() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        out = estimator(case.scores, case.decoder, mask=case.mask)
        (gradient,) = torch.autograd.grad(out.surrogate.sum(), case.scores, retain_graph=True)
        return gradient.square().flatten(1).sum(1).mean(), out.surrogate.mean()

    value, surrogate = squared_gradient()
    slopes = torch.autograd.grad(surrogate, list(estimator.parameters()))
    torch.manual_seed(5)
    reported = estimator(case.scores, case.decoder, mask=case.mask).metrics["squared_gradient"]
    torch.testing.assert_close(reported, value)
    for parameter, slope in zip(estimator.parameters(), slopes, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
            values.append(squared_gradient()[0])
            with torch.no_grad():
                parameter -= step * direction
        numerical = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((slope * direction).sum(), numerical, rtol=1e-4, atol=1e-6)


def slopes_and_differences(
    estimator: ControlVariate, scores: Tensor, objective: Any, mask: Tensor | None, step: float = 1e-5
) -> list[tuple[str, float, float]]:
    """The gradient of every scalar parameter of the critic, and the central difference of ``|g|^2``, noise held."""

    def squared_gradient() -> Tensor:
        torch.manual_seed(5)
        return estimator(scores, objective, mask=mask).metrics["squared_gradient"]

    torch.manual_seed(5)
    surrogate = estimator(scores, objective, mask=mask).surrogate.mean()
    found = []
    for name, parameter in estimator.named_parameters():
        (slope,) = torch.autograd.grad(surrogate, parameter, retain_graph=True)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step
            values.append(squared_gradient())
            with torch.no_grad():
                parameter -= sign * step
        found.append((name, slope.item(), ((values[0] - values[1]) / (2 * step)).item()))
    return found


REBAR_CASES = [
    (name, relaxation)
    for name, (structure, *_) in CASES.items()
    if {"trace", "conditional"} <= structure.oracles or "conditional_utility" in structure.oracles
    for relaxation, described in structure.relaxations.items()
    if described.draws is None
]


@pytest.mark.parametrize(("name", "relaxation"), REBAR_CASES)
def test_rebar_learns_the_right_thing(name: str, relaxation: str) -> None:
    """eta and temperature descend ``|g|^2``, with every relaxation that it accepts."""
    case = problem(name)
    with torch.no_grad():
        case.decoder.last += 1
    estimator = REBAR(case.structure, relaxation, temperature=0.8, n_samples=2).double()
    for _, slope, difference in slopes_and_differences(estimator, case.scores, case.decoder, case.mask):
        assert slope == pytest.approx(difference, rel=1e-4, abs=1e-6)


def bit_vector_decoder() -> tuple[Structure, tuple[int, ...], Any]:
    from structgrad.tasks.bit_vector_vae.model import Decoder

    decoder = Decoder(pixels=6, bits=4, hidden=5, rank=5)
    images = torch.randint(0, 256, (3, 6), dtype=torch.uint8)
    return Subset(), (4,), (decoder, lambda vertices, rows: decoder(vertices, images, rows))


def graph_decoder() -> tuple[Structure, tuple[int, ...], Any]:
    from structgrad.tasks.graph_layout.model import Decoder

    decoder = Decoder(8)
    positions = torch.randn(3, 4, 5, 2)

    def objective(vertices: Tensor, rows: Tensor) -> Tensor:
        at = positions[rows].to(vertices)
        return (decoder(at, vertices, 2) - at[:, 1:]).square().sum((1, 2, 3))

    return SpanningTree(), (5, 5), (decoder, objective)


@pytest.mark.parametrize("make", [bit_vector_decoder, graph_decoder])
def test_rebar_learns_the_right_thing_from_compiled_decoders(make: Any) -> None:
    """In float32, which is what the compiled code takes, against differences in float64, at the same noise."""
    structure, shape, (decoder, objective) = make()
    scores = torch.randn(3, *shape)
    estimator = REBAR(structure, temperature=0.8)
    torch.manual_seed(5)
    surrogate = estimator(scores, objective).surrogate.mean()
    slopes = torch.autograd.grad(surrogate, list(estimator.parameters()))
    decoder.double()
    wide = slopes_and_differences(estimator.double(), scores.double(), objective, None)
    for slope, (_, wide_slope, difference) in zip(slopes, wide, strict=True):
        assert wide_slope == pytest.approx(difference, rel=1e-4)
        assert slope.item() == pytest.approx(difference, rel=1e-3)
        assert abs(difference) > 1e-4


@pytest.mark.parametrize(
    "make", [lambda: relax("one_hot", "flat", n_samples=2), lambda: REBAR(OneHot(), n_samples=2).double()]
)
def test_decoder_gradient_is_that_of_the_hard_samples(make: Any) -> None:
    case = problem("one_hot")
    out = make()(case.scores, case.decoder, mask=case.mask)
    parameters = list(case.decoder.parameters())
    losses = case.decoder(out.vertices.detach(), out.rows)
    torch.testing.assert_close(
        torch.autograd.grad(out.surrogate.sum(), parameters),
        torch.autograd.grad((losses * out.weights).sum(), parameters),
    )
    torch.testing.assert_close(out.objective, out.mean(losses).detach())


def test_evaluations() -> None:
    case = problem("one_hot")
    for estimator, calls in ((relax("one_hot", "parts"), 1), (REBAR(OneHot()).double(), 3)):
        assert estimator(case.scores, case.decoder, mask=case.mask).metrics["decoder_calls"] == calls
        with torch.no_grad():
            out = estimator.eval()(case.scores, case.decoder, mask=case.mask)
        assert out.rows.tolist() == [0, 1]
        assert ((out.vertices == 0) | (out.vertices == 1)).all()


@pytest.mark.parametrize("name", CASES)
def test_large_scores_and_missing_parts_in_float32(name: str) -> None:
    _, shape, mask = CASES[name]
    tile = [50] + [1] * len(shape)
    scores = (200 * torch.rand(2, *shape) - 100).repeat(tile)
    mask = mask.repeat(tile)
    scores = torch.where(mask, scores, torch.nan).requires_grad_()
    estimator = relax(name, "parts").float()
    out = estimator(scores, lambda vertices, rows: vertices.flatten(1).sum(1).sin() + rows, mask=mask)
    (gradient,) = torch.autograd.grad(out.surrogate.sum(), scores, retain_graph=True)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    for slope in torch.autograd.grad(out.surrogate.mean(), list(estimator.parameters())):
        assert slope.isfinite().all()


def test_frozen_critics() -> None:
    """With the same random numbers the scores' gradient is that of critics that learn; nothing else gets one."""
    for make in (
        lambda: RELAX(OneHot()),
        lambda: REBAR(OneHot()),
        lambda: REBAR(OneHot(), learn_temperature=False),
        lambda: RODEO(Subset()),
    ):
        case = problem("subset" if isinstance(make(), RODEO) else "one_hot")
        gradients = []
        for frozen in (False, True):
            torch.manual_seed(0)
            estimator = make().double().requires_grad_(not frozen)
            estimate = estimator(case.scores, case.decoder, mask=case.mask)
            gradients.append(torch.autograd.grad(estimate.surrogate.sum(), case.scores)[0])
        assert (gradients[0] != 0).any()
        assert torch.equal(*gradients)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="critic must be one of"):
        RELAX(OneHot(), "transformer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="critic flat needs a shape"):
        RELAX(OneHot(), "flat")
    with pytest.raises(ValueError, match="critic flat needs a shape"):
        RELAX(OneHot(), "parts", [4])
    with pytest.raises(ValueError, match=r"shape is that of the parts, \[.*\]; got \[2, 4\]"):
        RELAX(OneHot(), "flat", [2, 4])
    with pytest.raises(ValueError, match="n_samples"):
        RELAX(OneHot(), n_samples=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        REBAR(OneHot(), temperature=0.0)
    with pytest.raises(UnsupportedError, match="sinkhorn"):
        REBAR(OneHot(), "sinkhorn")
    case = problem("one_hot")
    wrong = RELAX(OneHot(), "flat", [5]).double()
    with pytest.raises(SizeMismatchError, match=r"built for 5 parts \(shape\); the task has 4"):
        wrong(case.scores, case.decoder, mask=case.mask)
    for structure in (OneHot(), Subset(), Arborescence(), Permutation()):
        RELAX(structure)
