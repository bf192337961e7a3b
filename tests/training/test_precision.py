"""Every value of ``trainer.precision`` trains, tests and draws every task, or is refused when the run is composed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from structgrad.testing import DEVICE
from structgrad.training.errors import ConfigurationError
from structgrad.training.options import PRECISIONS
from structgrad.training.run import run
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
    assert task == "toy" or list((folder / "pictures").iterdir())
    assert torch.get_default_dtype() == torch.float32
