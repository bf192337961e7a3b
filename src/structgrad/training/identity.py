"""Who a run is: a hash of what decides its result, and the folder that it lives in."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from structgrad.common import renamed
from structgrad.training import contract


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, interpolations resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def portable(config: DictConfig) -> dict[str, Any]:
    """What decides a run's result, as plain dictionaries that name no folder of this machine."""
    # A task refers to the machine's folders only by interpolation of `paths`, which are the same for everyone here.
    elsewhere = OmegaConf.merge(config, {"paths": {str(key): f"<{key}>" for key in config.paths}})
    assert isinstance(elsewhere, DictConfig)
    content = {key: value for key, value in resolved(elsewhere).items() if key not in contract.IRRELEVANT}
    for option, neutral in contract.NEUTRAL.items():
        *above, name = option.split(".")
        node: Any = content
        for key in above:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node and node[name] == neutral:
            del node[name]
    return content


def identity(config: DictConfig) -> str:
    """Ten hexadecimal digits that are equal for runs that compute the same thing."""
    content = portable(config)
    content["trainer"] = {key: value for key, value in content["trainer"].items() if key not in contract.HARDWARE}
    content = renamed.with_first_names(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


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

    # An installed package may lie in an environment inside somebody else's repository.
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
