"""Text files of users, plain or packed with gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from structgrad.data.errors import DamagedDataError, MissingDataError


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


def file_of_split(folder: str | Path, split: str, suffix: str, content: str) -> Path:
    """The file of a split in a user's folder (``data.files``), plain or packed; a plain one is preferred.

    Args:
        folder: the folder.
        split: name of the file without suffixes.
        suffix: suffix of a plain file; a packed one has ``.gz`` after it.
        content: what such a file has, for the message.

    Raises:
        MissingDataError: if there is neither.
    """
    plain = Path(folder) / f"{split}{suffix}"
    packed = plain.with_suffix(f"{suffix}.gz")
    file = packed if packed.is_file() and not plain.is_file() else plain
    if not file.is_file():
        raise MissingDataError(
            f"There is no {file}: data.files has train, val and test, each {suffix} or {suffix}.gz, {content}"
        )
    return file
