"""Write files completely or not at all, even if the writing process is stopped."""

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
