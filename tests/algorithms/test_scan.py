"""The product of a chain's matrices: equal to the graph's, in logarithmically many launches."""

from __future__ import annotations

import pytest
import torch
from benchmarks.launches import Launches

from structgrad.algorithms.scan import chain_total
from structgrad.algorithms.semirings import IMPOSSIBLE, best, log_sum
from structgrad.structures import HiddenMarkov, LinearChain, Structure


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8])
def test_every_length_of_a_batch(n: int) -> None:
    scores = 100 * torch.randn(n + 1, n, 3, 3, dtype=torch.float64)
    if n:
        scores[-1, 0, 1] = IMPOSSIBLE
    length = torch.arange(n + 1)
    for plus in (log_sum, best):
        total = chain_total(scores, length, plus)
        for b in range(n + 1):
            forward = torch.zeros(3, dtype=torch.float64)
            for t in range(b):
                forward = plus(forward[:, None] + scores[b, t], 0)
            expected = plus(forward, 0) if b else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(total[b], expected)


def launches(structure: Structure, n: int, oracle: str) -> int:
    scores = torch.empty(2, *structure.shape(n), device="meta", requires_grad=oracle != "argmax")
    with Launches() as counter:
        value = getattr(structure, oracle)(scores)
        if value.requires_grad:
            torch.autograd.grad(value.sum(), scores)
    assert not counter.waits
    return counter.launches.total()


@pytest.mark.parametrize("structure", [LinearChain(3), HiddenMarkov(3)], ids=lambda s: s.name)
@pytest.mark.parametrize("oracle", ["log_partition", "marginals", "argmax", "sample"])
def test_launches_are_logarithmic_in_length(structure: Structure, oracle: str) -> None:
    few, more, most = (launches(structure, n, oracle) for n in (65, 1025, 16385))
    assert most - more == more - few  # four levels each
    assert most - more < 4 * 60


def test_ten_thousand_positions() -> None:
    """In float32, of scores up to 100, against the graph in float64 (compiled on the CPU)."""
    structure = LinearChain(3)
    scores = 30 * torch.randn(1, 9_999, 3, 3).clamp(-3, 3)
    leaf = scores.clone().requires_grad_()
    exact = structure.log_partition(scores.double())
    mean = structure.marginals(scores.double())
    (gradient,) = torch.autograd.grad(structure.log_partition(leaf), leaf)
    torch.testing.assert_close(gradient.double(), mean, rtol=0, atol=1e-4)
    length = torch.tensor([9_999])
    torch.testing.assert_close(chain_total(scores.double(), length, log_sum), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(structure.log_partition(scores).double(), exact, rtol=1e-6, atol=0)
