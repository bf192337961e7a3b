"""Tables as data, and reports from summaries."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import OmegaConf

from structgrad.experiments import markdown, tables
from structgrad.experiments.report import Report, _grouped, build
from structgrad.experiments.runs import Summary, load
from structgrad.experiments.tables import TableError
from structgrad.tasks.base import Task

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "table"
TASKS = {file.stem for file in (ROOT / "configs" / "task").glob("*.yaml")}

SMALL = """
title: Small
source: A paper, Table 1
overrides: [task=listops]
selection: {rule: mean_and_standard_error, metric: val/accuracy, direction: maximize, trials: 3}
published: {error: standard_deviation, seeds: 4}
columns:
  accuracy: {metric: test/accuracy, title: Accuracy (%), direction: maximize, scale: 100, margin: 2}
  calls: {metric: test/calls, title: Calls, direction: minimize}
rows:
  lstm: {title: LSTM, overrides: [structure=none], published: {accuracy: [80.0, 4.0]}}
  tree: {title: Tree, group: GNN, overrides: [structure=arborescence, estimator=sst]}
  hot: {title: Hot tree, group: GNN, overrides: [structure=arborescence, estimator=sst, estimator.temperature=9]}
claims:
  - text: Trees win.
    shown_by: [{column: accuracy, better: tree, than: lstm}]
  - text: Hot trees are cheap.
    shown_by: [{column: calls, row: hot, at_most: 2}]
