"""Sinkhorn scaling: GPU kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from benchmarks.launches import Launches
from torch import Tensor

from structgrad.algorithms import sinkhorn
from structgrad.structures import Matching
from tests.kernels import by_operators, compiled, needs_triton, quiet


@needs_triton
@quiet
@pytest.mark.parametrize("iterations", [1, 8, 9])  # before, at and after a Newton step
def test_kernels_take_the_same_steps(iterations: int) -> None:
    exists = torch.ones(3, 4, 4, dtype=torch.bool)
    exists[1, 0] = exists[1, :, 2] = False
    exists[2] = False
    log_k = torch.where(exists, 3 * torch.randn(3, 4, 4, dtype=torch.float64), -torch.inf)
    start = torch.randn(3, 4, dtype=torch.float64)

    def ask(start: Tensor, log_k: Tensor) -> tuple[Tensor, Tensor]:
        exists = log_k > -torch.inf
        return sinkhorn.potentials(start, log_k, exists.any(-1), exists.any(-2), 0.0, iterations)

    # Only their sum at an entry is determined.
    (f, g), (other_f, other_g) = by_operators(ask, start, log_k), ask(start, log_k)
    ours, other = (torch.where(exists, a[..., None] + b[:, None], 0.0) for a, b in ((f, g), (other_f, other_g)))
    torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-7)
    assert not f[2].any()
    assert not g[2].any()


@needs_triton
@quiet
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_relaxations_agree_with_the_cpu(scale: float) -> None:
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1, 0] = mask[1, :, 2] = False
    scores = (scale * torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    structure = Matching(tolerance=1e-12)
    ours, expected = by_operators(structure.sinkhorn, scores, mask), structure.sinkhorn(scores, mask)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(ours)
    pair = [torch.autograd.grad((point.sin() * weight).sum(), scores)[0] for point in (ours, expected)]
    torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-8)
    assert by_operators(structure.sinkhorn, scores[:, :0, :0]).shape == (2, 0, 0)


def test_a_relaxation_takes_few_launches_and_compiles() -> None:
    scores = torch.randn(2, 5, 5, device="meta")
    with Launches() as seen:
        Matching().sinkhorn(scores)
    assert seen.launches.total() < 130
    assert not seen.waits
    assert torch.compile(Matching().sinkhorn, backend="aot_eager", fullgraph=True)(scores).shape == (2, 5, 5)


@needs_triton
def test_gpu_kernels_compile_for_a_gpu() -> None:
    done = compiled("""
import torch
from structgrad.algorithms import sinkhorn
matrix = torch.ones(1, sinkhorn.LARGEST, sinkhorn.LARGEST, dtype=torch.float64)
sinkhorn._distances_operator(matrix)
sinkhorn._potentials_operator(matrix[0], matrix, matrix[0] > 0, matrix[0] > 0, 1e-6, 9)
""")
    assert [line.split()[0] for line in done.splitlines()] == ["_gpu_distances", "_gpu_potentials"]
