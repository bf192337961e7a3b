"""Decorators for black-box solvers: the gradients of the estimators of the same name, without a structure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from structgrad.estimators import Perturbed, SurrogateGradient, imle, perturbed
from structgrad.structures import KSubset, OneHot, Permutation, Structure


def largest(scores: Tensor) -> Tensor:
    """A solver in numpy: the k-subset of highest scores, k = 2."""
    assert not scores.requires_grad
    array = scores.numpy()
    out = np.zeros_like(array)
    np.put_along_axis(out, np.argpartition(-array, 1, -1)[..., :2], 1, -1)
    return torch.from_numpy(out)


def decoder(vertices: Tensor, rows: Tensor) -> Tensor:
    weight = torch.linspace(-2, 1, vertices[0].numel(), dtype=vertices.dtype)
    return (vertices.flatten(1) * weight).sum(1).tanh() + vertices.flatten(1)[:, 0] * (rows + 1)


def both(solver: Callable[[Tensor], Tensor], estimator: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The gradients for the same scores, of the same seed."""
    torch.manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    losses = decoder(solver(scores), torch.arange(3))
    (ours,) = torch.autograd.grad(losses.sum(), scores)
    torch.manual_seed(1)
    estimate = estimator(scores, decoder)
    torch.testing.assert_close(losses, estimate.surrogate)
    (theirs,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
    assert theirs.abs().max() > 0
    return ours, theirs


@pytest.mark.parametrize(("utility", "method"), [("gumbel", "imle"), ("logistic", "imle"), (None, "blackbox")])
def test_imle(utility: str | None, method: str) -> None:
    estimator = SurrogateGradient(KSubset(2), method, step=20.0, utility=utility)  # type: ignore[arg-type]
    torch.testing.assert_close(*both(imle(step=20.0, utility=utility)(largest), estimator))  # type: ignore[call-overload]


@pytest.mark.parametrize("structure", [OneHot(), KSubset(2), Permutation()], ids=str)
def test_perturbed(structure: Structure) -> None:
    """Vertices may have another shape than the scores."""
    estimator = Perturbed(structure, "gumbel", sigma=0.7, n_samples=5)
    solver = perturbed(sigma=0.7, n_samples=5, utility="gumbel")(structure.argmax)
    torch.testing.assert_close(*both(solver, estimator))


def test_a_bare_decorator_keeps_the_function() -> None:
    @imle
    def solve(scores: Tensor, scale: float = 1.0) -> Tensor:
        """Of somebody."""
        return (scale * scores > 0).to(scores)

    @perturbed
    def mean(scores: Tensor) -> Tensor:
        return (scores > 0).to(scores)

    assert (solve.__name__, solve.__doc__) == ("solve", "Of somebody.")
    scores = torch.tensor([[30.0, -30.0]], requires_grad=True)
    assert solve(scores).tolist() == [[1, 0]]
    assert solve(scores, scale=-1.0).tolist() == [[0, 1]]
    assert mean(scores).tolist() == [[1, 0]]
    assert mean(scores).requires_grad
    assert solve(scores).dtype == torch.float32


@pytest.mark.parametrize("decorate", [imle, perturbed(n_samples=4)])
def test_masks_and_lengths_belong_to_examples(
    decorate: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
) -> None:
    """Every sample of an example has the example's own, and missing parts have no gradient."""
    structure, seen = KSubset(2), []

    def solve(scores: Tensor, **missing: Tensor) -> Tensor:
        seen.append(missing)
        return structure.argmax(scores, **missing)

    lengths = torch.tensor([2, 3, 4])
    scores = torch.randn(3, 4, requires_grad=True)
    mask = structure.length_mask(lengths, scores)
    found = []
    for missing in ({"mask": mask}, {"lengths": lengths}):
        torch.manual_seed(1)
        vertices = decorate(solve)(scores, **missing)
        (gradient,) = torch.autograd.grad((vertices * torch.arange(4.0)).sum(), scores)
        assert not vertices[~mask].any()
        found.append((vertices, gradient))
    torch.testing.assert_close(*(vertices for vertices, _ in found))
    assert not found[0][1][~mask].any()
    assert found[0][1][2].any()
    times = len(seen[0]["mask"]) // 3
    assert seen[-1]["lengths"].tolist() == lengths.repeat(times).tolist()
    assert (seen[0]["mask"] == mask.repeat(times, 1)).all()
    with pytest.raises(ValueError, match=r"lengths \[2\] do not belong to the 3 examples"):
        decorate(solve)(scores, lengths=lengths[:2])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"the solver returns \[2\] for scores \[2, 3\]"):
        imle(lambda scores: scores.argmax(-1))(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="step must be positive and finite; got 0"):
        imle(step=0.0)
    with pytest.raises(TypeError, match="sigma must be a number; got Tensor"):
        perturbed(sigma=torch.ones(2))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        perturbed(n_samples=0)
    with pytest.raises(ValueError, match="scores plus noise; got NegExponential"):
        perturbed(utility="neg_exponential")
    scores = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(imle(largest)(scores).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative"):
        torch.autograd.grad(gradient.sum(), scores)
