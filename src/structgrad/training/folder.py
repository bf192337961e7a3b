"""The folder of a run: who works in it, and whether what lies in it is whole and belongs there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from structgrad.common.files import write_json
from structgrad.training.errors import RunError, RunHeldError

log = logging.getLogger("structgrad")

#: Length of the checksum at the end of a checkpoint.
_DIGEST = 32


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which must exist; the operating system frees it if this one dies.

    Raises:
        RunHeldError: at once, saying who has the run.
        RunError: if the folder cannot be written to, e.g. because it is somebody else's.
    """
    holder = folder / "running.json"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
        write_json(
            holder,
            {
                "process": os.getpid(),
                "machine": socket.gethostname(),
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
        )
    except Timeout:
        raise RunHeldError(
            f"{_describe(holder)} has this run: {folder}; the same command continues or reports it afterwards"
        ) from None
    except OSError as error:
        lock.release()
        raise RunError(f"cannot write to {folder}: {error.strerror}; set paths.runs to another folder") from error
    try:
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


def read_summary(folder: Path, name: str) -> dict[str, Any] | None:
    """The summary of a finished run; None if it is not finished.

    Args:
        folder: of the run, wherever it was moved to.
        name: of the run.

    Raises:
        RunError: if the file is damaged or another run's.
    """
    file = folder / "summary.json"
    if not file.exists():
        return None
    advice = f"delete {file}: the same command then tests the trained model again"
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        owner = content["name"]
        complete = isinstance(content["metrics"], dict) and {"task", "structure", "estimator", "budget", "seed"} <= {
            *content
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"the summary of this run is damaged ({type(error).__name__}); {advice}") from error
    if owner != name or not complete:
        raise RunError(
            f"the summary of this run is {'damaged' if owner == name else f'of another run, {owner}'}; {advice}"
        )
    return content


def seal(content: bytes) -> bytes:
    """A zip file with a checksum of all of it as the comment at its end; it stays a zip file to everybody else.

    Args:
        content: what ``torch.save`` writes: a zip file without a comment.
    """
    content = content[:-2] + _DIGEST.to_bytes(2, "little")
    return content + hashlib.sha256(content).digest()


def is_sealed(file: Path) -> bool:
    """Whether nothing of a sealed file has changed."""
    content = file.read_bytes()
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def checkpoint_to_resume(folder: Path, name: str) -> Path | None:
    """The checkpoint from which an unfinished run continues; None if there is none yet.

    Raises:
        RunError: if it, or the best one, which is to be tested at the end, is damaged or another run's.
    """
    last, best = (folder / "checkpoints" / f"{kind}.ckpt" for kind in ("last", "best"))
    found = [path for path in (last, best) if path.exists()]
    steps: dict[Path, int] = {}
    for path in found:
        if path == last:
            advice = f"delete {path} to continue from an older one or from the start"
        else:
            advice = f"delete the folder {path.parent} to start again"
        try:
            problem = None if is_sealed(path) else "is damaged (its checksum does not match)"
            content = {} if problem else torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            problem, content = f"is damaged ({type(error).__name__})", {}
        if problem is None and content.get("run") != name:
            problem = f"is of another run, {content.get('run')}"
        if problem is not None:
            raise RunError(f"checkpoint {path} {problem}; {advice}")
        steps[path] = content["global_step"]
    remembered = [state.get("best_model_path") for state in content.get("callbacks", {}).values()] if found else []
    if found == [last] and any(remembered):
        raise RunError(f"the best checkpoint {best} is missing; delete {last} to start again")
    if not found:
        return None
    # The best one is written first: a kill between the two leaves it the newer one, and the last one, which then knows
    # of an older best, would give that one's score to these weights.
    newest = max(found, key=lambda path: steps[path])
    log.info("continuing from step %d: %s", steps[newest], newest)
    return newest
