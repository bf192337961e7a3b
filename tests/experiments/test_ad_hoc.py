"""Sweeps without a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from structgrad.commands import CONFIGS, report, sweep
from structgrad.experiments import ad_hoc, tables
from structgrad.experiments.queue import Plan, SweepError
from structgrad.experiments.space import SpaceError

SEARCH = "search={task.optimizer.lr: {distribution: log_uniform, low: 1e-4, high: 1e-2}}"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()


def plan_of(*arguments: str) -> Plan:
    """And keeps the table, as the command does."""
    options, given = sweep._split(arguments)
    name, content = ad_hoc.make(options, given, CONFIGS)
    table = tables.parse(name, content)
    given = [argument for argument in given if argument not in content["overrides"]]
    plan = sweep.make_plan(table, options, given, CONFIGS)
    ad_hoc.keep(content, Path(plan.results))
    return plan


def test_what_is_given_is_searched_and_nothing_else() -> None:
    plan = plan_of("task=listops", "estimator=sst", "budget=quick", "trials=5", SEARCH, "metric=val/accuracy")
    (row,) = plan.rows
    assert row.overrides == ("task=listops", "estimator=sst")
    assert row.trials == (0, 1, 2, 3, 4)
    assert row.space == {"task.optimizer.lr": {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2}}
    assert (plan.metric, plan.direction, plan.common) == ("val/accuracy", "maximize", ("budget=quick",))
    # Where and with whom does not matter, nor the number of trials; what is run does.
    again = plan_of("task=listops", "estimator=sst", "budget=quick", "trials=7", SEARCH, "trainer=cpu", "workers=3")
    assert (again.name, len(again.rows[0].trials)) == (plan.name, 7)
    assert plan_of("task=listops", "estimator=sst", "budget=smoke", "trials=5", SEARCH).name != plan.name
    assert plan_of("task=listops", "estimator=sst", "budget=quick", "task.dropout=0.2", SEARCH).name != plan.name


def test_without_a_space_that_of_the_configuration_is_searched_but_for_what_is_given_by_hand() -> None:
    (row,) = plan_of("task=listops", "estimator=sst", "trials=2", "task.optimizer.weight_decay=0").rows
    assert set(row.space) == {"task.optimizer.lr", "estimator.temperature"}
    (seeds,) = plan_of("task=listops", "estimator=sst", "seeds=3,5").rows
    assert (seeds.trials, seeds.space) == ((3, 5), {})


def test_reports_read_the_table_beside_the_results(tmp_path: Path) -> None:
    """Selected among trials by the validation metric; the command to make it is the sweep's own."""
    plan = plan_of("task=listops", "estimator=sst", "budget=quick", "trials=2", SEARCH)
    for trial, (validated, tested) in enumerate([(0.5, 0.4), (0.7, 0.6)]):
        content = {
            "name": f"listops-{trial}",
            "task": "listops",
            "structure": "arborescence",
            "estimator": "sst",
            "budget": "quick",
            "seed": trial,
            "metrics": {"val/accuracy": validated, "test/accuracy": tested, "test/precision": 0.1, "test/recall": 0.1},
            "training_s": 1.0,
            "device": "cpu",
            "commit": "0",
            "config": {"task": {"optimizer": {"lr": 10.0**-trial}}},
            "sweep": {
                "table": plan.table,
                "row": "all",
                "trial": trial,
                "parameters": {"task.optimizer.lr": 10.0**-trial},
                "extra": [],
                "curve": [],
            },
        }
        (Path(plan.results) / f"all-{trial}.json").write_text(json.dumps(content))
    (found,), _ = report.find([plan.results], [])
    assert found.table.name == plan.table
    (line,) = found.lines
    assert line.cells["accuracy"].value == pytest.approx(0.6)
    assert found.command(line.row).startswith("python sweep.py task=listops estimator=sst budget=quick search=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task=listops", "trials=3", "metric=val/loss"), "type metric=val/accuracy"),
        (("task=listops", "trials=3", "search={}"), "search={}: no hyper-parameters"),
        (("task=listops", "trials=3", "search={task.optimizer.lr: 3}"), "no hyper-parameters with a distribution each"),
        (("task=listops", "trials=3", "search={task: {"), "search={task: {: "),
        (("task=listops", "trials=3", SEARCH, "task.optimizer.lr=1"), "task.optimizer.lr is given by hand as well"),
        (("task=listops", "trials=3", SEARCH.replace("optimizer", "optimiser")), "task.optimiser.lr is no key"),
        (("task=listops", "trials=3", "structure=treee"), "structure=treee: no such choice; nearest:"),
        (("trials=3", SEARCH), "table=... is missing"),
        (("table=paulus_2", SEARCH), "search: table paulus_2 says that itself"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((SweepError, SpaceError)) as caught:
        plan_of(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
