"""Bias, variance and cost of a gradient estimator on a tiny problem, measured against enumeration.

    structgrad-diagnose structure=arborescence estimator=sst n=4 samples=2000

You can also give any key of the structure's or the estimator's configuration, for instance
``estimator.relaxation=euclidean``. A class without a configuration is
``structure._target_=mylab.window.Window``.

options:
    n=4                number of items, nodes or parts; everything is enumerated, so keep it small
    batch=2            number of examples
    samples=2000       number of estimates of the gradient
    scale=1.0          standard deviation of the scores
    seed=0             of scores, decoder and samples
    truth=auto         the distribution of the true gradient: gibbs, trace, or a utility such as gumbel;
                       auto is the one that the estimator targets
    over=auto          the estimator's option on the plot's horizontal axis, e.g. temperature, or none
    values=[0.1,1]     its values; some options have values of their own
    out=diagnosis.png  the plot, .png, .pdf or .svg
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from structgrad.commands import CONFIGS
from structgrad.commands import group as folders_of
from structgrad.common import pictures
from structgrad.common.text import first_line, nearest
from structgrad.diagnose import FEATURES, Diagnosis, Problem, Quality, diagnose
from structgrad.estimators.base import Estimator, PerturbAndMap
from structgrad.estimators.utilities import make_utility
from structgrad.structures import Structure
from structgrad.training.composition import make
from structgrad.training.errors import explain

#: Options of the command that are not in the configuration, with their defaults.
OPTIONS: dict[str, Any] = {
    "n": 4,
    "batch": 2,
    "samples": 2000,
    "scale": 1.0,
    "seed": 0,
    "truth": "auto",
    "over": "auto",
    "values": None,
    "out": "diagnosis.png",
}
_TRUTHS = ("gibbs", "trace")
#: Groups that must be chosen, with an example each.
_GROUPS = {"structure": "spanning_tree", "estimator": "sst"}
SWEEPS: dict[str, list[float]] = {
    "temperature": [0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
    "sigma": [0.2, 0.5, 1.0, 2.0, 5.0],
    "step": [0.3, 1.0, 3.0, 10.0, 30.0],
    "n_samples": [2, 4, 8, 16],
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse unknown options before anything is composed.

    Raises:
        ValueError: one line that ends with what to type.
    """
    keys = [argument.partition("=")[0] for argument in arguments]
    for argument, key in zip(arguments, keys, strict=True):
        if argument.startswith("-") or "=" not in argument:
            raise ValueError(f"{argument}: expected key=value; type --help for the options")
        if key.isidentifier() and key not in (*_GROUPS, *OPTIONS):
            raise ValueError(f"{key}: no such option; nearest: {nearest(key, (*OPTIONS, *_GROUPS))}")
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice; type it once")
    values = dict(argument.split("=", 1) for argument in arguments)
    for name, example in _GROUPS.items():
        if name not in {key.lstrip("+").split(".")[0] for key in keys}:
            raise ValueError(f"{name}=... is missing; type e.g. {name}={example}")
        if "," in values.get(name, "") or values.get(name) == "":
            raise ValueError(f"{name}={values[name]}: one at a time; type e.g. {name}={example}")


def _check(settings: DictConfig) -> None:
    """Refuse options out of range, before anything is measured.

    Raises:
        ValueError: one line that ends with what to type.
    """
    for key, least in (("n", 1), ("batch", 1), ("samples", 20), ("seed", 0)):
        value = settings[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            example = f"type e.g. {key}={OPTIONS[key]}"
            raise ValueError(f"{key} must be a whole number of at least {least}; got {value}; {example}")
    if not _number(settings.scale) or not 0 <= settings.scale < math.inf:
        raise ValueError(f"scale must be a number of at least 0; got {settings.scale}; type e.g. scale=1")
    values = settings["values"]
    if values is not None and not (OmegaConf.is_list(values) and len(values) and all(map(_number, values))):
        raise ValueError(f"values must be a list of numbers; got {values}; type e.g. values=[0.1,1]")
    if not settings.over:
        raise ValueError("over=: an option of the estimator is missing; type e.g. over=temperature, or over=none")
    if settings.truth not in ("auto", *_TRUTHS):
        try:
            make_utility(settings.truth)
        except ValueError as error:
            raise ValueError(
                f"truth={settings.truth}: {error}; type truth=auto, gibbs, trace or one of these"
            ) from None
    out = Path(str(settings.out))
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out must end in .png, .pdf or .svg; got {out}; type e.g. out=diagnosis.png")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out={out} cannot be written; type e.g. out=diagnosis.png")


def _with(config: DictConfig, key: str, value: float) -> DictConfig:
    """A copy with another value of an option of the estimator."""
    changed = OmegaConf.merge(config, {"estimator": {key: value}})
    assert isinstance(changed, DictConfig)
    return changed


def _measure(config: DictConfig, settings: DictConfig, structure: Structure) -> Diagnosis:
    """Build the estimator and measure it."""
    torch.manual_seed(settings.seed)
    estimator = make(config, "estimator", Estimator, structure=structure).double()
    shape = structure.shape(settings.n)
    problem = Problem.make(structure, shape, batch=settings.batch, scale=settings.scale, seed=settings.seed)
    truth = settings.truth
    if truth == "auto":
        truth = None
    elif truth not in _TRUTHS:
        truth = PerturbAndMap(make_utility(truth))
    return diagnose(estimator, problem, settings.samples, truth)


