"""Callbacks of a run: progress, losses that are not finite, stopping, and random state that
survives a restart.
"""

from __future__ import annotations

import math
import random
import signal
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, TQDMProgressBar
from torch import Tensor, nn

from structgrad.algorithms.eager import magnitude, values_can_be_read
from structgrad.common.files import write_json
from structgrad.common.metrics import metric_rows
from structgrad.common.text import duration
from structgrad.data import Batch, Steps
from structgrad.training.errors import Interrupted, NonFiniteLossError, Paused
from structgrad.training.stopping import StopRequest


class ProgressBar(TQDMProgressBar):
    """One bar for the whole training, with the task's metrics and the time left; a short one for each validation."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The logged metrics, without a logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}

    @property
    def total_train_batches(self) -> int:
        """The number of batches of the whole training. Lightning's number is the rest after a run
        was resumed.
        """
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Lightning sees the training as one epoch. The time left is that of the steps left."""
        super().on_train_epoch_start(trainer, *arguments)
        bar = self.train_progress_bar
        bar.set_description("Training", refresh=False)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step * trainer.accumulate_grad_batches
        bar.refresh()


class ProgressLines(pl.Callback):
    """The content of :class:`ProgressBar` as an occasional line, for output that is no terminal.

    Args:
        every: seconds between two lines.
    """

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self._first = 0
        self._start = self._next = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time left is estimated from the steps of this process without the first, which compiles kernels."""
        self._first, self._start = trainer.global_step + 1, 0.0
        self._next = time.monotonic() + self.every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Print if it is time."""
        now = time.monotonic()
        step, steps = trainer.global_step, trainer.max_steps
        if step == self._first and not self._start:
            self._start = now
        if now < self._next or not trainer.is_global_zero:
            return
        self._next = now + self.every
        parts = [f"step {step}/{steps}"]
        parts += [f"{k.removeprefix('train/')} {v:.4g}" for k, v in trainer.progress_bar_metrics.items()]
        if step > self._first:
            parts.append(f"{duration((now - self._start) / (step - self._first) * (steps - step))} left")
        print("  ".join(parts), flush=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce the test, which can take longer than a validation."""
        if trainer.is_global_zero:
            print("testing the best model", flush=True)


class Patience(EarlyStopping):
    """Ends the training after ``patience`` validations in a row without a new best one.

    Args:
        monitor: name of the metric.
        mode: ``min`` or ``max``.
        patience: the number of validations.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"], patience: int) -> None:
        super().__init__(monitor, patience=patience, mode=mode, check_finite=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """If a run was killed between its last validation and its test, do not train on."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class Owner(pl.Callback):
    """Writes the name of the run into its checkpoints.

    Args:
        name: name of the run.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the name to the checkpoint."""
        checkpoint["run"] = self.name


class StopOnNonFiniteLoss(pl.Callback):
    """Stops with :class:`NonFiniteLossError`, which names the step, before a later checkpoint could
    be written.

    On a CPU, loss and scores are checked at every step. On other devices they are checked every
    ``every`` steps and before each validation, so that no other step waits for the device. The
    metric that selects the best model is checked after each validation.

    Args:
        monitor: name of that metric.
        every: number of steps between checks on another device.
    """

    def __init__(self, monitor: str, every: int = 50) -> None:
        self.monitor, self.every = monitor, every
        self.first: Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check scores before the estimator reads them, because its structure would refuse them
        with its own message.
        """
        estimator = getattr(pl_module, "estimator", None)
        if estimator is None:
            return

        def look(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # in a compiled step only the loss is checked
                return
            scores = (positional[0] if positional else named["scores"]).detach()
            if values_can_be_read(scores) and magnitude(scores) < math.inf:
                return
            # What is no part, such as padding, may have any value.
            mask = estimator.structure.mask_from(named.get("mask"), named.get("lengths"), scores)
            self._remember(torch.where(estimator.structure.parts(scores, mask), scores, 0.0), trainer.global_step)
            if scores.device.type == "cpu":
                self._stop_if_bad()

        estimator.register_forward_pre_hook(look, with_kwargs=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the first bad step on the device of the loss."""
        loss = outputs["loss"].detach()
        self._remember(loss, batch_idx // trainer.accumulate_grad_batches + 1)
        if loss.device.type == "cpu" or trainer.global_step % self.every == 0:
            self._stop_if_bad()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before validation, because checkpoints are written after it."""
        self._stop_if_bad()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the metric decides which checkpoint is best. Lightning calls the writers of
        checkpoints last.
        """
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and not bool(value.isfinite()):
            raise NonFiniteLossError(
                f"training diverged: {self.monitor} is {value.item()} at step {trainer.global_step}"
            )

    def _remember(self, values: Tensor, step: int) -> None:
        if values_can_be_read(values) and magnitude(values) < math.inf:
            return
        never = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=values.device)
        now = torch.where(values.isfinite().all(), never, step)
        self.first = now if self.first is None else torch.minimum(self.first, now)

    def _stop_if_bad(self) -> None:
        if self.first is not None and self.first.item() < torch.iinfo(torch.int64).max:
            raise NonFiniteLossError(
                f"training diverged: the loss or the scores are not finite at step {int(self.first.item())}"
            )


class StopBetweenSteps(pl.Callback):
    """Saves a run between two training steps after a request to stop, and raises
    :class:`Interrupted`.

    At that point the last step is completely logged and the next one has not begun. So the
    checkpoint is as good as one after a validation. A request during a validation waits for the
    next step. Before and after training it is followed at once.

    Args:
        request: the object that receives the signals.
        checkpoint: the callback that saves.
        pause_at: the step at which to do the same without a request, with :class:`Paused`.
    """

    def __init__(self, request: StopRequest, checkpoint: Path, pause_at: int | None = None) -> None:
        self.request, self.checkpoint, self.pause_at = request, checkpoint, pause_at
        self._saved: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the training loader check the request from now on. Lightning has just installed its
        own handlers.
        """
        self.request.listen()
        steps = trainer.train_dataloader
        assert isinstance(steps, Steps)
        steps.between = lambda: self._look(trainer)
        if self._pauses(trainer):  # the run has paused here before
            raise Paused(trainer.global_step)
        self.request.deferred = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After training no checkpoint is needed."""
        self.request.deferred = False
        if self.request.number is not None:
            raise Interrupted(self.request.number, trainer.global_step if self._saved == trainer.global_step else None)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has installed its own handlers again, so replace them."""
        self.request.listen()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the step, because Lightning's loops cannot distinguish two checkpoints of one
        step.
        """
        self._saved = trainer.global_step

    def _pauses(self, trainer: pl.Trainer) -> bool:
        return self.pause_at is not None and trainer.global_step >= self.pause_at

    def _look(self, trainer: pl.Trainer) -> None:
        asked = self.request.number is not None
        if trainer.world_size > 1:  # a signal may miss some processes, or reach them in different steps
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked and not self._pauses(trainer):
            return
        if self._saved != trainer.global_step:
            trainer.save_checkpoint(self.checkpoint)
        if not asked:
            raise Paused(trainer.global_step)
        raise Interrupted(self.request.number or signal.SIGTERM, trainer.global_step)


class ProgressFile(pl.Callback):
    """Keeps a file with the progress of a run, for a process that waits for it, e.g. a sweep.

    After every validation it has ``step``, the number of finished steps, and ``curve``, the steps
    and values of the selecting metric as in ``metrics.csv``.

    Args:
        file: path of the file; its folder is created.
        metrics: the run's ``metrics.csv``.
        monitor: name of that metric.
    """

    def __init__(self, file: Path, metrics: Path, monitor: str) -> None:
        self.file, self.metrics, self.monitor = file, metrics, monitor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file now, because a run that continues may have nothing to do before it pauses."""
        self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At this point the loggers have the metric."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        curve = [[step, value] for step, name, value in metric_rows(self.metrics) if name == self.monitor]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"step": trainer.global_step, "curve": curve})


class RandomState(pl.Callback):
    """Keeps the state of every random number generator in the checkpoint.

    A resumed run then repeats an uninterrupted one, to the last digit on one process. With several
    processes, the others draw fresh noise.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save only tensors and plain numbers, so that a checkpoint needs no pickle of arbitrary
        objects.
        """
        version, state, gauss = random.getstate()
        name, keys, *rest = np.random.get_state(legacy=True)
        checkpoint["random_state"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": [version, list(state), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        }

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Restore as late as possible, so that Lightning's start does not draw from the restored
        generators.
        """
        state, self._loaded = self._loaded, None
        if state is None or trainer.global_rank:
            return
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        version, python, gauss = state["python"]
        random.setstate((version, tuple(python), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Processes that share a batch must not share noise. The first one keeps the state of the
        checkpoint.
        """
        if trainer.global_rank:
            torch.manual_seed(hash((torch.initial_seed(), trainer.global_rank, trainer.global_step)) % 2**63)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the state until the first batch."""
        self._loaded = checkpoint["random_state"]
