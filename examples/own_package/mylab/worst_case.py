"""A baseline: the objective at the worst vertex, scaled by a number that is learnt."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from structgrad.estimators import Baseline, Outcome
from structgrad.structures import Structure


class WorstCase(Baseline):
    """``share`` of the objective at ``argmax(-scores)``, one more evaluation an example."""

    needs = ("argmax",)
    has_rival = True

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(()))

    def rival(self, structure: Structure, scores: Tensor, mask: Tensor | None, sample: Callable[[], Tensor]) -> Tensor:
        """The vertex that the scores like least."""
        return structure.argmax(-scores, mask)

    def predict(self, outcome: Outcome) -> Tensor:
        """The baseline of every sample of the example."""
        return self.share * outcome.rival

    def update(self, outcome: Outcome, prediction: Tensor) -> Tensor:
        """Squared error."""
        return (outcome.losses - prediction).square().mean(1)
