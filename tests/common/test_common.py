"""The ground floor: ranges, words and files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from structgrad.common.files import write_bytes, write_json
from structgrad.common.ranges import check_range
from structgrad.common.text import duration, first_line, nearest


def test_the_nearest_names_come_first() -> None:
    assert nearest("temprature", ["kl_weight", "temperature"]) == "temperature, kl_weight"
    assert nearest("zzz", ["a", "b"]) == "a, b"
    many = [f"n{i}" for i in range(15)]
    assert nearest("n14", many).startswith("n14, ")
    assert nearest("zzz", many).endswith("n11, and 3 more")
    assert nearest("zzz", many[:13]).endswith("n11, n12")


def test_first_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (120, "2.0 min"), (7200, "2.0 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_number_outside_of_its_range_is_named() -> None:
    check_range("x", 0.5, above=0, most=1)
    with pytest.raises(ValueError, match="x must be greater than 0 and at most 1; got 0"):
        check_range("x", 0, above=0, most=1)
    with pytest.raises(ValueError, match="got nan"):
        check_range("x", float("nan"), least=0)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"something else")
    assert file.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]
