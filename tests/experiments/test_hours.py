"""The benchmark that writes the hours of runs into the tables' files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from benchmarks import hours

from structgrad.experiments import tables


def test_hours_are_written_into_every_table(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever shape a row has in its file; nothing else changes."""
    monkeypatch.setattr(hours, "CONFIGS", tmp_path)
    shutil.copytree(root / "configs" / "table", tmp_path / "table")
    for name in tables.names(tmp_path / "table"):
        before = tables.load(name, tmp_path / "table")
        hours.write(before, {row.name: 1.25 for row in before.rows})
        after = tables.load(name, tmp_path / "table")
        assert after.rows == tuple(dataclasses.replace(row, hours=1.25) for row in before.rows)
