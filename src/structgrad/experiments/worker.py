"""A worker of a sweep: it takes a trial from the queue, runs ``train.py`` in its own process, and
records the result.

``python -m structgrad.experiments.worker <plan.json>`` starts one. Any number of workers may work
on a plan, on any machine that can reach its storage.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from optuna.exceptions import StorageInternalError

from structgrad.common.text import first_line
from structgrad.experiments import runs
from structgrad.experiments.queue import REST, Plan, Queue, SweepError, Taken, record
from structgrad.experiments.storage import PASSWORD, masked
from structgrad.experiments.tables import as_overrides
from structgrad.training.contract import EXIT_AGAIN, EXIT_INTERRUPTED


class Worker:
    """Works until every trial of a plan is finished or has failed, or until a request to stop.

    Args:
        file: the file of the plan.
        pause: seconds between looks at a queue without an open trial.
    """

    def __init__(self, file: str | Path, pause: float = 2.0) -> None:
        self.file = Path(file)
        self.pause = pause
        self.stopped = False

    def __call__(self) -> int:
        """Return the exit code: 0 if nothing is left to do, 75 after a request to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        plan = Plan.load(self.file)
        queue = Queue(plan)
        while not self.stopped:
            began = time.monotonic()
            taken = queue.take()
            if taken is not None:
                with queue.alive(taken):
                    self._work_or_tell(queue, taken)
            elif queue.settled():
                return 0
            else:
                ended = time.monotonic()
                rest = ended + max(self.pause, REST * (ended - began))
                while not self.stopped and time.monotonic() < rest:
                    time.sleep(min(self.pause, max(rest - time.monotonic(), 0.0)))
        return EXIT_AGAIN

    def checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """Submitit calls this before it ends a job that will come again. The run saves itself as
        the job ends.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Worker(self.file, self.pause))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def _work_or_tell(self, queue: Queue, taken: Taken) -> None:
        """An error of our own counts as an attempt of the trial, so that no trial can end workers
        for ever.
        """
        try:
            self._work(queue, taken)
        except Exception as error:
            line = f"its worker ended: {_line(error)}"
            with suppress(Exception):  # the database itself may be broken
                if queue.crashes(taken.row, taken.index) + 1 < queue.plan.attempts:
                    queue.give_back(taken, "crash")
                else:
                    queue.fail(taken, line)
            raise

    def _work(self, queue: Queue, taken: Taken) -> None:
        plan, name = queue.plan, f"{taken.row.name}-{taken.index}"
        folder = Path(plan.folder)
        finished, logs, progress = folder / "finished" / name, folder / "logs", folder / "progress" / f"{name}.json"
        given = overrides(plan, taken)
        places = [f"paths.results={finished}", f"paths.progress={progress}"]
        pause = [] if taken.until is None else [f"trainer.pause_at={taken.until}"]
        for place in (logs, progress.parent):
            place.mkdir(parents=True, exist_ok=True)
        try:
            code = self._run(
                [*plan.command, *given, *places, *pause],
                logs / name,
                group=f"{plan.name}/{taken.row.name}",
                look=_Curve(progress, lambda curve: queue.report(taken, curve)),
            )
        except SystemExit:  # from submitit's handler, when a job is preempted
            queue.give_back(taken, "stopped")
            raise
        if code == 0:
            self._record(queue, taken, finished, f"{logs / name}.log", given)
        elif code == EXIT_AGAIN and taken.until is not None and _step(progress) >= taken.until:
            queue.rest(taken, _curve(progress))
        elif code in (EXIT_AGAIN, EXIT_INTERRUPTED) or self.stopped:
            queue.give_back(taken, "stopped")
            if not self.stopped:  # another process has the run
                time.sleep(self.pause)
        elif code < 0 and queue.crashes(taken.row, taken.index) + 1 < plan.attempts:
            queue.give_back(taken, "crash")
        else:
            queue.fail(taken, explain(code, logs / f"{name}.err"))

    def _record(self, queue: Queue, taken: Taken, finished: Path, log: str, given: Sequence[str]) -> None:
        plan = queue.plan
        summaries = sorted(finished.glob("*.json"))
        if not summaries:
            queue.fail(taken, f"the run ended without a summary in {finished}; its output is {log}")
            return
        summary = json.loads(max(summaries, key=lambda file: file.stat().st_mtime).read_text())
        metric, _ = plan.monitor(taken.row)
        value = summary["metrics"].get(metric)
        if value is None or value != value:
            queue.fail(taken, f"{metric} is {value}: nothing to select by")
            return
        content = record(plan, taken, summary)
        content["sweep"]["curve"] = curve_of(summary, given, metric)
        queue.report(taken, content["sweep"]["curve"])
        queue.finish(taken, content)

    def _run(self, command: Sequence[str], log: Path, group: str, look: Callable[[], None]) -> int:
        environment = {key: value for key, value in os.environ.items() if key != PASSWORD}
        environment["WANDB_RUN_GROUP"] = group
        with (
            log.with_suffix(log.suffix + ".log").open("ab") as out,
            log.with_suffix(log.suffix + ".err").open("wb") as errors,
        ):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=environment,
                start_new_session=True,  # so that signals reach a run only through its worker
                preexec_fn=die_with_parent(),
            )
            asked = False
            try:
                while (code := process.poll()) is None:
                    if self.stopped and not asked:
                        asked = True
                        process.terminate()
                    look()
                    time.sleep(0.1)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        return code


class _Curve:
    """Passes on the run's measurements when there are new ones, at most once a second."""

    def __init__(self, file: Path, report: Callable[[list[tuple[int, float]]], None]) -> None:
        self.file, self.report = file, report
        self._known = 0
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1.0
        curve = _curve(self.file)
        if len(curve) > self._known:
            with suppress(StorageInternalError):  # a busy or unreachable database gets everything at the end
                self.report(curve[self._known :])
                self._known = len(curve)


