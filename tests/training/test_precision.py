"""Every value of ``trainer.precision`` trains, tests and draws every task, or is refused when the run is composed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from structgrad.experiments.runs import precisions, read
from structgrad.tasks.toy import Toy
from structgrad.testing import DEVICE
from structgrad.training import options
from structgrad.training.errors import ConfigurationError
from structgrad.training.options import PRECISIONS
from structgrad.training.run import Run, run
from tests.training.in_process import composed
from tests.training.test_devices import OF_IMAGES, TASKS

#: Tasks of which all parts can do their products in half precision.
MIXED = ("toy", "l2x")


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", [*PRECISIONS, "bf16-true", "16-true"])
def test_a_precision_trains_a_task_or_is_refused(
    task: str,
    precision: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> None:
    if precision == "32-true":
        pytest.skip("the default, which every other test of a run has")
    trained = precision == "64-true" or (precision.endswith("-mixed") and task in MIXED)
    if precision == "16-mixed" and DEVICE.type == "cpu":
        trained = False
    if task in OF_IMAGES and trained:
        request.getfixturevalue("shared_data")
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    cache = tmp_path_factory.getbasetemp() / "cache"
    where = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={cache}", f"trainer={accelerator}", "logger=csv"]
    overrides = [f"task={task}", "budget=smoke", f"trainer.precision={precision}", *TASKS[task], *where]
    if not trained:
        with pytest.raises(ConfigurationError, match=f"trainer.precision={precision}.*; .*") as caught:
            run(*composed(*overrides))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "runs").exists()
        return
    summary = run(*composed(*overrides))
    assert all(torch.tensor(value).isfinite() for value in summary["metrics"].values())
    (folder,) = (tmp_path / "runs" / task).iterdir()
    assert list((folder / "pictures").iterdir())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("precision", "units"), [("medium", False), ("high", False), ("high", True)])
def test_lower_products_without_units_are_refused(
    precision: str, units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "has_bfloat16_units", lambda: units)
    overrides = ["task=toy", "budget=smoke", "trainer=cpu", f"trainer.matmul_precision={precision}"]
    with pytest.raises(ConfigurationError, match=f"trainer.matmul_precision={precision}: .*(highest|medium)"):
        run(*composed(*overrides, f"paths.runs={tmp_path}"))


def test_lower_products_are_another_run_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "has_bfloat16_units", lambda: True)
    overrides = ["task=toy", "budget=smoke", "trainer=cpu", "logger=csv", f"paths.runs={tmp_path}"]
    plain = Run.compose(*composed(*overrides))
    assert "matmul_precision" not in plain.deciding["trainer"]
    seen = []
    monkeypatch.setattr(Toy, "on_train_start", lambda self: seen.append(torch.get_float32_matmul_precision()))
    monkeypatch.setattr(Toy, "on_test_start", lambda self: seen.append(torch.get_float32_matmul_precision()))
    summary = run(*composed(*overrides, "trainer.matmul_precision=medium"))
    assert summary["name"] != plain.name
    assert summary["products"] == "bfloat16"
    assert summary["config"]["trainer"]["matmul_precision"] == "medium"
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == "highest"
    (file,) = tmp_path.glob("toy/*/summary.json")
    assert precisions([read(file)]) == ["32-true, products in bfloat16"]
