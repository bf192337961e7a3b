"""The base of every task: a LightningModule with data, models, objective and metrics that chooses
no estimator.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from structgrad.data import Batch, Batches, Steps
from structgrad.estimators.base import Estimate, Estimator, log_size
from structgrad.structures.base import Structure
from structgrad.tasks.schedules import Schedule

Split = Literal["train", "val", "test"]
#: The prior of a latent variable: uniform over the vertices, or with scores that are parameters.
Prior = Literal["uniform", "learnt"]
#: A function from parameters or parameter groups to an optimizer.
OptimizerFactory = Callable[[Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]], torch.optim.Optimizer]


#: Metrics that the test of every task logs, and those that estimators add.
ESTIMATOR_METRICS = (
    "loss", "decoder_calls", "training_calls", "certified", "temperature", "alpha", "bound", "code_perplexity",
    "squared_gradient", "expected_l0", "l0_weight",
)  # fmt: skip


@dataclass
class Predictions:
    """A model's predictions for the examples of a batch, which an evaluation writes to a file.

    Attributes:
        prediction: ``[batch, ...]``, or a list of values that JSON can hold.
        target: likewise; NaN or None if it is unknown.
        vertices: one an example, ``[*parts]`` each, without padding, hard or relaxed; None without
            a latent variable.
        text: the examples as words, if they are words.
    """

    prediction: Tensor | Sequence[Any]
    target: Tensor | Sequence[Any]
    vertices: Sequence[Tensor] | Tensor | None = None
    text: Sequence[str] | None = None


@dataclass
class Evaluation:
    """The test of a task that is not trained, see :attr:`Task.evaluation`.

    Attributes:
        split: the split whose examples are tested.
        data: other data than those of the training, of the same kind; None: the same data.
        record: receives the :class:`StepOutput` of every batch, in the order of the data.
    """

    split: Split = "test"
    data: Any = None
    record: Callable[[Callable[[], Predictions] | None], None] = lambda predictions: None


@dataclass
class StepOutput:
    """The result of a task for a batch.

    Attributes:
        loss: scalar to minimise; NaN stops the run.
        metrics: name -> scalar tensor (a mean over the batch), or a ``(sum, count)`` pair for
            ratios whose denominator differs by batch.
        size: number of examples, the weight of the means.
        predictions: a function that makes the :class:`Predictions` of the batch, which only an
            evaluation calls. None in training, and for a task without predictions.
        calls: the number of evaluated vertices of each example, ``[size]``, for a task that logs
            their quartiles; None otherwise.
    """

    loss: Tensor
    size: int
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    predictions: Callable[[], Predictions] | None = None
    calls: Tensor | None = None


class Task(pl.LightningModule, abc.ABC):
    """Base of the tasks.

    Hydra builds subclasses from ``configs/task/<name>.yaml``; training passes the structure and the
    estimator. A task minimises ``(estimate.surrogate + estimate.kl).mean()``. If it weights the KL,
    it tells the estimator by ``kl_weight``. Where ``estimate.vertices.requires_grad`` is False,
    vertices are hard and a decoder may use a sparse path. Metrics of validation and test are means
    over examples, or ``(sum, count)`` pairs, summed over batches and processes. Metrics of training
    are logged on the steps that a logger or the progress bar reads.

    Args:
        structure: the latent structure, or a stand-in with ``is_latent = False`` for a baseline
            without a latent variable.
        estimator: built over that structure; None exactly when the structure is not latent.
        optimizer: a function from parameter groups to an optimizer (a Hydra partial). Its weight
            decay applies to the model only; see :meth:`configure_optimizers`.
    """

    #: The logged metric (`val/...`) that selects the best checkpoint, and its direction.
    monitor: ClassVar[str]
    mode: ClassVar[Literal["min", "max"]]
    #: Metrics (without split prefix) that the progress bar shows beside the loss.
    progress: ClassVar[tuple[str, ...]] = ()
    #: Metrics (without split prefix) that a test may log, beside those of estimators. A sweep
    #: checks the columns of a table against them before it trains anything. If empty, it cannot
    #: check.
    test_metrics: ClassVar[tuple[str, ...]] = ()

    #: The reason why half precision is wrong for this task's products
    #: (``trainer.precision=bf16-mixed``), if it is.
    needs_full_precision: ClassVar[str | None] = None

    def __init__(self, *, structure: Structure, estimator: Estimator | None, optimizer: OptimizerFactory) -> None:
        super().__init__()
        self.structure = structure
        self.estimator = estimator
        self.make_optimizer = optimizer
        #: The schedule of the learning rates, which replaces :meth:`learning_rates`; see
        #: :meth:`follow`.
        self.schedule: Schedule | None = None
        #: The test of a task that is not trained; None: the test set of its own data.
        self.evaluation: Evaluation | None = None
        self._sums: dict[str, list[Tensor]] = {}
        #: If set, :meth:`training_step` calls this instead of :meth:`step`: the same function,
        #: compiled.
        self.compiled_step: Callable[[Batch], StepOutput] | None = None

    # --- what a task provides -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def prepare_data(self) -> None:
        """Make or find the data and cache them. It is called once on one process, before
        :meth:`batches`.
        """

    @abc.abstractmethod
    def batches(self, split: Split) -> Batches:
        """The data of a split, complete; the base class divides them between processes.

        If batches differ in shape, a task must give training batches few shapes while
        :attr:`compiled_step` is set.
        """

    @abc.abstractmethod
    def step(self, batch: Batch) -> StepOutput:
        """Loss and metrics of a batch. ``self.training`` says whether gradients are needed."""

    def summarize(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metrics of a validation or test set, from the means over all its examples.

        It is for metrics that are decided once for a whole set.
        """
        return means

    def pictures(self, folder: Path) -> list[Path]:
        """After the test: draw a few test examples into ``folder`` and return the PNG and HTML
        files.
        """
        return []

    def learning_rates(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """The task's own schedule, which advances with every training step; None for a constant
        rate.
        """
        return None

    def follow(self, schedule: Schedule) -> None:
        """Let the learning rates follow a schedule (``task.schedule``).

        Raises:
            ValueError: if the task has its own schedule and that is not constant.
        """
        if type(self).learning_rates is not Task.learning_rates:
            raise ValueError(f"{type(self).__name__} has a schedule of its own; leave task.schedule out")
        self.schedule = schedule

    @classmethod
    def logged_by_test(cls) -> frozenset[str]:
        """All metrics that a test may log, without the prefix; empty if the task does not declare
        its own.
        """
        return frozenset((*cls.test_metrics, *ESTIMATOR_METRICS) if cls.test_metrics else ())

    @property
    def source(self) -> Any:
        """The data of :meth:`batches`: the task's own ``data``, or others in an evaluation."""
        other = None if self.evaluation is None else self.evaluation.data
        return self.data if other is None else other

    # --- what tasks ask for when they are built, and the divergence from the prior ------------------------------------

    def require_kl(self, by: str) -> None:
        """For constructors: raise an error unless :meth:`latent_kl` is defined.

        Args:
            by: who needs it, for the message.

        Raises:
            UnsupportedError: one line.
        """
        if self.estimator is not None and self.estimator.kl_over is None:
            self.structure.require("log_partition", by=f"{by}, with an estimator that has no KL divergence,")

    def latent_kl(
        self, estimate: Estimate, scores: Tensor, mask: Tensor | None = None, prior_scores: Tensor | None = None
    ) -> Tensor:
        """The KL divergence of an estimate, ``[batch]``. Without one it is that of a point mass,
        ``log |X|``.

        The point mass is right for one vertex without noise. Otherwise it is too large rather than
        too small, because no distribution over X is further from the uniform one. It is constant.
        With prior scores it is ``-log p(vertex)`` of their Gibbs distribution. The vertices must be
        hard then.

        Args:
            estimate: the estimate for the scores.
            scores: ``[batch, *parts]``.
            mask: which parts exist.
            prior_scores: see :meth:`~structgrad.estimators.base.Estimator.forward`.
        """
        if estimate.divergence is not None:
            return estimate.kl
        if prior_scores is None:
            return log_size(self.structure, scores, mask)
        prior = prior_scores.to(scores).expand(scores.shape)[estimate.rows]
        masks = None if mask is None else mask.expand(scores.shape)[estimate.rows]
        return -estimate.mean(self.structure.log_prob(estimate.vertices.detach(), prior, masks))

    def check_structure(self, shape: tuple[int, ...], what: str) -> None:
        """For constructors: refuse a structure that has no vertex over the data.

        Args:
            shape: shape of the scores of the smallest example.
            what: words for that example, for the message.

        Raises:
            ValueError: with the structure's own message.
        """
        try:
            self.structure.argmax(torch.zeros(1, *shape))
        except ValueError as error:
            raise ValueError(f"{self.structure.name} has no vertex over {what}: {error}") from error

    # --- Lightning ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Steps:
        """Training batches, repeated until the trainer's ``max_steps``."""
        return Steps(self._share("train"), self.trainer.max_steps, self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> Batches:
        """Validation batches."""
        return self._share("val")

    def test_dataloader(self) -> Batches:
        """Test batches, or those of an evaluation."""
        return self._share("test" if self.evaluation is None else self.evaluation.split)

    def _share(self, split: Split) -> Batches:
        return self.batches(split).shard(self.global_rank, self.trainer.world_size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, with its schedule or :meth:`learning_rates`.

        The parameters of the estimator (critics, baselines, a learnt temperature) are a group of
        their own, without the weight decay of the model.
        """
        own = [] if self.estimator is None else [p for p in self.estimator.parameters() if p.requires_grad]
        names = {id(p) for p in own}
        model = [p for p in self.parameters() if p.requires_grad and id(p) not in names]
        groups: list[dict[str, Any]] = [{"params": model}, {"params": own, "weight_decay": 0.0}]
        optimizer = _fused(self.make_optimizer([group for group in groups if group["params"]]))
        schedule: LRScheduler | None
        if self.schedule is None:
            schedule = self.learning_rates(optimizer)
        else:
            schedule = self.schedule.over(optimizer, self.trainer.max_steps)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; logs ``train/*``."""
        return self.training_output(batch).loss

    def training_output(self, batch: Batch) -> StepOutput:
        """The result of :meth:`step`, compiled or not, whose metrics are logged as ``train/*``."""
        out = (self.compiled_step or self.step)(batch)
        self.log_training(out)
        return out

    def is_logged(self) -> bool:
        """Whether the loggers or the progress bar read the current step.

        For a small model, Lightning would spend as much time on logging every step as on training.
        """
        step, trainer = self.global_step + 1, self.trainer
        every_n: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        shown_every = getattr(trainer.progress_bar_callback, "refresh_rate", 0)
        return any(every > 0 and step % every == 0 for every in (every_n, shown_every, trainer.max_steps))

    def log_training(self, out: StepOutput) -> None:
        """Log ``train/*`` of a step for which :meth:`is_logged` is True."""
        if not self.is_logged():
            return
        values = {"loss": out.loss.detach()} | {
            name: value[0] / value[1].clamp_min(1) if isinstance(value, tuple) else value
            for name, value in out.metrics.items()
        }
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name in ("loss", *self.progress), batch_size=out.size)
        if self.schedule is not None:
            (optimizer,) = self.trainer.optimizers
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"], batch_size=out.size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate ``val/*``."""
        self._accumulate(self.step(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate ``test/*``."""
        self._accumulate(self.step(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation set."""
        self._log_accumulated("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test set."""
        self._log_accumulated("test")

    def _accumulate(self, out: StepOutput) -> None:
        if self.evaluation is not None:
            self.evaluation.record(out.predictions)
        size = torch.tensor(float(out.size), device=out.loss.device)
        entries: dict[str, Tensor | tuple[Tensor, Tensor]] = {"loss": out.loss, **out.metrics}
        for name, value in entries.items():
            total, count = value if isinstance(value, tuple) else (value * size, size)
            sums = self._sums.setdefault(
                name,
                [torch.zeros_like(total, dtype=torch.float64), torch.zeros_like(size, dtype=torch.float64)],
            )
            sums[0] += total.detach()
            sums[1] += count.detach()

    def _log_accumulated(self, split: str) -> None:
        means = {}
        for name, (total, count) in self._sums.items():
            summed = self.trainer.strategy.reduce(torch.stack([total, count]), reduce_op="sum")
            means[name] = summed[0] / summed[1].clamp_min(1)
        for name, value in self.summarize(means).items():
            self.log(f"{split}/{name}", value, prog_bar=name in self.progress)
        self._sums = {}


def _fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let one kernel update all parameters, if torch has one and the configuration does not decide
    it.

    This is set here and not in the configuration, because the way in which a step is computed must
    not change the identity of a run. A checkpoint that was written without it continues without it.
    """
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD):
        for group in optimizer.param_groups:
            if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                group["fused"] = True
    return optimizer
