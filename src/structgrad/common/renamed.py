"""Old names: an error tells the new name, and stored configurations of old runs are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

#: Class path before -> now.
CLASSES: dict[str, str] = {
    "structgrad.estimators.Surrogate": "structgrad.estimators.SurrogateGradient",
    "structgrad.estimators.Relax": "structgrad.estimators.RELAX",
    "structgrad.estimators.Rebar": "structgrad.estimators.REBAR",
    "structgrad.estimators.Rodeo": "structgrad.estimators.RODEO",
}

#: Group of configurations -> choice before -> now.
CHOICES: dict[str, dict[str, str]] = {
    "estimator": {"straight_through": "identity_st", "t_reinforce_loo": "t_reinforce_plus"},
}

#: Group of configurations -> choice that no longer exists -> the reason.
GONE: dict[str, dict[str, str]] = {
    "logger": {
        "neptune": "Neptune has ended its service, and Lightning its logger; aim, comet, mlflow, trackio, wandb go on"
    },
}

_BEFORE = {new: old for old, new in CLASSES.items()}


def missing(module: str, name: str) -> NoReturn:
    """The ``__getattr__`` of a module, for a name that the module lacks.

    Raises:
        ImportError: for an old name, with the new one.
        AttributeError: for any other.
    """
    path = f"{module}.{name}"
    if path in CLASSES:
        raise ImportError(f"{path} is now called {CLASSES[path]}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def with_new_names(content: Any) -> Any:
    """A stored configuration, or a part of it, in which ``_target_`` names today's classes."""
    return _replaced(content, CLASSES)


def with_first_names(content: Any) -> Any:
    """The same with the oldest name of every class, so that a run from before a renaming keeps its
    identity.
    """
    return _replaced(content, _BEFORE)


def _replaced(content: Any, names: Mapping[str, str]) -> Any:
    if isinstance(content, Mapping):
        return {
            key: names.get(value, value) if key == "_target_" and isinstance(value, str) else _replaced(value, names)
            for key, value in content.items()
        }
    if isinstance(content, list):
        return [_replaced(value, names) for value in content]
    return content
