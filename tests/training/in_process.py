"""Runs of the example task without a process of their own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from mylab.find_window import FindWindow
from omegaconf import DictConfig, open_dict

from structgrad.data import Batch
from structgrad.tasks.base import StepOutput
from structgrad.training.run import run

ROOT = Path(__file__).resolve().parents[2]
OWN = ["hydra.searchpath=[pkg://mylab.configs]", "task=find_window", "trainer=cpu", "logger=csv"]
#: Validated, and saved, after steps 4, 8 and 12.
SHORT = ["trainer.max_steps=12", "trainer.val_every_n_steps=4", "trainer.log_every_n_steps=1"]


def composed(*overrides: str) -> tuple[DictConfig, dict[str, str], dict[str, str]]:
    """The arguments that ``train.py`` gives to ``run``."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices, dict(o.split("=", 1) for o in overrides if "=" in o)


def go(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run or continue the example task in ``folder``, three validations long."""
    return run(*composed(*OWN, *SHORT, f"paths.runs={folder}", *overrides))


def run_folder(folder: Path) -> Path:
    """The only run in there."""
    (found,) = (folder / "find_window").iterdir()
    return found


def metrics(folder: Path) -> list[list[str]]:
    """The rows of its metrics file."""
    with (run_folder(folder) / "metrics.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def summary(folder: Path) -> dict[str, Any]:
    """The summary of the finished run."""
    content: dict[str, Any] = json.loads((run_folder(folder) / "summary.json").read_text())
    return content


class At:
    """Something that happens once, when a certain step of training or of validation is done.

    Args:
        monkeypatch: undoes it.
        step: number of training steps before.
        action: e.g. raises.
        validating: in the validation after that step, instead of in the next step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, action: Any, *, validating: bool = False) -> None:
        original = FindWindow.step
        pending = [action]

        def stepped(task: FindWindow, batch: Batch) -> StepOutput:
            if pending and task.global_step == step and task.trainer.validating == validating:
                pending.pop()()
            return original(task, batch)

        monkeypatch.setattr(FindWindow, "step", stepped)
