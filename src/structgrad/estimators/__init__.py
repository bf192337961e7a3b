"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""

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
from structgrad.estimators.control_variates import Rebar, Relax
from structgrad.estimators.importance_weighted import ImportanceWeighted
from structgrad.estimators.marginalization import Marginalize, SumAndSample
from structgrad.estimators.muprop import MuProp
from structgrad.estimators.quantization import VectorQuantization
from structgrad.estimators.relaxation import SST, Deterministic, ExponentialSchedule, Perturbed
from structgrad.estimators.score_function import Reinforce
from structgrad.estimators.stein import Rodeo
from structgrad.estimators.straight_through import GappedStraightThrough, GumbelRao, ReinMax, StraightThrough
from structgrad.estimators.surrogate import AdaptiveIMLE, Surrogate
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
    "Rebar",
    "ReinMax",
    "Reinforce",
    "Relax",
    "Rodeo",
    "StraightThrough",
    "SumAndSample",
    "SumOfGamma",
    "Surrogate",
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
