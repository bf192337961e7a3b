"""Training steps as one compiled program: the same losses, gradients and state, or one line that says why not."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from mylab.find_window import FindWindow
from torch import Tensor, nn

from structgrad.data import Batch, Batches
from structgrad.estimators import SST, Estimator, Marginalize, Reinforce
from structgrad.estimators.relaxation import ExponentialSchedule
from structgrad.structures import DagPath, OneHot
from structgrad.tasks.base import Split, StepOutput, Task
from structgrad.training.compiled import compiled_step
from structgrad.training.errors import ConfigurationError, RunError
from structgrad.training.identity import identity, portable
from tests.training.in_process import composed, go, metrics, run_folder, summary


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Guess(Task):
    """Guess the largest entry of a vector."""

    monitor, mode = "val/loss", "min"

    def __init__(self, estimator: Estimator) -> None:
        super().__init__(structure=estimator.structure, estimator=estimator, optimizer=partial(torch.optim.SGD, lr=0.1))
        self.encoder, self.decoder = nn.Linear(5, 5), nn.Linear(5, 5)

    def prepare_data(self) -> None:
        """None."""

    def batches(self, split: Split) -> Batches:
        """None."""
        raise NotImplementedError

    def step(self, batch: Batch) -> StepOutput:
        """Squared error."""
        assert self.estimator is not None
        x = batch["x"]
        estimate = self.estimator(
            self.encoder(x), lambda vertices, rows: (self.decoder(vertices) - x[rows]).square().sum(1), context=x
        )
        return StepOutput((estimate.surrogate + estimate.kl).mean(), len(x), {"loss": estimate.objective.mean()})


def train(estimator: Estimator, mode: str | None, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, then parameters and buffers."""
    torch.manual_seed(1)
    task = Guess(estimator)
    step = task.step if mode is None else compiled_step(task, mode)
    optimizer = task.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = step({"x": torch.randn(4, 5)})
        out.loss.backward()
        optimizer.step()
        losses += [out.loss.detach(), out.metrics["loss"]]
    return losses, [*task.parameters(), *task.buffers()]  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["aot_eager", "reduce-overhead"])  # which, on a CPU, is inductor without graphs
def test_a_compiled_step_does_the_same(mode: str) -> None:
    """With state that is read for the gradient and then changed: a running mean, and a schedule."""

    def nvil() -> Estimator:
        return Reinforce(OneHot(), baseline="nvil", context_size=5)

    def sst() -> Estimator:
        return SST(OneHot(), temperature=ExponentialSchedule(rate=0.5, every=1))

    for make in (nvil, sst):
        torch.manual_seed(0)
        plain = train(make(), None)
        torch.manual_seed(0)
        estimator = make()
        places = list(estimator.buffers())
        torch.testing.assert_close(train(estimator, mode), plain)
        if mode == "reduce-overhead":  # the third step has read the state of the second where a graph reads it
            torch.manual_seed(0)
            again = make()
            train(again, None, steps=2)
            torch.testing.assert_close(places, list(again.buffers()))


def test_a_dynamic_program_in_a_compiled_step() -> None:
    """The same; a projection, which looks at values, is refused in words."""
    path = DagPath([[0, 1], [0, 2], [1, 2], [0, 2], [1, 2]])  # five parts

    def sst(relaxation: str) -> Estimator:
        return SST(path, relaxation=relaxation)

    torch.manual_seed(0)
    plain = train(sst("exp_family"), None)
    torch.manual_seed(0)
    torch.testing.assert_close(train(sst("exp_family"), "aot_eager"), plain)
    with pytest.raises(RunError, match="looks at values in every step") as refused:
        train(sst("euclidean"), "aot_eager")
    assert "\n" not in str(refused.value)


def test_vertices_whose_number_depends_on_values() -> None:
    """They can be compiled, not captured."""
    assert len(train(Marginalize(OneHot(), "sparsemax"), "aot_eager")[0]) == 6
    with pytest.raises(
        RunError, match=r"^trainer.compile=reduce-overhead: this training step cannot be a single program: "
    ) as refused:
        train(Marginalize(OneHot(), "sparsemax"), "reduce-overhead")
    assert "\n" not in str(refused.value)


def test_a_run_is_the_same_compiled(tmp_path: Path) -> None:
    go(tmp_path / "plain")
    go(tmp_path / "compiled", "trainer.compile=aot_eager")
    assert run_folder(tmp_path / "plain").name == run_folder(tmp_path / "compiled").name
    plain, compiled = (metrics(tmp_path / name)[1:] for name in ("plain", "compiled"))
    assert [row[:2] for row in plain] == [row[:2] for row in compiled]
    assert all(math.isclose(float(a[2]), float(b[2]), rel_tol=1e-4) for a, b in zip(plain, compiled, strict=True))
    assert summary(tmp_path / "compiled")["config"]["trainer"]["compile"] == "aot_eager"


def test_a_step_that_reads_values_says_so_and_the_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FindWindow.step

    def reading(task: FindWindow, batch: Batch) -> StepOutput:
        print(next(iter(batch.values())))
        return step(task, batch)

    with monkeypatch.context() as patch:
        patch.setattr(FindWindow, "step", reading)
        with pytest.raises(
            RunError, match=r"cannot be a single program: .* \(test_compiled.py, line \d+\); the same"
        ) as error:
            go(tmp_path, "trainer.compile=aot_eager")
    assert "\n" not in str(error.value)
    go(tmp_path)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("reduce-overhead", "this is no CUDA device; inductor works here"),
        ("true", "nearest: "),
        ("indutcor", "nearest: inductor"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, choice: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        go(tmp_path, f"trainer.compile={choice}")
    assert not any(tmp_path.iterdir())


def test_how_a_step_is_computed_is_not_who_a_run_is() -> None:
    plain, compiled = (composed("task=listops", *more)[0] for more in ((), ("trainer.compile=inductor",)))
    assert identity(portable(plain)) == identity(portable(compiled))
