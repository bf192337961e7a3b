"""One run: compose, train, test, record; found again and continued by the same command."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from structgrad.data import DataError
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import Task
from structgrad.training.callbacks import (
    NonFiniteLossError,
    ProgressBar,
    RandomState,
    StopBetweenSteps,
    StopOnNonFiniteLoss,
)
from structgrad.training.errors import ConfigurationError, Interrupted, RunError, RunHeldError
from structgrad.training.folder import held, write_json
from structgrad.training.identity import environment, identity, resolved
from structgrad.training.loggers import MetricsFile
from structgrad.training.stopping import StopRequest, stoppable

__all__ = ["ConfigurationError", "Interrupted", "RunError", "RunHeldError", "assemble", "run", "run_name"]

log = logging.getLogger("structgrad")


def assemble(config: DictConfig, chosen: Mapping[str, str] | None = None) -> Task:
    """Build structure, estimator and task; touches no data.

    Args:
        config: the composed configuration. For a structure that is not latent ``config.estimator`` is set to null:
            the task's default estimator has nothing to estimate there.
        chosen: the groups that the user chose by hand, with their choice.

    Raises:
        ConfigurationError: in one line, if the combination cannot work.
    """
    structure = _instantiate(config, "structure")
    assert isinstance(structure, Structure)
    estimator = None
    if not structure.is_latent:
        asked = (chosen or {}).get("estimator", "none")
        if asked != "none":
            raise ConfigurationError(
                f"estimator={asked}: {structure.name} has no latent variable to estimate a gradient for; "
                "leave the estimator out"
            )
        config.estimator = None
    elif config.estimator is None:
        raise ConfigurationError(f"estimator=none: {structure.name} is latent and needs an estimator")
    else:
        estimator = _instantiate(config, "estimator", structure=structure)
        assert isinstance(estimator, Estimator)
    task = _instantiate(config, "task", structure=structure, estimator=estimator)
    assert isinstance(task, Task)
    _check_steps(config.trainer)
    return task


def _instantiate(config: DictConfig, key: str, **objects: Any) -> Any:
    try:
        return instantiate(config[key], **objects)
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ConfigurationError(f"{key}: {reason}") from error


def _check_steps(trainer: DictConfig) -> None:
    steps, every = trainer.max_steps, trainer.val_every_n_steps
    if not 1 <= every <= steps:
        raise ConfigurationError(
            f"trainer.val_every_n_steps={every} must lie between 1 and trainer.max_steps={steps}: "
            "the test uses the best validated model"
        )


def run_name(config: DictConfig, choices: Mapping[str, str]) -> str:
    """``<task>/<structure>-<estimator>-<budget>-s<seed>-<identity>``."""
    estimator = choices["estimator"] if config.estimator is not None else "none"
    parts = (choices["structure"], estimator, choices["budget"], f"s{config.seed}", identity(config))
    return f"{choices['task']}/{'-'.join(parts)}"


def run(config: DictConfig, choices: Mapping[str, str], chosen: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Train, test and record a run, or continue it, or report it if it is finished.

    Args:
        config: the composed configuration.
        choices: group -> choice, for names and summaries.
        chosen: the part of them that the user chose by hand.

    Returns:
        the summary, as in ``summary.json`` of the run folder.

    Raises:
        ConfigurationError: before anything is written.
        RunError: if the run cannot go on; its folder keeps what it has.
    """
    pl.seed_everything(config.seed, verbose=False)
    test_file = config.paths.test_file
    if test_file is not None and str(test_file) not in json.dumps(resolved(config)["task"]):
        raise ConfigurationError(f"paths.test_file: task {choices['task']} reads no published test file")
    config.paths.test_file = None
    task = assemble(config, chosen)
    name = run_name(config, choices)
    folder = Path(config.paths.runs) / name
    OmegaConf.update(config, "run", {"name": name.replace("/", "-"), "folder": str(folder)}, force_add=True)
    with stoppable() as request:
        summary = _finished(folder)
        if summary is not None:
            log.info("this run is finished: %s", folder)
            _print_summary(summary, folder)
        else:
            _make_folder(folder)
            # Only the first of several processes that share the run, which waits for the others.
            with nullcontext() if getattr(rank_zero_only, "rank", 0) else held(folder):
                summary = _finished(folder) or _train_or_explain(config, choices, task, folder, request)
        if test_file is not None:
            config.paths.test_file = test_file
            _test_on(config, chosen, folder)
    return summary


def _finished(folder: Path) -> dict[str, Any] | None:
    file = folder / "summary.json"
    if not file.exists():
        return None
    summary: dict[str, Any] = json.loads(file.read_text())
    return summary


def _train_or_explain(
    config: DictConfig, choices: Mapping[str, str], task: Task, folder: Path, request: StopRequest
) -> dict[str, Any]:
    checkpoint = _checkpoint_to_resume(folder)
    try:
        _describe(folder, config)
        return _train(config, choices, task, folder, checkpoint, request)
    except (FileNotFoundError, DataError) as error:  # data that cannot be had; the message says how to get them
        raise RunError(str(error)) from error
    except NonFiniteLossError as error:
        best = folder / "checkpoints" / "best.ckpt"
        kept = f"the last good checkpoint is {best}" if best.exists() else "no checkpoint was written before"
        raise RunError(f"{error}; {kept}; try a smaller learning rate or gradient clipping") from error
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error}; free space or set paths.runs, then repeat the command"
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; set paths.runs to a folder with space") from error


@rank_zero_only
def _describe(folder: Path, config: DictConfig) -> None:
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    write_json(folder / "environment.json", environment())


