"""Stand-ins for "no latent variable": a model without structure, and a model that is given the true one."""

from __future__ import annotations

from typing import ClassVar

from structgrad.structures.base import Structure
from structgrad.structures.layout import Directed, Vector


class NoStructure(Structure):
    """No latent variable at all (``structure=none``): the task uses its unstructured baseline."""

    is_latent: ClassVar[bool] = False

    def __init__(self) -> None:
        self.layout = Vector()


class GroundTruth(Structure):
    """The true structure from the data (``structure=ground_truth``): nothing is learnt about it."""

    is_latent: ClassVar[bool] = False
    is_given: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layout = Directed()
