"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""

from structgrad.estimators.base import Divergence, Estimate, Estimator, Objective
from structgrad.estimators.control_variates import Rebar, Relax
from structgrad.estimators.marginalization import Marginalize, SumAndSample
from structgrad.estimators.relaxation import SST, Deterministic, ExponentialSchedule, Perturbed
from structgrad.estimators.score_function import Reinforce
from structgrad.estimators.surrogate import SumOfGamma, Surrogate
from structgrad.estimators.utilities import Gaussian, Gumbel, Logistic, NegExponential, Utility, make_utility

__all__ = [
    "SST",
    "Deterministic",
    "Divergence",
    "Estimate",
    "Estimator",
    "ExponentialSchedule",
    "Gaussian",
    "Gumbel",
    "Logistic",
    "Marginalize",
    "NegExponential",
    "Objective",
    "Perturbed",
    "Rebar",
    "Reinforce",
    "Relax",
    "SumAndSample",
    "SumOfGamma",
    "Surrogate",
    "Utility",
    "make_utility",
]
