"""The identity of a run: a hash of everything that decides its result."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from structgrad.common import renamed
from structgrad.training import contract


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, interpolations resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def portable(config: DictConfig) -> dict[str, Any]:
    """Everything that decides a run's result, as plain dictionaries that name no folder of this
    machine.
    """
    # A task refers to the machine's folders only by interpolation of `paths`, which are the same
    # for everyone here.
    elsewhere = OmegaConf.merge(config, {"paths": {str(key): f"<{key}>" for key in config.paths}})
    assert isinstance(elsewhere, DictConfig)
    content = {key: value for key, value in resolved(elsewhere).items() if key not in contract.IRRELEVANT}
    for option, neutral in contract.NEUTRAL.items():
        *above, name = option.split(".")
        node: Any = content
        for key in above:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node and node[name] == neutral:
            # For a class with another default, an option that is left out means something else.
            default = _default(node.get("_target_"), name)
            if default is _ABSENT or default == neutral:
                del node[name]
    return content


_ABSENT = object()


def _default(target: object, name: str) -> Any:
    """The default of an argument of a class, if it has one."""
    if not isinstance(target, str):
        return _ABSENT
    try:
        default = inspect.signature(get_object(target)).parameters[name].default
    except (ImportError, HydraException, KeyError, TypeError, ValueError):  # other checks name what is wrong
        return _ABSENT
    return _ABSENT if default is inspect.Parameter.empty else default


def identity(deciding: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that are equal for runs that compute the same thing.

    Args:
        deciding: see :func:`portable`.
    """
    trainer = {key: value for key, value in deciding["trainer"].items() if key not in contract.HARDWARE}
    content = renamed.with_first_names({**deciding, "trainer": trainer})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
