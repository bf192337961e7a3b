"""A finished run's best model on any data of its task: metrics, and predictions for every example."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from structgrad.common.files import expanded, write_bytes, write_json
from structgrad.common.text import first_line, nearest
from structgrad.data import DataError
from structgrad.structures.base import Structure
from structgrad.tasks.base import Evaluation, Predictions, Split, Task
from structgrad.training.composition import build_latent, build_task, make, reads_test_file
from structgrad.training.environment import environment
from structgrad.training.errors import ConfigurationError, RunError
from structgrad.training.folder import read_checkpoint
from structgrad.training.options import check_node, check_options
from structgrad.training.stored import configuration, summary_of

if TYPE_CHECKING:
    import pyarrow as pa

#: Suffixes of a file of predictions.
FORMATS = (".parquet", ".jsonl")
_SPLITS = ("val", "test")
#: Options of the trainer that may be changed, because another machine may not have them.
_PRECISION = ("trainer.precision", "trainer.matmul_precision")
_TRAINER = ("trainer.accelerator", *_PRECISION)


@dataclass
class Evaluated:
    """The results of an evaluation.

    Attributes:
        metrics: by name, with the split before it.
        examples: the number of examples with predictions; None for a task without predictions.
        predictions: the file of predictions, if any.
        file: the file of the metrics.
    """

    metrics: dict[str, float]
    examples: int | None
    predictions: Path | None
    file: Path


def evaluate(
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    data: DictConfig | None = None,
    split: Split = "test",
    out: Path | None = None,
    searchpath: Sequence[str] = (),
) -> Evaluated:
    """Test the best model of a finished run. The run is not changed.

    Args:
        folder: folder of the run.
        overrides: keys with their values: ``task.*``, ``paths.*``, and of ``trainer`` the options
            ``accelerator``, ``precision`` and ``matmul_precision``. Keys within ``task.data``, and
            ``paths.test_file``, say which data are tested; the model keeps what it knows of the data
            of its training.
        data: another data set of the task, as its node of a configuration.
        split: ``val`` or ``test``.
        out: the file of predictions, ``.parquet`` or ``.jsonl``; metrics go beside it, into
            ``.json``. None: a file in the folder ``evaluations`` of the run.
        searchpath: Hydra's search path; classes of its packages may be built.

    Raises:
        ConfigurationError: one line, before anything is tested.
        RunError: likewise; and if a file of the run is damaged, or data are missing or do not fit
            the model.
    """
    if split not in _SPLITS:
        raise ConfigurationError(f"split={split}: type split=val or split=test")
    if out is not None and out.suffix not in FORMATS:
        raise ConfigurationError(f"out={out}: type a name that ends in {' or '.join(FORMATS)}")
    overrides = dict(overrides or {})
    summary = summary_of(folder)
    own = configuration(folder, summary, searchpath)
    other = _changed(own, overrides, data)
    elsewhere = {key: value for key, value in overrides.items() if not _is_of_data(key)}
    own = _changed(own, elsewhere, None)
    for config in (own, other):
        check_options(config, {})
    task = build_task(own, *build_latent(own))
    name: str = split
    tested = None
    if other != own:
        tested = _data(other, overrides)
    options = {key: value for key, value in elsewhere.items() if key.startswith("task.") or key in _PRECISION}
    if tested is not None or options:
        name = f"{split}-{_digest(other, options)}"
    file = out or folder / "evaluations" / f"{name}.parquet"
    found = Recorded(task.structure, required=out is not None, task=str(summary["task"]))
    task.evaluation = Evaluation(split, tested, found)
    checkpoint = folder / "checkpoints" / "best.ckpt"
    step = read_checkpoint(checkpoint, str(summary["name"]), "the model is lost with it")["global_step"]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {file.parent}: {error.strerror}; type out=<file> elsewhere") from error
    metrics = _tested(task, own, checkpoint)
    metrics = {key.replace("test/", f"{split}/", 1): value for key, value in metrics.items()}
    result = Evaluated(metrics, found.examples, file if found.examples else None, file.with_suffix(".json"))
    data = OmegaConf.select(other, "task.data")
    content = {
        "run": summary["name"],
        "step": step,
        "split": split,
        "data": None if data is None else OmegaConf.to_container(data, resolve=True),
        "options": options,
        "metrics": metrics,
        "examples": found.examples,
        "predictions": None if result.predictions is None else file.name,
        **environment(),
    }
    try:
        if result.predictions is not None:
            write_bytes(file, found.as_parquet() if file.suffix == ".parquet" else found.as_lines())
        write_json(result.file, content)
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror or error}; type out=<file> elsewhere") from error
    return result


# --- which data --------------------------------------------------------------------------------------------------


def _is_of_data(key: str) -> bool:
    return key == "paths.test_file" or key.startswith("task.data.")


def _changed(config: DictConfig, overrides: Mapping[str, Any], data: DictConfig | None) -> DictConfig:
    """A copy with other data and options.

    Raises:
        ConfigurationError: for an option that an evaluation does not accept.
    """
    config = copy.deepcopy(config)
    if data is not None:
        if "data" not in config.task or "_target_" not in config.task.data:
            raise ConfigurationError("data=...: this task has no data sets to choose from; type paths.test_file=<file>")
        config.task.data = data
    for key, value in overrides.items():
        if key not in _TRAINER and not key.startswith(("task.", "paths.")):
            takes = ("data", "split", "out", "task", "paths", *_TRAINER)
            raise ConfigurationError(
                f"{key}: an evaluation cannot set it; nearest: {nearest(key.partition('.')[0], takes)}; type --help"
            )
        if key == "paths.test_file" and not reads_test_file(config):
            raise ConfigurationError("paths.test_file: this task reads no such file; type task.data.<option>=...")
        OmegaConf.update(config, key, expanded(value) if key.startswith("paths.") else value, force_add=True)
    return config


def _data(config: DictConfig, overrides: Mapping[str, Any]) -> Any:
    """The data of a configuration, built beside the task, which keeps those of its training."""
    node = OmegaConf.to_container(config.task, resolve=True)
    check_node("task", node, ("structure", "estimator"))
    file = config.paths.test_file
    if overrides.get("paths.test_file") is not None and not Path(file).is_file():
        raise ConfigurationError(f"paths.test_file: no file {file}")
    return make(config, "task.data", object)


def _digest(config: DictConfig, options: Mapping[str, Any]) -> str:
    """The test: the task with its data, the content of a file, and the precision if it was chosen."""
    task = OmegaConf.to_container(config.task, resolve=True)
    precision = {key: value for key, value in options.items() if key in _PRECISION}
    content = json.dumps([task, precision] if precision else task, sort_keys=True, default=str)
    file = config.paths.test_file
    read = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
    return hashlib.sha256(content.encode() + read).hexdigest()[:8]


def _tested(task: Task, config: DictConfig, checkpoint: Path) -> dict[str, float]:
    from structgrad.training.fit import test  # Lightning takes seconds to import

    try:
        return test(task, config.trainer, int(config.seed), checkpoint)
    except DataError as error:
        raise RunError(f"{error}; type paths.data=<folder> if it is elsewhere") from error
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"these data do not fit the model: {first_line(error)}") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else lines[0]
        raise ConfigurationError(
            f"the weights of {checkpoint} do not fit: {reason}; leave out what changes the model"
        ) from error


# --- what is recorded --------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """Predictions of all batches.

    structure: reads the vertices.
    required: refuse a task that makes no predictions.
    task: name of the task, for messages.
    """

    structure: Structure
    required: bool
    task: str
    columns: dict[str, list[Any]] = field(default_factory=dict, init=False)
    examples: int | None = field(default=None, init=False)

    def __call__(self, predictions: Callable[[], Predictions] | None) -> None:
        """Add a batch.

        Raises:
            ValueError: if predictions are required and missing.
        """
        if predictions is None:
            if self.required:
                raise ValueError(f"task {self.task} makes no predictions; leave out= out to get only the metrics")
            return
        with torch.no_grad():
            made = predictions()
        size = len(made.prediction)
        vertices = None if made.vertices is None else [self._read(vertex) for vertex in made.vertices]
        first = self.examples or 0
        self.examples = first + size
        batch = {
            "example": list(range(first, first + size)),
            "text": made.text,
            "prediction": made.prediction,
            "target": made.target,
            "vertex": vertices,
        }
        for name, values in batch.items():
            if values is not None:
                kept = _readable(values) if isinstance(values, Tensor) else list(values)
                self.columns.setdefault(name, []).append(kept)

    def _read(self, vertex: Tensor) -> Any:
        """The vertices as integers; for a relaxed one, the nearest vertex."""
        vertex = vertex.detach().cpu()
        if not bool(((vertex == 0) | (vertex == 1)).all()):
            vertex = self.structure.argmax(2 * vertex - 1)  # |x - v|^2 is |x|^2 - <2 x - 1, v> for v of 0 and 1
        return self.structure.read(vertex).tolist()

    def as_parquet(self) -> bytes:
        """Write one row for each example."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: _column(parts) for name, parts in self.columns.items()}
        if "vertex" not in columns:
            columns["vertex"] = pa.nulls(self.examples or 0)
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()

    def as_lines(self) -> bytes:
        """Write one JSON object for each example."""
        lists = {name: [value for part in parts for value in _plain(part)] for name, parts in self.columns.items()}
        lists.setdefault("vertex", [None] * (self.examples or 0))
        rows = (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _readable(values: Tensor) -> Tensor:
    """The value in a type that files can hold; they cannot hold numbers of half precision."""
    values = values.cpu()
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _plain(part: Tensor | list[Any]) -> list[Any]:
    """A value in the form of JSON, which has no NaN."""
    if not isinstance(part, Tensor):
        return part
    return [None if isinstance(value, float) and math.isnan(value) else value for value in part.tolist()]


def _column(parts: Sequence[Tensor | list[Any]]) -> pa.Array:
    """``[n]`` or lists of lists; NaN becomes null if the values are single numbers."""
    import pyarrow as pa

    if not isinstance(parts[0], Tensor):
        return pa.array([value for part in parts for value in part])
    values = torch.cat([part for part in parts if isinstance(part, Tensor)]).numpy()
    if values.ndim == 1:
        return pa.array(values, mask=np.isnan(values) if values.dtype.kind == "f" else None)
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in values.shape[:0:-1]:
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
