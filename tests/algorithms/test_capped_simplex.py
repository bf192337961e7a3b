"""Projections on the capped simplex: the torch version and the compiled one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from structgrad.algorithms import capped_simplex, gpu
from structgrad.structures import KSubset
from tests.kernels import by_operators, compiled, needs_triton, quiet

Project = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@pytest.mark.parametrize("total", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_versions_agree(total: int, dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-3, 1.0, 100.0):
        scores = scale * torch.randn(50, 60, dtype=dtype)
        exists = torch.rand(50, 60) < 0.95
        exists[:, :total] = True
        compiled = capped_simplex.project_capped_simplex(scores, exists, total)
        plain = capped_simplex.project_in_torch(scores, exists, total)
        tolerance = 2e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(plain, compiled, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            compiled.double().sum(-1), torch.full((50,), float(total)).double(), atol=60 * tolerance, rtol=0
        )
        assert (compiled[~exists] == 0).all()


@needs_triton
@quiet
@pytest.mark.parametrize("project", [capped_simplex.project_capped_simplex, capped_simplex.project_budget])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 100.0])
def test_projection_by_kernels_agrees_with_the_cpu(project: Project, dtype: torch.dtype, scale: float) -> None:
    exists = torch.rand(6, 9) < 0.7
    exists[:, :4] = True
    for total in (1, 4):
        scores = (scale * torch.randn(6, 9, dtype=dtype)).requires_grad_()
        ours, expected = by_operators(project, scores, exists, total), project(scores, exists, total)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)
        # The second derivative is that of a loss that is not linear in the point.
        weight = torch.randn_like(scores)
        first, second = [], []
        for point in (ours, expected):
            first += torch.autograd.grad(((point + weight) ** 3).sum(), scores, create_graph=True)
            second += torch.autograd.grad((first[-1] * weight).sum(), scores)
        torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)


@needs_triton
@quiet
@pytest.mark.parametrize("shape", [(0, 3), (2, 1), (2, 3, 4), (5,)])
def test_projection_by_kernels_of_any_shape(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape)
    exists = torch.ones(shape, dtype=torch.bool)
    ours = by_operators(capped_simplex.project_capped_simplex, scores, exists, 1)
    torch.testing.assert_close(ours, capped_simplex.project_capped_simplex(scores, exists, 1))


@needs_triton
@quiet
def test_compilers_pass_through_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", {"cpu", "meta"})
    scores = torch.randn(3, 5, requires_grad=True)
    exists = torch.ones(3, 5, dtype=torch.bool)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return (capped_simplex.project_capped_simplex(scores, exists, 2) ** 2).sum()

    expected = torch.autograd.grad(loss(scores), scores)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(whole(scores), scores), expected)


@needs_triton
@quiet
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_binary_entropy_by_kernels_agrees_with_the_cpu(scale: float) -> None:
    scores = (scale * torch.randn(4, 6, dtype=torch.float64)).requires_grad_()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, :3] = mask[2, 2:4] = False
    structure = KSubset(3)  # all that the second example has
    ours, expected = by_operators(structure.binary, scores, mask), structure.binary(scores, mask)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.sum(-1), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-12, atol=0)
    weight = torch.randn_like(ours)
    pair = [torch.autograd.grad((point * weight).sum(), scores)[0] for point in (ours, expected)]
    torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-8)
    assert by_operators(structure.binary, scores[:0], mask[:0]).shape == (0, 6)


@needs_triton
def test_gpu_kernels_compile_for_a_gpu() -> None:
    done = compiled("""
import torch
from structgrad.algorithms import capped_simplex
for n in (9, capped_simplex.LARGEST):
    scores = torch.ones(2, n, dtype=torch.float64)
    ends = scores[:, 0]
    capped_simplex._multiplier_operator(scores, scores > 0, ends, ends, ends, 3)
    for at_most in (False, True):
        point, is_bound = capped_simplex._projection_operator(scores.float(), scores > 0, 3, at_most)
    capped_simplex._projection_backward_operator(point, is_bound, point)
""")
    kernels = ["_gpu_multiplier", "_gpu_project", "_gpu_project", "_gpu_project_backward"]
    assert [line.split()[0] for line in done.splitlines()] == kernels * 2
