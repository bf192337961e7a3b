"""The configuration in a run's folder. The folder may come from anybody, so it is checked before
anything is built.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from structgrad.common import renamed
from structgrad.common.files import expanded
from structgrad.common.text import first_line
from structgrad.training.errors import ConfigurationError, RunError
from structgrad.training.folder import read_summary
from structgrad.training.options import CONFIGS, imported

#: Packages whose classes a stored configuration may name.
_OURS = ("structgrad", "torch.optim")
#: Paths that decide where things are read from. The others belong to a training.
_PATHS = ("data", "cache", "runs")


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        RunError: one line that says what to type, if the folder is not that of a finished run.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; type the folder of a finished run, as train.py printed it")
    summary = read_summary(folder)
    if summary is not None:
        return summary
    if (folder / "config.yaml").exists():
        command = "the command that began it"
        with suppress(OSError, ValueError, KeyError, TypeError):  # useful, but not needed
            command = json.loads((folder / "environment.json").read_text())["command"] or command
        raise RunError(f"{folder}: this run is not finished; type {command}")
    below = sorted(file.parent for file in folder.glob("**/summary.json"))
    if below:
        raise RunError(f"{folder} has {len(below)} finished runs; type the folder of one, e.g. {below[0]}")
    raise RunError(f"{folder} is no folder of a run; type the folder of a finished run, as train.py printed it")


def configuration(folder: Path, summary: Mapping[str, Any], searchpath: Sequence[str]) -> DictConfig:
    """The settings that decided a run, in a form that can be built again on this machine.

    They are those of the summary, which names no folder of a machine, with the paths of
    ``config.yaml``, on one device of any kind.

    Args:
        folder: folder of the run.
        summary: summary of the run.
        searchpath: the user's Hydra search path: classes of its packages may be built.

    Raises:
        ConfigurationError: one line, for a class of another package.
        RunError: if the configuration is missing or damaged.
    """
    content = renamed.with_new_names(summary.get("config"))
    if not isinstance(content, dict) or not {"task", "structure", "trainer", "seed"} <= content.keys():
        raise RunError(f"{folder / 'summary.json'} has no configuration; type the command of the run again")
    check_trusted(content, searchpath)
    paths = {**dict.fromkeys(("results", "progress", "test_file")), **_paths(folder / "config.yaml")}
    trainer = OmegaConf.merge(OmegaConf.load(CONFIGS / "trainer" / "auto.yaml"), content["trainer"])
    one = {"accelerator": "auto", "devices": 1, "strategy": "auto", "compile": None, "pause_at": None}
    rest = {"paths": paths, "logger": {}, "search": {}, "run": {"name": summary["name"], "folder": str(folder)}}
    trained: dict[str, Any] = _with_paths(content, paths)
    return OmegaConf.create({**trained, **rest, "trainer": OmegaConf.merge(trainer, one)})


def check_trusted(content: Any, searchpath: Iterable[str]) -> None:
    """Refuse a stored configuration that would build anything except classes of known packages. It
    imports no other.

    Args:
        content: dictionaries and lists.
        searchpath: the user's Hydra search path.

    Raises:
        ConfigurationError: one line with the option that allows it.
    """
    own = [place.removeprefix("pkg://").partition(".")[0] for place in searchpath if place.startswith("pkg://")]
    packages = (*_OURS, *own)
    for key, value in _leaves(content, ""):
        if isinstance(value, str) and "${" in value:
            raise ConfigurationError(f"{key}={value!r}: a stored configuration has no references; it was changed")
        if not key.endswith("._target_"):
            continue
        if not isinstance(value, str) or not _within(value, packages):
            raise ConfigurationError(_refusal(key, value, packages))
        target = imported(key.removesuffix("._target_"), value)
        if not inspect.isclass(target) or not _within(target.__module__, packages):
            raise ConfigurationError(_refusal(key, value, packages))


def _refusal(key: str, value: Any, packages: Sequence[str]) -> str:
    package = str(value).partition(".")[0]
    return (
        f"{key}={value} is no class of {', '.join(packages)}, and this folder may be somebody else's; if you trust it, "
        f"type 'hydra.searchpath=[pkg://{package}]', which allows the classes of the package {package}"
    )


def _within(path: str, packages: Iterable[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _leaves(content: Any, above: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            name = f"{above}.{key}" if above else str(key)
            yield from [(name, value)] if key == "_target_" else _leaves(value, name)
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from _leaves(value, f"{above}[{place}]")
    else:
        yield above, content


def _with_paths(content: Any, paths: Iterable[str]) -> Any:
    """Put references in the place of ``<data>`` and the like, which summaries have."""
    if isinstance(content, Mapping):
        return {key: _with_paths(value, paths) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_paths(value, paths) for value in content]
    if isinstance(content, str):
        for name in paths:
            content = content.replace(f"<{name}>", f"${{paths.{name}}}")
    return content


def _paths(file: Path) -> dict[str, str]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(found, dict)
        paths = {name: found["paths"][name] for name in _PATHS}
    except (OSError, YAMLError, OmegaConfBaseException, KeyError, TypeError, AssertionError) as error:
        raise RunError(f"{file} does not say where the data are: {first_line(error)}; copy the whole folder") from error
    for name, path in paths.items():
        if not isinstance(path, str) or "${" in path:
            raise RunError(f"{file}: paths.{name} must be a path; got {path!r}; type paths.{name}=<folder>")
    return {name: expanded(path) or path for name, path in paths.items()}
