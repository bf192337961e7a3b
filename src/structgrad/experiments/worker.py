"""A worker of a sweep: takes a trial from the queue, runs ``train.py`` in a process of its own, records what came out.

``python -m structgrad.experiments.worker <plan.json>`` starts one; any number of them may work on a plan, on any
machine that sees its storage.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from structgrad.experiments import runs
from structgrad.experiments.queue import Plan, PlannedRow, Queue, SweepError, record
from structgrad.training.contract import EXIT_AGAIN, EXIT_INTERRUPTED


class Worker:
    """Works until every trial of a plan is finished or has failed, or until it is asked to stop.

    Args:
        file: of the plan.
        pause: seconds between looks at a queue in which nothing waits.
    """

    def __init__(self, file: str | Path, pause: float = 2.0) -> None:
        self.file = Path(file)
        self.pause = pause
        self.stopped = False

    def __call__(self) -> int:
        """Returns the exit code: 0 when there is nothing left to do, 75 if it was asked to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        plan = Plan.load(self.file)
        queue = Queue(plan)
        while not self.stopped:
            taken = queue.take()
            if taken is not None:
                row, trial, parameters = taken
                with queue.alive(trial):
                    self._work(queue, row, trial, parameters)
            elif queue.settled():
                return 0
            else:
                time.sleep(self.pause)
        return EXIT_AGAIN

    def checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """Submitit calls this before it ends a job that is to come again; the run saves itself as the job ends."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Worker(self.file, self.pause))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def _work(self, queue: Queue, row: PlannedRow, trial: Any, parameters: dict[str, Any]) -> None:
        plan, index = queue.plan, int(trial.user_attrs["index"])
        name = f"{row.name}-{index}"
        finished = Path(plan.folder) / "finished" / name
        command = [*plan.command, *overrides(plan, row, index, parameters), f"paths.results={finished}"]
        logs = Path(plan.folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            code = self._run(command, logs / name, group=f"{plan.name}/{row.name}")
        except SystemExit:  # of submitit's handler, when a job is preempted
            queue.give_back(row, trial, "stopped")
            raise
        if code == 0:
            summaries = sorted(finished.glob("*.json"))
            if not summaries:
                queue.fail(
                    row, trial, f"the run ended without a summary in {finished}; its output is {logs / name}.log"
                )
                return
            summary = json.loads(max(summaries, key=lambda file: file.stat().st_mtime).read_text())
            metric, _ = plan.monitor(row)
            value = summary["metrics"].get(metric)
            if value is None or value != value:
                queue.fail(row, trial, f"{metric} is {value}: nothing to select by")
                return
            content = record(plan, row, index, parameters, summary)
            content["sweep"]["curve"] = curve_of(summary, overrides(plan, row, index, parameters), metric)
            queue.finish(row, trial, content)
        elif code in (EXIT_AGAIN, EXIT_INTERRUPTED) or self.stopped:
            queue.give_back(row, trial, "stopped")
            if not self.stopped:  # another process has the run
                time.sleep(self.pause)
        elif code < 0 and queue.crashes(row, index) + 1 < plan.attempts:
            queue.give_back(row, trial, "crash")
        else:
            queue.fail(row, trial, explain(code, logs / f"{name}.err"))

    def _run(self, command: Sequence[str], log: Path, group: str) -> int:
        environment = os.environ | {"WANDB_RUN_GROUP": group}
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
                start_new_session=True,  # signals reach a run through its worker only
                preexec_fn=die_with_parent(),
            )
            asked = False
            try:
                while (code := process.poll()) is None:
                    if self.stopped and not asked:
                        asked = True
                        process.terminate()
                    time.sleep(0.1)
            except SystemExit:
                process.terminate()
                process.wait()
                raise
        return code


def overrides(plan: Plan, row: PlannedRow, index: int, parameters: dict[str, Any]) -> list[str]:
    """What ``train.py`` is called with for a trial, but for where its summary goes."""
    drawn = [f"{key}={'null' if value is None else value}" for key, value in parameters.items()]
    return [*row.overrides, *plan.common, *drawn, f"seed={index}"]


def curve_of(summary: dict[str, Any], given: Sequence[str], metric: str) -> list[tuple[int, float]]:
    """The run's validation curve; empty if its folder is not where summaries say that it is."""
    root = next((o.split("=", 1)[1] for o in given if o.startswith("paths.runs=")), "runs")
    return runs.curve(Path(root) / runs.folder_of(summary), metric)


def explain(code: int, errors: Path) -> str:
    """The one line that says why a run failed."""
    lines = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    marked = [line for line in lines if line.startswith("error: ")]
    return (marked or lines or [f"exit code {code}"])[-1].removeprefix("error: ")


def die_with_parent() -> Callable[[], None] | None:
    """For a child: get SIGTERM when the parent dies, however it dies (Linux only; elsewhere the run's lock has to
    do).
    """
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be
    return lambda: library.prctl(1, signal.SIGTERM)


def main() -> int:
    """``python -m structgrad.experiments.worker <plan.json> [pause]``."""
    try:
        return Worker(sys.argv[1], *map(float, sys.argv[2:3]))()
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
