"""The toy problems of Struminsky et al. (2021): scores of one structure, optimised by a gradient estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from structgrad.common.ranges import check_choice
from structgrad.data import Batch, Batches
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Split, StepOutput, Task
from structgrad.tasks.toy.objectives import HARD_ONLY, OURS, RELEASED, Quadratic
from structgrad.tasks.toy.pictures import draw_shares

Objectives = Literal["ours", "released", "quadratic"]


class Toy(Task):
    """Minimises an expected objective over the scores of one structure; no data, no encoder, no
    decoder.

    ``objective`` chooses it. ``released`` is that of the released code, ``ours`` our own.
    ``quadratic`` works for every structure, and ``ours`` is the same for structures that have no
    other (:mod:`structgrad.tasks.toy.objectives`). A training batch is one example, so the samples
    of a step are the estimator's ``n_samples``. Validation and test draw ``eval_samples`` hard
    vertices.

    Args:
        structure: any latent structure; with ``released``, one that the released code has.
        estimator: over that structure.
        optimizer: a function from parameters to an optimizer.
        size: number of nodes, tokens, positions or rows; DagPath ignores it.
        eval_samples: number of vertices whose mean objective is reported.
        objective: see above.
        coefficients: with ``quadratic``, an ``.npz`` file with those of your own, see
            :class:`~structgrad.tasks.toy.objectives.Quadratic`.

    Raises:
        ValueError: for a structure without that objective, without an estimator, for an objective
            that the estimator cannot differentiate, or for sizes out of range.
    """

    monitor: ClassVar[str] = "val/objective"
    mode: ClassVar[Literal["min", "max"]] = "min"
    test_metrics: ClassVar[tuple[str, ...]] = ("objective",)
    progress: ClassVar[tuple[str, ...]] = ("objective",)

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        size: int = 10,
        eval_samples: int = 1000,
        objective: Objectives = "ours",
        coefficients: str | Path | None = None,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if estimator is None:
            raise ValueError(f"toy needs an estimator, hence a latent structure; got {structure.name}")
        if size < 2 or eval_samples < 1:
            raise ValueError(f"toy needs size >= 2 and eval_samples >= 1; got {size} and {eval_samples}")
        tables: Mapping[str, Mapping[type[Structure], Callable[[Tensor], Tensor]]]
        tables = {"ours": OURS, "released": RELEASED, "quadratic": {}}
        check_choice("objective", objective, tables)
        shape = structure.shape(size)
        self.check_structure(shape, f"size {size}")
        known = next((entry for kind, entry in tables[objective].items() if isinstance(structure, kind)), None)
        if known is None and objective == "released":
            names = ", ".join(kind.__name__ for kind in RELEASED)
            raise ValueError(f"the released code has the structures {names}; got {structure.name}")
        if coefficients is not None and objective != "quadratic":
            raise ValueError(f"coefficients are those of objective=quadratic; got objective={objective}")
        vertex = structure.argmax(torch.zeros(1, *shape)).shape[1:]
        self.objective = known or Quadratic(tuple(vertex), coefficients)
        if estimator.needs_differentiable_objective and self.objective in HARD_ONLY:
            raise ValueError(
                f"toy minimises the height of a binary tree, which {type(estimator).__name__} cannot differentiate"
            )
        self.eval_samples = eval_samples
        self.scores = nn.Parameter(torch.zeros(shape))

    def prepare_data(self) -> None:
        """Nothing to prepare."""

    def batches(self, split: Split) -> Batches:
        """The rows ``[1]`` of training and ``[eval_samples]`` of validation and test. Only their
        number matters.
        """
        size = 1 if split == "train" else self.eval_samples
        return Batches({"row": torch.arange(size)}, size)

    def step(self, batch: Batch) -> StepOutput:
        """The estimator's surrogate and the objective."""
        assert self.estimator is not None
        size = len(batch["row"])
        estimate = self.estimator(
            self.scores.expand(size, *self.scores.shape),
            lambda vertices, rows: self.objective(vertices),
            context=self.scores.new_ones(size, 1),
            kl_weight=0.0,
        )
        metrics = {"objective": estimate.objective.mean(), **estimate.metrics}
        return StepOutput(estimate.surrogate.mean(), size, metrics)

    @torch.no_grad()
    def pictures(self, folder: Path) -> list[Path]:
        """How often each part is in a sampled vertex, with all scores 0 (the start) and with the
        learnt scores.
        """
        before, after = self._shares(torch.zeros_like(self.scores)), self._shares(self.scores)
        objectives = (float(before[1]), float(after[1]))
        return [draw_shares(before[0], after[0], objectives, folder / "shares.png")]

    def _shares(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Mean vertex ``[*parts]`` and mean objective of ``eval_samples`` rows."""
        assert self.estimator is not None
        self.estimator.eval()
        estimate = self.estimator(
            scores.expand(self.eval_samples, *scores.shape),
            lambda vertices, rows: self.objective(vertices),
            context=scores.new_ones(self.eval_samples, 1),
            kl_weight=0.0,
        )
        shape = (-1, *[1] * (estimate.vertices.ndim - 1))
        mean = (estimate.vertices * estimate.weights.reshape(shape)).sum(0) / self.eval_samples
        return mean, estimate.objective.mean()
