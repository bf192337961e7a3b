"""The logger of Aim, whose own logger is in its package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aim import Image, Repo
from aim.pytorch_lightning import AimLogger

from structgrad.training.loggers import log_picture


class Aim(AimLogger):  # type: ignore[misc]
    """Aim's logger. Aim makes the hashes itself, so a run that continues is found by its name.

    Args:
        name: name of the run.
        experiment: the experiment of the run.
        repo: the folder of Aim's data; it is created.
        options: options of Aim's logger.
    """

    def __init__(self, name: str, experiment: str, repo: str, **options: Any) -> None:
        found = Repo.from_path(repo, init=True).query_runs(f"run.name == {name!r}").iter_runs()
        run_hash = next((of_run.run.hash for of_run in found), None)
        super().__init__(repo=repo, experiment=experiment, run_name=name, run_hash=run_hash, **options)


@log_picture.register
def _(logger: Aim, picture: Path, step: int) -> None:
    logger.experiment.track(Image(str(picture)), name=picture.stem, step=step)
