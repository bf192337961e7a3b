"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""

from typing import NoReturn

from structgrad.common import renamed
from structgrad.estimators.antithetic import DisARM
from structgrad.estimators.base import (
    Divergence,
    Estimate,
    Estimator,
    Objective,
    each_once,
    gibbs_divergence,
    log_size,
    pathwise,
    utility_divergence,
)
from structgrad.estimators.control_variates import REBAR, RELAX
from structgrad.estimators.importance_weighted import ImportanceWeighted
from structgrad.estimators.marginalization import Marginalize, SumAndSample
from structgrad.estimators.muprop import MuProp
from structgrad.estimators.quantization import VectorQuantization
from structgrad.estimators.relaxation import SST, Deterministic, ExponentialSchedule, Perturbed
from structgrad.estimators.score_function import Reinforce
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
    "Deterministic",
    "DisARM",
    "Divergence",
    "Estimate",
    "Estimator",
    "ExponentialSchedule",
    "GappedStraightThrough",
    "Gaussian",
    "Gumbel",
    "GumbelRao",
    "ImportanceWeighted",
    "Logistic",
    "Marginalize",
    "MuProp",
    "NegExponential",
    "Objective",
    "Perturbed",
    "ReinMax",
    "Reinforce",
    "StraightThrough",
    "SumAndSample",
    "SumOfGamma",
    "SurrogateGradient",
    "Utility",
    "VectorQuantization",
    "WithoutReplacement",
    "each_once",
    "gibbs_divergence",
    "log_size",
    "make_utility",
    "pathwise",
    "utility_divergence",
]


def __getattr__(name: str) -> NoReturn:
    renamed.missing(__name__, name)
