"""The command lines that Hydra's Optuna sweeper and an agent of Weights & Biases build from the files in examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from structgrad.commands import CONFIGS
from structgrad.training.composition import assemble

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "sweepers"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return content


def assembled(arguments: list[str]) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", arguments)
    assemble(config)
    return config


def test_hydras_optuna_sweeper() -> None:
    """A job has ``name=value`` of every trial's parameter, then what was typed (its ``_configure_trials``)."""
    params = read("optuna.yaml")["hydra"]["sweeper"]["params"]
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    assert all(override.is_sweep_override() for override in parsed)
    drawn = {"task.optimizer.lr": 0.0013157894736842105, "estimator.temperature": 0.7246, "structure": "spanning_tree"}
    assert drawn.keys() == params.keys()
    typed = ["task=listops", "estimator=sst", "budget=quick"]
    config = assembled([f"{name}={value}" for name, value in drawn.items()] + typed)
    assert config.task.optimizer.lr == drawn["task.optimizer.lr"]
    assert config.structure._target_.endswith("SpanningTree")


def test_an_agent_of_weights_and_biases() -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = read("wandb.yaml")
    drawn = {
        "estimator.temperature": 0.7246,
        "seed": 1,
        "structure": "spanning_tree",
        "task.optimizer.lr": 1.3157894736842105e-05,
    }
    assert drawn.keys() == sweep["parameters"].keys()
    given = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})
    assert sweep["command"][-1] == "${args_no_hyphens}"
    assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    config = assembled([*sweep["command"][3:-1], *given["args_no_hyphens"]])
    assert (config.seed, config.estimator.temperature, config.task.optimizer.lr) == (1, 0.7246, 1.3157894736842105e-05)
    assert "wandb" in config.logger