def _progress(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content


def _step(file: Path) -> int:
    return int(_progress(file).get("step", 0))


def _curve(file: Path) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in _progress(file).get("curve", [])]


def overrides(plan: Plan, taken: Taken) -> list[str]:
    """The arguments of ``train.py`` for a trial, except those for its output and its pause."""
    drawn = as_overrides(taken.parameters)
    return [*taken.row.overrides, *plan.common, *drawn, f"seed={taken.index}"]


def curve_of(summary: dict[str, Any], given: Sequence[str], metric: str) -> list[tuple[int, float]]:
    """The run's validation curve; empty if its folder is not where the summary says."""
    root = next((o.split("=", 1)[1] for o in given if o.startswith("paths.runs=")), "runs")
    return runs.curve(Path(root) / runs.folder_of(summary), metric)


def explain(code: int, errors: Path, begin: int = 0) -> str:
    """One line that says why a run failed, from its output after the first ``begin`` bytes of a
    file.
    """
    written = errors.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    marked = [line for line in lines if line.startswith("error: ")]
    return (marked or lines or [f"exit code {code}"])[-1].removeprefix("error: ")


def die_with_parent() -> Callable[[], None] | None:
    """For a child: get SIGTERM when the parent dies for any reason.

    It works on Linux only; elsewhere the run's lock must suffice.
    """
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)  # loaded here, because a child must not load anything between fork and exec
    return lambda: library.prctl(1, signal.SIGTERM)


def main() -> int:
    """``python -m structgrad.experiments.worker <plan.json> [pause]``."""
    try:
        return Worker(sys.argv[1], *map(float, sys.argv[2:3]))()
    except Exception as error:
        if not isinstance(error, SweepError | OSError):
            print(masked(traceback.format_exc()), file=sys.stderr)
        print(f"error: {_line(error)}", file=sys.stderr)
        return 1


def _line(error: Exception) -> str:
    """The sweep's line for an error of ours."""
    kind = "" if isinstance(error, SweepError | OSError) else f"{type(error).__name__}: "
    return kind + masked(first_line(error))


if __name__ == "__main__":
    sys.exit(main())
