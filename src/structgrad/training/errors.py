"""The ways in which a run can end without a result. Each message is one line."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from structgrad.common import renamed
from structgrad.common.text import first_line, nearest
from structgrad.training.contract import EXIT_AGAIN, EXIT_ERROR, EXIT_INTERRUPTED

#: Groups from which a user chooses, in the order of the help. The other groups follow from these.
GROUPS = (
    "task",
    "structure",
    "estimator",
    "budget",
    "data",
    "task.schedule",
    "experiment",
    "trainer",
    "logger",
)


class ConfigurationError(ValueError):
    """The configuration cannot work; the message is one line that says why."""


class RunError(RuntimeError):
    """A run stopped; the message is one line that says why, and which files are kept."""

    exit_code = EXIT_ERROR


class RunHeldError(RunError):
    """Another process has the run."""

    exit_code = EXIT_AGAIN


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss, the scores or the metric that selects the best model is NaN or infinite."""


class Interrupted(BaseException):
    """The process was asked to stop, by SIGTERM or Ctrl-C.

    Args:
        number: number of the signal.
        step: the step after which the run was saved; None outside of training, when the last
            checkpoint counts.
        begun: whether a checkpoint exists.
    """

    def __init__(self, number: int, step: int | None = None, *, begun: bool = True) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        where = "the last checkpoint" if step is None else f"step {step}"
        kept = (
            f"the same command continues from {where}"
            if begun
            else "nothing is kept yet; the same command starts again"
        )
        super().__init__(f"stopped by {name}; {kept}")
        self.number, self.step = number, step
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_AGAIN


class Paused(Interrupted):
    """Training reached ``trainer.pause_at``."""

    def __init__(self, step: int) -> None:
        BaseException.__init__(
            self, f"paused at step {step}; the same command without trainer.pause_at={step} continues"
        )
        self.exit_code = EXIT_AGAIN


def _takes(node: object, name: str) -> bool:
    """Whether the class of a node has an argument with this name."""
    from structgrad.training.options import arguments_of  # which needs torch

    if not isinstance(node, Mapping) or "_target_" not in node:
        return False
    try:
        return name in arguments_of("", node["_target_"])
    except ConfigurationError:  # there is no such class, which is another error
        return False


def explain(error: HydraException | OmegaConfBaseException | ValueError, arguments: Sequence[str]) -> str:
    """One line for Hydra's complaint about a command line, with likely alternatives."""
    for argument in arguments:  # Hydra does not name these
        group = argument.partition("=")[0]
        is_group = isinstance(error, ValueError) and group in GROUPS
        if is_group and not isinstance(OmegaConf.select(OmegaConf.from_dotlist([argument]), group), str):
            return f"{argument}: no such choice; see --help"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if name in renamed.CHOICES.get(group, {}):
            return f"{group}={name}: is now called {renamed.CHOICES[group][name]}"
        if name in renamed.GONE.get(group, {}):
            return f"{group}={name}: {renamed.GONE[group][name]}"
        return f"{group}={name}: no such choice; nearest: {nearest(name, error.options)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        return f"{group}={name}: no such choice; see --help"
    lines = str(error).strip().splitlines()
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        hint = "" if equals else "; expected key=value, e.g. task=listops"
        if equals and (any(sign in value for sign in "=(),{}[]~$ ") or not value.isascii()):
            hint = f"; a value with such signs needs quotes within quotes: '{key}=\"{value}\"'"
        reason = " ".join(lines[-2:-1]).strip(" ^")  # for some signs it is only a mark below them
        return f"{error.override}: {reason}{hint}" if reason else f"{error.override}{hint}"
    if len(lines) > 2 and lines[1] == "Available options:":  # a group without a default
        group = lines[0].partition("'")[2].partition("'")[0]
        return f"{group}=... is missing; there are {', '.join(line.strip() for line in lines[2:])}"
    if lines and lines[0].startswith("Ambiguous value for argument "):
        given = lines[0].partition("'")[2].removesuffix("'")
        key, _, values = given.partition("=")
        quoted = f"'{key}=\"{values}\"'"
        return f"{given}: several values; -m makes a run of each, {key}=[{values}] is a list, {quoted} one value"
    if lines and lines[0].startswith("Could not append to config."):
        return " ".join(lines)
    typed = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    owner = typed.get("experiment", "").partition("/")[0]
    if owner != typed.get("task") and lines and lines[0].startswith("In 'experiment/"):
        return f"experiment={typed['experiment']}: is for task={owner}"
    if lines and lines[0].startswith("Could not override 'data'."):
        return f"data={typed.get('data', '...')}: this task has no data sets to choose from"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None and cause.key is not None:
        if "." in str(cause.full_key) and cause.full_key in GROUPS:
            return f"{cause.full_key}: nothing is chosen; type {cause.full_key}=<choice> as well, see --help"
        key, parent = str(cause.key), cause.parent_node
        known = [str(k) for k in parent] if hasattr(parent, "keys") else []
        if "." not in str(cause.full_key):
            known = sorted({*known, *GROUPS})
        if known and key not in known:
            if _takes(parent, key):
                return f"{cause.full_key}: its file lacks it, but the class takes it; type +{cause.full_key}=..."
            return f"{cause.full_key}: no such option; nearest: {nearest(key, known)}"
    return (
        f"{first_line(error)} {first_line(cause)}" if isinstance(cause, OmegaConfBaseException) else first_line(error)
    )
