"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""

from typing import NoReturn

from structgrad.common import renamed
from structgrad.estimators.antithetic import DisARM
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    GibbsEstimator,
    Objective,
    PerturbAndMap,
    SizeMismatchError,
    evaluate,
    gibbs_divergence,
    log_size,
    pathwise,
    replicate,
    utility_divergence,
    with_gradient,
)
from structgrad.estimators.baselines import Baseline, Outcome
from structgrad.estimators.control_variates import REBAR, RELAX
from structgrad.estimators.importance_weighted import ImportanceWeighted
from structgrad.estimators.marginalization import Marginalize, SumAndSample
from structgrad.estimators.mixed import HardConcrete, HardKuma
from structgrad.estimators.muprop import MuProp
from structgrad.estimators.quantization import VectorQuantization
from structgrad.estimators.relaxation import SST, Deterministic, ExponentialSchedule, Perturbed
from structgrad.estimators.score_function import Reinforce
from structgrad.estimators.solvers import imle, perturbed
from structgrad.estimators.stein import RODEO
from structgrad.estimators.straight_through import GappedStraightThrough, GumbelRao, ReinMax, StraightThrough
from structgrad.estimators.surrogate import AdaptiveIMLE, SurrogateGradient
from structgrad.estimators.utilities import (
    Gaussian,
    Gumbel,
    Logistic,
    NegExponential,
    SumOfGamma,
    Utility,
    make_utility,
)
from structgrad.estimators.without_replacement import WithoutReplacement

__all__ = [
    "REBAR",
    "RELAX",
    "RODEO",
    "SST",
    "AdaptiveIMLE",
    "Baseline",
    "Deterministic",
    "DisARM",
    "Divergence",
    "Estimate",
    "Estimator",
    "ExponentialSchedule",
    "GappedStraightThrough",
    "Gaussian",
    "GibbsEstimator",
    "Gumbel",
    "GumbelRao",
    "HardConcrete",
    "HardKuma",
    "ImportanceWeighted",
    "Logistic",
    "Marginalize",
    "MuProp",
    "NegExponential",
    "Objective",
    "Outcome",
    "PerturbAndMap",
    "Perturbed",
    "ReinMax",
    "Reinforce",
    "SizeMismatchError",
    "StraightThrough",
    "SumAndSample",
    "SumOfGamma",
    "SurrogateGradient",
    "Utility",
    "VectorQuantization",
    "WithoutReplacement",
    "evaluate",
    "gibbs_divergence",
    "imle",
    "log_size",
    "make_utility",
    "pathwise",
    "perturbed",
    "replicate",
    "utility_divergence",
    "with_gradient",
]


def __getattr__(name: str) -> NoReturn:
    renamed.missing(__name__, name)
