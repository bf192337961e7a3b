"""Check the options of a configuration before anything is built or written.

The type of an option is read from its declaration, in the signature of what ``_target_`` names.
Constructors check ranges, because they read the values.
"""

from __future__ import annotations

import collections.abc
import inspect
import logging
import math
import types
import typing
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
from hydra.utils import get_object
from omegaconf import DictConfig

from structgrad.common.installing import install
from structgrad.common.private import has_bfloat16_units
from structgrad.common.text import first_line, nearest
from structgrad.training.errors import ConfigurationError

# Hydra logs what it also raises about a ``_target_``; it is shown once.
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)

#: The configurations that come with the package.
CONFIGS = Path(__file__).parents[1] / "configs"
#: Values of ``trainer.precision``.
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
#: Values of ``trainer.matmul_precision``, torch's names.
MATMUL_PRECISIONS = ("highest", "high", "medium")
#: Values of ``trainer.strategy``. Lightning's others are for models that do not fit into one
#: device.
_STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
#: Values of ``trainer.compile`` (see :mod:`structgrad.training.compiled`).
COMPILERS = (None, "inductor", "reduce-overhead", "aot_eager")
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_TRAINER = (
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "matmul_precision",
    "compile",
    "max_steps",
    "val_every_n_steps",
    "gradient_clip_val",
    "accumulate_grad_batches",
    "log_every_n_steps",
    "pause_at",
    "patience",
)
_PATHS = {
    "data": False,
    "cache": False,
    "runs": False,
    "results": True,
    "progress": True,
    "test_file": True,
}  # whether it may be null
#: Loggers that are extras of the package -> the package that each needs.
_SERVICES = {"wandb": "wandb", "mlflow": "mlflow", "aim": "aim", "comet": "comet_ml", "trackio": "trackio"}
_TOP = ("seed", "paths", "run", "search", "task", "structure", "estimator", "budget", "trainer", "logger")


def check_options(config: DictConfig, chosen: Mapping[str, str]) -> None:
    """Check the options of every run, and that everything added on the command line is read.

    Args:
        config: the composed configuration.
        chosen: the user's own choices, key (with the ``+`` of an addition) -> value.

    Raises:
        ConfigurationError: one line.
    """
    for group in ("task", "structure", "budget", "trainer"):
        if config.get(group) is None:
            known = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
            raise ConfigurationError(f"{group}=... is missing; there are {', '.join(known)}")
    if config.get("logger") is None:
        raise ConfigurationError("logger=null: for no logger but metrics.csv, say logger=csv")
    for name in map(str, config.logger):
        if name in _SERVICES and not find_spec(_SERVICES[name]):
            raise ConfigurationError(f"logger={name}: the package {_SERVICES[name]} is missing; {install(name)}")
    for key in chosen:
        name = key.lstrip("+~")
        top = name.split(".")[0].split("@")[0].split("/")[0]
        if top == "budgets":  # a group that follows from task and budget
            meant = chosen[key].rpartition("/")[2]
            raise ConfigurationError(f"{key}={chosen[key]}: did you mean budget={meant}?")
        if key.startswith("+") and top not in (*_TOP, "hydra", "data", "experiment", "settings"):
            raise ConfigurationError(f"{key}: nothing reads {name!r}; nearest: {nearest(name, _TOP)}")
    _whole("seed", config.get("seed"), 0, 2**32 - 1)
    for group in ("paths", "run", "search"):
        if not isinstance(config.get(group), DictConfig):
            raise ConfigurationError(f"{group} must be a mapping; got {config.get(group)!r}")
    unknown = [key for key in map(str, config.paths) if key not in _PATHS]
    if unknown:
        raise ConfigurationError(f"paths.{unknown[0]}: no such path; nearest: {nearest(unknown[0], _PATHS)}")
    for name, optional in _PATHS.items():
        value = config.paths.get(name)
        if value is None and optional:
            continue
        if not isinstance(value, str) or not value.strip():
            raise ConfigurationError(f"paths.{name} must be a path; got {value!r}")
    _check_trainer(config.trainer)


