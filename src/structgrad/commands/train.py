"""Train, test and record one run: ``structgrad-train task=listops structure=arborescence estimator=sst``.

Exit codes: 0 finished, 1 an error, 130 Ctrl-C, 75 "again": preempted by SIGTERM, or another process has the run. After
130 and 75 the same command continues.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from structgrad.commands import CONFIGS
from structgrad.runtime import tune_allocator
from structgrad.training.errors import EXIT_AGAIN, EXIT_ERROR, ConfigurationError, Interrupted, RunError

#: Jobs of this process (`-m`) without a result: overrides, why, exit code.
_unfinished: list[tuple[str, str, int]] = []


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def train(config: DictConfig) -> None:
    """One job of the command; with ``-m`` the next one is to follow also after an error, which is listed at the end."""
    # After Hydra has dealt with --help and with unknown choices, which need not wait for torch.
    from structgrad.training.run import run

    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    several = hydra_config.mode == RunMode.MULTIRUN
    by_hand = dict(o.split("=", 1) for o in overrides if "=" in o)
    try:
        run(config, hydra_config.runtime.choices, by_hand)
    except (ConfigurationError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, RunError) else EXIT_ERROR
        if not several:
            sys.exit(code)
        _unfinished.append((" ".join(overrides), str(error), code))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as bug:
        if not several:
            raise
        traceback.print_exc()
        _unfinished.append((" ".join(overrides), f"{type(bug).__name__}: {bug}", EXIT_ERROR))


def main() -> None:
    """The command; its arguments are Hydra's."""
    if {"-h", "--help"} & set(sys.argv) and not any(a.startswith("task=") for a in sys.argv):
        sys.argv.append("task=listops")  # Hydra's help composes a configuration, and a task has no default
    tune_allocator()
    train()
    if _unfinished:
        print(f"\n{len(_unfinished)} without a result:", file=sys.stderr)
        for overrides, reason, _ in _unfinished:
            print(f"  {overrides}\n    {reason}", file=sys.stderr)
        sys.exit(EXIT_AGAIN if all(code == EXIT_AGAIN for *_, code in _unfinished) else EXIT_ERROR)


if __name__ == "__main__":
    main()
