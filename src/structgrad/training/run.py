"""One run: compose, train, test, record. The same command finds it again and continues it.

What only training needs is imported when there is something to train. Lightning takes seconds to
import, and an error or a finished run does not wait for it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from structgrad.common.files import expanded, write_json
from structgrad.common.metrics import metric_rows
from structgrad.common.text import first_line
from structgrad.data import DataError, MissingDataError
from structgrad.estimators.base import SizeMismatchError
from structgrad.training.composition import Run, assemble, build_latent, build_task, reads_test_file
from structgrad.training.environment import environment, seed_everything
from structgrad.training.errors import (
    ConfigurationError,
    Interrupted,
    NonFiniteLossError,
    Paused,
    RunError,
    RunHeldError,
)
from structgrad.training.folder import KEPT, checkpoint_to_resume, held, read_summary
from structgrad.training.inputs import check_unchanged, digests
from structgrad.training.stopping import StopRequest, stoppable

if TYPE_CHECKING:
    from structgrad.tasks.base import Task

__all__ = ["ConfigurationError", "Interrupted", "Run", "RunError", "RunHeldError", "assemble", "run"]

log = logging.getLogger("structgrad")


def run(
    config: DictConfig,
    choices: Mapping[str, str],
    chosen: Mapping[str, str] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train, test and record a run, or continue it, or report it if it is finished.

    Args:
        config: the composed configuration, which is not changed.
        choices: group -> choice, for names and summaries.
        chosen: those choices that the user made by hand.
        command: the command that starts and continues the run, for the page of all runs.

    Returns:
        the summary, as in ``summary.json`` of the run folder.

    Raises:
        ConfigurationError: before anything is written.
        RunError: if the run cannot continue; its folder keeps its files.
    """
    this = Run.compose(config, choices, chosen)
    test_file = expanded(config.paths.test_file)
    tested = None if test_file is None else _task_of_file(this, test_file)
    seed_everything(this.seed)
    structure, estimator = build_latent(this.config)
    with stoppable() as request, _saying_what_is_kept(this.folder):
        check_unchanged(this)
        summary = read_summary(this.folder, this.name)
        if summary is not None:
            log.info("this run is finished: %s", this.folder)
            _say_what_is_not_logged(this)
            _keep(summary, this)
            _print_summary(summary, this.folder)
        else:
            task = build_task(this.config, structure, estimator)
            _prepare(task, this.config.paths.data)
            _make_folder(this.folder)
            # Of several processes that share the run, only the first takes the lock. It waits for the others.
            with held(this.folder) if this.is_first else nullcontext():
                summary = read_summary(this.folder, this.name)
                if summary is None:
                    summary = _train_or_explain(this, task, request, command)
                _keep(summary, this)
            if this.is_first:
                _print_summary(summary, this.folder)
        if tested is not None and test_file is not None:
            _test_on(tested, this, Path(test_file))
    return summary


@contextmanager
def _saying_what_is_kept(folder: Path) -> Iterator[None]:
    """Let a request to stop say whether the same command continues the run."""
    try:
        yield
    except Paused:
        raise
    except Interrupted as stop:
        begun = any((folder / kept).exists() for kept in KEPT)
        raise Interrupted(stop.number, stop.step, begun=begun) from None


def _task_of_file(this: Run, test_file: str) -> Task:
    """The task with a published test file. The file is read here, before anything is trained."""
    with_file = OmegaConf.merge(this.config, {"paths": {"test_file": test_file}})
    assert isinstance(with_file, DictConfig)
    if not reads_test_file(this.config):
        raise ConfigurationError(f"paths.test_file: task {this.choices['task']} reads no published test file")
    task = build_task(with_file, *build_latent(with_file))
    try:
        task.batches("test")
    except (OSError, ValueError, DataError) as error:
        raise ConfigurationError(f"paths.test_file: {first_line(error)}") from error
    return task


def _prepare(task: Task, data: str) -> None:
    """Make the data. So nothing is written for a run without data, or whose sizes do not fit them."""
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


def _train_or_explain(this: Run, task: Task, request: StopRequest, command: str) -> dict[str, Any]:
    """Train. If the run fails, ``error.txt`` in its folder says why until the run is started again."""
    failure = this.folder / "error.txt"
    failure.unlink(missing_ok=True)
    try:
        return _train(this, task, request, command)
    except Exception as error:
        with suppress(OSError):  # the error may be a full disk
            failure.write_text(f"{first_line(error)}\n")
        raise


def _train(this: Run, task: Task, request: StopRequest, command: str) -> dict[str, Any]:
    from structgrad.training.fit import fit

    folder = this.folder
    checkpoint = checkpoint_to_resume(folder, this.name)
    try:
        if this.is_first:
            OmegaConf.save(this.config, folder / "config.yaml", resolve=True)
            started = {
                "command": command,
                "from_step": _steps_so_far(folder) if checkpoint else 0,
                "files": digests(this),
                "monitor": task.monitor,
                "mode": task.mode,
            }
            write_json(folder / "environment.json", environment() | started)
        return fit(this, task, checkpoint, request)
    except SizeMismatchError as error:
        raise RunError(f"estimator: {error}") from error
    except NonFiniteLossError as error:
        best = folder / "checkpoints" / "best.ckpt"
        kept = f"the last good checkpoint is {best}" if best.exists() else "no checkpoint was written before"
        raise RunError(f"{error}; {kept}; try a smaller learning rate or gradient clipping") from error
    except OSError as error:
        raise _unwritable(folder, "paths.runs", error) from error


def _steps_so_far(folder: Path) -> int:
    """The last step in the metrics of a run that continues."""
    return max((step + 1 for step, _, _ in metric_rows(folder / "metrics.csv")), default=0)


def _unwritable(folder: Path, key: str, error: OSError) -> RunError:
    """An error that names the file of ``error``, if it has one, which may lie elsewhere."""
    where = error.filename or folder
    return RunError(f"cannot use {where}: {error.strerror or error}; free space or set {key}, then repeat the command")


def _say_what_is_not_logged(run: Run) -> None:
    """A finished run logs nothing more; say how to send it to a dashboard."""
    services = sorted(str(name) for name in run.config.get("logger") or {} if name != "tensorboard")
    if services:
        left = {"wandb sync": "wandb/offline-run-*", "comet upload": "comet/*/*.zip"}  # from runs without a network
        found = {command: sorted(run.folder.glob(pattern)) for command, pattern in left.items()}
        kept = [f"{command} {parts[-1]}" for command, parts in found.items() if parts]
        how = " and ".join(kept) or "paths.runs=<another folder> makes it again, and logs it"
        log.info("nothing is logged to %s now; %s", ", ".join(services), how)


def _make_folder(folder: Path) -> None:
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; set paths.runs to another folder") from error


def _keep(summary: dict[str, Any], this: Run) -> None:
    """Write a copy to ``paths.results``."""
    if not this.config.paths.results or not this.is_first:
        return
    results = Path(this.config.paths.results)
    try:
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / f"{summary['name']}.json", summary)
    except OSError as error:
        raise RunError(
            f"cannot write to {results}: {error.strerror}; set paths.results and repeat the command"
        ) from error


def _test_on(task: Task, this: Run, file: Path) -> None:
    """Test the finished model on a published file. Files with equal names do not overwrite each
    other's results.
    """
    from structgrad.training.fit import test

    folder = this.folder
    metrics = test(task, this.config.trainer, this.seed, folder / "checkpoints" / "best.ckpt")
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
