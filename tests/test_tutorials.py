"""The tutorials run, at a tiny size, and their pages are of the scripts that are there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples" / "tutorials").glob("*.py"))
#: Constants of the scripts that say how long they take, and what they are here.
TINY = {"STEPS": 2, "EVERY": 1, "SAMPLES": 20}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the extra `experiments`")
    text = script.read_text()
    if "sklearn" in text:
        pytest.importorskip("sklearn", reason="needs the extra `docs`")
    for name, value in TINY.items():
        text = re.sub(rf"^{name} = \d+$", f"{name} = {value}", text, flags=re.MULTILINE)
    file = tmp_path / script.name
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"tutorial_{script.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    pyplot.switch_backend("agg")
    with torch.random.fork_rng():
        spec.loader.exec_module(module)
    pyplot.close("all")
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_its_page_shows_it(script: Path) -> None:
    """Made again by `make docs` when a script changes; all its code and its figures are there."""
    page = (ROOT / "docs" / "tutorials" / f"{script.stem}.md").read_text()
    code = [block for block in re.split(r"^# %%.*$", script.read_text(), flags=re.MULTILINE) if block.strip()]
    for block in code:
        if not block.lstrip().startswith("# #") and "[markdown]" not in block:
            lines = [line for line in block.strip().splitlines() if line and not line.startswith("#")]
            assert all(line.rstrip() in page for line in lines), lines
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / "tutorials" / target).exists(), target


def test_there_are_ten_that_take_names_in_order() -> None:
    assert [script.stem[:2] for script in SCRIPTS] == [f"{number:02}" for number in range(1, len(SCRIPTS) + 1)]
