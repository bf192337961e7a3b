"""The metrics file of a run folder, and the hyper-parameters, metrics and pictures for dashboards."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from datetime import datetime
from functools import singledispatch
from pathlib import Path
from typing import Any

from filelock import FileLock
from pytorch_lightning.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from structgrad.training import contract
from structgrad.training.composition import Run
from structgrad.training.errors import RunError

_HEAD = ["step", "metric", "value"]


def hyperparameters(run: Run) -> dict[str, Any]:
    """The values that dashboards compare with a run's metrics: choices, seed, then every setting as
    ``with/...``.

    Dashboards sort columns by name, and ``with`` comes after the names of the choices. Folders,
    loggers and the search space of a sweep are left out.
    """
    chosen = {group: run.choices[group] for group in contract.CHOICES if run.choices.get(group) is not None}
    if run.config.estimator is None:
        chosen["estimator"] = "none"
    left_out = (*contract.IRRELEVANT, "seed", "budget")
    settings = {key: value for key, value in run.settings.items() if key not in left_out}
    return {**chosen, "seed": run.seed, **dict(_flat(settings, "with"))}


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value if isinstance(value, bool | int | float | str) else str(value)


def _own(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without the epoch, which Lightning adds. It is that of a loader without end, and says nothing."""
    return {name: value for name, value in metrics.items() if name != "epoch"}


