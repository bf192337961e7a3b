"""Common code of all tasks: the optimizer's groups, and the replacement of a missing KL divergence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from structgrad.data import Batch, Batches
from structgrad.estimators import RELAX, SST, Deterministic, Estimator, Marginalize, SurrogateGradient
from structgrad.structures import Matching, OneHot, Structure, Subset, UnsupportedError
from structgrad.tasks.base import Evaluation, Split, StepOutput, Task
from structgrad.tasks.history import CallsOverTime
from tests.tasks.trainers import quiet_trainer


class Tiny(Task):
    """One linear layer."""

    monitor, mode = "val/loss", "min"

    def __init__(self, structure: Structure, estimator: Estimator, **decay: float) -> None:
        optimizer = partial(torch.optim.AdamW, lr=1e-3, **decay)
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        self.require_kl("task tiny")
        self.layer = torch.nn.Linear(2, 3)

    def prepare_data(self) -> None:
        """None."""

    def batches(self, split: Split) -> Batches:
        """None."""
        raise NotImplementedError

    def step(self, batch: Batch) -> StepOutput:
        """None."""
        raise NotImplementedError


class Counting(CallsOverTime):
    """Metrics that are functions of the examples alone, in batches of unequal sizes."""

    monitor, mode = "val/loss", "min"

    def __init__(self) -> None:
        super().__init__(structure=OneHot(), estimator=None, optimizer=partial(torch.optim.SGD, lr=0.0))
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def prepare_data(self) -> None:
        """None."""

    def batches(self, split: Split) -> Batches:
        """Training steps with 1, 2, ... decoder calls; four validation and three test examples."""
        if split == "train":
            return Batches({"x": torch.arange(1.0, 7)}, 1)
        x = torch.tensor([1.0, 2, 4, 9] if split == "val" else [10.0, 20, 60])
        return Batches({"x": x}, 3 if split == "val" else 2)

    def step(self, batch: Batch) -> StepOutput:
        """The mean of the examples, the number of those above 3 among those above 1, and decoder calls."""
        x = batch["x"]
        share = ((x > 3).float().sum(), (x > 1).float().sum())
        metrics = {"share": share, "decoder_calls": x.mean()}
        return StepOutput(self.weight + x.mean(), len(x), metrics)


def test_metrics_are_means_over_examples_and_calls_are_those_since_the_last_validation() -> None:
    task = Counting()
    trainer = quiet_trainer(max_steps=6, val_check_interval=2)
    trainer.fit(task)
    # Batches of three examples and of one.
    assert task.history["loss"] == [4.0] * 3
    assert task.history["share"] == [pytest.approx(2 / 3)] * 3
    assert task.history["training_calls"] == [1.5, 3.5, 5.5]
    (tested,) = trainer.test(task, verbose=False)
    assert (tested["test/loss"], tested["test/share"], tested["test/training_calls"]) == (30.0, 1.0, 5.5)
    task.evaluation = Evaluation("val")
    (validated,) = trainer.test(task, verbose=False)
    assert validated["test/loss"] == 4.0


def test_estimators_have_a_group_of_their_own_without_weight_decay() -> None:
    estimator = RELAX(OneHot())
    optimizer = Tiny(OneHot(), estimator, weight_decay=0.3).configure_optimizers()
    model, own = optimizer.param_groups
    assert (model["weight_decay"], own["weight_decay"]) == (0.3, 0.0)
    assert model["lr"] == own["lr"] == 1e-3
    assert [p.shape for p in model["params"]] == [(3, 2), (3,)]
    assert {id(p) for p in own["params"]} == {id(p) for p in estimator.parameters()}
    assert len(Tiny(OneHot(), SurrogateGradient(OneHot())).configure_optimizers().param_groups) == 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_one_kernel_updates_all_parameters(kind: type[torch.optim.Optimizer]) -> None:
    """To what the usual update gives; and where the configuration chooses, it is left alone."""
    steps: dict[bool | None, list[torch.Tensor]] = {}
    for fused in (None, False):
        torch.manual_seed(3)
        task = Tiny(OneHot(), RELAX(OneHot()))
        task.make_optimizer = partial(kind, lr=0.1, weight_decay=0.01, fused=fused)
        optimizer = task.configure_optimizers()
        assert [group["fused"] for group in optimizer.param_groups] == [fused is None] * 2
        for _ in range(3):
            for parameter in task.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        steps[fused] = list(task.parameters())
    torch.testing.assert_close(steps[None], steps[False])
    task.make_optimizer = partial(kind, lr=0.1, foreach=True)
    assert task.configure_optimizers().param_groups[0]["fused"] is None
    task.make_optimizer = partial(torch.optim.RMSprop, lr=0.1)
    assert "fused" not in task.configure_optimizers().param_groups[0]


def test_a_point_mass_stands_in_for_a_missing_kl() -> None:
    scores, mask = torch.randn(2, 3), torch.tensor([[True] * 3, [True, True, False]])
    for estimator in (SurrogateGradient(OneHot()), Deterministic(OneHot()).eval()):
        task = Tiny(OneHot(), estimator)
        estimate = estimator(scores, lambda vertices, rows: vertices.sum(1), mask=mask)
        expected = torch.tensor([math.log(3), math.log(2)])
        torch.testing.assert_close(task.latent_kl(estimate, scores, mask), expected)
    logistic = SST(Subset(), utility="logistic")
    estimate = logistic(scores, lambda vertices, rows: vertices.sum(1))
    assert Tiny(Subset(), logistic).latent_kl(estimate, scores) is estimate.kl
    prior = torch.tensor([1.0, -2.0, 3.0])
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    estimate = SurrogateGradient(OneHot())(scores, lambda vertices, rows: vertices.sum(1), mask=mask)
    # -log p of the last class among three, and of the second among two.
    expected = torch.tensor([[1.0, -2.0, 3.0], [1.0, -2.0, -math.inf]]).logsumexp(1) - torch.tensor([3.0, -2.0])
    task = Tiny(OneHot(), SurrogateGradient(OneHot()))
    torch.testing.assert_close(task.latent_kl(estimate, scores, mask, prior), expected)
    with pytest.raises(UnsupportedError, match=r"task tiny, with an estimator .* needs log_partition, which Matching"):
        Tiny(Matching(), Marginalize(Matching(), "sparsemap"))