def _check_trainer(trainer: DictConfig) -> None:
    for key in map(str, trainer):
        if key not in _TRAINER:
            raise ConfigurationError(f"trainer.{key}: no such option; nearest: {nearest(key, _TRAINER)}")
    for key in ("max_steps", "val_every_n_steps", "log_every_n_steps", "accumulate_grad_batches"):
        _whole(f"trainer.{key}", trainer.get(key), 1)
    steps, every = trainer.max_steps, trainer.val_every_n_steps
    if every > steps:
        raise ConfigurationError(
            f"trainer.val_every_n_steps={every} must lie between 1 and trainer.max_steps={steps}: "
            "the test uses the best validated model"
        )
    if trainer.get("patience") is not None:
        _whole("trainer.patience", trainer.patience, 1)
    if trainer.get("pause_at") is not None:
        _whole("trainer.pause_at", trainer.pause_at, 1)
    clip = trainer.get("gradient_clip_val")
    if clip is not None and (not _is_number(clip) or clip <= 0):
        raise ConfigurationError(f"trainer.gradient_clip_val must be a positive number or null; got {clip!r}")
    if trainer.get("precision") in ("bf16-true", "16-true"):
        raise ConfigurationError(
            f"trainer.precision={trainer.precision}: structures and optimisers need weights of 32 bits; "
            "bf16-mixed computes the products of a model in 16 bits"
        )
    for key, choices in (
        ("precision", PRECISIONS),
        ("matmul_precision", MATMUL_PRECISIONS),
        ("strategy", _STRATEGIES),
        ("accelerator", _ACCELERATORS),
    ):
        value = trainer.get(key)
        if value not in choices:
            raise ConfigurationError(f"trainer.{key}={value}: no such choice; nearest: {nearest(str(value), choices)}")
    here = {"gpu": torch.cuda.is_available() or torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    here["mps"] = torch.backends.mps.is_available()
    accelerator = trainer.accelerator
    if not here.get(accelerator, True):
        raise ConfigurationError(f"trainer.accelerator={accelerator}: this machine has none; trainer=cpu works here")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not here["gpu"])
    if on_cpu and trainer.precision.startswith("16-"):
        raise ConfigurationError(f"trainer.precision={trainer.precision} needs a GPU; 32-true works everywhere")
    _check_products(trainer, on_cpu)
    _check_devices(trainer.get("devices"), None if on_cpu else max(torch.cuda.device_count(), 1))
    _check_compile(trainer, on_cpu)


def _check_products(trainer: DictConfig, on_cpu: bool) -> None:
    """Allow lower precision of matrix products only on machines with units for it. Elsewhere it
    would only be slower.
    """
    asked = trainer.matmul_precision
    if asked == "highest":
        return
    if trainer.precision == "64-true":
        raise ConfigurationError(
            f"trainer.matmul_precision={asked}: it is about products of float32 numbers, and trainer.precision=64-true"
        )
    if not on_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return  # TF32
    if on_cpu and asked == "medium" and has_bfloat16_units():
        return
    if on_cpu and asked == "high" and has_bfloat16_units():
        raise ConfigurationError("trainer.matmul_precision=high: on a CPU that is highest; medium rounds to bfloat16")
    raise ConfigurationError(
        f"trainer.matmul_precision={asked}: this machine has no units for such products, and would only be slower; "
        "highest works everywhere"
    )


def _check_compile(trainer: DictConfig, on_cpu: bool) -> None:
    if trainer.get("compile") not in COMPILERS:
        known = nearest(str(trainer.compile), (c or "null" for c in COMPILERS))
        raise ConfigurationError(f"trainer.compile={trainer.compile}: no such choice; nearest: {known}")
    if trainer.compile != "reduce-overhead":
        return
    if on_cpu or not torch.cuda.is_available():
        raise ConfigurationError(
            "trainer.compile=reduce-overhead captures CUDA graphs, and this is no CUDA device; inductor works here"
        )
    if trainer.devices != 1 or trainer.strategy != "auto":
        raise ConfigurationError(
            "trainer.compile=reduce-overhead is for one device (trainer.devices=1 trainer.strategy=auto): "
            "processes that share a batch talk within its backward pass; inductor works with them"
        )


def _check_devices(devices: Any, available: int | None) -> None:
    if devices in ("auto", -1) and not isinstance(devices, bool):
        return
    if _is_whole(devices) and devices >= 1:
        if available is not None and devices > available:
            raise ConfigurationError(f"trainer.devices={devices}: this machine has {available}")
        return
    if isinstance(devices, collections.abc.Sequence) and not isinstance(devices, str) and available is not None:
        if len(devices) and all(_is_whole(d) and 0 <= d < available for d in devices):
            return
        raise ConfigurationError(f"trainer.devices={list(devices)}: numbers of this machine's {available} devices")
    raise ConfigurationError(
        f"trainer.devices must be a number of devices of at least 1, or -1 for all of them; got {devices!r}"
    )