class MetricsFile(Logger):
    """Appends every metric to ``metrics.csv``, one line ``step,metric,value`` each.

    When a run is resumed, Lightning's own CSV logger deletes the file of the interrupted run. This
    one keeps it, without the lines after the checkpoint from which the run continues.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return "metrics"

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Delete what was logged after the first ``step`` steps, which are numbered from 0, and a
        half-written line.

        Raises:
            RunError: if this class did not write the file.
        """
        if not self.file.is_file():
            return
        try:
            with self.file.open(newline="", encoding="utf-8") as stream:
                head, *rows = list(csv.reader(stream)) or [_HEAD]
            if rows and len(rows[-1]) < 3:
                rows.pop()  # a kill left it half-written
            kept = [row for row in rows if int(row[0]) < step]
            for _, _, value in kept:
                float(value)
            if head != _HEAD:
                raise ValueError(f"it starts with {','.join(head)}")
        except (ValueError, IndexError, csv.Error) as error:
            raise RunError(
                f"the metrics file {self.file} is damaged or not of a run ({error}); delete it to go on without it"
            ) from error
        self._write("w", [_HEAD, *kept])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the metrics."""
        rows: list[list[Any]] = [[step or 0, name, float(value)] for name, value in _own(metrics).items()]
        if not self.file.exists():
            rows.insert(0, _HEAD)
        self._write("a", rows)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in ``config.yaml`` beside this file."""

    def _write(self, mode: str, rows: list[list[Any]]) -> None:
        with self.file.open(mode, newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without its first summary, by which the first run would decide all columns
    in *HParams*.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under that step."""
        super().log_metrics(_own(metrics), step)

    @rank_zero_only
    def log_hyperparams(  # type: ignore[override]
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None, step: int | None = None
    ) -> None:
        """Compare them with the final metrics; without these nothing is written yet.

        Args:
            params: name -> value, flat.
            metrics: metrics of the finished run.
            step: the last step.
        """
        from torch.utils.tensorboard.summary import hparams

        self.hparams.update(params)
        if metrics is None:
            return
        self.log_metrics(dict(metrics), step)
        _, start, end = hparams(dict(params), dict(metrics))
        for session in (start, end):
            self.experiment.file_writer.add_summary(session, step)


class WandbSteps(WandbLogger):
    """Lightning's logger, with the training step as the step of Weights & Biases.

    Lightning leaves the counting to the client, which starts at 0 in every process that works
    offline.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under that step."""
        extra = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({**_own(metrics), **extra}, step=step)


class MLflow(MLFlowLogger):
    """Lightning's logger. MLflow makes the ids itself, so a run that continues is found by its
    name.

    Args:
        name: name of the run.
        experiment: the experiment of the run; it is created if it does not exist.
        tracking_uri: a server (``https://...``), or a database (``sqlite:///runs/mlflow.db``),
            which is created.
        artifacts: the folder for pictures, if the database is on this machine; a server has its
            own.
    """

    def __init__(self, name: str, experiment: str, tracking_uri: str, artifacts: str, **options: Any) -> None:
        import mlflow

        local = tracking_uri.startswith("sqlite:///")
        place = Path(tracking_uri.removeprefix("sqlite:///")).parent if local else None
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(tracking_uri)
        found = None
        # Workers of a sweep start together, but only one of them can create a database or an
        # experiment.
        with nullcontext() if place is None else FileLock(place / "mlflow.lock"):
            known = client.get_experiment_by_name(experiment)
            if known is None:
                client.create_experiment(experiment, Path(artifacts).resolve().as_uri() if local else None)
            else:
                quoted = f"attributes.run_name = '{name}'"
                found = next(iter(client.search_runs([known.experiment_id], quoted, max_results=1)), None)
        run_id = None
        if found is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            run_id = found.info.run_id
            client.update_run(run_id, status="RUNNING")
        super().__init__(experiment, name, tracking_uri, run_id=run_id, **options)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """A run that continues, perhaps on other hardware, keeps its first values, because MLflow
        allows no change.
        """
        known = self.experiment.get_run(self.run_id).data.params
        super().log_hyperparams({name: value for name, value in params.items() if name not in known})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log under that step."""
        super().log_metrics(_own(metrics), step)


class Comet(CometLogger):
    """Lightning's logger, with an experiment key that follows from the name of the run.

    Args:
        name: name of the run.
        offline: whether archives are left for ``comet upload``.
        offline_directory: the folder of the archives; every start has its own folder there. The
            client draws the names of archives from a generator that a run seeds, so it would
            overwrite those of the start before.
        options: options of Lightning's logger and of Comet's experiments.
    """

    def __init__(self, name: str, *, offline: bool, offline_directory: str, **options: Any) -> None:
        start = Path(offline_directory) / datetime.now().strftime("%Y%m%d-%H%M%S")
        if offline:
            start.mkdir(parents=True)
        # The client treats 0 as offline as well. With False itself, Lightning disables the
        # experiment and keeps nothing.
        online: Any = 0 if offline else True
        super().__init__(
            experiment_key=key_of(name),
            mode="get_or_create",
            online=online,
            name=name,
            offline_directory=str(start),
            **options,
        )


class Trackio(Logger):
    """Trackio, whose data are in a folder. All data with the name of a run belong to it.

    Args:
        name: name of the run.
        project: the project of the run.
        folder: folder of Trackio's data on this machine.
        options: options of ``trackio.init``, e.g. ``space_id``, the dashboard's place on the hub.
    """

    def __init__(self, name: str, project: str, folder: str, **options: Any) -> None:
        super().__init__()
        os.environ.setdefault("TRACKIO_DIR", folder)  # Trackio reads it once, when it is imported
        import trackio

        self._trackio, self._name, self._project = trackio, name, project
        self._options = {"group": os.environ.get("WANDB_RUN_GROUP"), **options}

    @property
    def name(self) -> str:
        """The name of the project."""
        return self._project

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._name

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Start or continue the run with these parameters as its configuration."""
        self._trackio.init(self._project, self._name, config=dict(params), resume="allow", **self._options)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log under that step."""
        self._trackio.log(_own(metrics), step=step)

    @rank_zero_only
    def log_picture(self, picture: Path, step: int) -> None:
        """Log a PNG file."""
        self._trackio.log({picture.stem: self._trackio.Image(str(picture))}, step=step)

    @rank_zero_only
    def end(self) -> None:
        """Send the rest."""
        self._trackio.finish()


def key_of(name: str) -> str:
    """Forty hexadecimal digits, for services whose ids cannot be the name of a run."""
    return hashlib.sha1(name.encode()).hexdigest()


@singledispatch
def log_picture(logger: Logger, picture: Path, step: int) -> None:
    """Show a picture of a run beside its metrics, in the way of its logger; loggers without
    pictures are skipped.

    Args:
        logger: ours, or Lightning's own.
        picture: a PNG file.
        step: the last step of the training.
    """


@log_picture.register
def _(logger: TensorBoardLogger, picture: Path, step: int) -> None:
    from matplotlib import image

    logger.experiment.add_image(picture.stem, image.imread(picture), step, dataformats="HWC")


@log_picture.register
def _(logger: WandbLogger, picture: Path, step: int) -> None:
    logger.log_image(picture.stem, [str(picture)], step=step)


@log_picture.register
def _(logger: MLFlowLogger, picture: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(picture), "pictures")


@log_picture.register
def _(logger: CometLogger, picture: Path, step: int) -> None:
    logger.experiment.log_image(str(picture), name=picture.stem, step=step)


@log_picture.register
def _(logger: Trackio, picture: Path, step: int) -> None:
    logger.log_picture(picture, step)


@singledispatch
def end(logger: Logger, failed: bool) -> None:
    """Release a service, so that the next run of this process (``-m``) is another run there.

    Args:
        logger: ours, or Lightning's own; most have nothing to release.
        failed: whether the run did not finish.
    """


@end.register
def _(logger: WandbLogger, failed: bool) -> None:
    logger.experiment.finish(exit_code=int(failed))


@end.register
def _(logger: CometLogger, failed: bool) -> None:
    logger.experiment.end()


@end.register
def _(logger: Trackio, failed: bool) -> None:
    logger.end()
