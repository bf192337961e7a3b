"""The common code of tasks with few symbols: metrics over the course of training, such as decoder
calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structgrad.tasks.base import StepOutput, Task


class CallsOverTime(Task):
    """A task that reports ``training_calls`` and remembers every validation.

    ``training_calls`` is the mean number of decoder calls an example in training since the last
    validation. At test it is that before the last validation. An estimator may make other calls in
    training than in a test.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        #: Metric -> its value at every validation, from the beginning of the run.
        self.history: dict[str, list[float]] = {}
        self._calls: list[Tensor] = []

    def log_training(self, out: StepOutput) -> None:
        """Log the step and count the decoder calls."""
        calls = out.metrics["decoder_calls"]
        assert isinstance(calls, Tensor)
        self._calls.append(calls)
        super().log_training(out)

    def summarize(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``training_calls`` to the metrics."""
        past = self.history.get("training_calls", [])
        if self._calls:
            calls = self.trainer.strategy.reduce(torch.stack(self._calls).mean(), reduce_op="mean")
            means["training_calls"] = torch.as_tensor(calls)
            self._calls = []
        elif past:
            means["training_calls"] = torch.tensor(past[-1], device=self.device)
        if self.trainer.validating:
            for name, value in means.items():
                self.history.setdefault(name, []).append(float(value))
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the validations so far, and the calls since the last one."""
        checkpoint["history"] = {"values": self.history, "calls": [float(c) for c in self._calls]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them. The best checkpoint, which is loaded for the test, does not undo later
        validations.
        """
        values = checkpoint["history"]["values"]
        if len(values.get("loss", [])) >= len(self.history.get("loss", [])):
            self.history = {name: list(past) for name, past in values.items()}
            self._calls = [torch.tensor(c, device=self.device) for c in checkpoint["history"]["calls"]]
