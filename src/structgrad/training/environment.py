"""The surroundings of a run: its random numbers, versions, device and commit."""

from __future__ import annotations

import platform
import random
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, as Lightning's function of this name does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """Versions, device and commit, for the run folder."""

    def git(*arguments: str) -> str | None:
        try:
            root = Path(__file__).parent
            run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return run.stdout.strip()

    # An installed package may lie in an environment inside another repository.
    ours = git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = git("rev-parse", "HEAD") if ours else None
    changes = git("status", "--porcelain", "--untracked-files=no")
    packages = ("structgrad", "torch", "pytorch-lightning", "hydra-core", "numpy", "numba", "datasets")
    return {
        "commit": f"{commit}+changes" if commit and changes else commit,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "machine": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
