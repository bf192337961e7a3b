"""Test a finished run's best model on any data of its task, and write its predictions for every
example.

    structgrad-evaluate RUN                                        the test set, into evaluations/ in the run
    structgrad-evaluate RUN split=val out=predictions.jsonl        the validation set, as JSON lines
    structgrad-evaluate RUN paths.test_file=published.tsv          a published file (ListOps)
    structgrad-evaluate RUN data=movie_rationales                  another data set of the task
    structgrad-evaluate RUN task.data.files=mine                   the task's own data set, with your files

RUN is a folder that train.py printed, even if it was copied elsewhere. The run is not changed.
Options:

    data=<name>           another data set, as in training
    split=test            or val
    out=<file>            .parquet or .jsonl for the predictions; the metrics go beside it, into .json
    task.<option>=        an option of the task, e.g. task.data.test=100
    paths.<path>=         where data are: paths.data, paths.cache
    trainer=cpu           or gpu; otherwise the best device of this machine
    hydra.searchpath=[pkg://mylab.configs]   allows classes of this package too

A row has example (its index in the split), text (if examples are words), prediction, target and
vertex, in the form of structure.read. A run's folder may come from somebody else. So only classes
of structgrad and torch.optim are built, and those of packages on hydra.searchpath.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from structgrad.commands import CONFIGS, SearchPathError, group
from structgrad.common.text import nearest
from structgrad.training.errors import ConfigurationError, RunError, explain
from structgrad.training.runtime import announce_compilation, tune_allocator

_TRAINERS = ("auto", "cpu", "gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    tune_allocator()
    announce_compilation()
    try:
        _evaluate(arguments)
    except (ConfigurationError, RunError, SearchPathError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error, arguments)}", file=sys.stderr)
        return 1
    return 0


def _evaluate(arguments: Sequence[str]) -> None:
    from structgrad.training.evaluation import evaluate  # imports torch, for which --help need not wait

    folders = [argument for argument in arguments if "=" not in argument or Path(argument).is_dir()]
    if len(folders) != 1:
        raise ConfigurationError(f"type the folder of one run; got {len(folders)}: {' '.join(folders) or 'none'}")
    given = [argument for argument in arguments if argument not in folders]
    values: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(given):
        if override.package is not None or override.is_delete() or override.is_sweep_override():
            raise ConfigurationError(f"{override.input_line}: type key=value")
        if override.key_or_group in values:
            raise ConfigurationError(f"{override.key_or_group} is given twice; type it once")
        values[override.key_or_group] = override.value()
    searchpath = values.pop("hydra.searchpath", [])
    name, split, out, trainer = (values.pop(key, None) for key in ("data", "split", "out", "trainer"))
    if trainer is not None:
        if trainer not in _TRAINERS:
            raise ConfigurationError(f"trainer={trainer}: nearest: {nearest(str(trainer), _TRAINERS)}")
        values["trainer.accelerator"] = trainer
    searchpath = [str(place) for place in (searchpath if isinstance(searchpath, list) else [searchpath])]
    found = evaluate(
        Path(folders[0]),
        values,
        data=None if name is None else data_set(str(name), searchpath),
        split="test" if split is None else split,
        out=None if out is None else Path(str(out)),
        searchpath=searchpath,
    )
    print("  ".join(f"{metric} {value:.4g}" for metric, value in found.metrics.items()))
    print(f"metrics:      {found.file}")
    if found.predictions is not None:
        print(f"predictions:  {found.predictions} ({found.examples} examples)")
    else:
        print("predictions:  this task makes none")


def data_set(name: str, searchpath: Sequence[str] = ()) -> DictConfig:
    """The node of a data set of the group ``data``.

    Raises:
        ConfigurationError: if there is no data set with this name.
    """
    place = f"hydra.searchpath=[{','.join(searchpath)}]"
    known = sorted(
        file.name.removesuffix(".yaml")
        for folder in group("data", [place] if searchpath else [])
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )
    if name not in known:
        raise ConfigurationError(f"data={name}: no such choice; nearest: {nearest(name, known)}")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(f"data/{name}", [place] if searchpath else [])
    node = OmegaConf.select(config, "task.data")
    assert isinstance(node, DictConfig)
    return node


if __name__ == "__main__":
    sys.exit(main())