def _plot(key: str, values: Sequence[float], measured: Sequence[Diagnosis], title: str, out: Path) -> None:
    """Plot bias and variance against a key of the configuration, with the bias that chance alone
    would show.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for index, name in enumerate(("scores", "decoder")):
        look = pictures.line(index) | pictures.mark(index)
        quality: list[Quality] = [getattr(m, name) for m in measured]
        axes[0].plot(values, [q.bias for q in quality], label=name, **look)
        alone = {"linestyle": ":", "color": pictures.colour(index), "label": f"{name}: chance alone"}
        axes[0].plot(values, [q.error for q in quality], **alone)
        axes[1].plot(values, [q.variance for q in quality], label=name, **look)
    for axis, label in zip(axes, ("relative bias", "relative variance"), strict=True):
        axis.set(xlabel=key, ylabel=label, xscale="log", yscale="log")
        pictures.grid(axis)
    pictures.legend(figure, columns=4)
    figure.suptitle(title, fontsize="medium")
    pictures.save(figure, out)


def _settings(own: Sequence[str]) -> DictConfig:
    try:
        given = OmegaConf.from_dotlist(list(own))
    except YAMLError:
        wrong = next(argument for argument in own if not _is_yaml(argument))
        raise ValueError(f"{wrong}: a bracket or a quote is not closed; type e.g. values=[0.1,1]") from None
    settings = OmegaConf.merge(OmegaConf.create(OPTIONS), given)
    assert isinstance(settings, DictConfig)
    return settings


def _is_yaml(argument: str) -> bool:
    try:
        OmegaConf.from_dotlist([argument])
    except YAMLError:
        return False
    return True


def _is_new(key: str, chosen: Collection[str]) -> bool:
    """Whether a key must be added: a group, or part of ``structure._target_=...`` if no group is
    chosen.
    """
    group, _, option = key.partition(".")
    return group in ("structure", "estimator") and not (option and group in chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    wants_help = bool({"-h", "--help"} & set(arguments))
    if wants_help or not arguments:
        print(__doc__)
        return 0 if wants_help else 2
    own = [a for a in arguments if a.split("=")[0] in OPTIONS]
    other = [a for a in arguments if a not in own]
    chosen = {a.split("=")[0] for a in other}
    try:
        _check_arguments(arguments)
        folders_of("structure", other)  # the packages of the search path must be there
        settings = _settings(own)
        _check(settings)
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            overrides = [f"+{a}" if _is_new(a.split("=")[0], chosen) else a for a in other]
            config = hydra.compose(overrides=[*overrides, f"+context_size={FEATURES}"])
        structure: Structure = make(config, "structure", Structure)
        if config.estimator is None or not structure.is_latent:
            raise ValueError(
                "there is nothing to estimate without a latent structure and an estimator; "
                "type e.g. structure=spanning_tree estimator=sst"
            )
        key = settings.over
        if key == "auto":
            key = next((k for k in SWEEPS if _number(config.estimator.get(k))), "none")
        values = settings["values"] or SWEEPS.get(key, [])
        if key not in ("none", *(options := list(map(str, config.estimator)))):
            raise ValueError(f"over={key}: no option of this estimator; nearest: {nearest(key, options)}")
        if key != "none" and not values:
            raise ValueError(f"over={key}: at which values? type e.g. values=[0.1,1]")
        at: list[float | None] = [None, *(() if key == "none" else values)]
        configs = [config if v is None else _with(config, key, v) for v in at]
        for changed in configs:  # all of them, before the first is measured
            make(changed, "estimator", Estimator, structure=structure)
        points = [(v, _measure(c, settings, structure)) for v, c in zip(at, configs, strict=True)]
    except (hydra.errors.HydraException, OmegaConfBaseException, ValueError, ArithmeticError) as error:
        if isinstance(error, ArithmeticError):
            reason = f"{first_line(error)}; type a smaller n, e.g. n=4"
        elif isinstance(error, hydra.errors.HydraException | OmegaConfBaseException):
            reason = explain(error, other)
        else:
            reason = first_line(error)
        print(f"error: {reason}", file=sys.stderr)
        return 1
    base = points[0][1]
    print(f"{structure.name}, {structure.shape(settings.n)} scores, batch {settings.batch}; truth: {base.truth}")
    print("bias +- its standard error, variance of one estimate; both relative to the norm of the true gradient")
    heads = [f"{'bias ' + group:>18} {'variance':>10}" for group in ("scores", "decoder")]
    print(f"{key:>14}  {heads[0]}  {heads[1]}  {'calls':>6} {'ms':>8}")
    for value, m in points:
        line = "as configured" if value is None else f"{value:g}"
        cells = [f"{q.bias:8.4f} +- {q.error:.4f} {q.variance:10.4g}" for q in (m.scores, m.decoder)]
        print(f"{line:>14}  {cells[0]}  {cells[1]}  {m.decoder_calls:6.1f} {m.milliseconds:8.4f}")
    if len(points) > 1:
        choice = " ".join(a for a in other)
        _plot(key, values, [m for _, m in points[1:]], f"{choice} n={settings.n}", Path(settings.out))
        print(f"plot: {settings.out}")
    elif any(argument.startswith("out=") for argument in own):
        print("no plot: nothing varies; over=<option of the estimator> and values=[...] say what")
    return 0
