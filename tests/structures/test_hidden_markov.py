"""Hidden Markov models against enumeration and the forward algorithm as textbooks write it."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from structgrad.structures import HiddenMarkov
from structgrad.testing import Case
from tests.structures.test_dynamic_programs import SequenceContract, holes


def up_to(length: int) -> Tensor:
    """Mask of so many of three positions, two states."""
    return (torch.arange(3) < length)[:, None, None].expand(3, 2, 2)


class TestHiddenMarkov(SequenceContract):
    cases: ClassVar[list[Case]] = [
        Case(HiddenMarkov(2), (3, 2, 2), [*map(up_to, (2, 1, 0)), holes(3, 2, 2, seed=4)]),
        Case(HiddenMarkov(3), (2, 3, 3)),
        Case(HiddenMarkov(1), (2, 1, 1)),
        Case(HiddenMarkov(2), (0, 2, 2)),
    ]


def model(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of three states and four symbols, of five sequences of observations."""
    torch.manual_seed(0)
    initial, transition = torch.randn(3).log_softmax(-1), torch.randn(3, 3).log_softmax(-1)
    symbols = torch.randn(3, 4).log_softmax(-1)
    return initial, transition, symbols.T[torch.randint(4, (5, n))]


@pytest.mark.parametrize("n", [1, 2, 6])
def test_likelihood_filtering_and_smoothing(n: int) -> None:
    initial, transition, emission = (t.double() for t in model(n))
    structure = HiddenMarkov(3)
    scores = structure.scores(initial, transition, emission)
    assert scores.shape == (5, n, 3, 3)
    forward, filtered = initial.exp() * emission[:, 0].exp(), []
    for t in range(n):
        if t:
            forward = (forward @ transition.exp()) * emission[:, t].exp()
        filtered.append(forward / forward.sum(-1, keepdim=True))
    torch.testing.assert_close(structure.log_partition(scores), forward.sum(-1).log())
    torch.testing.assert_close(structure.filtering(scores), torch.stack(filtered, 1))
    backward = torch.ones(5, 3, dtype=torch.float64)
    for t in reversed(range(n)):
        both = filtered[t] * backward
        torch.testing.assert_close(structure.smoothing(scores)[:, t], both / both.sum(-1, keepdim=True))
        backward = (emission[:, t].exp() * backward) @ transition.exp().T


def test_lengths() -> None:
    """A shorter example has the posteriors of its own positions, and 0 behind them."""
    structure = HiddenMarkov(3)
    scores = structure.scores(*model(4))
    mask = (torch.arange(4) < 2)[:, None, None]
    for oracle in (structure.filtering, structure.smoothing):
        short = oracle(scores, mask.expand(4, 3, 3))
        torch.testing.assert_close(short[:, :2], oracle(scores[:, :2]))
        assert (short[:, 2:] == 0).all()
    path = structure.read(structure.sample(scores, mask))
    assert (path[:, :2] >= 0).all()
    assert (path[:, 2:] == -1).all()
    assert structure.filtering(scores[:, :0]).shape == (5, 0, 3)


def test_the_best_path() -> None:
    structure = HiddenMarkov(2)
    scores = structure.scores(
        torch.tensor([0.9, 0.1]).log(),
        torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log(),
        torch.tensor([[0.9, 0.2], [0.1, 0.8], [0.1, 0.8]]).log(),
    )
    assert structure.read(structure.argmax(scores)).tolist() == [0, 1, 1]  # .9 .9 .2 .8 .7 .8 beats .9 .9 .8 .1 .2 .8


def test_what_cannot_be_is_refused() -> None:
    structure, mask = HiddenMarkov(2), torch.ones(2, 3, 2, 2, dtype=torch.bool)
    mask[1, 1] = False
    for oracle in (structure.filtering, structure.log_partition):
        with pytest.raises(ValueError, match=r"example \[1\] has no vertex"):
            oracle(torch.zeros(2, 3, 2, 2), mask)
    with pytest.raises(ValueError, match="have shape"):
        structure.argmax(torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="at least 1"):
        HiddenMarkov(0)
