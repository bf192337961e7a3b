"""The table of structures and oracles is that of the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


def test_the_table_is_up_to_date(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("structure_table", root / "scripts" / "structure_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.table(), "run python scripts/structure_table.py"


def test_the_example_prints_what_it_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (root / "docs" / "structures" / "README.md").read_text()
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    exec(block, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"tensor\(.*?\)$", block, re.MULTILINE)
