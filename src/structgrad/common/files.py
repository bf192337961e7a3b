"""Files that are written completely or not at all, even if the writing process is stopped; and their paths."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, or leave the old one unchanged. If several processes write the same file, the
    last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The same for content that JSON can hold, indented."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def expanded(path: str | None) -> str | None:
    """A path in which the user's folder replaces ``~`` and values replace environment variables."""
    return None if path is None else os.path.expandvars(os.path.expanduser(path))
