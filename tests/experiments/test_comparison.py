"""Any runs beside each other: groups, intervals, pairs, settings in force, and the command."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structgrad.experiments import comparison
from structgrad.experiments.comparison import compare, matching, what_differs
from structgrad.experiments.html import comparison_page
from structgrad.experiments.runs import Summary, load, of_content
from tests.experiments.test_tables import put, report


def made(estimator: str, seed: int, value: float, **changes: Any) -> Summary:
    """A run of ListOps; changes beginning with a task's key are settings."""
    task = changes.get("task", "listops")
    settings = {"temperature": 1.0, "n_samples": 1} | changes.get("estimator_settings", {})
    content = {
        "name": f"{task}-tree-{estimator}-{changes.get('lr', 0)}-{seed}",
        "task": task, "structure": "tree", "estimator": estimator, "budget": changes.get("budget", "quick"),
        "seed": seed, "mode": "max", "device": "cpu", "commit": "0" * 40, "training_s": 10.0,
        "metrics": {"val/accuracy": value, "test/accuracy": value, "test/loss": 1 - value, "test/calls": 2.0},
        "config": {
            "seed": seed, "task": {"seed": seed, "lr": changes.get("lr", 0.1)}, "trainer": {"precision": "32-true"},
            "estimator": {"_target_": f"x.{estimator}", **settings},
        },
    }  # fmt: skip
    content |= {key: changes[key] for key in ("sweep", "device") if key in changes}
    return of_content(content)


def noisy() -> list[Summary]:
    """Two estimators whose runs of a seed share much of their noise."""
    shared = np.array([0.0, 0.05, -0.04])
    own = np.array([0.001, -0.002, 0.001])
    settings = {"estimator_settings": {"clip_range": 15.0}}
    return [
        *(made("sst", s, 0.9 + shared[s] + own[s], **settings) for s in range(3)),
        *(made("mine", s, 0.88 + shared[s]) for s in range(3)),
    ]


def test_groups_differences_and_settings_in_force() -> None:
    (block,) = compare(noisy())
    assert block.keys == ("estimator",)
    assert [group.title for group in block.groups] == ["sst", "mine"]
    assert block.metrics == ("test/accuracy", "test/calls")
    (found,) = block.contrasts
    assert found.paired
    # Paired: the differences are 0.02 + (0.001, -0.002, 0.001), of standard error 0.001; Student's t: 4.303.
    assert found.difference.value == pytest.approx(0.02)
    assert found.difference.half_width == pytest.approx(4.303 * 0.001, rel=1e-3)
    text = comparison.text([block])
    assert "sst        3     0.903 [0.795, 1.012] *" in text
    assert "sst − mine: +0.020 [+0.016, +0.024] (paired by seed)" in text
    # Only the one that differs in force; the class follows from the choice.
    assert "estimator.clip_range" not in text  # `mine` has no such setting
    two = [*noisy()[:3], *(made("mine", s, 0.8, estimator_settings={"clip_range": None}) for s in range(3))]
    assert "  estimator.clip_range: 15.0 (sst); null (mine)" in comparison.text(compare(two))
    assert "budget quick; device cpu; precision 32-true" in text


def test_other_seeds_and_trials_of_a_search_are_not_paired() -> None:
    runs = noisy()
    (block,) = compare(runs[:5])
    assert not block.contrasts[0].paired
    drawn = [made(e, s, 0.8, lr=s + 1, sweep={"parameters": {"task.lr": s + 1}}) for e in ("a", "b") for s in (0, 1)]
    (block,) = compare(drawn)
    assert block.keys == ("estimator",)
    assert not block.contrasts[0].paired
    assert "task.lr drawn for each run by a search" in comparison.caption(block)
    # The same from the folders of the runs, which do not say that they are of a search.
    (block,) = compare([made(e, s, 0.8, lr=s + 1.5) for e in ("a", "b") for s in (0, 1)], ["estimator"])
    assert not block.contrasts[0].paired


def test_what_differs_without_being_told() -> None:
    runs = [made("sst", s, 0.8, lr=rate) for rate in (0.1, 0.2) for s in (0, 1)]
    assert what_differs(runs) == ["task.lr"]
    (block,) = compare(runs)
    assert [group.title for group in block.groups] in (["0.1", "0.2"], ["0.2", "0.1"])
    (block,) = compare(runs, by=["estimator"])
    assert "task.lr varies within a row" in comparison.caption(block)
    assert "task.lr: varies (sst)" in comparison.settings(block)


def test_tasks_have_no_common_mean() -> None:
    blocks = compare([*noisy(), *(made("sst", s, 0.5, task="toy") for s in range(2))], by=["task", "estimator"])
    assert [(block.task, len(block.groups)) for block in blocks] == [("listops", 2), ("toy", 1)]


