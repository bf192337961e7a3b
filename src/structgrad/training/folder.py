"""The folder of a run: who works in it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from structgrad.training.errors import RunHeldError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which must exist; the operating system frees it if this one dies.

    Raises:
        RunHeldError: at once, saying who has the run.
    """
    holder = folder / "running.json"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunHeldError(
            f"{_describe(holder)} has this run: {folder}; the same command continues or reports it afterwards"
        ) from None
    try:
        write_json(
            holder,
            {
                "process": os.getpid(),
                "machine": socket.gethostname(),
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe(holder: Path) -> str:
    try:
        content = json.loads(holder.read_text())
        return f"process {content['process']} on {content['machine']} (since {content['since']})"
    except (OSError, ValueError, KeyError):  # it has only just started, or is about to end
        return "another process"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
    os.replace(temporary, path)