"""


def small(tmp_path: Path, change: tuple[str, str] = ("", "")) -> tables.Table:
    (tmp_path / "small.yaml").write_text(SMALL.replace(*change))
    return tables.load("small", tmp_path)


def summary(row: str, seed: int, accuracy: float, **changes: Any) -> Summary:
    structure, estimator = ("none", "none") if row == "lstm" else ("arborescence", "sst")
    content = {
        "task": "listops", "structure": structure, "estimator": estimator, "budget": "paper", "seed": seed,
        "name": f"{row}-{seed}",
        "metrics": {"test/accuracy": accuracy, "val/accuracy": accuracy}, "device": "cpu", "commit": "0123456789abcdef",
        "training_s": 100.0,
        "config": {"estimator": {"temperature": 9 if row == "hot" else 1.0}, "task": {"data": {"train": 5}}},
    }  # fmt: skip
    if row == "hot":
        content["metrics"]["test/calls"] = 3.0
    content |= changes
    keys = ("task", "structure", "estimator", "budget", "seed", "metrics")
    return Summary(**{key: content[key] for key in keys}, content=content)


def runs() -> list[Summary]:
    """Three seeds of two rows, one of a third."""
    seeds = range(3)
    return [
        *(summary("lstm", s, 0.8 + s / 100) for s in seeds),
        *(summary("tree", s, 0.9 + s / 100) for s in seeds),
        summary("hot", 0, 0.5),
    ]


def test_rows_claims_and_differences(tmp_path: Path) -> None:
    report = build(small(tmp_path), runs())
    text = markdown.document(report)
    # Welch: variances 1/3 and 4 with 2 and 3 degrees of freedom make 3.5, t = 2.943; that of 4 alone is 3.182 * 2.
    assert "| LSTM | 3 | 81.0 ± 0.6 | 80.0 ± 4.0 | +1.0 [-5.4, +7.4] | - |" in text
    assert "Brackets have 95 % intervals, by Student's t and for differences by Welch's." in text
    assert "Differences are ours minus the published number." in text
    assert "| **GNN** |  |  |  |  |  |" in text
    assert "| Tree | 3 | 91.0 ± 0.6 | - | - | - |" in text
    assert "| Hot tree | 1 | 50.0 | - | - | 3.0 |" in text
    # Twice the variance 1/3, four degrees of freedom: 2.776 * 0.816.
    assert "*Trees win.* **Shown.** Accuracy (%): Tree − LSTM = +10.0 [+7.5, +12.5]." in text
    assert (
        "*Hot trees are cheap.* **Open.** Calls: Hot tree 3.0, claimed ≤ 2; numbers without an interval decide nothing."
        in text
    )
    assert "The budget is `paper`. Device cpu, 1.7 min of training a run, commit 0123456789." in text
    assert "Not run" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("overrides: [task=listops]", "overrides: task=listops"), r"the table: overrides are a list .*; got 'task=li"),
        (("overrides: [task=listops]", "overrides: [{task: listops}]"), "the table: overrides are a list"),
        (("overrides: [task=listops]", "overrides: [task=listops]\nsearch: [a]"), "the table: search takes keys with"),
        (("accuracy: [80.0, 4.0]", "accuracy: abc"), "row lstm: published: accuracy is 'abc', neither a number nor"),
        (("accuracy: [80.0, 4.0]", "accuracy: [1, 2, 3]"), r"row lstm: published: accuracy is \[1, 2, 3\], neither"),
        (("overrides: [structure=none]", "overrides: [structure=none], given: 3"), "row lstm: given takes keys with"),
        (("overrides: [structure=none]", "overrides: [structure=none], search: 3"), "row lstm: search takes keys with"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(TableError, match=message):
        small(tmp_path, change)


def test_the_best_value_is_that_of_its_column(tmp_path: Path) -> None:
    """Also if two columns share a title, or one has that of the column of runs."""
    twins = ("title: Calls, direction: minimize", "title: Runs, direction: minimize")
    found = [summary("tree", 0, 0.5) for _ in range(1)] + [summary("hot", 0, 0.9)]
    for run, calls in zip(found, (1.0, 2.0), strict=True):
        run.content["metrics"]["test/calls"] = calls
    text = markdown.latex(build(small(tmp_path, twins), found))
    (tree,) = (line for line in text.splitlines() if line.startswith("Tree"))
    (hot,) = (line for line in text.splitlines() if line.startswith("Hot"))
    assert "\\textbf{1.0}" in tree
    assert "\\textbf{90.0}" in hot
    assert tree.count("textbf") == hot.count("textbf") == 1


def test_a_setting_that_is_left_out_at_its_neutral_value_is_known(tmp_path: Path) -> None:
    """Rows that name it, in their overrides or as a given setting, have the runs that lack it."""
    for change in (
        ("estimator=sst, estimator.temperature=9]", "estimator=sst, estimator.epsilon=0.01]"),
        ("estimator=sst, estimator.temperature=9]}", "estimator=sst], given: {estimator.epsilon: 0.01}}"),
    ):
        swept = {"sweep": {"table": "small", "row": "hot", "trial": 0}} if "given" in change[1] else {}
        report = build(small(tmp_path, change), [summary("tree", 0, 0.9, **swept)])
        assert [len(line.runs) for line in report.lines if line.row.name == "hot"] == [1]
        assert not any(line.marks for line in report.lines)


def test_what_is_close_is_not_shown_and_one_run_decides_nothing(tmp_path: Path) -> None:
    close = [summary("lstm", s, 0.8 + s / 10) for s in range(3)] + [summary("tree", s, 0.85 + s / 10) for s in range(3)]
    assert "**Open.** Accuracy (%): Tree − LSTM = +5.0 [-19.8, +29.8]." in markdown.claims(
        build(small(tmp_path), close)
    )
    single = [summary("lstm", 0, 0.8), summary("tree", 0, 0.9)]
    text = markdown.claims(build(small(tmp_path), single))
    assert "**Open.** Accuracy (%): Tree − LSTM = +10.0; numbers without an interval decide nothing." in text
    reverse = [summary("lstm", s, 0.9 + s / 100) for s in range(3)] + [
        summary("tree", s, 0.8 + s / 100) for s in range(3)
    ]
    assert "**Contradicted.**" in markdown.claims(build(small(tmp_path), reverse))


@pytest.mark.parametrize(
    ("accuracy", "sentence"),
    [
        ("[95.0, 4.0]", "By the same test, the published numbers show it."),
        ("[84.0, 4.0]", "By the same test, the published numbers show 0 of 1 comparisons and leave 1 open."),
        ("[60.0, 4.0]", "By the same test, the published numbers show 0 of 1 comparisons and contradict 1."),
    ],
)
def test_a_claim_is_judged_by_the_published_numbers_as_well(tmp_path: Path, accuracy: str, sentence: str) -> None:
    """Four seeds and a standard deviation of 4 each: the interval of a difference is 6.9 wide."""
    change = ("estimator=sst]}", "estimator=sst], published: {accuracy: " + accuracy + "}}")
    for found in (runs(), []):
        lines = markdown.claims(build(small(tmp_path, change), found)).splitlines()
        assert lines[0].endswith(sentence)
        assert "published" not in lines[1]  # of a column without published numbers
    quick = [summary(row, s, 0.8, budget="quick") for row in ("lstm", "tree") for s in range(3)]
    assert "published" not in markdown.claims(build(small(tmp_path, change), quick))


def test_missing_rows_come_with_the_command(tmp_path: Path) -> None:
    text = markdown.document(build(small(tmp_path), []))
    assert "- LSTM: `python sweep.py table=small rows=lstm budget=paper`" in text
    assert "**Open.** No runs of Tree, LSTM." in text
    closed = build(small(tmp_path, ("[structure=none],", "[structure=none], unavailable: no such data,")), [])
    assert "- LSTM: no such data" in markdown.document(closed)


def test_what_cannot_be_compared_is_marked_and_never_mixed(tmp_path: Path) -> None:
    strange = [
        summary("lstm", 3, 0.1, budget="quick"),
        summary("lstm", 4, 0.2, device="GPU"),
        summary("lstm", 5, 0.3, sweep={"table": "small", "row": "lstm", "trial": 0, "extra": ["task.hidden=9"]}),
        summary("lstm", 6, 0.4, config={"task": {"data": {"train": 7}}}),
    ]
    report = build(small(tmp_path), [*runs(), *strange])
    lines = markdown.table(report).splitlines()
    assert lines[2].startswith("| LSTM | 3 | 81.0 ± 0.6 |")
    for mark in ("(budget quick) | 1 | 10.0 |", "(device GPU) | 1 | 20.0 |", "(with task.hidden=9) | 1 | 30.0 |"):
        assert any(mark in line for line in lines)
    assert any("(other data: task.data.train=7) | 1 | 40.0 |" in line for line in lines)
    assert "+10.0 [+7.5, +12.5]" in markdown.claims(report)


def test_a_quick_run_does_not_stand_beside_published_numbers(tmp_path: Path) -> None:
    report = build(small(tmp_path), [summary("lstm", s, 0.8, budget="quick") for s in range(2)])
    assert "published" not in markdown.table(report)
    assert "no reproduction" in markdown.caption(report)


def test_one_trial_counts_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small, lstm: seeds \[0, 0\] repeat"):
        build(small(tmp_path), [summary("lstm", 0, 0.8), summary("lstm", 0, 0.9)])
    with pytest.raises(ValueError, match="lstm-0 has no val/accuracy to select by"):
        build(small(tmp_path), [summary("lstm", 0, 0.8, metrics={"test/accuracy": 0.8})])


def swept(row: str, trial: int, *extra: str, **parameters: object) -> dict[str, Any]:
    return {"table": "small", "row": row, "trial": trial, "parameters": parameters, "extra": list(extra)}


def test_a_run_by_hand_that_a_sweep_has_found_counts_once(tmp_path: Path) -> None:
    both = [*runs()[:3], *(summary("lstm", s, 0.8 + s / 100, sweep=swept("lstm", s)) for s in range(3))]
    assert "| LSTM | 3 | 81.0 ± 0.6 |" in markdown.table(build(small(tmp_path), both))
    with pytest.raises(ValueError, match=r"small, lstm: seeds \[0, 0\] repeat"):  # with another result
        build(small(tmp_path), [runs()[0], summary("lstm", 0, 0.7, sweep=swept("lstm", 0))])


def test_the_same_trials_under_other_conditions_stand_on_other_lines(tmp_path: Path) -> None:
    """A sweep with settings of the user's has trials 0, 1, 2 as well; so has the same table on another device."""
    plain = [summary("lstm", s, 0.8, sweep=swept("lstm", s)) for s in range(3)]
    wide = [summary("lstm", s, 0.3, name=f"w{s}", sweep=swept("lstm", s, "task.hidden=9")) for s in range(2)]
    gpu = [summary("lstm", s, 0.2, device="GPU", sweep=swept("lstm", s)) for s in range(2)]
    text = markdown.table(build(small(tmp_path), [*plain, *wide, *gpu]))
    for line in ("| LSTM | 3 | 80.0", "| LSTM (with task.hidden=9) | 2 | 30.0", "| LSTM (device GPU) | 2 | 20.0"):
        assert line in text


