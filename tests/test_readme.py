"""The examples and links of the README work."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from structgrad.commands import diagnose

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_prints_what_stands_below_it() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, names)
    number = re.compile(r"-?\d+\.\d*")
    found, expected = ([float(n) for n in number.findall(text)] for text in (printed.getvalue(), shown))
    assert found == pytest.approx(expected, abs=2e-4)  # the last digit may be another on another processor
    gradient = names["scores"].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z0-9-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_diagnosis_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (options,) = re.findall(r"python diagnose\.py ([^`]*)`", README)
    assert diagnose.main([*options.split(), "over=none", "samples=20"]) == 0, capsys.readouterr().err


def test_the_commands_name_what_there_is() -> None:
    """Tables, tasks, structures and estimators of the README's commands are choices of the configuration."""
    block = README.split("## Run an experiment")[1].split("![")[0]
    options = [word for line in block.splitlines() for word in line.split("#")[0].split() if "=" in word]
    named = [(group, name) for group, _, names in (o.partition("=") for o in options) for name in names.split(",")]
    configured = [(group, name) for group, name in named if (ROOT / "configs" / group).is_dir()]
    assert len(configured) >= 5
    for group, name in configured:
        assert (ROOT / "configs" / group / f"{name}.yaml").exists(), (group, name)


def test_it_fits_two_screens() -> None:
    assert len(README.splitlines()) <= 90


def test_the_rows_beside_published_numbers_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by scripts/readme_rows.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from figures import read
    from readme_rows import rows

    (shown,) = re.findall(r"<!-- table:paulus_2_accuracy -->\n(.*?)<!-- /table -->", README, re.DOTALL)
    assert shown == rows(read("paulus_2", ROOT / "results" / "paulus_2")) + "\n"
    assert "published" in shown
    assert len(shown.splitlines()) == 5  # however many rows have been run
