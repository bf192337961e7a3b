"""The folder of a run: which process uses it, and whether its files are intact and belong to the
run.
"""

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

#: The files from which the same command continues a run or reports it.
KEPT = ("summary.json", "checkpoints/last.ckpt")
#: Length of the checksum at the end of a checkpoint.
_DIGEST = 32


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which must exist. The operating system frees it
    if this one dies.

    Raises:
        RunHeldError: at once; the message says which process has the run.
        RunError: if the folder cannot be written to, e.g. because another user owns it.
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
    except (OSError, ValueError, KeyError):  # the process has just started, or is about to end
        return "another process"


def read_summary(folder: Path, name: str | None = None) -> dict[str, Any] | None:
    """The summary of a finished run; None if it is not finished.

    Args:
        folder: folder of the run, wherever it is now.
        name: name of the run; None for any run.

    Raises:
        RunError: if the file is damaged or belongs to another run.
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
    if name not in (None, owner) or not complete:
        raise RunError(f"the summary of this run is {f'of another run, {owner}' if complete else 'damaged'}; {advice}")
    return content


def seal(content: bytes) -> bytes:
    """A zip file with a checksum of its whole content as the comment at its end. It remains a valid
    zip file.

    Args:
        content: the output of ``torch.save``: a zip file without a comment.
    """
    content = content[:-2] + _DIGEST.to_bytes(2, "little")
    return content + hashlib.sha256(content).digest()


def is_sealed(file: Path) -> bool:
    """Whether a sealed file is unchanged."""
    content = file.read_bytes()
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def read_checkpoint(path: Path, name: str, advice: str) -> dict[str, Any]:
    """A checkpoint of a run. It has only tensors and plain values, which no pickle could execute.

    Args:
        path: path of the file.
        name: name of the run.
        advice: advice for the message of an error.

    Raises:
        RunError: one line.
    """
    content: dict[str, Any] = {}
    try:
        problem = None if is_sealed(path) else "is damaged (its checksum does not match)"
        content = {} if problem else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        problem = f"is damaged, or holds more than weights ({type(error).__name__})"
    if problem is None and content.get("run") != name:
        problem = f"is of another run, {content.get('run')}"
    if problem is not None:
        raise RunError(f"checkpoint {path} {problem}; {advice}")
    return content


def checkpoint_to_resume(folder: Path, name: str) -> Path | None:
    """The checkpoint from which an unfinished run continues; None if there is none yet.

    Raises:
        RunError: if it, or the best checkpoint, which is tested at the end, is damaged or belongs
            to another run.
    """
    last, best = (folder / "checkpoints" / f"{kind}.ckpt" for kind in ("last", "best"))
    found = [path for path in (last, best) if path.exists()]
    steps: dict[Path, int] = {}
    for path in found:
        if path == last:
            advice = f"delete {path} to continue from an older one or from the start"
        else:
            advice = f"delete the folder {path.parent} to start again"
        content = read_checkpoint(path, name, advice)
        steps[path] = content["global_step"]
    remembered = [state.get("best_model_path") for state in content.get("callbacks", {}).values()] if found else []
    if found == [last] and any(remembered):
        raise RunError(f"the best checkpoint {best} is missing; delete {last} to start again")
    if not found:
        return None
    # The best checkpoint is written first. A kill between the two leaves it newer than the last
    # one. The last one, which refers to an older best checkpoint, would then give its score to
    # these weights.
    newest = max(found, key=lambda path: steps[path])
    log.info("continuing from step %d: %s", steps[newest], newest)
    return newest
