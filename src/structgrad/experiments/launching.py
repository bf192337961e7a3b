"""Starts the workers of a plan, on this machine or as jobs, and shows their progress."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from omegaconf import OmegaConf

from structgrad.common.installing import install
from structgrad.experiments.planning import whole_number
from structgrad.experiments.queue import Plan, Queue, SweepError
from structgrad.experiments.screen import Screen
from structgrad.experiments.tables import Table
from structgrad.experiments.worker import Worker, die_with_parent, explain
from structgrad.training.contract import EXIT_AGAIN


def launch(table: Table, plan: Plan, options: Mapping[str, str], given: Sequence[str]) -> int:
    """Open the queue of a plan, start its workers, and wait for them. Returns the exit code of the
    command.

    Args:
        table: the table of the plan.
        plan: the plan.
        options: all options of the command.
        given: overrides; those that begin with ``slurm.`` are parameters of jobs.

    Raises:
        SweepError: one line.
    """
    environments = places(options)
    if not shutil.which(plan.command[0]):
        raise SweepError(f"no {plan.command[0]}")
    file = plan.save()
    _check_writable(Path(plan.results))
    queue = Queue(plan)
    if options["retry"] == "true":
        queue.retry()
    queue.export_finished()
    print(f"sweep {plan.name}: {plan.folder} (queue, output of the runs), {plan.results} (results)")
    if environments == [] and options["launcher"] == "local":
        Screen(table, 0, plan.metric).show(queue.progress())
        return 0
    if options["launcher"] == "local":
        code = _work_here(table, queue, file, environments)
    else:
        code = _work_in_jobs(table, queue, file, len(environments), options["launcher"], given)
    queue.export_finished()
    return _conclude(plan, queue, code)


def places(options: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables that are added to the environment of each worker."""
    if options["workers"] and options["workers_per_gpu"]:
        raise SweepError("workers= and workers_per_gpu=: type one of them")
    if options["workers_per_gpu"]:
        each = whole_number("workers_per_gpu", options["workers_per_gpu"], 1)
        if options["launcher"] != "local":
            raise SweepError("workers_per_gpu= is for this machine; of jobs say slurm.gpus_per_node=")
        gpus = _gpus()
        if not gpus:
            raise SweepError("workers_per_gpu: this machine shows no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES)")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(each) for gpu in gpus]
    workers = whole_number("workers", options["workers"] or "1", 0)
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    return [{} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)} for _ in range(workers)]


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return listed.stdout.split() if listed.returncode == 0 else []


#: A sweep ends after this many deaths of workers by the same error, with no trial finished between
#: them.
_DEATHS = 3


def _check_writable(results: Path) -> None:
    """Check before anything is trained, because a worker that cannot write its results would train
    again.
    """
    probe = results / f".{os.getpid()}.partial"
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SweepError(f"cannot write to {results}: {error.strerror}; results=<folder> names another") from error


def _work_here(table: Table, queue: Queue, file: Path, environments: list[dict[str, str]]) -> int:
    """Start local workers, replace those that die, and wait until they have nothing left to do.

    Returns 75 after a request to stop.

    Raises:
        SweepError: if one of the workers' own errors, which it shows, ends them repeatedly.
    """
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    logs = Path(queue.plan.folder) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    workers = {place: _start(file, logs, place, add) for place, add in enumerate(environments)}
    told, deaths, done = False, Counter[str](), 0
    try:
        with Screen(table, len(environments), queue.plan.metric) as screen:
            while workers:
                progress = queue.progress()
                screen.show(progress)
                if (now := sum(p.done for p in progress.values())) > done:
                    done, deaths = now, Counter()
                if asked and not told:
                    told = True
                    print("stopping: runs save themselves; the same command continues", file=sys.stderr)
                    for worker in workers.values():
                        worker.process.terminate()
                for place, worker in list(workers.items()):
                    code = worker.process.poll()
                    if code is None:
                        continue
                    if code in (0, EXIT_AGAIN) or asked:
                        del workers[place]
                        continue
                    line = worker.reason(code)
                    # A signal comes from outside. It may come often in a long sweep, but not at
                    # once.
                    if code > 0 or time.monotonic() - worker.started < 10:
                        deaths[line] += 1
                    if deaths[line] >= _DEATHS:
                        raise SweepError(f"{line} (this ended workers {_DEATHS} times; see {worker.log})")
                    screen.note(f"worker {place} ended: {line}; it is started again")
                    workers[place] = _start(file, logs, place, environments[place])
                time.sleep(0.5)
            screen.show(queue.progress())
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_AGAIN if asked else 0


