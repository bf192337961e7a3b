"""Stands in for train.py in tests of sweeps: the same contract (overrides, lock, checkpoint, summary, exit codes), in
milliseconds and without torch.

Usage: ``python fake_run.py key=value ...``; it does ``steps`` steps of ``step_s`` seconds, goes on until the file
``gate`` exists, keeps a checkpoint after each, and writes a line to ``starts.log`` and to ``steps.log`` of its run's
folder, so that tests can count what was done twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    results = Path(settings.pop("paths.results"))
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(settings["paths.runs"]) / "fake" / identity
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("error: another process has this run", file=sys.stderr)
        sys.exit(75)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    with (folder / "starts.log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    if "fail" in settings:
        print("something\nerror: it cannot work", file=sys.stderr)
        sys.exit(1)
    if settings.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint = folder / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    gate = Path(settings.get("gate", folder))
    while step < int(settings.get("steps", 1)) or not gate.exists():
        if stop:
            sys.exit(75)
        time.sleep(float(settings.get("step_s", 0.0)))
        step += 1
        partial = folder / "checkpoint.partial"
        partial.write_text(str(step))
        os.replace(partial, checkpoint)
        with (folder / "steps.log").open("a") as log:
            log.write(f"{step}\n")
    value = float(settings.get("x", 0.0)) + int(settings["seed"])
    summary = {
        "name": f"fake-{identity}", "task": "fake", "structure": settings["row"], "estimator": "none",
        "budget": "quick", "seed": int(settings["seed"]), "metrics": {"val/score": value, "test/score": 2 * value},
        "training_s": 1.0, "device": "cpu", "commit": "0", "config": {"x": settings.get("x")},
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    (results / f"fake-{identity}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