def check_node(key: str, node: Any, given: Iterable[str] = ()) -> None:
    """Compare a node that will be instantiated, and its nested nodes, with the signature of its
    ``_target_``.

    Args:
        key: key of the node, for messages.
        node: its resolved configuration; a node without ``_target_`` is ignored.
        given: parameters that are passed when it is instantiated.

    Raises:
        ConfigurationError: one line.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        return
    target = imported(key, node["_target_"])
    check_kinds(key, node)
    hints, required, any_name = _signature(target)
    options = {str(name): value for name, value in node.items() if not str(name).startswith("_")}
    for name in given:
        if name not in hints and not any_name:
            raise ConfigurationError(f"{key}._target_: {node['_target_']} takes no {name}; see --help for the choices")
    for name, value in options.items():
        if name not in hints:
            if any_name:
                continue
            known = nearest(name, (n for n in hints if n not in set(given)))
            others = f"nearest: {known}" if known else f"{node['_target_']} has none"
            raise ConfigurationError(f"{key}.{name}: no such option; {others}")
        if isinstance(value, Mapping) and "_target_" in value:
            check_node(f"{key}.{name}", value)
            continue
        expected = _expected(value, hints[name])
        if expected is not None:
            raise ConfigurationError(f"{key}.{name} must be {expected}; got {value!r}")
    missing = [name for name in required if name not in options and name not in set(given)]
    if missing and not node.get("_partial_"):
        raise ConfigurationError(f"{key}.{missing[0]} is missing")


def imported(key: str, path: Any) -> Any:
    """The object that a dotted path names.

    Args:
        key: key of the node with this ``_target_``, for messages.
        path: path of a class.

    Raises:
        ConfigurationError: one line.
    """
    try:
        return get_object(path)
    except Exception as error:  # importing an unknown module can fail in any way
        # Hydra's message starts with the path and says the reason in the next line.
        reason = next((line for line in str(error).splitlines()[1:] if line.strip()), first_line(error))
        raise ConfigurationError(f"{key}._target_: cannot import {path}: {reason}") from error


def arguments_of(key: str, path: Any) -> list[str]:
    """The arguments of the constructor of a class; see :func:`imported`."""
    return list(_signature(imported(key, path))[0])


def check_kinds(key: str, node: Mapping[str, Any]) -> None:
    """Refuse nested objects of another class than the parameter's, e.g. the data set of another
    task.

    Only their ``_target_`` is read.

    Raises:
        ConfigurationError: one line.
    """
    hints, _, _ = _signature(imported(key, node["_target_"]))
    for name, value in node.items():
        hint = hints.get(str(name), Any)
        wanted = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if not isinstance(value, Mapping) or "_target_" not in value or value.get("_partial_") or Any in wanted:
            continue
        made = imported(f"{key}.{name}", value["_target_"])
        if not inspect.isclass(made) or not all(map(inspect.isclass, wanted)):
            continue
        if not any(issubclass(made, kind) for kind in wanted):
            kinds = " or ".join(_article(kind.__name__) for kind in wanted if kind is not types.NoneType)
            raise ConfigurationError(f"{key}.{name} must be {kinds}; {value['_target_']} is none")


def _signature(target: Any) -> tuple[dict[str, Any], list[str], bool]:
    """Parameters with their types, those without a default, and whether any other name is accepted."""
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    hints: dict[str, Any] = {}
    required: list[str] = []
    for function in functions:
        parameters = list(inspect.signature(function).parameters.values())
        parameters = parameters[1:] if inspect.isclass(target) else parameters
        try:
            types_ = typing.get_type_hints(function)
        except (NameError, TypeError):  # annotations of foreign code that exist only for its type checker
            types_ = {}
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                if parameter.default is parameter.empty and parameter.name not in hints:
                    required.append(parameter.name)
                hints.setdefault(parameter.name, types_.get(parameter.name, Any))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return hints, required, False
        # A name that is missing here goes to the base class, as far as we can see.
    return hints, required, True


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIO' else 'a'} {noun}"


def _expected(value: Any, hint: Any) -> str | None:
    """A description of the expected value; None if the value fits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return None
    if origin in (Union, types.UnionType):
        wanted = [_expected(value, a) for a in arguments]
        return None if None in wanted else " or ".join(dict.fromkeys(w for w in wanted if w))
    if hint in (None, types.NoneType):
        return None if value is None else "null"
    if origin is Literal:
        return None if value in arguments else f"one of {nearest(str(value), map(str, arguments))}"
    if hint is bool:
        return None if isinstance(value, bool) else "true or false"
    if hint is int:
        return None if _is_whole(value) else "a whole number"
    if hint is float:
        return None if _is_number(value) else "a finite number"
    if hint is str or hint is Path:
        return None if isinstance(value, str) else "a text" if hint is str else "a path"
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable):
        if isinstance(value, str) or not isinstance(value, collections.abc.Sequence):
            return "a list"
        inside = [w for w in (_expected(v, arguments[0]) for v in value) if w]
        return f"a list, each {inside[0]}" if inside else None
    if origin is tuple:
        return None if isinstance(value, collections.abc.Sequence) and not isinstance(value, str) else "a list"
    if origin in (dict, collections.abc.Mapping):
        return None if isinstance(value, Mapping) else "a mapping"
    if inspect.isclass(hint):
        return f"{_article(hint.__name__)} (_target_: ...)"
    if origin is collections.abc.Callable:
        return "a function (_target_: ...)"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(key: str, value: Any, least: int, most: int | None = None) -> None:
    if not _is_whole(value) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigurationError(f"{key} must be a whole number {limits}; got {value!r}")
