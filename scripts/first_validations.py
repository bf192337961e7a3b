"""Trains finished runs again until the first validation that their summaries have, and compares
the two.

    python scripts/first_validations.py results/struminsky_toy
    python scripts/first_validations.py results/correia_1_quick/dense-0.json trainer=cpu

A change of the code that changes what a task learns shows here, also where the loss stays finite.
A folder stands for the first run of each of its rows. Processors and versions of torch round
differently, so the numbers need not be equal. A difference that is larger than the stored run's own
change until its second validation is marked, and the exit code is then 1. Arguments with ``=`` are
overrides for the runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from structgrad.commands import CONFIGS
from structgrad.experiments import tables
from structgrad.experiments.runs import Summary, curve, load, read


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
    places = [Path(text) for text in given if "=" not in text]
    if not places:
        parser.error("type a folder of results, or a summary, beside the overrides")
    try:
        chosen = [(summary, command_of(summary)) for place in places for summary in first_runs(place)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    code = 0
    for summary, command in chosen:
        name = f"{summary.sweep['table']} {summary.sweep['row']}"
        found = compare(summary, [*command, *overrides])
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
    """The first run of each row with a stored curve; of a file, its run.

    Raises:
        FileNotFoundError: if there is no finished run.
        ValueError: if a file is no summary, or none has the curve of its validations.
    """
    summaries = [read(place)] if place.is_file() else load(place)
    kept = [summary for summary in summaries if summary.sweep.get("curve")]
    if not kept:
        raise ValueError(f"{place}: no summary has the curve of its validations")
    first: dict[str, Summary] = {}
    for summary in sorted(kept, key=lambda summary: summary.sweep["trial"]):
        first.setdefault(summary.sweep["row"], summary)
    return list(first.values())


def command_of(summary: Summary) -> list[str]:
    """The overrides that made a sweep's run.

    Raises:
        ValueError: if its table or its row is no more.
    """
    sweep = summary.sweep
    table = tables.load(sweep["table"], CONFIGS / "table")
    row = table.row(sweep["row"])
    settings = tables.as_overrides(table.settings(row, summary.budget) | sweep["parameters"])
    chosen = [f"budget={summary.budget}", f"seed={summary.seed}"]
    return [*table.overrides, *row.overrides, *settings, *sweep["extra"], *chosen]


def compare(summary: Summary, command: list[str]) -> Comparison | None:
    """Train a run, by its overrides, until its first validation. Returns None if the run fails."""
    (step, stored), *later = summary.sweep["curve"]
    with tempfile.TemporaryDirectory() as folder:
        here = [f"paths.runs={folder}", f"trainer.pause_at={step + 1}", "logger=csv"]
        train = [sys.executable, "-m", "structgrad.commands.train", *command, *here]
        ended = subprocess.run(train, capture_output=True, text=True)
        runs = [dict(curve(log.parent, summary.monitor)) for log in Path(folder).glob("**/metrics.csv")]
    if not runs or step not in runs[0]:
        print(ended.stderr, file=sys.stderr)
        return None
    return Comparison(step, stored, runs[0][step], later[0][1] - stored if later else None)


if __name__ == "__main__":
    sys.exit(main())
