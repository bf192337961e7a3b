"""Projections on the capped simplex: the torch version and the compiled one."""

from __future__ import annotations

import pytest
import torch

from structgrad.algorithms import capped_simplex


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
