"""Derivatives for any solver: decorators for functions ``scores -> vertices``, without a
:class:`Structure`.

The solver is a black box, for arrays of any kind, as long as it takes and returns tensors::

    @imle(step=10.0)
    def shortest_path(scores):                        # [batch, *parts] -> 0/1 [batch, *parts]
        return torch.from_numpy(my_solver(scores.numpy()))

    loss = decoder(shortest_path(encoder(x)))         # differentiable

It must *maximise* ``<x, scores>``. For a solver that minimises costs, pass the negated scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from structgrad.algorithms.derivatives import first_order_only
from structgrad.common.ranges import check_count, check_positive
from structgrad.estimators.relaxation import mean_argmax
from structgrad.estimators.utilities import SumOfGamma, Utility, UtilityName, make_utility

Solver = Callable[[Tensor], Tensor]


class _Interpolated(torch.autograd.Function):
    """A solver whose derivative is replaced by the difference of two calls."""

    @staticmethod
    def forward(ctx: Any, utility: Tensor, solve: Solver, step: float) -> Tensor:
        vertex = solve(utility)
        if vertex.shape != utility.shape:
            raise ValueError(
                f"the solver returns {list(vertex.shape)} for scores {list(utility.shape)}; a step in the direction of "
                "a gradient needs one entry a score"
            )
        ctx.save_for_backward(utility, vertex)
        ctx.settings = (solve, step)
        return vertex

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        utility, vertex = ctx.saved_tensors
        solve, step = ctx.settings
        moved = (vertex - solve(utility - step * gradients[0].detach())) / step
        return first_order_only(moved, "a surrogate gradient", gradients[0], utility), None, None


def _named(
    options: dict[str, Any], scores: Tensor, mask: Tensor | None, lengths: Tensor | None, n: int
) -> dict[str, Any]:
    """Keyword arguments of the solver; what belongs to examples is repeated n times."""
    if mask is not None:
        options = options | {"mask": mask.expand(scores.shape).repeat(n, *[1] * (scores.dim() - 1))}
    if lengths is not None:
        if lengths.shape[:1] != scores.shape[:1]:
            raise ValueError(f"lengths {list(lengths.shape)} do not belong to the {len(scores)} examples of the scores")
        options = options | {"lengths": lengths.repeat(n, *[1] * (lengths.dim() - 1))}
    return options


def _solver(function: Callable[..., Tensor], options: dict[str, Any]) -> Solver:
    """The function without a gradient, in the precision of the scores."""

    def solve(scores: Tensor) -> Tensor:
        with torch.no_grad():
            return function(scores.detach(), **options).to(scores)

    return solve


@overload
def imle(function: Callable[..., Tensor]) -> Callable[..., Tensor]: ...


@overload
def imle(
    *, step: float = 10.0, utility: UtilityName | Utility | SumOfGamma | None = "gumbel"
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]: ...


def imle(
    function: Callable[..., Tensor] | None = None,
    *,
    step: float = 10.0,
    utility: UtilityName | Utility | SumOfGamma | None = "gumbel",
) -> Any:
    """Make a solver differentiable by implicit maximum likelihood (Niepert et al. 2021).

    Let ``u = scores + noise``; the value is ``x = solver(u)``. With v the gradient there, the
    gradient of the scores is defined as ``(x - solver(u - step v)) / step``. It is biased and takes
    two calls of the solver. With ``utility=None`` there is no noise. This is the linear
    interpolation of Pogančić et al. (2020).

    Args:
        function: the solver, ``scores [batch, *parts] -> vertices [batch, *parts]``, 0/1. Keyword
            arguments of a call are passed to it. It must not use parts that ``mask`` or ``lengths``
            excludes; their gradient is then 0.
        step: lambda in the papers.
        utility: the noise, by name or as an object.

    Returns:
        the function, differentiable once in the scores; or a decorator, if ``function`` is left
        out.

    Raises:
        TypeError, ValueError: unless the step is a positive number; from a call, for vertices of
            another shape.
    """
    check_positive("step", step)
    noise = utility if utility is None or isinstance(utility, SumOfGamma) else make_utility(utility)

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def differentiable(
            scores: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, **options: Any
        ) -> Tensor:
            perturbed = scores if noise is None else noise.sample(scores)
            solver = _solver(function, _named(options, scores, mask, lengths, 1))
            vertex: Tensor = _Interpolated.apply(perturbed, solver, step)
            return vertex

        return differentiable

    return decorate if function is None else decorate(function)


@overload
def perturbed(function: Callable[..., Tensor]) -> Callable[..., Tensor]: ...


@overload
def perturbed(
    *, sigma: float = 1.0, n_samples: int = 10, utility: UtilityName | Utility = "gaussian"
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]: ...


def perturbed(
    function: Callable[..., Tensor] | None = None,
    *,
    sigma: float = 1.0,
    n_samples: int = 10,
    utility: UtilityName | Utility = "gaussian",
) -> Any:
    """Make a solver differentiable by the mean of its results under noise (Berthet et al. 2020).

    The value is the mean of ``solver(scores + sigma Z)`` over samples. The derivative is that of
    its expectation, estimated from the same samples. The solver is called once, with
    ``n_samples * batch`` examples.

    Args:
        function: the solver, ``scores [batch, *parts] -> vertices [batch, *vertex]``. Keyword
            arguments of a call are passed to it. ``mask`` (broadcastable to the scores; the gradient
            of missing parts is 0) and ``lengths`` (``[batch, ...]``) are repeated for the samples.
            Which parts lengths exclude is known to the solver alone, so the gradient there is not 0
            but noise of mean 0. Other arguments are passed as they are and must fit every example.
        sigma: scale of the noise.
        n_samples: number of samples an example.
        utility: the noise Z: gumbel, gaussian or logistic.

    Returns:
        the function, differentiable once in the scores; or a decorator, if ``function`` is left
        out.

    Raises:
        TypeError, ValueError: for options out of range, or noise that is not added to the scores.
    """
    check_positive("sigma", sigma)
    check_count("n_samples", n_samples)
    noise = make_utility(utility)
    if not noise.is_location_family:
        raise ValueError(f"perturbed needs utilities that are scores plus noise; got {type(noise).__name__}")

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def differentiable(
            scores: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, **options: Any
        ) -> Tensor:
            drawn = noise.sample(torch.zeros_like(scores), n_samples)
            solver = _solver(function, _named(options, scores, mask, lengths, n_samples))
            vertices = solver((scores.detach() + sigma * drawn).flatten(0, 1)).unflatten(0, (n_samples, len(scores)))
            exists = torch.ones_like(scores, dtype=torch.bool)
            exists = exists if mask is None else exists & mask
            return mean_argmax(scores, vertices, drawn, noise, exists, sigma)

        return differentiable

    return decorate if function is None else decorate(function)


__all__ = ["imle", "perturbed"]
