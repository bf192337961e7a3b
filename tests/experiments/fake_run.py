"""Stands in for train.py in tests of sweeps: the same contract (overrides, lock, checkpoint, summary, exit codes), in
milliseconds and without torch.

Usage: ``python fake_run.py key=value ...``. It does ``steps`` steps of ``step_s`` seconds and keeps a checkpoint after
each. Its last step waits for the file ``gate``; without ``steps`` it makes steps until that file exists. It writes
lines to ``starts.log`` and ``steps.log`` in its run's folder, so tests can count repeated work. With ``every`` it is
validated after that many steps.
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


def value_at(settings: dict[str, str], step: int) -> float:
    """The validation metric after a number of steps: better with time and with ``x``, in the same order at all."""
    return float(settings.get("x", 0.0)) + step / 1000


def follow(progress: Path, settings: dict[str, str], step: int, every: int) -> None:
    curve = [[at - 1, value_at(settings, at)] for at in range(every, step + 1, every)]
    progress.parent.mkdir(parents=True, exist_ok=True)
    partial = progress.with_suffix(".partial")
    partial.write_text(json.dumps({"step": step, "curve": curve}))
    os.replace(partial, progress)


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    results = Path(settings.pop("paths.results"))
    if settings.pop("environment", ""):
        print(dict(os.environ))
    progress = Path(settings.pop("paths.progress", "/dev/null"))
    pause_at = int(settings.pop("trainer.pause_at", 0))
    every = int(settings.pop("every", 0))
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
    done = folder / "steps.log"
    if step and str(step) not in (done.read_text().split() if done.exists() else []):
        with done.open("a") as log:  # killed between the checkpoint and the log
            log.write(f"{step}\n")
    gate = Path(settings.get("gate", folder))
    steps = int(settings.get("steps", 1))
    endless = "steps" not in settings
    if every:
        follow(progress, settings, step, every)
    while step < steps or (endless and not gate.exists()):
        if stop or (pause_at and step >= pause_at):
            sys.exit(75)
        time.sleep(float(settings.get("step_s", 0.0)))
        if step + 1 == steps and not endless and not gate.exists():
            continue
        step += 1
        partial = folder / "checkpoint.partial"
        partial.write_text(str(step))
        os.replace(partial, checkpoint)
        with done.open("a") as log:
            log.write(f"{step}\n")
        if every and step % every == 0:
            follow(progress, settings, step, every)
    value = float(settings.get("x", 0.0)) + int(settings["seed"])
    if every:
        value = value_at(settings, step)
    summary = {
        "name": f"fake-{identity}", "task": "fake", "structure": settings["row"], "estimator": "none",
        "budget": "quick", "seed": int(settings["seed"]), "metrics": {"val/score": value, "test/score": 2 * value},
        "training_s": 1.0, "device": "cpu", "commit": "0", "config": {"x": settings.get("x")},
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    (results / f"fake-{identity}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
