"""What watches over a run: loss that stops being a number, and random state that must survive a restart."""

from __future__ import annotations

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

from structgrad.common.files import write_json
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
        """Of the whole training; Lightning's is what is left of it when a run was resumed."""
        return self.trainer.max_steps

    def on_train_epoch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """The one epoch that Lightning sees is the training; the time left is that of the steps left."""
        super().on_train_epoch_start(trainer, *arguments)
        bar = self.train_progress_bar
        bar.set_description("Training", refresh=False)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.refresh()


class ProgressLines(pl.Callback):
    """What :class:`ProgressBar` shows, as a line now and then, for output that is no terminal.

    Args:
        every: seconds between two lines.
    """

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self._first = 0
        self._start = self._next = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time left is reckoned from the steps of this process."""
        self._first, self._start = trainer.global_step, time.monotonic()
        self._next = self._start + self.every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Print if it is time."""
        now = time.monotonic()
        if now < self._next or not trainer.is_global_zero:
            return
        self._next = now + self.every
        step, steps = trainer.global_step, trainer.max_steps
        left = (now - self._start) / max(1, step - self._first) * (steps - step)
        metrics = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in trainer.progress_bar_metrics.items())
        print(f"step {step}/{steps}  {metrics}  {duration(left)} left", flush=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so: a test can take longer than a validation."""
        if trainer.is_global_zero:
            print("testing the best model", flush=True)


class Patience(EarlyStopping):
    """Ends the training after so many validations in a row that were no better than the best one.

    Args:
        monitor: name of the metric.
        mode: ``min`` or ``max``.
        patience: the number of validations.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"], patience: int) -> None:
        super().__init__(monitor, patience=patience, mode=mode, check_finite=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was killed between its last validation and its test does not train on."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class Owner(pl.Callback):
    """Writes the name of the run into its checkpoints.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """One more key."""
        checkpoint["run"] = self.name


class StopOnNonFiniteLoss(pl.Callback):
    """Stops with :class:`NonFiniteLossError`, naming the step, before a checkpoint could be written after it.

    Loss and scores are looked at every step on a CPU; elsewhere every ``every`` steps and before each validation, so
    that no other step waits for the device. The metric that selects the best model is looked at after each validation.

    Args:
        monitor: name of that metric.
        every: how often values on another device are looked at.
    """

    def __init__(self, monitor: str, every: int = 50) -> None:
        self.monitor, self.every = monitor, every
        self.first: Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores are looked at before an estimator does, whose structure would refuse them in its own words."""
        estimator = getattr(pl_module, "estimator", None)
        if estimator is None:
            return

        def look(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # a compiled step is looked at by its loss alone
                return
            scores = positional[0].detach()
            mask = named.get("mask")
            self._remember(scores if mask is None else torch.where(mask, scores, 0.0), trainer.global_step)
            if scores.device.type == "cpu":
                self._stop_if_bad()

        estimator.register_forward_pre_hook(look, with_kwargs=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the first bad step on the device of the loss."""
        loss = outputs["loss"].detach()
        self._remember(loss, trainer.global_step)
        if loss.device.type == "cpu" or trainer.global_step % self.every == 0:
            self._stop_if_bad()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checkpoints are written after validation: look before."""
        self._stop_if_bad()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the metric decides which checkpoint is the best; Lightning calls those that write them last."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and not bool(value.isfinite()):
            raise NonFiniteLossError(
                f"training diverged: {self.monitor} is {value.item()} at step {trainer.global_step}"
            )

    def _remember(self, values: Tensor, step: int) -> None:
        never = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=values.device)
        now = torch.where(values.isfinite().all(), never, step)
        self.first = now if self.first is None else torch.minimum(self.first, now)

    def _stop_if_bad(self) -> None:
        if self.first is not None and self.first.item() < torch.iinfo(torch.int64).max:
            raise NonFiniteLossError(
                f"training diverged: the loss or the scores are not finite at step {int(self.first.item())}"
            )


class StopBetweenSteps(pl.Callback):
    """Saves a run that was asked to stop, between two training steps, and raises :class:`Interrupted`.

    There, everything of the last step is logged and nothing of the next one has begun, so that the checkpoint is as
    good as one after a validation. Elsewhere in training (a validation) the request waits for the next step; before
    and after training it is followed at once.

    Args:
        request: which receives the signals.
        checkpoint: where to save.
        pause_at: the step at which to do the same without a request, with :class:`Paused`.
    """

    def __init__(self, request: StopRequest, checkpoint: Path, pause_at: int | None = None) -> None:
        self.request, self.checkpoint, self.pause_at = request, checkpoint, pause_at
        self._saved: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on the training loader looks at the request; Lightning has just put its own handlers in place."""
        self.request.listen()
        steps = trainer.train_dataloader
        assert isinstance(steps, Steps)
        steps.between = lambda: self._look(trainer)
        if self._pauses(trainer):  # it has been there before
            raise Paused(trainer.global_step)
        self.request.deferred = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows needs no checkpoint."""
        self.request.deferred = False
        if self.request.number is not None:
            raise Interrupted(self.request.number, trainer.global_step if self._saved == trainer.global_step else None)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has put its own handlers in place again."""
        self.request.listen()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the step: Lightning's loops could not tell two checkpoints of one step apart."""
        self._saved = trainer.global_step

    def _pauses(self, trainer: pl.Trainer) -> bool:
        return self.pause_at is not None and trainer.global_step >= self.pause_at

    def _look(self, trainer: pl.Trainer) -> None:
        asked = self.request.number is not None
        if trainer.world_size > 1:  # a signal need not reach all processes, nor in the same step
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked and not self._pauses(trainer):
            return
        if self._saved != trainer.global_step:
            trainer.save_checkpoint(self.checkpoint)
        if not asked:
            raise Paused(trainer.global_step)
        raise Interrupted(self.request.number or signal.SIGTERM, trainer.global_step)


class ProgressFile(pl.Callback):
    """Keeps a file that says how far a run is, for whoever waits for it, e.g. a sweep.

    After every validation it has ``step``, the number of steps done, and ``curve``, the steps and values of the
    selecting metric as they stand in ``metrics.csv``.

    Args:
        file: where; its folder is made.
        metrics: the run's ``metrics.csv``.
        monitor: name of that metric.
    """

    def __init__(self, file: Path, metrics: Path, monitor: str) -> None:
        self.file, self.metrics, self.monitor = file, metrics, monitor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that continues may have nothing left to do before it pauses."""
        self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loggers have the metric by now."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        lines = self.metrics.read_text().splitlines()[1:] if self.metrics.exists() else []
        found = [line.rsplit(",", 2) for line in lines]
        curve = [[int(step), float(value)] for step, name, value in found if name == self.monitor]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"step": trainer.global_step, "curve": curve})


class RandomState(pl.Callback):
    """Keeps the state of every random number generator in the checkpoint.

    A resumed run then repeats an uninterrupted one, to the last digit on one process; on several, the others draw
    fresh noise.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tensors and plain numbers only: a checkpoint needs no pickle of arbitrary objects."""
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
        """Restore as late as possible: Lightning's own start-up must not draw from the restored generators."""
        state, self._loaded = getattr(self, "_loaded", None), None
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
        """Processes that share a batch must not share the noise; the first keeps the state that a checkpoint holds."""
        if trainer.global_rank:
            torch.manual_seed(hash((torch.initial_seed(), trainer.global_rank, trainer.global_step)) % 2**63)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the state until the first batch."""
        self._loaded = checkpoint["random_state"]
