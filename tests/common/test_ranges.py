"""Options that count things are whole numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from structgrad import estimators
from structgrad.common.ranges import check_count
from structgrad.estimators.baselines import LearntBaseline
from structgrad.losses import perturbed_loss
from structgrad.structures import (
    Arborescence,
    BudgetSubset,
    Constituency,
    CorrelatedKSubset,
    FactorGraph,
    Grammar,
    HiddenMarkov,
    KSubset,
    Labelled,
    LinearChain,
    LowRankGrammar,
    Matching,
    OneHot,
    SemiMarkov,
    Subset,
)
from structgrad.structures.factor_graph import Budget


@pytest.mark.parametrize("value", [2.0, 2.5, True, "2", None])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("k", KSubset),
        ("k", CorrelatedKSubset),
        ("budget", BudgetSubset),
        ("labels", LinearChain),
        ("labels", Constituency),
        ("states", HiddenMarkov),
        ("labels", lambda n: Labelled(Arborescence(), n)),
        ("labels", lambda n: SemiMarkov(n, 1)),
        ("longest", lambda n: SemiMarkov(1, n)),
        ("nonterminals", lambda n: Grammar(n, 1)),
        ("preterminals", lambda n: LowRankGrammar(1, n, 1)),
        ("rank", lambda n: LowRankGrammar(1, 1, n)),
        ("max_iterations", lambda n: Matching(max_iterations=n)),
        ("size", lambda n: FactorGraph(n, [])),
        ("k", lambda n: Budget([0, 1], n)),
        ("max_iterations", lambda n: FactorGraph(2, [], max_iterations=n)),
        ("max_nodes", lambda n: FactorGraph(2, [], max_nodes=n)),
        ("listed", lambda n: FactorGraph(2, [], listed=n)),
        ("n_samples", lambda n: estimators.SST(OneHot(), n_samples=n)),
        ("n_samples", lambda n: estimators.Reinforce(OneHot(), n_samples=n)),
        ("n_samples", lambda n: estimators.REBAR(OneHot(), n_samples=n)),
        ("n_samples", lambda n: estimators.RODEO(Subset(), n_samples=n)),
        ("n_samples", lambda n: estimators.AdaptiveIMLE(OneHot(), n_samples=n)),
        ("n_samples", lambda n: perturbed_loss(OneHot(), torch.zeros(2), torch.tensor([1.0, 0.0]), n_samples=n)),
        ("hidden_size", lambda n: estimators.RELAX(OneHot(), hidden_size=n)),
        ("context_size", LearntBaseline),
        ("n_pairs", lambda n: estimators.DisARM(Subset(), n_pairs=n)),
        ("k", lambda n: estimators.SumAndSample(OneHot(), k=n)),
        ("tries", lambda n: estimators.SumAndSample(OneHot(), tries=n)),
        ("k", lambda n: estimators.WithoutReplacement(OneHot(), k=n)),
        ("words", lambda n: estimators.VectorQuantization(OneHot(), n, 1)),
        ("n_conditional", lambda n: estimators.GumbelRao(OneHot(), n_conditional=n)),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_count_is_a_whole_number(name: str, make: Callable[[object], object], value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a whole number; got {value!r}"):
        make(value)


def test_integers_of_numpy_are_counts() -> None:
    check_count("k", np.int64(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1 and at most 3; got 4"):
        check_count("k", 4, most=3)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        KSubset(0)