def _checkpoint_to_resume(folder: Path) -> Path | None:
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        if not path.exists():
            continue
        try:
            step = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
        except (RuntimeError, KeyError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise RunError(
                f"checkpoint {path} is damaged ({type(error).__name__}); "
                "delete it to continue from an older one or from the start"
            ) from error
        log.info("continuing from step %d: %s", step, path)
        return path
    return None


def _train(
    config: DictConfig,
    choices: Mapping[str, str],
    task: Task,
    folder: Path,
    checkpoint: Path | None,
    request: StopRequest,
) -> dict[str, Any]:
    settings = resolved(config)
    metrics_file = MetricsFile(folder)
    done = 0 if checkpoint is None else torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"]
    metrics_file.rewind(done)
    loggers: list[Logger] = [metrics_file, *_start_loggers(config)]
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor=task.monitor,
        mode=task.mode,
        save_last=True,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    timer = Timer()  # its time is part of the checkpoint, so a resumed run reports its whole training time
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(num_workers|Checkpoint directory|isinstance\\(treespec|dataloader).*")
        trainer = pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            strategy=config.trainer.strategy,
            precision=config.trainer.precision,
            max_steps=config.trainer.max_steps,
            gradient_clip_val=config.trainer.gradient_clip_val,
            val_check_interval=config.trainer.val_every_n_steps,
            log_every_n_steps=config.trainer.log_every_n_steps,
            logger=loggers,
            callbacks=[
                StopOnNonFiniteLoss(),
                RandomState(),
                timer,
                best,
                StopBetweenSteps(request, folder / "checkpoints" / "last.ckpt"),
                ProgressBar(refresh_rate=20),
            ],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(task, ckpt_path=checkpoint, weights_only=True)
        # The step that loggers get for the test; a run that was resumed after its last step would log it one too low.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        training_s = timer.time_elapsed("train")  # now: the test below restores the best checkpoint's callbacks
        pl.seed_everything(config.seed, verbose=False)
        (metrics,) = trainer.test(task, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    summary = {
        "name": settings["run"]["name"],
        **{group: choices[group] for group in ("task", "structure", "estimator", "budget", "data") if group in choices},
        "seed": config.seed,
        "metrics": {**metrics, task.monitor: float(best.best_model_score or torch.nan)},
        "best_step": torch.load(best.best_model_path, map_location="cpu", weights_only=True)["global_step"],
        "steps": trainer.global_step,
        "training_s": round(training_s, 1),
        "device": torch.cuda.get_device_name() if trainer.accelerator.name() == "cuda" else "cpu",
        **environment(),
        "config": {key: value for key, value in settings.items() if key not in ("paths", "logger", "run", "search")},
    }
    if task.estimator is None:
        summary["estimator"] = "none"
    if trainer.is_global_zero:
        pictures = _draw(task, folder, loggers, trainer.global_step)
        write_json(folder / "summary.json", summary)
        if config.paths.results:
            results = Path(config.paths.results)
            results.mkdir(parents=True, exist_ok=True)
            write_json(results / f"{summary['name']}.json", summary)
        _print_summary(summary, folder, pictures)
    for logger in loggers:
        logger.finalize("success")
    return summary


def _test_on(config: DictConfig, chosen: Mapping[str, str] | None, folder: Path) -> None:
    """Test the finished model on ``paths.test_file``; the metrics go to ``test-<name of the file>.json``."""
    task = assemble(config, chosen)
    trainer = pl.Trainer(accelerator=config.trainer.accelerator, devices=1, logger=False, enable_model_summary=False)
    try:
        checkpoint = folder / "checkpoints" / "best.ckpt"
        (metrics,) = trainer.test(task, ckpt_path=checkpoint, weights_only=True, verbose=False)
    except (FileNotFoundError, ValueError) as error:
        raise RunError(str(error)) from error
    file = Path(config.paths.test_file)
    write_json(folder / f"test-{file.stem}.json", {"test_file": str(file), "metrics": metrics})
    print(f"{file}: " + "  ".join(f"{name.removeprefix('test/')} {value:.4g}" for name, value in metrics.items()))


def _start_loggers(config: DictConfig) -> list[Logger]:
    loggers: list[Logger] = []
    for name, node in config.logger.items():
        try:
            logger = instantiate(node)
            # The first call opens a connection, where there is one.
            logger.log_hyperparams(resolved(config))
        except OSError:
            raise
        except Exception as error:  # every tracking service has errors of its own
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"logger {name}: {reason}; logger=default needs no account and no network") from error
        loggers.append(logger)
    return loggers


def _draw(task: Task, folder: Path, loggers: list[Logger], step: int) -> list[Path]:
    (folder / "pictures").mkdir(exist_ok=True)
    task.eval()
    with torch.no_grad():
        pictures = task.pictures(folder / "pictures")
    images = [picture for picture in pictures if picture.suffix == ".png"]  # pages are for the browser
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib import image

            for picture in images:
                logger.experiment.add_image(picture.stem, image.imread(picture), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            for picture in images:
                logger.log_image(picture.stem, [str(picture)], step=step)
    return pictures


def _print_summary(summary: dict[str, Any], folder: Path, pictures: list[Path] | None = None) -> None:
    if pictures is None:
        pictures = sorted(p for p in (folder / "pictures").glob("*") if p.suffix in (".png", ".html"))
    metrics = "  ".join(
        f"{name.removeprefix('test/')} {value:.4g}"
        for name, value in summary["metrics"].items()
        if name.startswith("test/")
    )
    print(
        f"\n{summary['task']} {summary['structure']} {summary['estimator']} "
        f"budget={summary['budget']} seed={summary['seed']}"
    )
    print(f"test:     {metrics}")
    print(f"run:      {folder}")
    print(f"metrics:  {folder / 'metrics.csv'} (over time), {folder / 'summary.json'} (final)")
    for picture in pictures:
        print(f"picture:  {picture}")
