"""The enumerated truth itself, and the command that measures estimators against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from structgrad.commands.diagnose import main
from structgrad.diagnose import Problem, diagnose, target
from structgrad.estimators import SST, Marginalize, NegExponential, Reinforce
from structgrad.estimators.utilities import Gumbel, Logistic
from structgrad.structures import Arborescence, KSubset, Matching, OneHot, SpanningTree, Structure, Subset
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
    assert_mean(p.perturbed(utility, 80_000), p.gradient(p.expected(distribution)))


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
    assert isinstance(target(SST(Arborescence())), Gumbel)
    assert isinstance(target(SST(Arborescence(), utility=NegExponential("softplus"))), NegExponential)
    assert isinstance(target(SST(Matching(), "sinkhorn", "neg_exponential")), NegExponential)
    assert target(Reinforce(Matching(), "T")) == "trace"
    assert target(Reinforce(OneHot(), "X")) == "gibbs"


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
        (["structure=one_hot", "estimator=sst", "estimator.temprature=1"], "temprature"),
        (["structure=nothing", "estimator=sst"], "structure/nothing"),
        (["structure=none", "estimator=sst"], "nothing to estimate"),
        (["structure=one_hot", "estimator=sst", "truth=cauchy"], "utility must be one of"),
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


def test_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "structgrad-diagnose structure=" in capsys.readouterr().out
