"""Sigmoid and hyperbolic tangent of the kernels against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from structgrad.algorithms import elementary


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_digits(name: str) -> None:
    function = getattr(elementary, name)
    points = torch.cat([torch.linspace(-80, 80, 801), torch.linspace(-1, 1, 801), 10.0 ** torch.arange(-30, 2)])
    found = torch.tensor([function(np.float32(x)) for x in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, getattr(points.double(), name)(), rtol=5e-7, atol=0.0)


def test_ends_of_the_format() -> None:
    ends = np.array([-np.inf, -3e38, -1e3, 1e3, 3e38, np.inf], np.float32)
    assert [elementary.sigmoid(x) for x in ends] == pytest.approx([0, 0, 0, 1, 1, 1], abs=1e-37)
    assert [elementary.tanh(x) for x in ends] == [-1, -1, -1, 1, 1, 1]
    assert np.isnan([elementary.sigmoid(np.float32(np.nan)), elementary.tanh(np.float32(np.nan))]).all()
