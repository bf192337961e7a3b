"""The figure of the toy problems, trained as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from structgrad.experiments.report import build
from structgrad.experiments.runs import load
from structgrad.experiments.tables import load as table

ROOT = Path(__file__).resolve().parents[2]


def test_its_runs_are_rows_of_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/toy_figure.py", "--budget", "smoke", "--structures", "spanning_tree"]
    own = ["--output", str(tmp_path / "toy.png"), f"paths.runs={tmp_path}", "trainer=cpu", "logger=csv"]
    result = subprocess.run([*command, *own], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    runs = [run for folder in (tmp_path / "toy").iterdir() for run in load(folder)]
    report = build(table("toy", ROOT / "configs" / "table"), runs, "smoke")
    rows = {line.row.name: len(line.runs) for line in report.lines if line.runs}
    # RELAX has a critic of the size, which is 10 in the table and 5 in this budget.
    kinds = ("e_reinforce", "t_reinforce", "e_reinforce_plus", "t_reinforce_plus", "sst")
    assert rows == {f"spanning_tree_{kind}": 1 for kind in kinds}
