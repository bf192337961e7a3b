"""The hours that a run of every row takes at the paper's budget on one core of this machine.

    python -m benchmarks.hours                       # prints them, for all tables at that budget
    python -m benchmarks.hours --only paulus         # of some tables
    python -m benchmarks.hours --only correia_figure_1 task.data.source=MNIST/parquet
    RECORD=1 python -m benchmarks.hours              # and writes them into configs/table/*.yaml

Each row is trained for a few seconds: the estimators with sparse distributions decode fewer vertices
after the first steps. Then a step, a batch of the validation and one of the test are measured in
processor time, and multiplied by their number. Examples are generated in small numbers and of the
paper's sizes. ``hours`` are those of training and validation. The test is printed beside them: the
bit-vector VAE decodes equal samples once, and only a trained model draws equal ones, so this number
is its upper bound.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from benchmarks.launches import built
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from structgrad.commands import CONFIGS
from structgrad.data import Batch, MissingDataError
from structgrad.experiments import tables
from structgrad.experiments.tables import Row, Table
from structgrad.tasks.base import Task
from structgrad.training.runtime import tune_allocator

#: Seconds of training before a step is measured, and of each measurement.
WARM_UP, MEASURED = 3.0, 1.5
#: Of generated data only the sizes of an example count.
FEW = {
    task: [f"task.data.{split}={n}" for split, n in (("train", 1000), ("val", 500), ("test", 500))]
    for task in ("listops", "graph_layout", "parentheses")
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one core for a whole run: training, all validations, the test."""

    training: float
    validation: float
    test: float

    @property
    def hours(self) -> float:
        """Of training and validation, with two digits."""
        return float(f"{(self.training + self.validation) / 3600:.2g}")


def cost(overrides: list[str]) -> Cost:
    """The cost of a run at the paper's budget.

    Raises:
        MissingDataError: if its data are missing.
    """
    task, name, config = prepared(overrides)
    trainer, data = config.trainer, config.task.get("data", {})
    step = training_seconds(task)
    numbers = {split: _batches(task, split, data.get(split) if name in FEW else None) for split in ("val", "test")}
    validations = -(-trainer.max_steps // trainer.val_every_n_steps)
    return Cost(
        trainer.max_steps * step,
        validations * numbers["val"] * _seconds(task, "val", lambda batch: task.validation_step(batch, 0)),
        numbers["test"] * _seconds(task, "test", lambda batch: task.test_step(batch, 0)),
    )


def prepared(overrides: list[str]) -> tuple[Task, str, DictConfig]:
    """The task with few generated examples, its name, and the configuration with all of them.

    Raises:
        MissingDataError: if its data are missing.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", overrides)
    name = next(o.removeprefix("task=") for o in overrides if o.startswith("task="))
    task = built([*overrides, *FEW.get(name, [])])
    # Schedules of the learning rate ask for the number of steps.
    steps = config.trainer.max_steps
    task.trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False)
    return task, name, config


def training_seconds(task: Task) -> float:
    """The median processor time of a training step."""
    optimizer: Any = task.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer

    def train(batch: Batch) -> None:
        optimizer.zero_grad()
        task.step(batch).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _seconds(task, "train", train, WARM_UP)


def _batches(task: Task, split: Any, examples: int | None) -> float:
    """The number of batches of a split; ``examples`` if those of the task are fewer than the paper's."""
    batches = task.batches(split)
    return len(batches) if examples is None else examples / batches.batch_size


def _seconds(task: Task, split: Any, call: Callable[[Batch], None], warm_up: float = 0.0) -> float:
    """The median processor time of a batch, drawing it included."""
    task.train(split == "train")
    batches, times = _endless(task, split), []
    with nullcontext() if split == "train" else torch.no_grad():
        call(next(batches))  # compiles kernels
        start = time.process_time()
        while not times or time.process_time() - start < warm_up + MEASURED:
            before = time.process_time()
            call(next(batches))
            if before - start >= warm_up:
                times.append(time.process_time() - before)
    return statistics.median(times)


def _endless(task: Task, split: Any) -> Iterator[Batch]:
    batches = task.batches(split)
    while True:
        yield from batches


def write(table: Table, hours: dict[str, float]) -> None:
    """Put the hours into the table's file."""
    file = CONFIGS / "table" / f"{table.name}.yaml"
    text = file.read_text()
    for row, value in hours.items():
        block = re.search(rf"^  {row}:.*\n(?:    .*\n)*", text, re.MULTILINE)
        assert block is not None, f"{file.name} has no row {row}"
        old = block.group()
        new, found = re.subn(r"\bhours: [0-9.]+", f"hours: {value:g}", old, count=1)
        if not found:
            new = re.sub(r"^(  \w+:(?:\n   )?) \{", rf"\g<1> {{hours: {value:g}, ", old)
        if new == old and f"hours: {value:g}" not in old:
            new = re.sub(r"^(  \w+:\n)", rf"\g<1>    hours: {value:g}\n", old)
        text = text.replace(old, new, 1)
    file.write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tables whose name contains this")
    parser.add_argument("overrides", nargs="*", help="overrides of every row, such as a folder of images")
    arguments = parser.parse_args()
    only = arguments.only
    every = [tables.load(name, CONFIGS / "table") for name in tables.names(CONFIGS / "table") if only in name]
    chosen = [table for table in every if table.budget == "paper"]
    if not chosen:
        parser.error(f"--only {only}: no table at the paper's budget has this in its name")
    torch.set_num_threads(1)
    tune_allocator()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # it names its devices for every row
    print(f"{'table':22} {'row':34} {'hours':>7} {'validation':>10} {'test':>8}")
    for table in chosen:
        found = {row.name: hours for row in table.rows if (hours := line(table, row, arguments.overrides)) is not None}
        if os.environ.get("RECORD", "") not in ("", "0"):
            write(table, found)


def overrides_of(table: Table, row: Row) -> list[str]:
    """Of a run at the paper's budget, with the settings that are given if it searches none."""
    given = tables.as_overrides(table.settings(row, "paper"))
    return [*table.overrides, *row.overrides, *given, "budget=paper"]


def line(table: Table, row: Row, overrides: list[str]) -> float | None:
    """Measure a row and print its line; None without its data."""
    if row.unavailable or table.unavailable:
        return None
    try:
        found = cost([*overrides_of(table, row), *overrides])
    except MissingDataError:
        return None
    validation = found.validation / (found.training + found.validation)
    print(f"{table.name:22} {row.name:34} {found.hours:7.2g} {validation:10.1%} {found.test / 60:4.1f} min", flush=True)
    return found.hours


if __name__ == "__main__":
    main()
