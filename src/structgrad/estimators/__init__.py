"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""

from structgrad.estimators.base import Estimate, Estimator, Objective

__all__ = ["Estimate", "Estimator", "Objective"]

from structgrad.estimators.marginalization import Marginalize as Marginalize
from structgrad.estimators.marginalization import SumAndSample as SumAndSample
from structgrad.estimators.score_function import Reinforce as Reinforce