def test_where_and_copies() -> None:
    runs = [*noisy(), *noisy(), made("sst", 0, 0.1, budget="smoke", lr=3)]
    assert len(matching(runs, {"estimator": "sst", "budget": "quick"})) == 3
    assert len(matching(runs, {"task.lr": "3"})) == 1
    with pytest.raises(ValueError, match="no run has estimator=gumbel"):
        matching(runs, {"estimator": "gumbel"})
    earlier, later = made("sst", 0, 0.1), made("sst", 0, 0.2)
    later.content["commit"] = "0123456789abcdef+changes"
    reason = r"sst-0-0 is there twice.*\(commits 0000000000 and 0123456789\+changes\); type fewer"
    with pytest.raises(ValueError, match=reason):
        compare([earlier, later])


@pytest.mark.parametrize(
    ("by", "metrics", "message"),
    [
        (["estimatr"], [], "estimatr: no run has such a key; nearest: estimator"),
        (["task.lrr"], [], "task.lrr: no run has such a key; nearest: task.lr"),
        (None, ["test/acuracy"], "metric test/acuracy: no run has it; nearest: test/accuracy"),
    ],
)
def test_errors_are_one_line(by: list[str] | None, metrics: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        compare(noisy(), by, metrics)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no finished run to compare"):
        compare([], by, metrics)


def test_over_several_tasks() -> None:
    """Normalised: 0 is the worst group of a task, 1 the best; with few runs Student's t, with enough the bootstrap."""
    few = [
        made(estimator, seed, value + seed / 100, task=task)
        for task, values in (("listops", (0.8, 0.6)), ("toy", (0.3, 0.2)))
        for estimator, value in zip(("good", "bad"), values, strict=True)
        for seed in range(3)
    ]
    found = comparison.aggregate(compare(few))
    assert found is not None
    assert found.tasks == ("listops", "toy")
    assert found.few
    (best, high, _), (worst, low, _) = found.ranking
    assert (best, worst) == ("good", "bad")
    assert (high, low) == (pytest.approx(1.0), pytest.approx(0.0))
    text = comparison.text(compare(few))
    assert "fewer than 5 runs of a task, too few for a bootstrap" in text
    assert "good over bad: 1.00" in text
    many = [made(e, s, v + s / 100, task=t) for t in ("a", "b") for e, v in (("x", 0.8), ("y", 0.78)) for s in range(6)]
    found = comparison.aggregate(compare(many))
    assert found is not None
    assert not found.few
    assert "interquartile means with 95 % intervals of the stratified bootstrap" in comparison.text(compare(many))
    ((_, _, probability, ends),) = found.improvements
    assert ends is not None
    assert 0.5 < probability < 1
    assert ends[0] < probability < ends[1]
    assert comparison.aggregate(compare(noisy())) is None  # one task
    page = comparison_page(compare(many))
    assert page.count("<figure>") == 3
    assert "Performance profiles" in page


def test_shapes() -> None:
    blocks = compare(noisy(), metrics=["test/accuracy", "test/loss"], directions={"test/loss": "minimize"})
    latex = comparison.latex(blocks)
    assert r"sst & 3 & \textbf{0.903 [0.795, 1.012]} & \textbf{0.097 [-0.012, 0.205]} \\" in latex
    assert r"\caption{task listops: means over runs; in brackets 95 \% intervals" in latex
    assert "| sst | 3 | **0.903 [0.795, 1.012]** |" in comparison.markdown(blocks)
    rows = list(csv.DictReader(io.StringIO(comparison.comma_separated(blocks))))
    assert [(r["estimator"], r["metric"], r["runs"]) for r in rows[:2]] == [
        ("sst", "test/accuracy", "3"),
        ("sst", "test/loss", "3"),
    ]
    assert float(rows[0]["mean"]) == pytest.approx(0.9 + 0.01 / 3)


def test_the_command(tmp_path: Path) -> None:
    put(tmp_path / "a", *noisy()[:3])
    put(tmp_path / "b", *noisy()[3:])
    done = report("a", "b", "--by", "estimator", "--metric", "test/accuracy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sst − mine: +0.020 [+0.016, +0.024] (paired by seed)" in done.stdout
    assert report("a", "b", "--metric", "test/accuracy", cwd=tmp_path).stdout == done.stdout  # by what differs
    one = report("a", "b", "--where", "estimator=mine", "--csv", cwd=tmp_path)
    assert one.stdout.splitlines()[0] == "task,metric,runs,mean,standard_error,low,high"
    for run in load(tmp_path / "a"):  # the folders of runs, below the folder that is named
        (tmp_path / "a" / run.folder).mkdir(parents=True)
        rows = [f"{step},{run.monitor},{step / 10}" for step in range(3)]
        (tmp_path / "a" / run.folder / "metrics.csv").write_text("\n".join(["step,metric,value", *rows]))
    page = report("a", "b", "--html", "page.html", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    written = (tmp_path / "page.html").read_text()
    assert "<title>structgrad: comparison</title>" in written
    assert "Learning curves" in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--by", "estimatr"], "error: estimatr: no run has such a key"),
        (["a", "--where", "estimator"], "error: --where estimator: expected key=value"),
        (["none", "--by", "task"], "error: none is no folder; type "),
        (["table=paulus_2", "--compare"], "error: table=paulus_2: a comparison takes folders"),
        (["a", "--compare", "--into", "x.md"], "error: --into x.md: no such file"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    put(tmp_path / "a", *noisy())
    done = report(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
