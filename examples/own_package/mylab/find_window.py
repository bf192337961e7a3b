"""A task: a sequence of noise in which the mean of one window is the answer."""

from typing import ClassVar, Literal

import torch
from torch import nn

from structgrad.data import Batch, Batches
from structgrad.tasks.base import Split, StepOutput, Task


class FindWindow(Task):
    """Regress the sum of the entries that a latent window selects.

    Args:
        length: of the sequences.
        examples: in each split.
        batch_size: examples a step.
        hidden: units of the encoder.
        kl_weight: of the divergence from the prior.
        base: structure, estimator and optimizer, see :class:`structgrad.tasks.base.Task`.
    """

    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[Literal["min", "max"]] = "min"
    progress: ClassVar[tuple[str, ...]] = ("overlap",)

    def __init__(self, *, length: int, examples: int, batch_size: int, hidden: int, kl_weight: float, **base) -> None:
        super().__init__(**base)
        self.require_kl("task find_window")
        self.length, self.examples, self.batch_size, self.kl_weight = length, examples, batch_size, kl_weight
        self.encoder = nn.Sequential(
            nn.Conv1d(2, hidden, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.Conv1d(hidden, 1, 3, padding=1)
        )

    def prepare_data(self) -> None:
        """Drawn anew from fixed seeds each time, in no time."""

    def batches(self, split: Split) -> Batches:
        """Flags mark the window; values are noise."""
        random = torch.Generator().manual_seed(("train", "val", "test").index(split))
        values = torch.randn(self.examples, self.length, generator=random)
        start = torch.randint(self.length - 2, (self.examples, 1), generator=random)
        window = ((torch.arange(self.length) >= start) & (torch.arange(self.length) < start + 3)).float()
        flags = window + 0.3 * torch.randn(window.shape, generator=random)
        data = {"input": torch.stack([values, flags], 1), "window": window, "answer": (values * window).sum(1)}
        return Batches(data, self.batch_size, shuffle=split == "train")

    def step(self, batch: Batch) -> StepOutput:
        """Squared error of the sum over the latent window."""
        values, answer = batch["input"][:, 0], batch["answer"]
        scores = self.encoder(batch["input"])[:, 0]
        estimate = self.estimator(scores, lambda x, rows: ((x * values[rows]).sum(-1) - answer[rows]) ** 2)
        loss = estimate.surrogate if self.training else estimate.objective
        loss = loss + self.kl_weight * self.latent_kl(estimate, scores)
        overlap = estimate.mean((estimate.vertices * batch["window"][estimate.rows]).sum(-1) / 3)
        return StepOutput(loss.mean(), len(scores), {"overlap": overlap.detach().mean()})
