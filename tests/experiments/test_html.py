"""The page, as text and in a browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from structgrad.experiments import tables
from structgrad.experiments.html import page
from structgrad.experiments.report import build
from structgrad.experiments.runs import Summary

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "table"


def example(tmp_path: Path) -> str:
    """ListOps at the paper's budget: five trials of most rows, made up; one of them from another machine."""
    generator = np.random.default_rng(0)
    table = tables.load("paulus_2", FOLDER)
    table = replace(table, rows=tuple(replace(row, given={}) for row in table.rows))  # as a random search
    summaries = []
    for position, row in enumerate(table.rows[:-1]):
        for trial in range(5):
            rate = float(10 ** generator.uniform(-4, -2))
            value = 0.9 - 0.02 * position - 0.05 * (np.log10(rate) + 3) ** 2 + generator.normal(0, 0.01)
            folder = tmp_path / "runs" / "listops" / f"{row.name}-{trial}"
            (folder / "pictures").mkdir(parents=True)
            imsave(folder / "pictures" / "parses.png", generator.uniform(size=(40, 60, 3)))
            curve = [(step, float(value * (1 - np.exp(-step / 9000)))) for step in range(800, 50001, 800)]
            metrics = {"val/accuracy": value, "test/accuracy": value - 0.01}
            if position:
                metrics |= {"test/precision": 0.5 + 0.05 * position, "test/recall": 0.6}
            parameters = {"task.optimizer.lr": rate, "estimator.kl": ["utility", "<b>"][trial % 2]}
            made = {"table": "paulus_2", "row": row.name, "trial": trial, "parameters": parameters, "extra": []}
            content = {
                "name": f"listops-{row.name}-{trial}",
                "device": "cpu" if position < 6 or trial else "NVIDIA H100",
                "commit": "0" * 40, "training_s": 5000.0 + trial,
                "sweep": made | {"curve": curve},
                "config": {"task": {"data": {"train": 100000}}},
            }  # fmt: skip
            summaries.append(Summary("listops", row.name, "sst", "paper", trial, metrics, content))
    return page([build(table, summaries), build(tables.load("paulus_1", FOLDER), [])], tmp_path / "runs")


def test_a_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = example(tmp_path)
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*(?![\"']?(?:data:|#))", text)
    assert "<script" not in text
    assert "<b>" not in text
    for content in (
        "Learning curves of the selected runs",
        "Sensitivity to the searched",
        "Pictures of the selected runs",
    ):
        assert content in text
    assert "published 92.1 ± 0.2" in text
    assert "device NVIDIA H100" in text
    assert "python sweep.py table=paulus_1 rows=spanning_tree_10 budget=paper" in text
    assert text.count("<figure>") == 3 + 2 * 3 + 7  # curves by group, two hyper-parameters by group, a picture a row


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs Chromium")
    return found


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_a_phone_and_a_desk(tmp_path: Path, width: int) -> None:
    """A frame as wide as the screen; what is inside must not be wider, and every picture must load."""
    chromium = browser()
    content = html.escape(example(tmp_path), quote=True)
    file = tmp_path / "frame.html"
    file.write_text(
        f'<!doctype html><iframe id=f style="width:{width}px;height:800px;border:0" srcdoc="{content}"></iframe>'
        "<script>"
        "window.onload = () => { const d = document.getElementById('f').contentDocument; const i = [...d.images];"
        "document.title = [d.documentElement.scrollWidth, i.length,"
        "i.filter(x => x.complete && x.naturalWidth > 0).length,"
        "d.querySelectorAll('td').length, getComputedStyle(d.querySelector('thead')).display].join(' ') }</script>"
    )
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"<title>(\d+) (\d+) (\d+) (\d+) ([\w-]+)</title>", done.stdout)
    assert match, done.stderr[-500:]
    wide, images, loaded, cells = map(int, match.groups()[:4])
    assert wide <= width
    assert images == loaded == 16
    assert cells > 50
    assert match[5] == ("none" if width == 390 else "table-header-group")
