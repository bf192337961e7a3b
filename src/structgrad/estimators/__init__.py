"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""

from structgrad.estimators.base import Estimate, Estimator, Objective

__all__ = ["Estimate", "Estimator", "Objective"]

from structgrad.estimators.marginalization import Marginalize as Marginalize
from structgrad.estimators.marginalization import SumAndSample as SumAndSample
from structgrad.estimators.score_function import Reinforce as Reinforce
from structgrad.estimators.relaxation import SST as SST
from structgrad.estimators.relaxation import Deterministic as Deterministic
from structgrad.estimators.relaxation import ExponentialSchedule as ExponentialSchedule
from structgrad.estimators.relaxation import Perturbed as Perturbed
from structgrad.estimators.utilities import NegExponential as NegExponential

from structgrad.estimators.control_variates import Rebar as Rebar
from structgrad.estimators.control_variates import Relax as Relax
from structgrad.estimators.surrogate import SumOfGamma as SumOfGamma
from structgrad.estimators.surrogate import Surrogate as Surrogate
