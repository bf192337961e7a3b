"""The toy problems of Struminsky et al. (2021): scores of one structure, optimised by a gradient estimator."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from structgrad.data import Batch, Batches
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Split, StepOutput, Task
from structgrad.tasks.toy.objectives import OBJECTIVES, height


class Toy(Task):
    """Minimises an expected objective over the scores of one structure; no data, no encoder, no decoder.

    Which objective goes with which structure is in :data:`~structgrad.tasks.toy.objectives.OBJECTIVES`. A
    training batch is one example, so that the samples of a step are the estimator's ``n_samples``. Validation
    and test draw ``eval_samples`` hard vertices.

    Args:
        structure: one of the structures there.
        estimator: over that structure.
        optimizer: parameters -> optimizer.
        size: number of nodes, tokens, positions or rows; of no meaning for DagPath.
        eval_samples: vertices whose mean objective is reported.

    Raises:
        ValueError: for another structure, without an estimator, for an objective that the estimator cannot
            differentiate, or sizes out of range.
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
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        known = next((entry for kind, entry in OBJECTIVES.items() if isinstance(structure, kind)), None)
        if known is None or estimator is None:
            names = ", ".join(kind.__name__ for kind in OBJECTIVES)
            raise ValueError(f"toy needs an estimator and one of the structures {names}; got {structure.name}")
        if size < 2 or eval_samples < 1:
            raise ValueError(f"toy needs size >= 2 and eval_samples >= 1; got {size} and {eval_samples}")
        self.objective = known
        if estimator.needs_differentiable_objective and self.objective is height:
            raise ValueError(
                f"toy minimises the height of a binary tree, which {type(estimator).__name__} cannot differentiate"
            )
        self.eval_samples = eval_samples
        self.scores = nn.Parameter(torch.zeros(structure.shape(size)))

    def prepare_data(self) -> None:
        """Nothing to prepare."""

    def batches(self, split: Split) -> Batches:
        """The rows ``[1]`` of training, ``[eval_samples]`` of validation and test, of which only the number counts."""
        size = 1 if split == "train" else self.eval_samples
        return Batches({"row": torch.arange(size)}, size)

    def step(self, batch: Batch) -> StepOutput:
        """The estimator's surrogate, and the objective."""
        assert self.estimator is not None
        size = len(batch["row"])
        estimate = self.estimator(
            self.scores.expand(size, *self.scores.shape),
            lambda vertices, rows: self.objective(vertices),
            context=self.scores.new_ones(size, 1),
        )
        metrics = {"objective": estimate.objective.mean(), **estimate.metrics}
        return StepOutput(estimate.surrogate.mean(), size, metrics)
