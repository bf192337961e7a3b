"""The scripts in ``examples`` run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_supervised_parser(root: Path) -> None:
    command = [sys.executable, str(root / "examples" / "supervised_parser.py"), "SparseMAPLoss", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert "attachment score" in done.stdout
