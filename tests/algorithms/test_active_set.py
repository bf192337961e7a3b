"""The active-set method against quadratic programs over all vertices, closed forms and lp-sparsemap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from structgrad.structures import Arborescence, Matching, OneHot, SpanningTree, Structure, Subset
from structgrad.structures.derived import ActiveSetProjection, project, sparsemap


def nearest(vertices: Tensor, target: Tensor) -> Tensor:
    """The projection by non-negative least squares over all vertices, the sum of weights by a heavy row."""
    heavy = 1e4
    rows = np.vstack([vertices.flatten(1).T.numpy(), heavy * np.ones(len(vertices))])
    weights, _ = optimize.nnls(rows, np.append(target.flatten().numpy(), heavy))
    return torch.tensordot(torch.from_numpy(weights / weights.sum()), vertices, 1)


class Square(ActiveSetProjection, Subset):
    """Subsets without their closed form."""


STRUCTURES: list[tuple[Structure, tuple[int, ...]]] = [
    (OneHot(), (5,)),
    (Subset(), (5,)),
    (Subset(layout="undirected"), (4, 4)),
    (Matching(), (4, 4)),
]


@pytest.mark.parametrize(("structure", "shape"), STRUCTURES, ids=lambda p: getattr(p, "name", None))
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 100.0])
def test_projection_and_its_distribution(structure: Structure, shape: tuple[int, ...], scale: float) -> None:
    scores = scale * torch.randn(12, *shape, dtype=torch.float64)
    every = structure.enumerate(*shape)
    point = project(structure, scores)
    sparse = sparsemap(structure, scores)
    assert (sparse.rows.diff() >= 0).all()
    assert (sparse.weights > 0).all()
    weighted = sparse.vertices * sparse.weights.reshape(-1, *[1] * len(shape))
    torch.testing.assert_close(torch.zeros_like(scores).index_add(0, sparse.rows, weighted), point)
    upper = structure.layout.flatten
    for b in range(len(scores)):
        expected = nearest(upper(every), upper(scores[b]))
        torch.testing.assert_close(upper(point[b]), expected, atol=2e-5 * max(1.0, scale), rtol=0)
        gap = (upper(every) - upper(point[b])) @ (upper(scores[b]) - upper(point[b]))
        assert gap.max() <= 1e-9 * max(1.0, scale)
        mine = sparse.vertices[sparse.rows == b]
        assert all((every == v).flatten(1).all(-1).any() for v in mine)
        assert len(torch.unique(mine.flatten(1), dim=0)) == len(mine)


@pytest.mark.parametrize(("structure", "shape"), STRUCTURES, ids=lambda p: getattr(p, "name", None))
def test_gradients_by_finite_differences(structure: Structure, shape: tuple[int, ...]) -> None:
    scores = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: project(structure, s), scores, fast_mode=True)
    assert torch.autograd.gradcheck(lambda s: sparsemap(structure, s).weights, scores, fast_mode=True)
    upstream = torch.randn_like(scores)
    sparse = sparsemap(structure, scores)
    mean = torch.einsum("n,n...->n...", sparse.weights, sparse.vertices)
    (through_weights,) = torch.autograd.grad((mean * upstream[sparse.rows]).sum(), scores)
    (through_mean,) = torch.autograd.grad((project(structure, scores) * upstream).sum(), scores)
    torch.testing.assert_close(through_weights, through_mean)


@pytest.mark.parametrize("structure", [Matching(), SpanningTree(), Arborescence()], ids=lambda s: s.name)
def test_the_weights_carry_the_gradient_of_the_projection(structure: Structure) -> None:
    """At sizes and scores as in training, with dozens of vertices, the active set spans the face."""
    scores = (0.3 * torch.randn(4, 9, 9, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn_like(scores)
    sparse = sparsemap(structure, scores)
    assert len(sparse.rows) > 4 * 15
    inner = (sparse.vertices * upstream[sparse.rows]).sum((-1, -2))
    (through_weights,) = torch.autograd.grad((sparse.weights * inner).sum(), scores)
    (through_mean,) = torch.autograd.grad((project(structure, scores) * upstream).sum(), scores)
    torch.testing.assert_close(through_weights, through_mean)


@pytest.mark.parametrize("dimension", [64, 128])
def test_more_fractional_bits_than_public_code_can_take(dimension: int) -> None:
    """If the active set of lp-sparsemap is cut off, its gradients are wrong; ours is that of clip(scores, 0, 1)."""
    scores = (0.5 + 0.4 * torch.randn(3, dimension, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn_like(scores)
    point = project(Subset(), scores)
    torch.testing.assert_close(point, scores.clamp(0, 1))
    inside = ((scores > 0) & (scores < 1)).double()
    (gradient,) = torch.autograd.grad((point * upstream).sum(), scores)
    torch.testing.assert_close(gradient, upstream * inside)
    sparse = sparsemap(Subset(), scores)
    mean = torch.zeros_like(scores).index_add(0, sparse.rows, sparse.weights.unsqueeze(-1) * sparse.vertices)
    torch.testing.assert_close(mean, point)
    assert sparse.rows.bincount().max() <= dimension + 1


def test_gradient_of_the_projection_at_ties() -> None:
    """Equal scores: the active set is two opposite corners, but the projection moves in every direction."""
    scores = torch.full((2, 10), 0.5, dtype=torch.float64, requires_grad=True)
    assert len(sparsemap(Subset(), scores).rows) < 2 * 11
    (gradient,) = torch.autograd.grad((project(Subset(), scores) * torch.arange(10.0)).sum(), scores)
    torch.testing.assert_close(gradient, torch.arange(10.0, dtype=torch.float64).expand(2, 10))
    zeros = torch.zeros(1, 4, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 4, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((project(Matching(), zeros) * upstream).sum(), zeros)
    centred = upstream - upstream.mean(-1, keepdim=True) - upstream.mean(-2, keepdim=True) + upstream.mean()
    torch.testing.assert_close(gradient, centred)


def test_the_mixin_and_leading_shapes() -> None:
    scores = torch.randn(2, 3, 6)
    square = Square()
    assert {"project", "sparsemap"} <= square.oracles
    torch.testing.assert_close(square.project(scores), scores.clamp(0, 1))
    assert square.project(scores).dtype == torch.float32
    assert square.project(scores[:0]).shape == (0, 3, 6)
    assert len(square.sparsemap(scores[:0]).rows) == 0
    mask = torch.rand(2, 3, 6) > 0.5
    hidden = torch.where(mask, scores, torch.nan)
    torch.testing.assert_close(square.project(hidden, mask), torch.where(mask, scores.clamp(0, 1), 0.0))


def test_a_limit_on_iterations_gives_the_best_so_far() -> None:
    scores = 0.5 + 0.1 * torch.randn(4, 20, dtype=torch.float64)
    distances = [(project(Subset(), scores, max_iterations=k) - scores).norm() for k in (1, 5, 50)]
    assert distances[0] > distances[1] > distances[2]


def test_against_lp_sparsemap() -> None:
    lpsmap = pytest.importorskip("lpsmap")
    scores = torch.randn(8, 4, 4, dtype=torch.float64)
    point = project(Matching(), scores)
    for b in range(8):
        graph = lpsmap.TorchFactorGraph()
        variable = graph.variable_from(scores[b])
        for i in range(4):
            graph.add(lpsmap.Xor(variable[i, :]))
            graph.add(lpsmap.Xor(variable[:, i]))
        graph.solve(max_iter=10_000, tol=1e-9)
        torch.testing.assert_close(point[b], variable.value, atol=1e-4, rtol=0)
