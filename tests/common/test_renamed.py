"""Old names fail with the new one, and old runs are understood."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import structgrad.estimators
from structgrad.common import renamed
from structgrad.experiments.runs import read
from structgrad.training.identity import identity


@pytest.mark.parametrize("old", renamed.CLASSES)
def test_an_old_class_is_told_its_new_name(old: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=f"{name} is now called .*{renamed.CLASSES[old].rpartition('.')[2]}"):
        exec(f"from {module} import {name}")
    found, _, new = renamed.CLASSES[old].rpartition(".")
    assert hasattr(importlib.import_module(found), new)


def test_other_names_are_missing_as_ever() -> None:
    assert not hasattr(structgrad.estimators, "Nothing")
    with pytest.raises(ImportError, match="cannot import name"):
        from structgrad.estimators import Nothing  # noqa: F401


@pytest.mark.parametrize("group", renamed.CHOICES)
def test_new_choices_are_there_and_old_ones_are_not(group: str, root: Path) -> None:
    there = {path.stem for path in (root / "configs" / group).glob("*.yaml")}
    assert set(renamed.CHOICES[group].values()) <= there
    assert not there & set(renamed.CHOICES[group])


def test_summaries_of_old_runs_are_read_with_new_names(tmp_path: Path) -> None:
    old = {
        "task": "l2x",
        "structure": "k_subset",
        "estimator": "straight_through",
        "budget": "quick",
        "seed": 0,
        "metrics": {"test/error": 0.5},
        "config": {"estimator": {"_target_": "structgrad.estimators.Surrogate", "nested": [{"_target_": "mylab.My"}]}},
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    summary = read(tmp_path / "old.json")
    assert summary.estimator == summary.content["estimator"] == "identity_st"
    assert summary.content["config"]["estimator"] == {
        "_target_": "structgrad.estimators.SurrogateGradient",
        "nested": [{"_target_": "mylab.My"}],
    }


def test_a_run_keeps_its_identity_under_a_new_name() -> None:
    def config(target: str) -> str:
        return identity({"trainer": {}, "estimator": {"_target_": target}})

    for old, new in renamed.CLASSES.items():
        assert config(old) == config(new)
    assert config("structgrad.estimators.SST") != config("structgrad.estimators.RELAX")
