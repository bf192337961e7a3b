"""The table of what is possible is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_table_is_up_to_date(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("estimator_table", root / "scripts" / "estimator_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TABLE.read_text() == module.table(), "run: python scripts/estimator_table.py"