def configured(row: str, seed: int, accuracy: float, **changes: Any) -> Summary:
    """A run with a configuration of which the seed is a part."""
    task = {"seed": seed, "data": {"train": 5}} | {
        k: v for k, v in changes.items() if k not in ("sweep", "name", "budget")
    }
    config = {"seed": seed, "task": task, "estimator": {"temperature": 1.0}}
    others = {k: v for k, v in changes.items() if k in ("sweep", "name", "budget")}
    return summary(row, seed, accuracy, config=config, **others)


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    table = small(tmp_path)
    same = [configured("lstm", seed, 0.8, lr=0.1) for seed in range(3)]
    text = markdown.table(build(table, [*same, configured("lstm", 3, 0.2, lr=0.2)]))
    assert "| LSTM | 3 | 80.0 ± 0.0 |" in text
    assert "| LSTM (other settings than above: task.lr=0.2) | 1 | 20.0 |" in text
    searching = small(tmp_path, ("mean_and_standard_error", "best_trial"))
    drawn = [configured("lstm", s, 0.8, lr=s, same=s, sweep=swept("lstm", s, **{"task.lr": s})) for s in range(3)]
    assert "| LSTM | 3 |" in markdown.table(build(searching, drawn))
    changed = configured("lstm", 3, 0.9, lr=3, same=3, epochs=9, sweep=swept("lstm", 3, **{"task.lr": 3}))
    assert "(other settings than above: task.epochs=9) | 1 |" in markdown.table(build(searching, [*drawn, changed]))


