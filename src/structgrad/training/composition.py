"""From a configuration to a run: its name, its folder and its objects."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from structgrad.common.files import expanded
from structgrad.common.text import first_line
from structgrad.data import DataError
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure, UnsupportedError
from structgrad.tasks.schedules import Schedule
from structgrad.training.errors import ConfigurationError
from structgrad.training.identity import identity, portable, resolved
from structgrad.training.options import check_kinds, check_node, check_options
from structgrad.training.processes import is_first

if TYPE_CHECKING:
    from structgrad.tasks.base import Task


@dataclass(frozen=True)
class Run:
    """A composed run. It is made once and never changes.

    Attributes:
        config: the whole configuration, read-only, with the name and the folder of the run; objects
            are built from it.
        choices: group -> choice, for summaries.
        name: ``<task>-<structure>-<estimator>-<budget>-s<seed>-<identity>``; unique wherever runs
            are collected.
        folder: the folder of the run's files, which need not exist yet.
        settings: the configuration as plain dictionaries, with interpolations resolved.
        deciding: the part of the settings that decides the result; it names no folder of this
            machine.
    """

    config: DictConfig
    choices: Mapping[str, str]
    name: str
    folder: Path
    settings: Mapping[str, Any]
    deciding: Mapping[str, Any]

    @classmethod
    def compose(cls, config: DictConfig, choices: Mapping[str, str], chosen: Mapping[str, str] | None = None) -> Run:
        """Check a configuration and name the run that it describes. It reads no data and writes
        nothing.

        Args:
            config: the composed configuration, which is not changed.
            choices: group -> choice.
            chosen: the user's own choices, group or key -> choice or value.

        Raises:
            ConfigurationError: one line, if the configuration cannot work and this is known without
                a task.
        """
        config = settled(config, chosen or {})
        if config.run.name is not None or config.run.folder is not None:
            raise ConfigurationError(
                "run.name and run.folder follow from the configuration; paths.runs says where runs are"
            )
        estimator = choices["estimator"] if config.estimator is not None else "none"
        try:
            deciding = portable(config)
        except OmegaConfBaseException as error:
            # Options that refer to those of the data set fail first if it belongs to another task.
            _check_kinds_of_task(config)
            raise ConfigurationError(first_line(error)) from error
        parts = (choices["structure"], estimator, choices["budget"], f"s{config.seed}", identity(deciding))
        task, rest = choices["task"], "-".join(parts)
        name, folder = f"{task.replace('/', '-')}-{rest.replace('/', '-')}", Path(config.paths.runs) / task / rest
        OmegaConf.update(config, "run", {"name": name, "folder": str(folder)}, force_add=True)
        OmegaConf.update(config, "paths.test_file", None)  # it tests the finished run and is not part of it
        OmegaConf.set_readonly(config, True)
        settings = resolved(config)
        return cls(config, MappingProxyType(dict(choices)), name, folder, settings, deciding)

    @property
    def is_first(self) -> bool:
        """Whether this process writes; see :func:`~structgrad.training.processes.is_first`."""
        return is_first(self.config.trainer)

    @property
    def seed(self) -> int:
        """The seed of all random numbers."""
        return int(self.config.seed)


def settled(config: DictConfig, chosen: Mapping[str, str]) -> DictConfig:
    """A checked copy of a configuration, in which ``estimator`` is null if the structure is not
    latent.

    The default estimator of a task would have nothing to estimate there.

    Raises:
        ConfigurationError: one line.
    """
    check_options(config, chosen)
    config = copy.deepcopy(config)
    OmegaConf.set_readonly(config, False)
    for name, path in config.paths.items():
        config.paths[name] = expanded(path)
    structure: Structure = make(config, "structure", Structure)
    if not structure.is_latent:
        asked = chosen.get("estimator", "none")
        if asked != "none":
            raise ConfigurationError(
                f"estimator={asked}: {structure.name} has no latent variable to estimate a gradient for; "
                "leave the estimator out"
            )
        config.estimator = None
    elif config.estimator is None:
        raise ConfigurationError(f"estimator=none: {structure.name} is latent and needs an estimator")
    return config


def reads_test_file(config: DictConfig) -> bool:
    """Whether the task refers to ``paths.test_file``."""
    return "${paths.test_file}" in json.dumps(OmegaConf.to_container(config.task, resolve=False))


def build_latent(config: DictConfig) -> tuple[Structure, Estimator | None]:
    """Structure and estimator of a settled configuration. They need no task and much less time to
    import.
    """
    structure: Structure = make(config, "structure", Structure)
    if not structure.is_latent:
        return structure, None
    return structure, make(config, "estimator", Estimator, structure=structure)


def build_task(config: DictConfig, structure: Structure, estimator: Estimator | None) -> Task:
    """The task over them; it reads no data."""
    schedule = None
    if OmegaConf.is_dict(config.task) and "schedule" in config.task:  # for any task: no constructor needs to take it
        if config.task.schedule is not None:
            schedule = make(config, "task.schedule", Schedule)
        config = copy.deepcopy(config)
        OmegaConf.set_readonly(config, False)
        with open_dict(config):
            del config.task.schedule
    task: Task = make(config, "task", object, structure=structure, estimator=estimator)
    if schedule is not None:
        try:
            task.follow(schedule)
        except ValueError as error:
            raise ConfigurationError(f"task.schedule: {first_line(error)}") from error
    precision = config.trainer.precision
    if precision.endswith("-mixed") and task.needs_full_precision is not None:
        reason = task.needs_full_precision
        raise ConfigurationError(f"trainer.precision={precision}: {reason}; 32-true and 64-true train this task")
    if not task.automatic_optimization:
        accumulated = config.trainer.accumulate_grad_batches
        refused = {f"trainer.accumulate_grad_batches={accumulated}": accumulated > 1, "task.schedule": schedule}
        for option in (name for name, asked in refused.items() if asked):
            raise ConfigurationError(
                f"{option}: {type(task).__name__} makes the steps of its optimizer itself (automatic_optimization = "
                "False); leave the option out"
            )
    try:
        task.make_optimizer(parameter for parameter in task.parameters() if parameter.requires_grad)
    except (ValueError, TypeError, OmegaConfBaseException) as error:  # its options are checked only with parameters
        raise ConfigurationError(f"task.optimizer: {first_line(error)}") from error
    return task


def assemble(config: DictConfig, chosen: Mapping[str, str] | None = None) -> Task:
    """Check a configuration and build structure, estimator and task of it; touches no data.

    Args:
        config: the composed configuration, which is not changed.
        chosen: the user's own choices, group or key -> choice or value.

    Raises:
        ConfigurationError: in one line, if the combination cannot work.
    """
    config = settled(config, chosen or {})
    return build_task(config, *build_latent(config))


def make(config: DictConfig, key: str, kind: type, **objects: Any) -> Any:
    """Build the object that a key of a configuration describes.

    Args:
        config: the whole configuration, in which references are resolved.
        key: the key, with dots.
        kind: the class that it must have.
        objects: further arguments of its constructor.

    Raises:
        ConfigurationError: one line.
    """
    try:
        node = OmegaConf.to_container(OmegaConf.select(config, key), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{key}: {first_line(error)}") from error
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigurationError(f"{key} has no _target_; see --help for its choices")
    check_node(key, node, objects)
    try:
        built = instantiate(OmegaConf.select(config, key), **objects)
    except InstantiationException as error:
        # What a constructor refuses is the user's affair; any other error is a bug, and shows where it is.
        if isinstance(error.__cause__, ValueError | UnsupportedError | DataError):
            raise ConfigurationError(f"{key}: {first_line(error.__cause__)}") from error
        raise error.__cause__ or error from None
    if not isinstance(built, kind):
        raise ConfigurationError(f"{key}._target_: {node['_target_']} makes no {kind.__name__}")
    return built


def _check_kinds_of_task(config: DictConfig) -> None:
    node = OmegaConf.to_container(config.task, resolve=False)
    if isinstance(node, dict) and "_target_" in node:
        check_kinds("task", {str(key): value for key, value in node.items()})
