"""The queue of a sweep on PostgreSQL: trials dealt out a second, connections a worker, and whether each was run once.

    python -m benchmarks.sweep_queue                                     # 10,000 trials of 50 rows, 64 workers
    python -m benchmarks.sweep_queue --trials 20 --rows 50 --workers 8   # a table of 50 rows, a worker on 8 machines
    python -m benchmarks.sweep_queue --sleep 0.5

A worker takes a trial as those of a sweep do, with signs of life, and sleeps in the place of a run. It needs Debian's
server (`apt install postgresql`), and starts one of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psycopg
from benchmarks.postgresql import NoServerError, server

from structgrad.experiments.queue import REST, Plan, PlannedRow, Queue


def make_plan(folder: Path, url: str, rows: int, trials: int) -> Plan:
    """Rows with one searched hyper-parameter each."""
    space = {"x": {"distribution": "uniform", "low": 0.0, "high": 1.0}}
    return Plan(
        name="queue",
        table="queue",
        rows=tuple(PlannedRow(f"row_{k}", (), tuple(range(trials)), space) for k in range(rows)),
        metric="val/score",
        direction="maximize",
        folder=str(folder / "sweep"),
        results=str(folder / "results"),
        storage=url,
        command=("none",),
        common=(),
        heartbeat=30,
        grace=120,
    )


def work(plan: Plan, sleep: float, folder: str) -> None:
    """A worker, until nothing is left; it writes a line for every trial, and at its end its processor time."""
    log = Path(folder) / f"{os.getpid()}.log"
    queue = Queue(plan)
    with log.open("w") as lines:
        while True:
            looked = time.monotonic()
            if (taken := queue.take()) is None:
                if queue.settled():
                    break
                time.sleep(max(2.0, REST * (time.monotonic() - looked)))  # as workers do
                continue
            began = time.time()
            with queue.alive(taken):
                time.sleep(sleep)
            metrics = {"val/score": float(taken.parameters["x"]), "test/score": 0.0}
            sweep = {"table": plan.table, "row": taken.row.name, "trial": taken.index, "parameters": taken.parameters}
            queue.finish(taken, {"name": f"{taken.row.name}-{taken.index}", "metrics": metrics, "sweep": sweep})
            lines.write(f"{taken.row.name} {taken.index} {began}\n")
            lines.flush()
        used = resource.getrusage(resource.RUSAGE_SELF)
        lines.write(f"processor {used.ru_utime + used.ru_stime}\n")


def count_connections(url: str, stop: threading.Event, seen: list[int]) -> None:
    """How many the server has, but for this one, ten times a second."""
    own = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    with psycopg.connect(url, autocommit=True) as connection:
        while not stop.wait(0.1):
            row = connection.execute(own).fetchone()
            seen.append(row[0] if row else 0)


def measure(rows: int, trials: int, workers: int, sleep: float) -> bool:
    """Run it and print what was found. Returns whether every trial was run exactly once."""
    folder = Path(tempfile.mkdtemp(prefix="structgrad-queue-"))
    try:
        with server(options=f"-c max_connections={4 * workers + 20}") as url:
            plan = make_plan(folder, url, rows, trials)
            Queue(plan)
            logs = folder / "logs"
            logs.mkdir()
            stop, seen = threading.Event(), list[int]()
            counter = threading.Thread(target=count_connections, args=(url, stop, seen))
            context = multiprocessing.get_context("fork")  # what is imported is shared
            began = time.time()
            processes = [context.Process(target=work, args=(plan, sleep, str(logs))) for _ in range(workers)]
            for process in processes:
                process.start()
            counter.start()
            for process in processes:
                process.join()
            stop.set()
            counter.join()
            wall = time.time() - began
            queue = Queue(plan)
            complete = {
                (row.name, index) for row in plan.rows for index, t in queue.trials(row).items() if t.state == 1
            }
            entries = sum(len(queue.entries(row)) for row in plan.rows)
        lines = [line.split() for file in logs.iterdir() for line in file.read_text().splitlines()]
        runs = Counter((row, int(index)) for row, index, *_ in (line for line in lines if line[0] != "processor"))
        processor = sum(float(line[1]) for line in lines if line[0] == "processor")
        files = len(list(Path(plan.results).glob("*.json")))
    finally:
        shutil.rmtree(folder)
    wanted = {(row.name, index) for row in plan.rows for index in row.trials}
    once = runs == Counter(wanted) and complete == wanted and files == entries == len(wanted)
    total, ended = len(wanted), sum(process.exitcode == 0 for process in processes)
    print(f"{total:,} trials of {rows} rows, {workers} workers that sleep {sleep:g} s a trial, on one machine")
    print(f"  dealt out and recorded: {sum(runs.values()) / wall:.1f} a second ({wall:.0f} s)")
    print(f"  processor time of the workers: {1000 * processor / total:.1f} ms a trial")
    print(f"  connections: {max(seen)} at most, {max(seen) / workers:.1f} a worker")
    print(
        f"  run: {len(runs):,} trials, {sum(runs.values()) - len(runs)} of them again; lost {len(wanted - set(runs))}"
    )
    print(f"  in the database: {len(complete):,} complete of {entries:,} entries; {files:,} files of results")
    print(f"  workers that ended well: {ended} of {workers}")
    return once and ended == workers


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of each row")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--sleep", type=float, default=0.1, help="seconds that stand for a run")
    options = parser.parse_args()
    try:
        return 0 if measure(options.rows, options.trials, options.workers, options.sleep) else 1
    except NoServerError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
