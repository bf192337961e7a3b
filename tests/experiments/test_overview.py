"""The page of all runs: states, commands, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imsave

from structgrad.experiments import overview
from tests.experiments.test_html import browser
from tests.experiments.test_tables import report


def run(root: Path, name: str, step: int, **files: Any) -> Path:
    """The folder of a run of 1000 steps, with a curve up to a step and further files."""
    folder = root / "listops" / f"arborescence-{name}-quick-s3-0123456789"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 3\ntrainer: {max_steps: 1000}\n")
    lines = [f"{s},val/accuracy,{s / 1000}" for s in range(99, step, 100)]
    (folder / "metrics.csv").write_text("\n".join(["step,metric,value", *lines, ""]))
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def example(root: Path) -> Path:
    """A run in every state."""
    since = (datetime.now().astimezone() - timedelta(seconds=100)).isoformat(timespec="seconds")
    here = {"process": os.getpid(), "machine": socket.gethostname(), "since": since}
    command = {"command": "python train.py task=listops estimator=sst", "from_step": 200}
    command |= {"monitor": "val/accuracy", "mode": "max"}
    run(root, "running", 400, running__json=here, environment__json=command)
    dead = subprocess.Popen(["true"])
    dead.wait()
    run(root, "killed", 300, running__json=here | {"process": dead.pid}, environment__json=command)
    run(root, "failed", 200, error__txt="training diverged: <script>alert(1)</script>\n", environment__json=command)
    summary = {
        "name": "listops-x", "task": "listops", "structure": "arborescence", "estimator": "done", "budget": "quick",
        "seed": 3, "metrics": {"val/accuracy": 0.87, "test/accuracy": 0.86}, "steps": 1000, "training_s": 61.0,
    }  # fmt: skip
    folder = run(root, "done", 1000, summary__json=summary, environment__json=command)
    imsave(folder / "pictures" / "parses.png", np.random.default_rng(0).uniform(size=(40, 60, 3)))
    return root


def test_states_and_how_far(tmp_path: Path) -> None:
    found = {run.state: run for run in overview.states(example(tmp_path))}
    assert list(found) == ["running", "failed", "interrupted", "finished"]
    # 200 steps in 100 seconds since it was started at step 200; 600 are left.
    assert re.fullmatch(r"step 400 of 1000, about (5\.0|5\.1) min left", found["running"].progress)
    assert found["interrupted"].progress == "step 300 of 1000"
    assert found["failed"].progress == "training diverged: <script>alert(1)</script>"
    assert found["finished"].progress == "1000 steps in 61 s"
    assert found["finished"].value == 0.87
    assert found["finished"].command == "python train.py task=listops estimator=sst"
    assert found["interrupted"].choices == {
        "task": "listops", "structure": "arborescence", "estimator": "killed", "budget": "quick", "seed": "3",
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no run in"):
        overview.states(tmp_path / "nothing")


def test_an_unfinished_run_shows_its_best_value_so_far_of_the_metric_that_selects(tmp_path: Path) -> None:
    """Neither the last value nor the first metric, nor a line that is only half-written."""
    best = {"max": 0.9, "min": 0.2}
    for mode in best:
        folder = run(tmp_path, mode, 0, environment__json={"monitor": "val/score", "mode": mode})
        lines = ["9,val/other,7.0", "9,val/score,0.2", "19,val/score,0.9", "29,val/score,0.4", "39,val/score,0."]
        (folder / "metrics.csv").write_text("\n".join(["step,metric,value", *lines]))  # the last is 0.1, half-written
    for found in overview.states(tmp_path):
        assert found.metric == "val/score"
        assert found.value == best[found.choices["estimator"]]
        assert found.curve[-1] == (29, 0.4)
        assert found.step == 30


@pytest.mark.parametrize(
    "damage",
    [
        {"summary.json": '{"metrics": null, "task": "listops"}'},
        {"config.yaml": "trainer: default"},
        {"config.yaml": "trainer: {max_steps: many}"},
        {"metrics.csv": "step,metric,value\nx,y\n"},
        {"running.json": "[1]"},
    ],
)
def test_one_damaged_folder_does_not_hide_the_others(tmp_path: Path, damage: dict[str, str]) -> None:
    example(tmp_path)
    folder = run(tmp_path, "broken", 100)
    for name, content in damage.items():
        (folder / name).write_text(content)
    found = {run.folder: run for run in overview.states(tmp_path)}
    assert len(found) == 5
    assert sum(run.state == "finished" for run in found.values()) == 1


def test_a_run_that_does_not_say_what_selects_shows_its_last_value(tmp_path: Path) -> None:
    run(tmp_path, "before", 400, environment__json={"command": "x", "from_step": 0})
    (found,) = overview.states(tmp_path)
    assert (found.metric, found.value) == ("val/accuracy", 0.399)


def test_the_page_is_one_file_and_escapes(tmp_path: Path) -> None:
    text = overview.page(overview.states(example(tmp_path)), tmp_path)
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*(?![\"']?(?:data:|#))", text)
    assert "alert(1)" in text
    assert text.count("<script") == 1  # its own
    assert text.count("data:image/jpeg") == 1
    assert text.count("<polyline") == 4
    assert "python train.py task=listops estimator=sst" in text


def test_the_command(tmp_path: Path) -> None:
    example(tmp_path / "runs")
    done = report("runs", "--html", "overview.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 runs: 1 running, 1 failed, 1 interrupted, 1 finished\n")
    assert (tmp_path / "overview.html").exists()


@pytest.mark.parametrize("width", [390, 1280])
def test_sorting_and_filtering_in_a_browser(tmp_path: Path, width: int) -> None:
    chromium = browser()
    text = overview.page(overview.states(example(tmp_path / "runs")), tmp_path)
    script = """<script>
      const lines = () => [...document.querySelectorAll('.runs tbody tr')].filter(r => !r.hidden)
      const state = () => lines().map(r => r.dataset.state)
      const seen = [document.documentElement.scrollWidth]
      document.querySelectorAll('.runs button')[6].click(); seen.push(state().join('+'))
      document.querySelectorAll('.runs button')[6].click(); seen.push(state().join('+'))
      document.getElementById('find').value = 'done'; document.getElementById('find').dispatchEvent(new Event('input'))
      seen.push(state().join('+')); document.title = seen.join(' ')
    </script>"""
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"{script}</body>"))
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"<title>(\d+) (\S+) (\S+) (\S+)</title>", done.stdout)
    assert match, done.stderr[-500:]
    assert int(match[1]) <= max(width, 500)  # headless windows are at least 500 wide
    assert match[2].split("+") == ["failed", "interrupted", "running", "finished"]  # by the metric, upwards
    assert match[3].split("+") == ["finished", "running", "interrupted", "failed"]
    assert match[4] == "finished"