def test_each_task_of_a_table_has_its_own_data(tmp_path: Path) -> None:
    lstm = [replace(configured("lstm", seed, 0.8), task="toy") for seed in range(3)]
    tree = [replace(configured("tree", seed, 0.9, data={"train": 7}), task="l2x") for seed in range(3)]
    other = replace(configured("tree", 3, 0.1, data={"train": 8}), task="l2x")
    groups = _grouped(small(tmp_path), {"lstm": lstm, "tree": [*tree, other]})
    data = {name: [(condition.data, len(runs)) for condition, runs in found.items()] for name, found in groups.items()}
    assert data == {"lstm": [(frozenset(), 3)], "tree": [(frozenset(), 3), (frozenset({("task.data.train", "8")}), 1)]}


def test_rows_on_other_data_are_not_compared(tmp_path: Path) -> None:
    lstm = [configured("lstm", seed, 0.8 + seed / 100) for seed in range(3)]
    tree = [configured("tree", seed, 0.9 + seed / 100, data={"train": 7}) for seed in range(3)]
    report = build(small(tmp_path), [*lstm, *tree])
    assert "| Tree (other data: task.data.train=7) | 3 |" in markdown.table(report)
    assert "**Open.** No runs of Tree." in markdown.claims(report)
    rows = small(tmp_path, ("[structure=none]", "[structure=none, task.data.train=5]"))  # where rows differ in it
    assert "**Shown.**" in markdown.claims(build(rows, [*lstm, *tree]))


def test_a_run_by_hand_with_an_experiment_is_of_a_row_with_it(tmp_path: Path) -> None:
    run = summary("tree", 0, 0.9, experiment="listops/wide")
    assert build(small(tmp_path), [run]).main() == {}
    wide = small(tmp_path, ("[structure=none]", "[experiment=listops/wide]"))
    assert list(build(wide, [run]).main()) == ["lstm"]
    assert list(build(wide, [summary("tree", 0, 0.9)]).main()) == ["tree"]


