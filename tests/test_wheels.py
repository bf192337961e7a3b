"""The wheels that a GPU machine without a network needs beside torch and Lightning."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def test_the_list_has_every_dependency_but_torch(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/wheels.py", "--list"], cwd=root, capture_output=True, text=True, check=True
    )
    listed = {Requirement(line).name.lower().replace("_", "-") for line in done.stdout.split()}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    own = project["dependencies"] + project["optional-dependencies"]["experiments"]
    # What these need themselves is where they are.
    there = {"torch", "pytorch-lightning", "numpy", "tqdm", "filelock"}
    assert {Requirement(line).name for line in own} - there <= listed
    assert not listed & (there | {"sympy", "torchmetrics"})
    assert {"pytest", "pytest-xdist", "sqlalchemy", "llvmlite"} <= listed
