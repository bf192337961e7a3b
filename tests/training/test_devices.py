"""Every task's training step on ``STRUCTGRAD_TEST_DEVICE`` against the CPU, and a whole run there (`make test-gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from benchmarks.launches import built
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structgrad.data import Batch
from structgrad.tasks.base import StepOutput, Task
from structgrad.testing import DEVICE, moved
from structgrad.training.compiled import compiled_step
from structgrad.training.evaluation import evaluate
from structgrad.training.run import run
from tests.training.in_process import composed

pytestmark = pytest.mark.gpu

#: Without dropout, whose kernels draw for themselves.
TASKS = {
    "toy": [],
    "listops": ["task.dropout=0.0"],
    "graph_layout": [],
    "parentheses": [],
    "l2x": ["data=planted_reviews", "task.dropout=0.0"],
    "communication_game": [],
    "bit_vector_vae": ["task.data.source=MNIST/parquet"],
    "ssvae": ["task.data.source=MNIST/parquet", "task.warm_start.epochs=1"],
}
#: Those that need the data directory.
OF_IMAGES = ("communication_game", "bit_vector_vae", "ssvae")
#: Those whose own estimator has a sparse distribution.
SPARSE = ("communication_game", "bit_vector_vae", "ssvae")


@pytest.fixture(params=TASKS)
def overrides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A smoke run; of images, where there are any."""
    own = TASKS[request.param]
    if request.param in OF_IMAGES:
        request.getfixturevalue("shared_data")
    cache = tmp_path_factory.getbasetemp() / "cache"  # of all tests here
    return [f"task={request.param}", "budget=smoke", f"paths.cache={cache}", *own]


class SameNoise(TorchDispatchMode):
    """Draws everything that is random on the CPU, whatever device it is for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or "_cudnn_rnn" in func.name():  # which could drop out
            return func(*args, **kwargs)
        cpu = torch.device("cpu")
        at = kwargs.get("device") or next((a.device for a in args if isinstance(a, Tensor)), cpu)
        drawn = func(*moved(args, cpu), **moved(kwargs, cpu) | ({"device": cpu} if "device" in kwargs else {}))
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return moved(drawn, torch.device(at))


def step(overrides: list[str], device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first training step."""
    task = built(overrides)
    batch = next(iter(task.batches("train")))
    task.to(device).train()
    torch.manual_seed(1)
    with SameNoise():
        loss = task.step({name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in task.named_parameters() if p.grad is not None}


def test_a_training_step_is_that_of_the_cpu(overrides: list[str]) -> None:
    """The same weights, batch and noise: loss and gradients agree as float32 does."""
    loss, gradients = step(overrides, DEVICE)
    expected, expected_gradients = step(overrides, torch.device("cpu"))
    assert loss == pytest.approx(expected, rel=1e-3)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(g.norm() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 2e-3 * expected_gradients[name].norm() + 1e-5 * scale, (
            name
        )


def test_a_training_step_of_a_gpu_is_one_program(overrides: list[str]) -> None:
    """On the meta device, which takes the path of a GPU. Not with RELAX, which asks for a gradient within the step; and
    without values there is no support whose size depends on them.
    """
    torch._dynamo.reset()
    other = {"parentheses": "structure=none"} | dict.fromkeys(SPARSE, "estimator=gumbel_softmax")
    name = overrides[0].removeprefix("task=")
    task = built([*overrides, other[name]] if name in other else overrides)
    batch = {name: tensor.to("meta") for name, tensor in next(iter(task.batches("train"))).items()}
    task.to("meta").train()
    compiled_step(task, "aot_eager")(batch).loss.backward()


def test_every_step_of_a_compiled_run_is_the_compiled_one(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a task with a training step of its own. The steps are counted instead of compiled."""
    steps: list[int] = []

    def counted(task: Task, mode: str) -> Callable[[Batch], StepOutput]:
        def step(batch: Batch) -> StepOutput:
            steps.append(task.global_step)
            return task.step(batch)

        return step

    monkeypatch.setattr("structgrad.training.fit.compiled_step", counted)
    short = ["trainer.max_steps=2", "trainer.val_every_n_steps=2", "trainer.compile=aot_eager"]
    run(*composed(*overrides, *short, "trainer=cpu", "logger=csv", f"paths.runs={tmp_path}"))
    assert steps == [0, 1]


def test_a_run_from_its_start_to_its_pictures_and_its_evaluation(overrides: list[str], tmp_path: Path) -> None:
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    summary = run(*composed(*overrides, f"trainer={accelerator}", "logger=csv", f"paths.runs={tmp_path}"))
    assert (summary["device"] == "cpu") == (DEVICE.type == "cpu")
    assert all(torch.tensor(value).isfinite() for value in summary["metrics"].values())
    (file,) = (tmp_path / summary["task"]).glob("*/summary.json")
    before = file.read_bytes()
    tested = evaluate(file.parent, {"trainer.accelerator": accelerator})
    assert tested.metrics == {name: summary["metrics"][name] for name in tested.metrics}
    validated = evaluate(file.parent, {"trainer.accelerator": accelerator}, split="val")
    assert file.read_bytes() == before
    if summary["task"] == "toy":  # without data
        assert tested.predictions is None
        return
    assert tested.predictions is not None
    assert validated.predictions is not None
    for found in (tested, validated):
        table = pq.read_table(found.predictions)
        assert table["example"].to_pylist() == list(range(found.examples or 0))
        assert {"prediction", "target", "vertex"} <= set(table.column_names)
        assert table["vertex"].null_count == 0
