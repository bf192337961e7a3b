"""Schedules of the learning rate for any task: ``task.schedule=warmup``, ``cosine`` or ``step``.

A schedule is a factor on the optimizer's rates. It is a function of the step alone, so a run that
continues after a kill has the same rates. All lengths are fractions of the training
(``trainer.max_steps``), so a schedule fits every budget.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

from structgrad.common.ranges import check_range


class Schedule(abc.ABC):
    """A factor on the learning rates, after a linear warm-up.

    In the warm-up of w steps the factor of step t = 0, 1, ... is ``(t + 1) / w`` (Goyal et al.
    2017, section 2.2).

    Args:
        warmup: fraction of the training steps.

    Raises:
        ValueError: for a fraction outside of [0, 1).
    """

    def __init__(self, *, warmup: float = 0.0) -> None:
        check_range("schedule.warmup", warmup, least=0, below=1)
        self.warmup = warmup

    def factor(self, step: int, steps: int) -> float:
        """The factor of the rates in a training step.

        Args:
            step: the step, from 0.
            steps: number of steps of the training.
        """
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return self.after_warmup(step - warm, steps - warm, step / steps)

    @abc.abstractmethod
    def after_warmup(self, step: int, steps: int, share: float) -> float:
        """The factor after the warm-up.

        Args:
            step: the step, from 0, the first after the warm-up.
            steps: number of steps after the warm-up.
            share: fraction of the whole training that is done, warm-up included.
        """

    def over(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Torch's scheduler, which advances every step.

        Args:
            optimizer: the optimizer with the rates.
            steps: number of steps of the training.
        """
        return LambdaLR(optimizer, lambda step: self.factor(step, steps))


class WarmUp(Schedule):
    """The warm-up, then the optimizer's rate.

    Args:
        warmup: fraction of the training steps.
    """

    def after_warmup(self, step: int, steps: int, share: float) -> float:
        """See :class:`Schedule`."""
        return 1.0


class Cosine(Schedule):
    """The warm-up, then half a cosine down to a fraction of the rate (Loshchilov and Hutter 2017,
    without restarts).

    Args:
        final: the factor at the end of the training.
        warmup: fraction of the training steps.

    Raises:
        ValueError: for a fraction outside of [0, 1), or a factor outside of [0, 1].
    """

    def __init__(self, *, final: float = 0.0, warmup: float = 0.0) -> None:
        super().__init__(warmup=warmup)
        check_range("schedule.final", final, least=0, most=1)
        self.final = final

    def after_warmup(self, step: int, steps: int, share: float) -> float:
        """See :class:`Schedule`."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * step / steps)) / 2


class Step(Schedule):
    """The warm-up, then the rate, multiplied by a factor at each of some points.

    Args:
        factor: the factor at each point.
        at: the points, as ascending fractions of the training.
        warmup: fraction of the training steps; it ends before the first point.

    Raises:
        ValueError: for points outside of (0, 1), not ascending, or within the warm-up; for a factor
            that is not positive.
    """

    def __init__(self, *, factor: float = 0.1, at: Sequence[float] = (0.5, 0.75), warmup: float = 0.0) -> None:
        super().__init__(warmup=warmup)
        check_range("schedule.factor", factor, above=0)
        ascending = all(before < after for before, after in itertools.pairwise(at))
        if not at or not ascending or at[0] <= 0 or at[-1] >= 1:
            raise ValueError(
                f"schedule.at must be shares of the training, ascending, between 0 and 1; got {list(at)}; "
                "type e.g. task.schedule.at=[0.5,0.75]"
            )
        if at[0] < warmup:
            raise ValueError(f"schedule.at begins at {at[0]}, within the warm-up of {warmup}; type a smaller warmup")
        self.by, self.at = factor, tuple(at)

    def after_warmup(self, step: int, steps: int, share: float) -> float:
        """See :class:`Schedule`."""
        return float(self.by ** sum(share >= point for point in self.at))
