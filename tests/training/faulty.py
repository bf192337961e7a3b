"""The example task with faults to order."""

from __future__ import annotations

import time
from typing import Any

import torch
from mylab.find_window import FindWindow

from structgrad.data import Batch
from structgrad.tasks.base import StepOutput


class Faulty(FindWindow):
    """Slow enough to be killed, or with a loss that stops being a number.

    Args:
        pause: seconds a training step takes longer.
        break_at: the training step from which on the loss is NaN.
        base: of the example.
    """

    def __init__(self, *, pause: float = 0.0, break_at: int = 10**9, **base: Any) -> None:
        super().__init__(**base)
        self.pause, self.break_at = pause, break_at

    def step(self, batch: Batch) -> StepOutput:
        output = super().step(batch)
        if self.training:
            time.sleep(self.pause)
            if self.global_step >= self.break_at - 1:
                output.loss = output.loss * torch.nan
        return output


class Calm(FindWindow):
    """Without dropout: a batch of two halves has the mean of their gradients."""

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.encoder[2].p = 0.0


class ByHand(FindWindow):
    """Makes the steps of its optimizer itself."""

    automatic_optimization = False
