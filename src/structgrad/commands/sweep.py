"""Make the runs of a table: every row, its trials, on as many workers as there are.

Usage: {command} table=<name> [option=value ...], then overrides for every run
       {command} task=<name> trials=20 'search={...}' [option=value ...]      without a table

Trial i of a row is always the same run, whatever the number of workers. Finished trials are found, and
killed ones continue from their checkpoint. The same command continues a stopped sweep. A run that fails
is recorded with its reason, and the other runs continue.

== Options ==
    table=<name>          {tables}
    search={key: range}   without a table: what is searched, as tables say it; docs/sweeps.md
    metric=val/elbo       without a table: what selects; the task's monitor by default
    rows=a,b              some rows of it; by default those whose data anyone can get; all: the others as well
    trials=20             draws of the hyper-parameters for each row, for tables that select among trials
    seeds=0,1,2           for tables over seeds; trials and seeds are the table's own by default
    budget=paper          paper, quick (minutes a run), smoke (seconds); the table's own by default
    workers=1             processes on this machine; 0 only shows the progress
    workers_per_gpu=1     instead of workers=: processes on each GPU of this machine
    launcher=local        or slurm: workers are jobs, with slurm.<parameter>=<value> for submitit;
                          or submitit: the same without Slurm, on this machine
    storage=<url>         the queue's database: by default SQLite beside the runs;
                          postgresql://user@host/name for several machines, its password in ~/.pgpass
    sampler=random        or any Optuna sampler by name, e.g. tpe; trials then depend on earlier ones
    halving=3             asynchronous successive halving: at each rung the best third of the trials
                          continues and the rest stops; docs/sweeps.md says where the rungs are
    results=runs/tables   finished runs leave their summary in <results>/<table>_<budget>
    folder=runs/sweeps    the folder of the queue and of the runs' output
    retry=false           true: try failed trials again
    heartbeat=30          seconds between a worker's signs of life
    grace=120             after this many seconds without one, another worker gets the trial

== Examples ==
    {command} table=paulus_2 trials=20 workers=2 budget=quick     all rows of a table on two processes
    {command} table=paulus_2 rows=lstm,arborescence trainer=cpu   some rows
    {command} table=struminsky_3 seeds=0,1,2 logger=wandb         with dashboards, see docs/comparing_runs.md
    {command} task=toy trials=20 'search={task.optimizer.lr: {distribution: log_uniform, low: 1e-4, high: 1e-2}}'
    {command} table=paulus_1 storage=postgresql://me@host/name    machines that share it, see docs/sweeps.md

Exit codes: 0 all trials are finished or have failed; 1 an error, or all trials failed; 75 stopped by
SIGTERM or Ctrl-C. After 75 the same command continues.
"""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from structgrad.commands import CONFIGS, SearchPathError, group
from structgrad.experiments import ad_hoc, tables
from structgrad.experiments.launching import launch
from structgrad.experiments.planning import make_plan
from structgrad.experiments.queue import SweepError
from structgrad.experiments.space import SpaceError
from structgrad.experiments.storage import keep_password, without_password
from structgrad.experiments.tables import TableError

OPTIONS: dict[str, str] = {
    "table": "",
    "search": "",
    "metric": "",
    "rows": "",
    "trials": "",
    "seeds": "",
    "budget": "",
    "workers": "",
    "workers_per_gpu": "",
    "launcher": "local",
    "storage": "",
    "sampler": "random",
    "halving": "",
    "results": "runs/tables",
    "folder": "runs/sweeps",
    "retry": "false",
    "heartbeat": "30",
    "grace": "120",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_help())
        return 0 if arguments else 2
    try:
        options, given = _split(arguments)
        options["storage"] = keep_password(options["storage"], os.environ)
        content = None
        if options["table"]:
            table = tables.load(options["table"], *group("table", given))
        else:
            name, content = ad_hoc.make(options, given, CONFIGS)
            table = tables.parse(name, content)
            given = [argument for argument in given if argument not in content["overrides"]]
        plan = make_plan(table, options, given, CONFIGS)
        if content is not None:
            ad_hoc.keep(content, Path(plan.results))
        return launch(table, plan, options, given)
    except (SweepError, SpaceError, TableError, SearchPathError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _help() -> str:
    command = "python sweep.py" if Path(sys.argv[0]).name == "sweep.py" else "structgrad-sweep"
    names = ", ".join(tables.names(*group("table", sys.argv[1:])))
    assert __doc__ is not None
    return __doc__.replace("{command}", command).replace("{tables}", _wrapped(names, 26, 110))


def _wrapped(text: str, indent: int, width: int) -> str:
    return ("\n" + " " * indent).join(textwrap.wrap(text, width - indent))


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options of the command, and the overrides for runs (with those of submitit)."""
    options, given = dict(OPTIONS), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise SweepError(f"{without_password(argument)}: expected key=value; type --help for the options")
        if key in OPTIONS:
            if not value:
                raise SweepError(f"{key}=: a value is missing; type it, or leave {key}= out")
            options[key] = value
        elif "." not in key and (near := difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.8)):
            raise SweepError(f"{without_password(argument)}: did you mean {near[0]}={without_password(value)}?")
        else:
            given.append(argument)
    for key in ("search", "metric"):
        if options["table"] and options[key]:
            raise SweepError(f"{key}: table {options['table']} says that itself; leave {key}= out")
    if not options["table"] and not any(argument.startswith("task=") for argument in given):
        raise SweepError(f"table=... is missing; there are {', '.join(tables.names(*group('table', given)))}")
    return options, given


if __name__ == "__main__":
    sys.exit(main())
