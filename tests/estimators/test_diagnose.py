"""The enumerated truth itself, and the command that measures estimators against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from structgrad.commands.diagnose import main
from structgrad.diagnose import Problem, diagnose, target
from structgrad.estimators import (
    REBAR,
    RELAX,
    SST,
    Marginalize,
    NegExponential,
    Perturbed,
    Reinforce,
    SumOfGamma,
    SurrogateGradient,
)
from structgrad.estimators.base import PerturbAndMap
from structgrad.estimators.utilities import Gumbel, Logistic
from structgrad.structures import (
    Arborescence,
    CorrelatedKSubset,
    KSubset,
    Layout,
    Matching,
    OneHot,
    SpanningTree,
    Structure,
    Subset,
    UnsupportedError,
)
from structgrad.testing import assert_mean, assert_unbiased


@pytest.mark.parametrize(
    ("structure", "shape"), [(OneHot(), (4,)), (Subset(), (3,)), (SpanningTree(), (4, 4)), (Arborescence(), (4, 4))]
)
def test_gibbs_probabilities_agree_with_the_structure(structure: Structure, shape: tuple[int, ...]) -> None:
    p = Problem.make(structure, shape)
    marginals = structure.marginals(p.scores)
    for b in range(2):
        vertices, probabilities = p.probabilities(b, "gibbs")
        assert len(vertices) == len(structure.enumerate(*shape))
        torch.testing.assert_close(torch.tensordot(probabilities, vertices, 1), marginals[b])


def test_expected_objective_by_hand() -> None:
    p = Problem.make(OneHot(), (3,))
    losses = torch.stack([p.decoder(torch.eye(3), torch.full((3,), b)) for b in range(2)])
    by_hand = (p.scores.softmax(-1) * losses).sum()
    torch.testing.assert_close(p.expected("gibbs"), by_hand)
    torch.testing.assert_close(p.expected("trace"), by_hand)
    torch.testing.assert_close(p.gradient(p.expected("gibbs")), p.gradient(by_hand))


@pytest.mark.parametrize(
    ("structure", "shape", "utility", "distribution"),
    [
        (KSubset(2), (4,), Gumbel(), "trace"),
        (Subset(), (3,), Logistic(), "gibbs"),
        (Arborescence(), (3, 3), NegExponential(), "trace"),
    ],
)
def test_monte_carlo_truth_agrees_with_enumeration(structure, shape, utility, distribution) -> None:  # type: ignore[no-untyped-def]
    p = Problem.make(structure, shape)
    assert_mean(p.perturb_and_map(PerturbAndMap(utility), 80_000), p.gradient(p.expected(distribution)))


def test_a_wrong_gradient_is_noticed() -> None:
    p = Problem.make(OneHot(), (4,))
    with pytest.raises(AssertionError, match="coordinates; worst"):
        assert_unbiased(SST(OneHot(), temperature=1.0), p, "gibbs")


def test_target() -> None:
    assert target(SST(OneHot())) == "gibbs"
    assert target(SST(Subset(), utility="logistic")) == "gibbs"
    assert target(SST(KSubset(2))) == "trace"
    assert target(SST(SpanningTree())) == "trace"
    assert target(SST(Arborescence(), utility="neg_exponential")) == "trace"
    for estimator, utility in (
        (SST(Arborescence()), Gumbel),
        (SST(Arborescence(), utility=NegExponential("softplus")), NegExponential),
        (SST(Matching(), "sinkhorn", "neg_exponential"), NegExponential),
        (SurrogateGradient(KSubset(2), "imle", step=1.0, utility=SumOfGamma(2)), SumOfGamma),
        (Perturbed(OneHot(), "gumbel", sigma=0.3), Gumbel),
    ):
        distribution = target(estimator)
        assert isinstance(distribution, PerturbAndMap)
        assert isinstance(distribution.utility, utility)
        assert distribution.scale == getattr(estimator, "sigma", 1.0)
    assert target(Reinforce(Matching(), "T")) == "trace"
    assert target(Reinforce(OneHot(), "X")) == "gibbs"
    assert target(Reinforce(KSubset(2), "U")) == "trace"
    for control_variate in (REBAR, RELAX):
        assert target(control_variate(KSubset(2))) == target(control_variate(SpanningTree())) == "trace"
        assert target(control_variate(Subset())) == "gibbs"
    assert target(SurrogateGradient(KSubset(2))) == target(Marginalize(KSubset(2))) == "gibbs"


def test_vertices_are_listed() -> None:
    """Random directions miss some of the 1,296 spanning trees of six nodes."""
    p = Problem.make(SpanningTree(), (6, 6))
    assert len(p.vertices(0)) == 6**4
    present = torch.arange(5) < 4
    masked = Problem.make(SpanningTree(), (5, 5), mask=present[:, None] & present)
    assert len(masked.vertices(0)) == 4**2
    two = Problem.make(KSubset(2), (5,), mask=torch.arange(5) < 4)
    assert len(two.vertices(0)) == 6
    few = Problem.make(SpanningTree(), (6, 6))
    few.structure.enumerate = lambda *shape: SpanningTree().enumerate(*shape)[:-1]  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError, match=r"1295 vertices were found, \+1 are missing"):
        few.vertices(0)


def test_perturbed_is_measured_at_its_sigma() -> None:
    """With Gumbel noise on categories the distribution at sigma is the softmax of the scores over sigma."""
    p = Problem.make(OneHot(), (4,))
    losses = torch.stack([p.decoder(torch.eye(4), torch.full((4,), b)) for b in range(2)])
    exact = p.gradient(((p.scores / 0.5).softmax(-1) * losses).sum())
    distribution = target(Perturbed(OneHot(), "gumbel", sigma=0.5))
    assert isinstance(distribution, PerturbAndMap)
    assert_mean(p.perturb_and_map(distribution, 80_000), exact)
    assert diagnose(Perturbed(OneHot(), "gumbel", sigma=0.5), p, samples=40).truth.startswith(
        "perturb-and-MAP, Gumbel times 0.5"
    )


def test_noise_without_a_density() -> None:
    """Differences agree with the enumerated truth where there is one."""

    class Hidden:
        """Gumbel noise whose density nobody knows."""

        def sample(self, scores: torch.Tensor) -> torch.Tensor:
            return Gumbel().sample(scores)

    p = Problem.make(KSubset(2), (4,))
    rows = p.perturb_and_map(PerturbAndMap(Hidden()), 400_000)  # type: ignore[arg-type]
    exact = p.gradient(p.expected("trace"))
    error = (rows.var(0) / len(rows)).sum().sqrt()
    # The bias of the step is below 1 % of the gradient.
    assert (rows.mean(0) - exact).norm() < 4 * error + 0.01 * exact.norm()
    assert error < 0.1 * exact.norm()
    imle = SurrogateGradient(p.structure, "imle", step=1.0, utility=SumOfGamma(2)).double()
    found = diagnose(imle, p, samples=400, reference_samples=100_000)
    assert found.truth == "perturb-and-MAP, SumOfGamma, 100000 samples"
    assert found.decoder.bias < 4 * found.decoder.error


def test_a_baseline_over_the_batch_sees_real_batches() -> None:
    """The variance of one call for one batch, by hand."""
    p = Problem.make(OneHot(), (4,))
    estimator = Reinforce(OneHot(), baseline="batch")
    found = diagnose(estimator, p, samples=4000)
    calls = torch.stack(
        [p.gradient(estimator(p.scores, p.decoder, mask=p.mask).surrogate.sum())[p.is_score] for _ in range(4000)]
    )
    exact = p.gradient(p.expected("gibbs"))[p.is_score]
    assert found.scores.variance == pytest.approx((calls.var(0).sum() / exact.square().sum()).item(), rel=0.15)
    assert found.scores.bias < 4 * found.scores.error


def test_structures_state_their_shape() -> None:
    assert [s.shape(4) for s in (OneHot(), CorrelatedKSubset(2), Matching(), SpanningTree(), Subset("matrix"))] == [
        (4,),
        (7,),
        (4, 4),
        (4, 4),
        (4, 4),
    ]

    class Labels(OneHot):
        def __init__(self) -> None:
            self.layout = Layout("labels", ("n", "C"))

    with pytest.raises(UnsupportedError, match="Labels does not say the shape"):
        Labels().shape(4)


def test_diagnosis_of_known_estimators() -> None:
    p = Problem.make(OneHot(), (4,))
    exact = diagnose(Marginalize(OneHot()), p, samples=20)
    assert exact.scores.bias < 1e-12
    assert exact.scores.variance < 1e-24
    assert exact.decoder_calls == 4
    plain, averaged = (diagnose(Reinforce(OneHot(), n_samples=k), p, samples=4000) for k in (1, 8))
    assert plain.scores.bias < 4 * plain.scores.error
    assert plain.scores.variance / averaged.scores.variance == pytest.approx(8, rel=0.4)
    warm = diagnose(SST(OneHot(), temperature=5.0), p, samples=1000)
    assert warm.scores.bias > 10 * warm.scores.error


def test_command_gives_input_dependent_baselines_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["structure=one_hot", "estimator=nvil", "n=3", "samples=40", "over=none"]) == 0
    assert "as configured" in capsys.readouterr().out


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plot.png"
    options = [f"out={out}", "n=3", "samples=40", "values=[0.5,2]"]
    assert main(["structure=spanning_tree", "estimator=sst", "estimator.relaxation=euclidean", *options]) == 0
    printed = capsys.readouterr().out
    assert "SpanningTree, (3, 3) scores, batch 2; truth: trace, enumerated" in printed
    assert out.stat().st_size > 5000
    assert [line.split()[0] for line in printed.splitlines() if "+-" in line][1:] == ["as", "0.5", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["structure=matching", "estimator=sst"], "which Matching lacks"),
        (["structure=one_hot", "estimator=sst", "estimator.temperature=0"], "temperature must be positive"),
        (["structure=one_hot", "estimator=sst", "estimator.temprature=1"], "nearest: temperature,"),
        (["structure=nothing", "estimator=sst"], "structure=nothing: no such choice; nearest: "),
        (["structure=one_hot", "estimator=sst", "sample=30"], "sample: no such option; nearest: samples,"),
        (["structure=one_hot", "estimator=sst", "over=clip_range"], "over=clip_range: at which values?"),
        (["structure=none", "estimator=sst"], "nothing to estimate"),
        (["structure=one_hot", "estimator=sst", "truth=cauchy"], "utility must be one of"),
        (["structure=one_hot", "estimator=sst", "n=0"], "n must be a whole number of at least 1; got 0"),
        (["structure=one_hot", "estimator=sst", "n=many"], "n must be a whole number of at least 1; got many"),
        (["structure=one_hot", "estimator=sst", "n=2.5"], "n must be a whole number"),
        (["structure=one_hot", "estimator=sst", "batch=0"], "batch must be a whole number of at least 1"),
        (["structure=one_hot", "estimator=sst", "samples=-5"], "samples must be a whole number of at least 20"),
        (["structure=one_hot", "estimator=sst", "samples=null"], "samples must be a whole number of at least 20"),
        (["structure=one_hot", "estimator=sst", "seed=abc"], "seed must be a whole number"),
        (["structure=one_hot", "estimator=sst", "scale=nan"], "scale must be a number"),
        (["structure=one_hot", "estimator=sst", "values=3"], "values must be a list"),
        (["structure=one_hot", "estimator=sst", "out=/nowhere/plot.png"], "cannot be written"),
        (["structure=one_hot", "estimator=sst", "out=plot"], "out must end in"),
        (["structure=one_hot", "estimator=reinforce", "estimator.baseline=batch", "batch=1"], "at least two examples"),
        (["structure=bit_vector", "estimator=dense", "n=40"], "too many to be listed"),
        (["structure=k_subset", "estimator=sst", "n=4"], "have fewer"),
    ],
)
def test_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_command_takes_other_peoples_configurations(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "examples" / "own_package"))
    options = ["hydra.searchpath=[pkg://mylab.configs]", "over=none", "n=4", "samples=20"]
    assert main(["structure=window", "estimator=sst", *options]) == 0
    assert "Window, (4,) scores" in capsys.readouterr().out
    options.append("out=nothing.png")
    assert main(["structure._target_=mylab.window.Window", "structure.width=2", "estimator=sst", *options[1:]]) == 0
    printed = capsys.readouterr().out
    assert "Window, (4,) scores" in printed
    assert "no plot: nothing varies; over=" in printed


def test_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "structgrad-diagnose structure=" in capsys.readouterr().out