def test_what_is_not_a_number_shows_nothing(tmp_path: Path) -> None:
    bad = {"val/accuracy": 0.5, "test/accuracy": math.nan, "test/calls": math.nan}
    text = markdown.document(build(small(tmp_path), [summary("hot", 0, 0.5, metrics=bad)]))
    assert "*Hot trees are cheap.* **Open.**" in text
    best = small(tmp_path, ("scale: 100}", "scale: 100, statistic: best}"))
    assert "| Hot tree | 1 | nan |" in markdown.table(build(best, [summary("hot", 0, 0.5, metrics=bad)]))


def test_latex(tmp_path: Path) -> None:
    text = markdown.latex(build(small(tmp_path), runs()))
    assert r" & Runs & Accuracy (\%) & published & difference & Calls \\" in text
    assert r"LSTM & 3 & 81.0 $\pm$ 0.6 & 80.0 $\pm$ 4.0 & +1.0 [-5.4, +7.4] & - \\" in text
    assert r"\multicolumn{6}{l}{\emph{GNN}} \\" in text
    made = swept("lstm", 0, "task.optimizer={lr: 1}", "~task.x^$")
    other = markdown.latex(build(small(tmp_path), [*runs(), summary("lstm", 3, 0.3, sweep=made)]))
    assert r"(with task.optimizer=\{lr: 1\} \textasciitilde{}task.x\textasciicircum{}\$)" in other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title: Small", "titel: Small"), "the table has no key titel; nearest: title"),
        (("title: Small\n", ""), "the table lacks title"),
        ((", direction: maximize, trials: 3", ""), "selection: metric and direction go together"),
        (("[structure=none],", "[structure=none], search: {a: null}, given: {b: 1},"), "row lstm: given settings take"),
        (("[structure=none],", "[structure=none], given: {b: {low: 1}},"), "row lstm: given: b is neither a value nor"),
        (("  lstm:", "  all:"), "row all: this name stands for all rows"),
        (("metric: test/calls, ", ""), "column calls lacks metric"),
        (("direction: minimize}\n", "direction: down}\n"), "column calls: direction: down is none of"),
        (("published: {accuracy", "published: {acuracy"), "row lstm: published: acuracy is none of accuracy, calls"),
        (("than: lstm", "than: lstn"), "claim 'Trees win.': lstn is none of lstm, tree, hot"),
        (("row: hot, at_most: 2", "row: hot"), "a comparison is"),
        (("minimize}\nrows", "null}\nrows"), None),
        (("  lstm:", "  tree:"), "found duplicate key tree"),
        (("title: Small", "title: [Small"), "expected"),
        (("better: tree", "not_worse: tree"), None),
        (("scale: 100, margin: 2", "scale: 100"), None),
        (("margin: 2", "margin: 0"), "column accuracy: margin 0 is no positive number"),
        (
            ("row: hot, at_most: 2", "not_worse: hot, than: tree"),
            "claim 'Hot trees are cheap.': column calls has no margin",
        ),
        (("mean_and_standard_error", "luck"), "selection: no rule luck; there are best_trial"),
    ],
)
def test_errors_of_a_table_are_one_line(tmp_path: Path, change: tuple[str, str], message: str | None) -> None:
    if message is None:
        small(tmp_path, change)
        return
    with pytest.raises(TableError) as error:
        small(tmp_path, change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_table_names_the_nearest() -> None:
    with pytest.raises(TableError, match="no table paulus_22; nearest: paulus_2"):
        tables.load("paulus_22", FOLDER)


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    """Compositions of the checkout's configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        yield


def rows_to_compose() -> Iterator[tuple[str, str]]:
    """One row of each set of keys and choices: numbers do not matter."""
    seen = set()
    for name in tables.names(FOLDER):
        table = tables.load(name, FOLDER)
        for row in table.rows:
            overrides = (*table.overrides, *row.overrides)
            key = tuple(o if "." not in o.split("=")[0] else o.split("=")[0] for o in overrides)
            if key not in seen:
                seen.add(key)
                yield name, row.name


@pytest.mark.parametrize(("name", "row"), rows_to_compose())
def test_every_row_composes(hydra: None, name: str, row: str) -> None:
    table = tables.load(name, FOLDER)
    overrides = [*table.overrides, *table.row(row).overrides]
    task = next(o.split("=")[1] for o in overrides if o.startswith("task="))
    if task not in TASKS:
        pytest.skip(f"there is no task {task} yet")
    config = compose("config", [*overrides, f"budget={table.budget}"])
    assert config.trainer.max_steps > 0
    assert get_class(config.task._target_).monitor == table.selection.metric  # the one that summaries have


def task_class(table: tables.Table, row: str) -> type[Task]:
    overrides = (*table.overrides, *table.row(row).overrides)
    task = next(o.split("=")[1] for o in overrides if o.startswith("task="))
    found: type[Task] = get_class(OmegaConf.load(FOLDER.parent / "task" / f"{task}.yaml").task._target_)
    return found


@pytest.mark.parametrize("name", tables.names(FOLDER))
def test_every_column_is_of_a_metric_that_a_test_logs(name: str) -> None:
    table = tables.load(name, FOLDER)
    for row in table.rows:
        assert tables.check_metrics(table, task_class(table, row.name).logged_by_test()) == []


def test_every_metric_of_the_recorded_runs_is_declared() -> None:
    """A task logs the metrics that it declares."""
    for file in sorted((ROOT / "results").glob("*/*.json")):
        content = json.loads(file.read_text())
        if "task" in content:
            task = get_class(content["config"]["task"]["_target_"])
            known = {f"test/{metric}" for metric in task.logged_by_test()} | {task.monitor}
            assert set(content["metrics"]) <= known, file


@pytest.mark.parametrize(
    ("metric", "message"),
    [("test/acuracy", "column accuracy: no test is known to log test/acuracy; nearest: test/accuracy"),
     ("val/loss", "column accuracy: no test is known to log val/loss")],
)  # fmt: skip
def test_a_misspelt_column_is_found_before_training(tmp_path: Path, metric: str, message: str) -> None:
    wrong = small(tmp_path, ("metric: test/accuracy", f"metric: {metric}"))
    with pytest.raises(TableError, match=message):
        tables.check_metrics(wrong, ("accuracy", "calls"))
    own = small(tmp_path, ("metric: test/accuracy", "metric: test/fairness"))
    assert tables.check_metrics(own, ("accuracy", "calls")) == [
        "small: column accuracy: no test is known to log test/fairness"
    ]


GIVEN = ("[structure=none],", "[structure=none], given: {task.lr: 0.1, task.decay: {low: 1.0e-6, high: 1.0e-4}},")


def test_runs_with_the_given_settings_count(tmp_path: Path) -> None:
    """By a sweep or by hand; others stand on a line of their own."""
    table = small(tmp_path, GIVEN)
    right = [configured("lstm", s, 0.8, lr=0.1, decay=1e-5) for s in range(2)]
    swept_before = configured("lstm", 2, 0.3, lr=0.2, decay=1e-5, sweep=swept("lstm", 2, **{"task.lr": 0.2}))
    by_hand = configured("lstm", 3, 0.2, lr=0.1, decay=0.1)  # of no row
    text = markdown.document(build(table, [*right, swept_before, by_hand]))
    assert "| LSTM, settings given | 2 | 80.0 ± 0.0 |" in text
    assert "| LSTM (other settings than given) | 1 | 30.0 |" in text
    assert "20.0" not in text
    assert "Rows with “settings given” search only the ranges" in text
    alone = markdown.document(build(table, [swept_before]))
    assert "| LSTM (other settings than given) | 1 | 30.0 |" in alone  # and of no other device or data
    quick = markdown.document(build(table, [configured("lstm", 0, 0.8, lr=7, budget="quick")], "quick"))
    assert "| LSTM | 1 | 80.0 |" in quick  # published for the other budget
    assert table.row("lstm").trials(20) == 20
    assert (
        small(tmp_path, ("[structure=none],", "[structure=none], given: {task.lr: 0.1},")).row("lstm").trials(20) == 1
    )


MIXED = """
title: Mixed
rows:
  parser: {title: Parser, overrides: [task=listops, structure=arborescence, estimator=sst]}
  words: {title: Words, overrides: [task=l2x, structure=k_subset, estimator=sst]}
columns:
  accuracy: {metric: test/accuracy, title: Accuracy, direction: maximize, digits: 2}
  mse: {metric: test/mse, title: MSE, direction: minimize, digits: 2}
"""


def test_a_table_of_ones_own_over_several_tasks(tmp_path: Path) -> None:
    """No source, no selection, tasks with different monitors."""
    (tmp_path / "mixed.yaml").write_text(MIXED)
    table = tables.load("mixed", tmp_path)
    words = [
        summary("tree", s, 0, task="l2x", structure="k_subset", budget="quick", name=f"words-{s}",
                metrics={"val/mse": 0.1 - s / 100, "test/mse": 0.2})
        for s in range(3)
    ]  # fmt: skip
    parser = [summary("tree", s, 0.9 + s / 100, budget="quick", mode="max") for s in range(3)]
    report = build(table, [*words, *parser])
    text = markdown.document(report)
    assert "| Parser | 3 | 0.91 ± 0.01 | - |" in text
    assert "| Words | 3 | - | 0.20 ± 0.00 |" in text
    assert "published" not in text
    assert "The budget is `quick`. Device cpu" in text
    assert {name: line.chosen for name, line in report.main().items()} == {"parser": 2, "words": 2}
    assert markdown.heading(report) == "Mixed"
    without = small(tmp_path, ("metric: test/calls", "metric: test/val"))
    assert without.selection.metric == "val/accuracy"


def put(folder: Path, *summaries: Summary) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for run in summaries:
        (folder / f"{run.content['name']}.json").write_text(json.dumps(run.content))


def report(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "report.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "listops_quick"
    put(folder, *(summary("lstm", s, 0.8 + s / 100, budget="quick") for s in range(3)))
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- table:listops_quick -->\noutdated\n<!-- /table -->\nb\n")
    done = report(folder, "--into", document)
    assert done.returncode == 0, done.stderr
    assert "LSTM, no latent variable | 3 | 81.0 ± 0.6" in document.read_text()
    assert document.read_text().endswith("<!-- /table -->\nb\n")
    assert "outdated" not in document.read_text()
    same = report("table=listops_quick", cwd=tmp_path)
    assert same.stdout == done.stdout
    assert report(cwd=tmp_path).stdout == done.stdout
    assert report("table=listops_quick", "--latex", cwd=tmp_path).stdout.startswith("% listops_quick\n\\begin{table}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=nothing"], "error: no table nothing; nearest: "),
        (["budget=big"], "error: budget=big: type budget=paper or"),
        (["tabel=x"], "error: tabel=x: there are table= and budget=; type table="),
        (["empty"], "error: empty is no folder; type"),
        (["table=paulus_1", "table=paulus_2"], "error: table=... is given twice; type it once"),
        ([], "error: no table has finished runs"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = report(*arguments, *(["table=paulus_2"] if arguments == ["empty"] else []), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not the summary of a run: KeyError\('task'\); delete it"):
        load(tmp_path)
    content = summary("lstm", 0, 0.8, metrics={"val/accuracy": None}).content
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"x\.json is not the summary of a run: .*a metric is no number"):
        load(tmp_path)


def test_the_folder_of_a_run_has_one_summary(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps(summary("lstm", 0, 0.8).content))
    assert [run.seed for run in load(tmp_path)] == [0]


def test_a_document_without_a_place(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        markdown.insert(document, "y", "new")


def test_an_empty_report_is_a_report(tmp_path: Path) -> None:
    empty = build(small(tmp_path), [])
    assert isinstance(empty, Report)
    assert empty.main() == {}
