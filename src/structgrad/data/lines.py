"""Text files of users, plain or packed with gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from structgrad.data.errors import DamagedDataError


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, each together with ``<file>:<line>``.

    Raises:
        DamagedDataError: if the file is no (gzip) text in UTF-8.
    """
    number = 0
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8", newline="\n")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8", newline="\n") as text
        ):
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield f"{file}:{number}", line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DamagedDataError(f"{file}:{number + 1}: {error}") from error
