"""The figure scripts, called as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def figure(script: str, folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Draw the summaries in a folder."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), str(folder), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True)
