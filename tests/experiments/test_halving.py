"""Asynchronous successive halving: where the rungs are, who goes on, and a sweep of it with workers that are killed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from structgrad.commands import CONFIGS, sweep
from structgrad.experiments import html, markdown, tables
from structgrad.experiments.halving import promoted, rungs
from structgrad.experiments.planning import make_plan
from structgrad.experiments.queue import Plan, PlannedRow, Queue
from structgrad.experiments.report import build
from structgrad.experiments.runs import load
from tests.experiments.test_queue import children, kill, make, results, row, start, work
from tests.experiments.test_tables import small, summary, swept

STEPS = (4, 12)


def test_rungs_are_validations_and_as_many_as_leave_a_trial_for_the_end() -> None:
    assert rungs(50_000, 800, 20, 3) == (5_600, 16_800)  # 20, 6, 2 trials
    assert rungs(50_000, 800, 27, 3) == (2_400, 5_600, 16_800)
    assert rungs(50_000, 800, 8, 3) == (16_800,)
    assert rungs(50_000, 800, 2, 3) == ()
    assert rungs(36, 1, 9, 3) == STEPS
    assert rungs(20, 10, 20, 3) == (10,)  # two of them would be one validation
    assert rungs(20, 20, 20, 3) == ()  # validated at its end only


def test_the_best_third_goes_on() -> None:
    values = {trial: float(trial) for trial in range(7)}
    resting = dict.fromkeys(values, 0)
    assert promoted([values, {}], resting, 3, idle=False) == [(6, 0), (5, 0)]
    assert promoted([values, {}], {**resting, 6: 1}, 3, idle=False) == [(5, 0)]  # 6 is at work, or further
    assert promoted([dict.fromkeys(values, 0.0), {}], resting, 3, idle=False) == [(0, 0), (1, 0)]  # ties
    few = {0: 0.5, 1: 0.7}
    assert promoted([few, {}], {0: 0, 1: 0}, 3, idle=False) == []  # a third may yet come
    assert promoted([few, {}], {0: 0, 1: 0}, 3, idle=True) == [(1, 0)]  # so that one is finished
    assert promoted([few, {1: 0.0}], {0: 0}, 3, idle=True) == []
    assert promoted([values, few, {}], {**resting, 0: 1, 1: 1}, 3, idle=True) == [(1, 1), (6, 0), (5, 0)]


def halved(tmp_path: Path, trials: int = 9, **settings: Any) -> PlannedRow:
    whole = row("a", trials, "x", steps=36, every=1, **settings)
    return PlannedRow(whole.name, whole.overrides, whole.trials, whole.space, rungs=STEPS)


def check(plan: Plan, queue: Queue) -> None:
    """Nine trials, of which at least three and one went on: the best ones; each step was done once."""
    content = json.loads((Path(plan.results) / "halving" / "a.json").read_text())
    assert (content["reduction"], content["rungs"]) == (3, list(STEPS))
    drawn = {entry["trial"]: entry["parameters"]["x"] for entry in content["trials"]}
    assert len(drawn) == 9
    best = sorted(drawn, key=lambda trial: -drawn[trial])
    reached = {entry["trial"]: entry["rungs"] for entry in content["trials"]}
    assert set(reached.values()) <= {1, 2}
    assert {trial for trial, count in reached.items() if count == 2} >= set(best[:3])
    finished = {entry["trial"] for entry in content["trials"] if entry["finished"]}
    assert best[0] in finished
    assert {index for index, _, _ in results(plan).values()} == finished
    progress = queue.progress()["a"]
    assert (progress.done, progress.open, progress.resting) == (len(finished), 0, 9 - len(finished))
    assert progress.reached == {4: 9, 12: sum(count == 2 for count in reached.values())}
    done = [(f / "steps.log").read_text().split() for f in Path(plan.common[0].partition("=")[2]).glob("fake/*")]
    assert all(len(set(steps)) == len(steps) for steps in done)  # continued from its checkpoint, never repeated
    assert sorted(map(len, done)) == sorted(
        36 if trial in finished else STEPS[count - 1] for trial, count in reached.items()
    )
    for entry in content["trials"]:
        assert [at for at, _ in entry["curve"]] == list(range(len(entry["curve"])))


def test_a_sweep_with_halving(tmp_path: Path) -> None:
    plan = make(tmp_path, halved(tmp_path), reduction=3)
    queue = work(plan)
    check(plan, queue)
    progress = queue.progress()["a"]
    assert (progress.done, progress.reached) == (1, {4: 9, 12: 3})  # one worker: exactly a third
    before = results(plan)
    work(plan)  # has nothing left to do
    assert results(plan) == before


def test_more_trials_later_go_through_the_rungs_that_there_are(tmp_path: Path) -> None:
    work(make(tmp_path, halved(tmp_path, 3), reduction=3))
    queue = work(make(tmp_path, halved(tmp_path, 9), reduction=3))
    progress = queue.progress()["a"]
    assert progress.open == 0
    assert progress.reached[4] == 9
    assert progress.reached[12] >= 3
    assert progress.done >= 1


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, of two workers or of their runs too: the best still get furthest, all steps once."""
    gate = tmp_path / "gate"
    plan = make(tmp_path, halved(tmp_path, step_s=0.05, gate=gate), reduction=3, heartbeat=1, grace=2)
    generator = random.Random(1)
    workers = [start(plan), start(plan)]
    queue = Queue(plan)
    kills, end = 0, time.monotonic() + 400
    while not queue.settled():
        assert time.monotonic() < end, queue.progress()
        victim, moment = generator.randrange(2), time.monotonic() + generator.uniform(0.3, 1.5)
        while time.monotonic() < moment or (0 < kills < 8 and not children(workers[victim]) and not queue.settled()):
            time.sleep(0.05)
            if workers[victim].poll() is not None:
                workers[victim] = start(plan)
        if kills < 10 and workers[victim].poll() is None:
            kill(workers[victim], run_too=generator.random() < 0.5)
            kills += 1
        if kills == 10:
            gate.touch()  # no run could finish before
        for place, worker in enumerate(workers):
            if worker.poll() is not None:
                workers[place] = start(plan)
    for worker in workers:
        assert worker.wait(60) == 0
    assert kills == 10
    queue.export_finished()
    check(plan, queue)


