"""Gradients accumulated over batches, and schedules of learning rates: what they compute, and that they are resumed."""

from __future__ import annotations

import csv
import math
import signal
from pathlib import Path

import pytest
import torch

from structgrad.tasks.schedules import Cosine, Schedule, Step, WarmUp
from structgrad.training.errors import ConfigurationError, Interrupted
from structgrad.training.run import Run, assemble
from tests.training.in_process import OWN, SHORT, At, composed, go, metrics, run_folder, summary
from tests.training.test_stopping import send

CALM = "task._target_=tests.training.faulty.Calm"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = run_folder(folder) / "checkpoints" / "last.ckpt"
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def test_accumulated_gradients_are_those_of_a_larger_batch(tmp_path: Path) -> None:
    """Steps, validations and logged lines are those of the larger batch too."""
    plain = [CALM, "task.optimizer._target_=torch.optim.SGD"]  # Adam would make a step of what rounding leaves
    go(tmp_path / "large", *plain, "task.batch_size=20")
    go(tmp_path / "two", *plain, "task.batch_size=10", "trainer.accumulate_grad_batches=2")
    large, two = weights(tmp_path / "large"), weights(tmp_path / "two")
    torch.testing.assert_close(two, large)
    assert (metrics(tmp_path / "two")[0], summary(tmp_path / "two")["steps"]) == (["step", "metric", "value"], 12)
    places = [[row[:2] for row in metrics(tmp_path / name)] for name in ("large", "two")]
    assert places[0] == places[1]


OPTIONS = ["trainer.accumulate_grad_batches=3", "task.schedule=cosine", "task.schedule.warmup=0.25"]


def test_a_killed_run_goes_on_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked to stop within a step, and stopped after it."""
    go(tmp_path / "whole", *OPTIONS)
    At(monkeypatch, 5, send(signal.SIGTERM))
    with pytest.raises(Interrupted, match="continues from step 6"):
        go(tmp_path / "killed", *OPTIONS)
    go(tmp_path / "killed", *OPTIONS)
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), rtol=0, atol=0)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    with (run_folder(tmp_path / "killed") / "metrics.csv").open(newline="") as stream:
        rates = [float(value) for _, name, value in csv.reader(stream) if name == "train/learning_rate"]
    base = summary(tmp_path / "whole")["config"]["task"]["optimizer"]["lr"]
    expected = [base * Cosine(warmup=0.25).factor(step, 12) for step in range(12)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (WarmUp(warmup=0.4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        (WarmUp(warmup=0.0), [1] * 10),
        (Cosine(final=0.5, warmup=0.2), [0.5, 1, 1, 0.75 + 0.25 * math.cos(math.pi / 8)]),
        (Step(at=[0.3, 0.8], factor=0.5), [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]),
        (Step(at=[0.3], factor=0.5, warmup=0.2), [0.5, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_factors(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule.factor(step, 10) for step in range(len(expected))] == pytest.approx(expected)


def test_a_cosine_ends_at_its_share() -> None:
    """Half of the way it is half-way; at the end, which no step reaches, it would be the share."""
    half = Cosine(final=0.2)
    assert half.factor(500, 1000) == pytest.approx(0.6)
    assert half.factor(1000, 1000) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "task",
    [
        "toy", "listops", "graph_layout", "parentheses", "communication_game", "bit_vector_vae", "ssvae",
        "l2x data=planted_reviews task.decay_factor=1.0",
    ],
)  # fmt: skip
def test_every_task_takes_one(task: str) -> None:
    config, choices, chosen = composed(
        *f"task={task}".split(" "), "budget=smoke", "trainer=cpu", "task.schedule=cosine"
    )
    assert isinstance(assemble(config, chosen).schedule, Cosine)
    assert Run.compose(config, choices, chosen).deciding["task"]["schedule"]["final"] == 0.0


def test_neutral_values_are_no_part_of_the_identity() -> None:
    plain = Run.compose(*composed(*OWN, *SHORT))
    same = Run.compose(*composed(*OWN, *SHORT, "trainer.accumulate_grad_batches=1", "task.schedule=constant"))
    assert plain.name == same.name
    assert "accumulate_grad_batches" not in plain.deciding["trainer"]
    assert assemble(composed(*OWN, *SHORT, "task.schedule=constant")[0]).schedule is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=l2x", "data=planted_reviews", "task.schedule=cosine"], "task.decay_factor=1 turns it off"),
        (["task=toy", "task.schedule=cosin"], "nearest: cosine"),
        (["task=toy", "task.schedule=step", "task.schedule.at=[0.9,0.2]"], "type e.g. task.schedule.at=[0.5,0.75]"),
        (["task=toy", "task.schedule=step", "task.schedule.warmup=0.6"], "type a smaller warmup"),
        (["task=toy", "task.schedule=warmup", "task.schedule.warmup=1"], "less than 1"),
        (["task=toy", "task.schedule=warmup", "task.schedule.warm=1"], "no such option"),
        (["task=toy", "task.schedule.warmup=0.1"], "type task.schedule=<choice> as well"),
        (["task=toy", "task.schedule=null"], "no such choice; see --help"),
        (["task=toy", "trainer.accumulate_grad_batches=0"], "a whole number of at least 1"),
        (["task=toy", "trainer.accumulate_grad_batches=1.5"], "a whole number of at least 1"),
        ([*OWN, "task._target_=tests.training.faulty.ByHand", "trainer.accumulate_grad_batches=2"], "leave the option"),
        ([*OWN, "task._target_=tests.training.faulty.ByHand", "task.schedule=step"], "leave the option out"),
    ],
)
def test_what_cannot_work_is_one_line(overrides: list[str], words: str) -> None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from structgrad.training.errors import explain

    given = [*overrides, *([] if overrides[0].startswith("hydra") else ["budget=smoke", "trainer=cpu"])]
    try:
        config, _, chosen = composed(*given)
        assemble(config, chosen)
    except ConfigurationError as error:
        line = str(error)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        line = explain(error, given)
    else:
        pytest.fail("it was accepted")
    assert "\n" not in line
    assert words in line
