"""Common code of all tasks: the optimizer's groups, and the replacement of a missing KL divergence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from structgrad.data import Batch, Batches
from structgrad.estimators import RELAX, SST, Deterministic, Estimator, Marginalize, SurrogateGradient
from structgrad.structures import Matching, OneHot, Structure, Subset, UnsupportedError
from structgrad.tasks.base import Split, StepOutput, Task


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
    with pytest.raises(UnsupportedError, match=r"task tiny, with an estimator .* needs log_partition, which Matching"):
        Tiny(Matching(), Marginalize(Matching(), "sparsemap"))
