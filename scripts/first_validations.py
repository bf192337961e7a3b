"""Trains finished runs again until their first validation, and compares it with the one that is
stored in their summaries.

    python scripts/first_validations.py results/struminsky_toy
    python scripts/first_validations.py results/correia_1_quick/sparsemax-0.json trainer=cpu

A change of the code that changes what a task learns shows here, also where the loss stays finite.
A folder stands for the first run of each of its rows. Processors and versions of torch round
differently, so the numbers need not be equal. A difference that is larger than the stored run's own
change until its second validation is marked, and the exit code is then 1. Arguments with ``=`` are
overrides for the runs.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from structgrad.commands import CONFIGS
from structgrad.experiments import tables
from structgrad.experiments.runs import Summary, load, read


@dataclass(frozen=True)
class Comparison:
    """The first validation of a run, stored and today.

    Attributes:
        step: number of training steps before it, less one, as in the log.
        stored: the metric that selects the checkpoint, as the summary has it.
        now: the same of today's code.
        change: the stored change until the second validation; None if there was only one.
    """

    step: int
    stored: float
    now: float
    change: float | None

    @property
    def differs(self) -> bool:
        """Whether today's value is further off than the run went until its second validation."""
        return self.change is not None and not abs(self.now - self.stored) <= abs(self.change)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 1 if a run differs or fails, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="results", help="folders of results, or summaries")
    given = parser.parse_args(arguments).arguments
    overrides = [text for text in given if "=" in text]
    code = 0
    for place in (Path(text) for text in given if "=" not in text):
        for summary in first_runs(place):
            name = f"{summary.sweep['table']} {summary.sweep['row']}"
            found = compare(summary, overrides)
            if found is None:
                print(f"{name}: the run failed, see above", flush=True)
            else:
                mark = "  differs" if found.differs else ""
                change = "" if found.change is None else f", change until the second {found.change:+.4g}"
                values = f"stored {found.stored:.6g}, now {found.now:.6g} ({found.now - found.stored:+.2g})"
                print(f"{name}: {summary.monitor} after step {found.step} {values}{change}{mark}", flush=True)
            code |= found is None or found.differs
    return code


def first_runs(place: Path) -> list[Summary]:
    """The first run of each row with a stored curve; of a file, its run."""
    summaries = [read(place)] if place.is_file() else load(place)
    kept = [summary for summary in summaries if summary.sweep.get("curve")]
    if not kept:
        print(f"{place}: no summary has the curve of its validations", file=sys.stderr)
    kept.sort(key=lambda summary: summary.sweep["trial"])
    return list({summary.sweep["row"]: summary for summary in reversed(kept)}.values())[::-1]


def compare(summary: Summary, overrides: list[str]) -> Comparison | None:
    """Train a run until its first validation. Returns None if the run fails."""
    (step, stored), *later = summary.sweep["curve"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "structgrad.commands.train", *command_of(summary), *overrides]
        ended = subprocess.run(
            [*command, f"paths.runs={folder}", f"trainer.pause_at={step + 1}", "logger=csv"],
            capture_output=True,
            text=True,
        )
        values = [value_at(log, step, summary.monitor) for log in Path(folder).glob("**/metrics.csv")]
    if not values or values[0] is None:
        print(ended.stderr, file=sys.stderr)
        return None
    return Comparison(step, stored, values[0], later[0][1] - stored if later else None)


def command_of(summary: Summary) -> list[str]:
    """The overrides that made a sweep's run."""
    sweep = summary.sweep
    table = tables.load(sweep["table"], CONFIGS / "table")
    row = table.row(sweep["row"])
    drawn = (row.fixed | sweep["parameters"]).items()
    settings = [f"{key}={value}" for key, value in drawn]
    chosen = [f"budget={summary.budget}", f"seed={summary.seed}"]
    return [*table.overrides, *row.overrides, *settings, *sweep["extra"], *chosen]


def value_at(log: Path, step: int, metric: str) -> float | None:
    """A metric in a run's ``metrics.csv`` (step, metric, value)."""
    with log.open() as lines:
        found = [row for row in csv.DictReader(lines) if row["step"] == str(step) and row["metric"] == metric]
    return float(found[0]["value"]) if found else None


if __name__ == "__main__":
    sys.exit(main())
