"""Train, test and record one run: ``structgrad-train task=listops structure=arborescence
estimator=sst``.

Exit codes: 0 finished; 1 error; 130 Ctrl-C; 75 "again", because SIGTERM preempted the run or
another process has it. After 130 and 75 the same command continues.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from structgrad.commands import CONFIGS, group, places
from structgrad.common.files import expanded
from structgrad.training.contract import EXIT_AGAIN, EXIT_ERROR
from structgrad.training.errors import (
    GROUPS,
    ConfigurationError,
    Interrupted,
    Paused,
    RunError,
    explain,
)
from structgrad.training.runtime import announce_compilation, tune_allocator

#: Jobs of this process (`-m`) without a result: overrides, reason, exit code.
_unfinished: list[tuple[str, str, int]] = []
#: Summaries of the jobs with a result.
_finished: list[dict[str, Any]] = []
#: Overrides of the jobs that have started.
_begun: list[list[str]] = []


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def train(config: DictConfig) -> float | None:
    """One job of the command. With ``-m`` the next job starts even after an error; the end lists
    the errors.

    Returns:
        the value of the metric that selects the checkpoint, for sweepers of Hydra; None if the job
        has no result.
    """
    # Hydra deals with --help and with unknown choices before this import, so they need not wait for
    # torch.
    from structgrad.training.run import run

    if not _begun:
        announce_compilation()
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    _begun.append(overrides)
    several = hydra_config.mode == RunMode.MULTIRUN
    by_hand = dict(o.split("=", 1) for o in overrides if "=" in o)
    in_force = settings_in_force(config, hydra_config.runtime.choices.get("settings"), hydra_config.searchpath)
    if in_force is not None:
        print(in_force, flush=True)
    try:
        command = command_of(overrides, hydra_config.overrides.hydra)
        _finished.append(run(config, hydra_config.runtime.choices, by_hand, command))
        if not several and not (config.paths.results or config.paths.progress):  # those are of sweeps
            print(next_steps(sys.argv[1:], config.paths.runs, config.seed))
        selecting = [value for name, value in _finished[-1]["metrics"].items() if not name.startswith("test/")]
        return float(selecting[0]) if selecting else None
    except (ConfigurationError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, RunError) else EXIT_ERROR
        if not several:
            sys.exit(code)
        _unfinished.append((" ".join(overrides), str(error), code))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        if not several or not isinstance(stop, Paused):
            sys.exit(stop.exit_code)
        _unfinished.append((" ".join(overrides), str(stop), stop.exit_code))
    except Exception as bug:
        if not several:
            raise
        traceback.print_exc()
        _unfinished.append((" ".join(overrides), f"{type(bug).__name__}: {bug}", EXIT_ERROR))
    return None


def command_of(overrides: Sequence[str], hydra: Sequence[str]) -> str:
    """The command that repeats this job alone, without what a sweep sets for itself."""
    own = [item for item in hydra if item.startswith("hydra.searchpath=")]
    if any(item.startswith("paths.progress=") for item in overrides):  # of a sweep
        overrides = [item for item in overrides if not item.startswith(("paths.progress=", "paths.results="))]
    return shlex.join(["python", "train.py", *overrides, *own])


def next_steps(arguments: Sequence[str], runs: str, seed: int) -> str:
    """What to do after a run, as commands that can be copied."""
    here = os.path.relpath(sys.executable)
    if here.startswith(".."):
        here = "python" if shutil.which("python") == sys.executable else sys.executable
    command = Path(sys.argv[0])
    train, report = (
        shlex.join([here, os.path.relpath(command.with_name(f"{n}.py"))])
        if command.name == "train.py"
        else f"structgrad-{n}"
        for n in ("train", "report")
    )
    others = shlex.join([o for o in arguments if not o.startswith("seed=")])
    seeds = ",".join([str(other) for other in range(1, 5) if other != seed][:3])
    return (
        f"next:     {report} runs --runs {shlex.quote(runs)} --html runs.html\n"
        "              makes a page of all runs there: curves, pictures, settings\n"
        f"          {train} -m {others} seed={seeds}\n"
        "              trains with three more seeds and compares them\n"
        f"          {train} --help\n"
        "              lists tasks, structures and estimators to put in their place"
    )


def settings_in_force(config: DictConfig, choice: str | None, searchpath: Sequence[str] | None) -> str | None:
    """A line that names the settings file of a run and what it sets; None without one.

    If the experiment, the budget or the command line changes a setting, the present value is shown.

    Args:
        config: the composed configuration.
        choice: the file in the group ``settings``, which need not exist.
        searchpath: Hydra's search path.
    """
    from structgrad.experiments.runs import flat

    for folder in places(searchpath) if choice else ():
        file = folder / "settings" / f"{choice}.yaml"
        if file.is_file():
            content = OmegaConf.to_container(OmegaConf.create(file.read_text()), resolve=False)
            keys = [key for key in flat(content) if not key.startswith(("search.", "defaults"))]  # type: ignore[arg-type]
            found = {key: OmegaConf.select(config, key, throw_on_resolution_failure=False) for key in keys}
            said = "  ".join(f"{key}={value}" for key, value in found.items())
            return f"settings: settings/{choice}.yaml sets {said or 'nothing'}"
    return None


def choices(searchpath: Sequence[str] | None = None) -> str:
    """The groups from which a user chooses, one line each, including those of other packages on the
    search path.
    """
    lines = []
    for kind in GROUPS:
        names: set[str] = set()
        for folder in places(searchpath):
            names |= {name for name in _names(folder / kind, "") if not name.startswith("default/")}  # the budget's
        if names:
            lines.append(f"{kind}: {', '.join(sorted(names))}")
    return "\n".join(lines)


def _names(folder: Traversable, prefix: str) -> set[str]:
    names: set[str] = set()
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir():
            names |= _names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            names.add(prefix + entry.name.removesuffix(".yaml"))
    return names


OmegaConf.register_new_resolver("structgrad.choices", choices, replace=True)
OmegaConf.register_new_resolver("structgrad.folder", expanded, replace=True)


def _compare() -> None:
    """Print the jobs side by side, by the options in which they differ."""
    from structgrad.experiments import comparison
    from structgrad.experiments.runs import of_content

    print(f"\n{len(_finished)} runs:\n\n{comparison.text(comparison.compare(map(of_content, _finished)))}")


def with_quoted_path(argument: str) -> str:
    """``paths.runs=~/x`` in Hydra's syntax. Its grammar allows no ``~`` in a value, and most shells
    leave it there.
    """
    key, _, value = argument.partition("=")
    return f"{key}='{value}'" if key.startswith("paths.") and value.startswith("~") else argument


def main() -> None:
    """The command; its arguments are Hydra's."""
    if {"-h", "--help"} & set(sys.argv) and not any(a.startswith("task=") for a in sys.argv):
        sys.argv.append("task=listops")  # Hydra's help composes a configuration, and a task has no default
    sys.argv[1:] = [with_quoted_path(argument) for argument in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # this function shows errors itself
    tune_allocator()
    try:
        group("task", sys.argv[1:])  # refuses a package that is not there; Hydra would only warn
        train()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if _begun:
            raise  # a bug; errors in a configuration are found before
        sys.exit(f"error: {explain(error, sys.argv[1:])}")
    except OSError as error:
        if _begun:
            raise
        sys.exit(f"error: cannot use {error.filename or 'paths.runs'}: {error.strerror or error}; set paths.runs")
    if len(_finished) > 1:
        _compare()
    if _unfinished:
        print(f"\n{len(_unfinished)} without a result:", file=sys.stderr)
        for overrides, reason, _ in _unfinished:
            print(f"  {overrides}\n    {reason}", file=sys.stderr)
        sys.exit(EXIT_AGAIN if all(code == EXIT_AGAIN for *_, code in _unfinished) else EXIT_ERROR)


if __name__ == "__main__":
    main()