@pytest.mark.parametrize("trials", [20, 9])
def test_a_plan_with_halving(trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, given = sweep._split(["table=paulus_2", "rows=lstm", "budget=quick", f"trials={trials}", "halving=3"])
    plan = make_plan(tables.load("paulus_2", CONFIGS / "table"), options, given, CONFIGS)
    (planned,) = plan.rows
    assert len(planned.rungs) == 2
    assert plan.reduction == 3
    assert plan.extra == ("halving=3",)
    assert Plan.load(plan.save()) == plan


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("table=paulus_2 halving=1", "halving=1 must be a whole number, at least 2"),
        ("table=paulus_2 halving=3 trials=2", "halving=3: no row has at least 3 trials, a search space, and a valid"),
        ("table=struminsky_3 halving=3", "halving: struminsky_3 searches nothing and goes over seeds"),
    ],
)
def test_what_halving_is_not_for(given: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*given.split(), "budget=quick"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_the_report_says_who_got_how_far(tmp_path: Path) -> None:
    """Counts in the caption, no bootstrap error, and a picture of all curves with the rungs."""
    table = small(tmp_path, ("mean_and_standard_error", "best_trial"))
    folder = tmp_path / "small-abcdef"
    (folder / "halving").mkdir(parents=True)
    for trial in (4, 7):
        run = summary("lstm", trial, 0.8 + trial / 100, sweep=swept("lstm", trial, "halving=3")).content
        (folder / f"lstm-{trial}.json").write_text(json.dumps(run))
    curve = [[9, 0.1], [19, 0.2], [29, 0.3]]
    trials = []
    for trial in range(9):
        passed = 1 + (trial in (1, 4, 7)) + (trial in (4, 7))
        rungs_passed, finished = min(passed, 2), trial in (4, 7)
        trials.append({"trial": trial, "curve": curve[:passed], "rungs": rungs_passed, "finished": finished})
    trials[8] |= {"curve": [], "rungs": 0, "error": "it cannot work"}
    content = {"table": "small", "row": "lstm", "reduction": 3, "rungs": [10, 20], "trials": trials}
    (folder / "halving" / "lstm.json").write_text(json.dumps(content))
    report = build(table, load(folder))
    line = report.main()["lstm"]
    assert [cell.standard_error for cell in line.cells.values()] == [None]
    caption = markdown.caption(report)
    assert caption.startswith(
        "Numbers are of the trial with the best validation metric. Trials were stopped by asynchronous successive "
    )
    assert "the selection has no bootstrap error" in caption
    assert "LSTM: of 9 trials 8 to step 10, 3 to step 20, 2 to the end, 1 failed" in caption
    assert "| LSTM | 2 | 87.0 |" in markdown.table(report)
    assert "Successive halving: learning curves of all trials" in html.page([report], tmp_path)
    (folder / "halving" / "lstm.json").write_text("{")
    with pytest.raises(ValueError, match=r"lstm\.json does not say who got to which rung: .*; delete it"):
        load(folder)