@dataclass(frozen=True)
class _Local:
    """A worker on this machine. Its part of the log starts at ``begin``."""

    process: subprocess.Popen[bytes]
    log: Path
    begin: int
    started: float

    def reason(self, code: int) -> str:
        """One line that says why it ended."""
        return explain(code, self.log, self.begin)


def _start(file: Path, logs: Path, place: int, environment: dict[str, str]) -> _Local:
    path = logs / f"worker-{place}.log"
    with path.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "structgrad.experiments.worker", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,  # so that Ctrl-C reaches workers only once, through us
            preexec_fn=die_with_parent(),
        )
    return _Local(process, path, begin, time.monotonic())


def _work_in_jobs(table: Table, queue: Queue, file: Path, workers: int, launcher: str, given: Sequence[str]) -> int:
    """Submit workers as jobs and watch until all trials are settled or no job is left.

    If this process is stopped, the jobs continue.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise SweepError(f"launcher: submitit is not installed; {install('slurm')}") from error
    slurm = OmegaConf.from_dotlist([item.removeprefix("slurm.") for item in given if item.startswith("slurm.")])
    parameters = {_slurm_key(str(key)): value for key, value in slurm.items()}
    try:
        executor = submitit.AutoExecutor(
            Path(queue.plan.folder) / "jobs", cluster="slurm" if launcher == "slurm" else "local"
        )
    except RuntimeError as error:
        raise SweepError("launcher=slurm: this machine has no srun; launcher=submitit works without Slurm") from error
    try:
        executor.update_parameters(**{"name": queue.plan.name, "timeout_min": 24 * 60} | parameters)
    except (NameError, TypeError, ValueError) as error:
        raise SweepError(f"slurm: {str(error).splitlines()[0]}") from error
    jobs = [executor.submit(Worker(file.resolve())) for _ in range(workers)]
    print("jobs: " + ", ".join(job.job_id for job in jobs) + f" (their output: {Path(queue.plan.folder) / 'jobs'})")
    try:
        with Screen(table, workers, queue.plan.metric) as screen:
            while not queue.settled() and not all(job.done() for job in jobs):
                screen.show(queue.progress())
                time.sleep(2)
            screen.show(queue.progress())
    except KeyboardInterrupt:
        print("the jobs continue; workers=0 shows their progress", file=sys.stderr)
        return EXIT_AGAIN
    return 0 if queue.settled() else EXIT_AGAIN


def _slurm_key(key: str) -> str:
    return (
        key if key in ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb", "nodes", "name") else f"slurm_{key}"
    )


def _conclude(plan: Plan, queue: Queue, code: int) -> int:
    progress = queue.progress()
    for row, p in progress.items():
        for index, error in p.errors.items():
            print(f"failed: {row}-{index}: {error}", file=sys.stderr)
    done, failed = sum(p.done for p in progress.values()), sum(p.failed for p in progress.values())
    if code == EXIT_AGAIN:
        print(f"stopped with {done} trials done; the same command continues", file=sys.stderr)
        return code
    if failed and not done:
        print(f"error: all {failed} trials failed; their output is in {Path(plan.folder) / 'logs'}", file=sys.stderr)
        return 1
    searchpath = [item for item in plan.common if item.startswith("hydra.searchpath=")]  # finds a table of the user's
    report = shlex.join(["python", "report.py", plan.results, *searchpath])
    print(f"{done} trials done, {failed} failed; {report}")
    return 0
