"""Training with Lightning. Its imports take long, so errors in options are found before it is
imported.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from structgrad.common.files import write_json
from structgrad.common.private import log_the_test_at_the_last_step, skip_idle_callbacks
from structgrad.common.text import first_line
from structgrad.tasks.base import Task
from structgrad.training import contract
from structgrad.training.callbacks import (
    Owner,
    Patience,
    ProgressBar,
    ProgressFile,
    ProgressLines,
    RandomState,
    StopBetweenSteps,
    StopOnNonFiniteLoss,
)
from structgrad.training.checkpoints import BestAndLast, CheckedFiles
from structgrad.training.compiled import compiled_step
from structgrad.training.composition import Run
from structgrad.training.environment import environment, seed_everything
from structgrad.training.errors import RunError
from structgrad.training.loggers import MetricsFile, end, hyperparameters, log_picture
from structgrad.training.processes import number_of_devices
from structgrad.training.stopping import StopRequest

# A run prints only our lines. Lightning sets the level of its loggers when it is imported, above.
for _name in ("pytorch_lightning", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def fit(run: Run, task: Task, checkpoint: Path | None, request: StopRequest) -> dict[str, Any]:
    """Train a task from its start or from a checkpoint, test its best model, draw, and write the
    summary.

    Args:
        run: a run to whose folder no other process writes.
        task: newly built.
        checkpoint: the checkpoint from which to continue.
        request: the request to stop training.

    Raises:
        NonFiniteLossError: if training diverges.
        Interrupted: after a request to stop was followed.
        RunError: if a logger does not start or a file of the run is damaged.
    """
    if number_of_devices(run.config.trainer) == 1:
        rank_zero_only.rank = 0  # type: ignore[attr-defined]  # Lightning takes it from the environment
    metrics_file = MetricsFile(run.folder)
    metrics_file.rewind(0 if checkpoint is None else _step_of(checkpoint))
    with _services(run) as services:
        return _fit(run, task, checkpoint, request, metrics_file, services)


def _fit(
    run: Run,
    task: Task,
    checkpoint: Path | None,
    request: StopRequest,
    metrics_file: MetricsFile,
    services: list[Logger],
) -> dict[str, Any]:
    config, folder, loggers = run.config, run.folder, [metrics_file, *services]
    best = BestAndLast(
        folder / "checkpoints",
        filename="best",
        monitor=task.monitor,
        mode=task.mode,
        save_last=True,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    if config.trainer.compile is not None:
        task.compiled_step = compiled_step(task, config.trainer.compile)
    progress = config.paths.get("progress")
    followed = [ProgressFile(Path(progress), metrics_file.file, task.monitor)] if progress else []
    timer = Timer()  # its time is part of the checkpoint, so a resumed run reports its whole training time
    with products_in(config.trainer.matmul_precision), without_warnings():
        trainer = pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            strategy=config.trainer.strategy,
            precision=config.trainer.precision,
            max_steps=config.trainer.max_steps,
            gradient_clip_val=config.trainer.gradient_clip_val,
            # Lightning counts batches between two validations, and steps everywhere else.
            val_check_interval=config.trainer.val_every_n_steps * config.trainer.accumulate_grad_batches,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            log_every_n_steps=config.trainer.log_every_n_steps,
            logger=loggers,
            callbacks=[
                StopOnNonFiniteLoss(task.monitor),
                Owner(run.name),
                RandomState(),
                timer,
                best,
                *followed,
                *(
                    []
                    if config.trainer.patience is None
                    else [Patience(task.monitor, task.mode, config.trainer.patience)]
                ),
                StopBetweenSteps(request, folder / "checkpoints" / "last.ckpt", config.trainer.get("pause_at")),
                ProgressBar(refresh_rate=20) if sys.stderr.isatty() else ProgressLines(),
            ],
            plugins=_plugins(config),
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        skip_idle_callbacks(trainer)
        trainer.fit(task, ckpt_path=checkpoint, weights_only=True)
        log_the_test_at_the_last_step(trainer)
        training_s = timer.time_elapsed(
            "train"
        )  # read it now, because the test restores the best checkpoint's callbacks
        seed_everything(run.seed)
        (metrics,) = trainer.test(task, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    best_score = best.best_model_score
    assert best_score is not None, "training ends with a validation"
    summary = {
        "name": run.name,
        **{group: run.choices[group] for group in contract.CHOICES if run.choices.get(group) is not None},
        "seed": run.seed,
        "metrics": {**metrics, task.monitor: float(best_score)},
        "mode": task.mode,
        "best_step": _step_of(best.best_model_path),
        "steps": trainer.global_step,
        "training_s": round(training_s, 1),
        "device": torch.cuda.get_device_name() if trainer.accelerator.name() == "cuda" else "cpu",
        **environment(),
        "config": run.deciding,
    }
    if task.estimator is None:
        summary["estimator"] = "none"
    if config.trainer.matmul_precision != "highest":
        summary["products"] = "TF32" if trainer.accelerator.name() == "cuda" else "bfloat16"
    if trainer.is_global_zero:
        _draw(task, folder, loggers, trainer.global_step)
        write_json(folder / "summary.json", summary)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):  # the tab HParams compares the configuration with these
            logger.log_hyperparams(hyperparameters(run), summary["metrics"], trainer.global_step)
        logger.finalize("success")
    return summary


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """A context with this precision (in torch's names) for products of float32 matrices, except
    those of structures.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def without_warnings() -> Iterator[None]:
    """A context in which Lightning's warnings are not shown, because a run prints only our lines."""
    with warnings.catch_warnings():
        for module in ("pytorch_lightning", "lightning_fabric"):
            warnings.filterwarnings("ignore", module=module)
        yield


class Seeded(pl.Callback):
    """Seeds the random numbers of a test when the model is made and loaded, so that they equal
    those after the training.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the seed."""
        seed_everything(self.seed)


class OneProcess(LightningEnvironment):
    """The environment of a run on one device, whatever ranks a launcher has set."""

    @property
    def creates_processes_externally(self) -> bool:
        """No launcher has started processes for this run."""
        return False

    def local_rank(self) -> int:
        """The only rank."""
        return 0

    def node_rank(self) -> int:
        """The only rank."""
        return 0


def _plugins(config: DictConfig) -> list[Any]:
    """With several devices, the environment is that of the launcher that Lightning finds."""
    alone = [OneProcess()] if number_of_devices(config.trainer) == 1 else []
    return [CheckedFiles(), *alone]


def test(task: Task, options: DictConfig, seed: int, checkpoint: Path) -> dict[str, float]:
    """The metrics of a checkpoint on the test set of a task.

    Args:
        task: newly built.
        options: ``trainer``; only the hardware and the precision matter.
        seed: seed of the random numbers.
        checkpoint: the file with the weights.
    """
    rank_zero_only.rank = 0  # type: ignore[attr-defined]  # see `fit`
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Seeded(seed)],
        plugins=[CheckedFiles(), OneProcess()],
    )
    with products_in(options.matmul_precision), without_warnings():
        (metrics,) = trainer.test(task, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return dict(metrics)


def _step_of(checkpoint: str | Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


@contextmanager
def _services(run: Run) -> Iterator[list[Logger]]:
    """The loggers of the configuration; their services are released at the end."""
    loggers: list[Logger] = []
    failed = True
    try:
        for name, node in run.config.logger.items():
            try:
                logger = instantiate(node)
                # For a remote service, the first call opens a connection. One that does not open has none to release.
                logger.log_hyperparams(hyperparameters(run))
                loggers.append(logger)
            except OSError:
                raise
            except Exception as error:  # every tracking service has its own errors
                reason = first_line(error.__cause__ or error)  # Hydra's own first line says where
                raise RunError(f"logger {name}: {reason}; logger=default needs no account and no network") from error
        yield loggers
        failed = False
    finally:
        for logger in loggers:
            end(logger, failed)


def _draw(task: Task, folder: Path, loggers: list[Logger], step: int) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    task.eval().float()  # in the precision of the data, whatever the precision of the training
    with torch.no_grad():
        pictures = task.pictures(folder / "pictures")
    images = [picture for picture in pictures if picture.suffix == ".png"]  # pages are for the browser
    for picture in images:
        for logger in loggers:
            log_picture(logger, picture, step)
