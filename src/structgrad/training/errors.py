"""How a run can end without a result; each message is one line."""

from __future__ import annotations

import signal

#: Exit codes of the commands: 0 finished, 1 an error, and two that mean that the same command continues.
EXIT_ERROR = 1
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: preempted, or another process has the run
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells count


class ConfigurationError(ValueError):
    """The configuration cannot work; the message is one line that says why."""


class RunError(RuntimeError):
    """A run stopped; the message is one line that says why and what is kept."""

    exit_code = EXIT_ERROR


class RunHeldError(RunError):
    """Another process has the run."""

    exit_code = EXIT_AGAIN


class Interrupted(BaseException):
    """The process was asked to stop, by SIGTERM or Ctrl-C.

    Args:
        number: of the signal.
        step: after which the run was saved; None outside of training, where the last checkpoint counts.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        where = "the last checkpoint" if step is None else f"step {step}"
        super().__init__(f"stopped by {name}; the same command continues from {where}")
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_AGAIN
