"""The share of structure and estimator in a training step."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.harness import Time
from torch import Tensor

from structgrad.estimators.base import Estimate, Estimator, Objective


class _CallBack(torch.autograd.Function):
    """The identity; its backward calls back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, callback: Any) -> Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.callback()
        return gradients[0], None


class Stopwatch:
    """Adds up the time between an estimator's scores and the objective, there and back, without the
    objective's.

    Args:
        estimator: one that differentiates the objective in its vertices; its ``forward`` is
            replaced.
    """

    def __init__(self, estimator: Estimator) -> None:
        self.restart()
        self._start = 0.0, 0.0
        forward = estimator.forward

        def timed(scores: Tensor, objective: Objective, **options: Any) -> Estimate:
            def watched(vertices: Tensor, rows: Tensor) -> Tensor:
                self._end()
                losses = objective(_CallBack.apply(vertices, self._begin), rows)
                self._begin()
                return losses

            self._calls += 1
            self._begin()
            estimate = forward(_CallBack.apply(scores, self._end), watched, **options)
            self._end()
            return estimate

        estimator.forward = timed  # type: ignore[method-assign]

    def restart(self) -> None:
        """Forget what was measured."""
        self._wall = self._processor = 0.0
        self._calls = 0

    def mean(self) -> Time:
        """The mean time of a call, forward and backward."""
        return Time(1e3 * self._wall, 1e3 * self._processor) / self._calls

    def _begin(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def _end(self) -> None:
        self._wall += time.perf_counter() - self._start[0]
        self._processor += time.process_time() - self._start[1]
