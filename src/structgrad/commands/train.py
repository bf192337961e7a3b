"""Train, test and record one run: ``structgrad-train task=listops structure=arborescence estimator=sst``."""

from __future__ import annotations

import logging
import sys
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from structgrad.commands import CONFIGS
from structgrad.runtime import tune_allocator


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def train(config: DictConfig) -> None:
    """Hydra's entry point."""
    # After Hydra has dealt with --help and with unknown choices, which need not wait for torch.
    from structgrad.training.run import ConfigurationError, RunError, run

    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    hydra_config = HydraConfig.get()
    by_hand = dict(o.split("=", 1) for o in hydra_config.overrides.task if "=" in o)
    try:
        run(config, hydra_config.runtime.choices, by_hand)
    except (ConfigurationError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from the last checkpoint")


def main() -> None:
    """The command; its arguments are Hydra's."""
    if {"-h", "--help"} & set(sys.argv) and not any(a.startswith("task=") for a in sys.argv):
        sys.argv.append("task=listops")  # Hydra's help composes a configuration, and a task has no default
    tune_allocator()
    train()
