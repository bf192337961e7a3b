"""Sweeps without a table: one row, made of a command line, whose table is kept beside its results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from structgrad.common.files import write_bytes
from structgrad.common.text import first_line
from structgrad.experiments.planning import decides, task_class, whole_number
from structgrad.experiments.queue import SweepError
from structgrad.experiments.tables import OF_SWEEP
from structgrad.training.errors import explain

#: The name of the only row.
ROW = "all"
_EXAMPLE = "search='{task.optimizer.lr: {distribution: log_uniform, low: 1e-4, high: 1e-2}}'"


def make(options: Mapping[str, str], given: Sequence[str], configs: Path) -> tuple[str, dict[str, Any]]:
    """The table of a sweep without one: its name, which follows from the rest, and the content of its file.

    Args:
        options: all options of the command; ``search`` is a mapping in YAML, hyper-parameter ->
            distribution, without which that of the configuration is searched.
        given: overrides for every run.
        configs: folder of the configurations.

    Raises:
        SweepError: in one line.
    """
    overrides = [argument for argument in given if decides(argument)]
    budget = options["budget"] or "paper"
    with hydra.initialize_config_dir(str(configs), version_base="1.3"):
        try:
            config = hydra.compose("config", [f"budget={budget}", *(a for a in given if not a.startswith("slurm."))])
        except (HydraException, OmegaConfBaseException) as error:
            raise SweepError(explain(error, overrides)) from error
    if config.get("task") is None:
        raise SweepError("table=... or task=... is missing; type e.g. task=listops trials=20")
    task = task_class(str(config.task._target_))
    asked = options["metric"] or task.monitor
    if asked != task.monitor:
        raise SweepError(
            f"metric={asked} is not what selects the checkpoint of this task; "
            f"type metric={task.monitor}, or leave it out"
        )
    fixed = {argument.partition("=")[0].lstrip("+") for argument in overrides}
    own = {str(key): value for key, value in (OmegaConf.to_container(config.search) or {}).items()}  # type: ignore[union-attr]
    search = _search(options["search"], fixed) if options["search"] else None
    searched = {key for key in (own if search is None else search) if key not in fixed}
    if options["trials"] and not searched:
        raise SweepError(f"trials: this task searches nothing; type {_EXAMPLE}, or seeds=0,1,2 in its place")
    if options["seeds"]:
        searched = set()
    name_of_test = re.sub("^val/", "", task.monitor)
    logged = sorted(task.logged_by_test() & {*task.test_metrics, name_of_test}) or [name_of_test]
    logged.sort(key=lambda name: name != name_of_test)
    direction = "maximize" if task.mode == "max" else "minimize"
    content: dict[str, Any] = {
        "title": f"Sweep of {' '.join(overrides)}",
        "budget": budget,
        "overrides": overrides,
        "rows": {ROW: {"title": "trials" if searched else "seeds"}},
        "columns": {
            name: {"metric": f"test/{name}", "title": name, "digits": 4}
            | ({"direction": direction} if name == name_of_test else {})
            for name in logged
        },
    }
    if searched:
        trials = whole_number("trials", options["trials"] or "20", 1)
        selection = {"rule": "best_trial", "metric": task.monitor, "direction": direction, "trials": trials}
        # What is given takes the place of the configuration's space.
        space = {**dict.fromkeys(key for key in own if search is not None or key in fixed), **(search or {})}
        content |= {"selection": selection, "search": space}
    identity = {**content, "selection": None, "title": None}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    task_name = next(o.partition("=")[2] for o in overrides if o.startswith("task="))
    parts = [task_name, *(o.partition("=")[2] for o in overrides if o.startswith(("structure=", "estimator=")))]
    words = [
        *overrides,
        f"budget={budget}",
        *(f"{k}={options[k]!r}" for k in ("search", "trials", "seeds") if options[k]),
    ]
    content["command"] = " ".join(["python sweep.py", *words])
    return f"{re.sub('[^A-Za-z0-9_]+', '_', '_'.join(parts))}_{digest}", content


def keep(content: Mapping[str, Any], folder: Path) -> None:
    """Write the table beside its results, where reports find it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / OF_SWEEP, OmegaConf.to_yaml(OmegaConf.create(dict(content))).encode())


def _search(text: str, fixed: set[str]) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise SweepError(f"search={text}: {first_line(error)}; type e.g. {_EXAMPLE}") from error
    except AssertionError:  # of a number, which is no container
        found = None
    if not isinstance(found, dict) or not found or not all(isinstance(value, dict) for value in found.values()):
        raise SweepError(f"search={text}: no hyper-parameters with a distribution each; type e.g. {_EXAMPLE}")
    for key in found:
        if key in fixed:
            raise SweepError(f"search: {key} is given by hand as well; leave one of both out")
    return {str(key): value for key, value in found.items()}
