"""Gradient estimators: relaxation, surrogate gradients, score function, marginalisation."""
