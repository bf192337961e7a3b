"""One run: compose, train, test, record; found again and continued by the same command.

What only training needs (Lightning above all, which takes seconds to import) is imported when there is something to
train: an error or a finished run does not wait for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from structgrad.common.files import write_json
from structgrad.common.text import first_line
from structgrad.data import DataError, MissingDataError
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure, UnsupportedError
from structgrad.training.errors import ConfigurationError, Interrupted, NonFiniteLossError, RunError, RunHeldError
from structgrad.training.folder import checkpoint_to_resume, held, read_summary
from structgrad.training.identity import environment, identity, resolved, seed_everything
from structgrad.training.options import check_kinds, check_node, check_options
from structgrad.training.stopping import StopRequest, stoppable

if TYPE_CHECKING:
    from structgrad.tasks.base import Task

__all__ = ["ConfigurationError", "Interrupted", "RunError", "RunHeldError", "assemble", "run", "run_name"]

log = logging.getLogger("structgrad")


def assemble(config: DictConfig, chosen: Mapping[str, str] | None = None) -> Task:
    """Build structure, estimator and task; touches no data.

    Args:
        config: the composed configuration. For a structure that is not latent ``config.estimator`` is set to null:
            the task's default estimator has nothing to estimate there.
        chosen: what the user gave by hand, group or key -> choice or value.

    Raises:
        ConfigurationError: in one line, if the combination cannot work.
    """
    check_options(config, chosen or {})
    structure, estimator = _assemble_latent(config, chosen or {})
    return _assemble_task(config, structure, estimator)


def _assemble_latent(config: DictConfig, chosen: Mapping[str, str]) -> tuple[Structure, Estimator | None]:
    """What needs no task, and much less time to import."""
    structure: Structure = _instantiate(config, "structure", Structure)
    if not structure.is_latent:
        asked = chosen.get("estimator", "none")
        if asked != "none":
            raise ConfigurationError(
                f"estimator={asked}: {structure.name} has no latent variable to estimate a gradient for; "
                "leave the estimator out"
            )
        config.estimator = None
        return structure, None
    if config.estimator is None:
        raise ConfigurationError(f"estimator=none: {structure.name} is latent and needs an estimator")
    return structure, _instantiate(config, "estimator", Estimator, structure=structure)


def _assemble_task(config: DictConfig, structure: Structure, estimator: Estimator | None) -> Task:
    task: Task = _instantiate(config, "task", object, structure=structure, estimator=estimator)
    try:
        task.make_optimizer(parameter for parameter in task.parameters() if parameter.requires_grad)
    except (ValueError, TypeError) as error:  # its options are known only when it has parameters
        raise ConfigurationError(f"task.optimizer: {first_line(error)}") from error
    return task


def _instantiate(config: DictConfig, key: str, kind: type, **objects: Any) -> Any:
    try:
        node = OmegaConf.to_container(config[key], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{key}: {first_line(error)}") from error
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigurationError(f"{key} has no _target_; see --help for its choices")
    check_node(key, node, objects)
    try:
        built = instantiate(config[key], **objects)
    except InstantiationException as error:
        # What a constructor refuses is the user's affair; any other error is a bug, and shows where it is.
        if isinstance(error.__cause__, ValueError | UnsupportedError):
            raise ConfigurationError(f"{key}: {first_line(error.__cause__)}") from error
        raise error.__cause__ or error from None
    if not isinstance(built, kind):
        raise ConfigurationError(f"{key}._target_: {node['_target_']} makes no {kind.__name__}")
    return built


def _check_kinds_of_task(config: DictConfig) -> None:
    node = OmegaConf.to_container(config.task, resolve=False)
    if isinstance(node, dict) and "_target_" in node:
        check_kinds("task", {str(key): value for key, value in node.items()})


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
    chosen = chosen or {}
    check_options(config, chosen)
    if config.run.name is not None or config.run.folder is not None:
        raise ConfigurationError(
            "run.name and run.folder follow from the configuration; paths.runs says where runs are"
        )
    test_file, config.paths.test_file = config.paths.test_file, None
    tested = None if test_file is None else _task_of_file(config, choices, chosen, test_file)
    seed_everything(config.seed)
    structure, estimator = _assemble_latent(config, chosen)
    try:
        name = run_name(config, choices)
    except OmegaConfBaseException as error:
        # Options that refer to those of the data set fail first where it is that of another task.
        _check_kinds_of_task(config)
        raise ConfigurationError(first_line(error)) from error
    folder = Path(config.paths.runs) / name
    label = name.replace("/", "-")
    OmegaConf.update(config, "run", {"name": label, "folder": str(folder)}, force_add=True)
    with stoppable() as request:
        summary = read_summary(folder, label)
        if summary is not None:
            log.info("this run is finished: %s", folder)
            _keep(summary, config)
            _print_summary(summary, folder)
        else:
            task = _assemble_task(config, structure, estimator)
            _prepare(task, config.paths.data)
            _make_folder(folder)
            # Only the first of several processes that share the run, which waits for the others.
            with held(folder) if _is_first_process() else nullcontext():
                summary = read_summary(folder, label)
                if summary is None:
                    summary = _train_or_explain(config, choices, task, folder, request)
                _keep(summary, config)
            if _is_first_process():
                _print_summary(summary, folder)
        if tested is not None:
            _test_on(tested, config, folder, Path(test_file))
    return summary


def _is_first_process() -> bool:
    """Of those that share a run; the launchers of Lightning and torch number them like this."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def _task_of_file(config: DictConfig, choices: Mapping[str, str], chosen: Mapping[str, str], test_file: str) -> Task:
    """The task with a published test file, which is read here, before anything is trained."""
    with_file = OmegaConf.merge(config, {"paths": {"test_file": test_file}})
    assert isinstance(with_file, DictConfig)
    if str(test_file) not in json.dumps(resolved(with_file)["task"]):
        raise ConfigurationError(f"paths.test_file: task {choices['task']} reads no published test file")
    task = assemble(with_file, chosen)
    try:
        task.batches("test")
    except (OSError, ValueError, DataError) as error:
        raise ConfigurationError(f"paths.test_file: {first_line(error)}") from error
    return task


