"""The contract of every gradient estimator."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from structgrad.structures.base import Structure, UnsupportedError

#: ``(vertices [N, *parts], rows int64 [N]) -> losses [N]``: the downstream loss of N vertices; row r belongs to
#: example r.
Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Estimate:
    """What an estimator returns for a batch.

    Attributes:
        surrogate: ``[batch]``; its gradient estimates that of the expected objective, for encoder and decoder. Its
            value means nothing: minimise ``(surrogate + kl).mean()``, monitor :attr:`objective`.
        objective: ``[batch]``, detached: the (weighted) mean of the objective over the evaluated vertices.
        kl: ``[batch]``, differentiable in the scores: divergence of the latent distribution from its prior (see
            each estimator).
        vertices: ``[N, *parts]``: what the objective was evaluated on; hard unless the estimator relaxes while
            training. ``vertices.requires_grad`` is False exactly when no gradient flows through them, in which case
            they are hard.
        rows: int64 ``[N]``: the example each vertex belongs to.
        weights: ``[N]``, detached: sum to one within an example.
        metrics: scalars worth logging, detached; ``decoder_calls`` (evaluated vertices per example) is always there.
        exact: whether ``vertices`` and ``weights`` are the whole latent distribution rather than samples of it.
    """

    surrogate: Tensor
    objective: Tensor
    kl: Tensor
    vertices: Tensor
    rows: Tensor
    weights: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = False

    def __post_init__(self) -> None:
        """Count the decoder calls."""
        calls = self.rows.numel() / max(1, self.surrogate.shape[0])
        self.metrics.setdefault("decoder_calls", torch.full((), calls, device=self.surrogate.device))

    def mean(self, values: Tensor) -> Tensor:
        """Average ``values`` ``[N, ...]`` of the evaluated vertices into examples: ``[batch, ...]``."""
        weighted = values * self.weights.reshape(-1, *[1] * (values.dim() - 1))
        out = weighted.new_zeros(self.surrogate.shape[0], *values.shape[1:])
        return out.index_add(0, self.rows, weighted)


class Estimator(nn.Module, abc.ABC):
    """Turns scores and an objective into a surrogate whose gradient estimates that of the expected objective.

    Buffers and parameters hold the estimator's state (running baselines, critics, schedules), so it is saved, moved
    and resumed with the model. In ``train()`` mode :meth:`forward` estimates gradients; in ``eval()`` mode it
    evaluates hard vertices.

    Args:
        structure: the set of vertices.

    Raises:
        UnsupportedError: at construction, if the structure lacks what the estimator needs.
    """

    #: Whether the objective must be differentiable in the vertex and defined on relaxed ones.
    needs_differentiable_objective: ClassVar[bool] = False

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    @abc.abstractmethod
    def forward(
        self,
        scores: Tensor,
        objective: Objective,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Estimate:
        """Estimate the gradient of the expected objective.

        Args:
            scores: ``[batch, *parts]``.
            objective: ``(vertices [N, *parts], rows [N]) -> losses [N]``; called once a step with all vertices to
                be evaluated.
            mask: which parts exist, broadcastable to the scores.
            context: ``[batch, features]`` for input-dependent baselines; others leave it alone.

        Returns:
            the :class:`Estimate`.
        """


def each_once(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and weights when every example is evaluated on one vertex: ``arange(batch)`` and ones."""
    return torch.arange(batch, device=device), torch.ones(batch, device=device)


def pathwise(
    objective: Objective,
    vertices: Tensor,
    samples: int,
    kl: Tensor,
    metrics: dict[str, Tensor] | None = None,
) -> Estimate:
    """The estimate whose surrogate is the mean objective itself: all gradients flow through the vertices.

    Args:
        objective: the downstream loss.
        vertices: ``[batch * samples, *parts]``, the samples of one example side by side.
        samples: an example.
        kl: ``[batch]``.
        metrics: see :class:`Estimate`.
    """
    batch = vertices.shape[0] // samples
    rows = torch.arange(batch, device=vertices.device).repeat_interleave(samples)
    losses = objective(vertices, rows).reshape(batch, samples).mean(1)
    weights = torch.full(rows.shape, 1 / samples, device=vertices.device)
    return Estimate(losses, losses.detach(), kl, vertices, rows, weights, metrics or {})


def uniform_kl(structure: Structure, scores: Tensor, mask: Tensor | None) -> Tensor:
    """KL of the Gibbs distribution from the uniform one over the same vertices, ``log |X| - H``: ``[*batch]``."""
    with torch.no_grad():
        log_size = structure.log_partition(torch.zeros_like(scores), mask)
    return log_size - structure.entropy(scores, mask)


__all__ = ["Estimate", "Estimator", "Objective", "UnsupportedError", "each_once", "pathwise", "uniform_kl"]
