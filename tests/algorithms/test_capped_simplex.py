"""Projections on the capped simplex: the torch version and the compiled one."""

from __future__ import annotations

import pytest
import torch

from structgrad.algorithms import capped_simplex
from structgrad.structures import KSubset
from tests.kernels import by_operators, compiled, needs_triton, quiet


@pytest.mark.parametrize("total", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_versions_agree(total: int, dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-3, 1.0, 100.0):
        scores = scale * torch.randn(50, 60, dtype=dtype)
        exists = torch.rand(50, 60) < 0.95
        exists[:, :total] = True
        compiled = capped_simplex.project_capped_simplex(scores, exists, total)
        plain = capped_simplex._project_in_torch(scores, exists, total)
        tolerance = 2e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(plain, compiled, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            compiled.double().sum(-1), torch.full((50,), float(total)).double(), atol=60 * tolerance, rtol=0
        )
        assert (compiled[~exists] == 0).all()


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
""")
    assert [line.split()[0] for line in done.splitlines()] == ["_gpu_multiplier"] * 2