def _prepare(task: Task, data: str) -> None:
    """Make the data, so that nothing is written of a run that has none or whose sizes do not fit them."""
    try:
        task.prepare_data()
        for split in ("train", "val", "test"):
            task.batches(split)
    except DataError as error:  # the message says how to get them
        astray = isinstance(error, MissingDataError) and not Path(data).is_dir()
        hint = f" There is no folder {data}: STRUCTGRAD_DATA or paths.data says where data are." if astray else ""
        raise RunError(f"{error}{hint}") from error
    except ValueError as error:
        raise ConfigurationError(f"task: {first_line(error)}") from error


def _train_or_explain(
    config: DictConfig, choices: Mapping[str, str], task: Task, folder: Path, request: StopRequest
) -> dict[str, Any]:
    from structgrad.training.fit import fit

    checkpoint = checkpoint_to_resume(folder, config.run.name)
    try:
        if _is_first_process():
            OmegaConf.save(config, folder / "config.yaml", resolve=True)
            write_json(folder / "environment.json", environment())
        return fit(config, choices, task, folder, checkpoint, request)
    except NonFiniteLossError as error:
        best = folder / "checkpoints" / "best.ckpt"
        kept = f"the last good checkpoint is {best}" if best.exists() else "no checkpoint was written before"
        raise RunError(f"{error}; {kept}; try a smaller learning rate or gradient clipping") from error
    except OSError as error:
        raise _unwritable(folder, "paths.runs", error) from error


def _unwritable(folder: Path, key: str, error: OSError) -> RunError:
    """Names the file of the error, where it has one, which may be elsewhere."""
    where = error.filename or folder
    return RunError(f"cannot use {where}: {error.strerror or error}; free space or set {key}, then repeat the command")


def _make_folder(folder: Path) -> None:
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; set paths.runs to a folder with space") from error


def _keep(summary: dict[str, Any], config: DictConfig) -> None:
    """Leave a copy in ``paths.results``."""
    if not config.paths.results or not _is_first_process():
        return
    results = Path(config.paths.results)
    try:
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / f"{summary['name']}.json", summary)
    except OSError as error:
        raise RunError(
            f"cannot write to {results}: {error.strerror}; set paths.results and repeat the command"
        ) from error


def _test_on(task: Task, config: DictConfig, folder: Path, file: Path) -> None:
    """Test the finished model on a published file; files of equal names do not overwrite each other's results."""
    from structgrad.training.fit import evaluate

    metrics = evaluate(task, config, folder / "checkpoints" / "best.ckpt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    out = folder / f"test-{file.stem}-{digest}.json"
    try:
        write_json(out, {"test_file": str(file), "metrics": metrics})
    except OSError as error:
        raise _unwritable(folder, "paths.runs", error) from error
    print(f"{file}: " + "  ".join(f"{name.removeprefix('test/')} {value:.4g}" for name, value in metrics.items()))
    print(f"also in:  {out}")


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
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
    pictures = sorted(p for p in (folder / "pictures").glob("*") if p.suffix in (".png", ".html"))
    for picture in pictures:
        print(f"picture:  {picture}")
