"""Alignments with blanks against enumeration and torch's loss."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ctc_loss

from structgrad.structures import Ctc
from structgrad.testing import Case, StructureContract


def sized(frames: int, labels: int, length: int, target: int, equal: tuple[int, ...] = ()) -> Tensor:
    """Mask of an example of so many frames and labels, in which the given labels equal those before them."""
    mask = torch.zeros(frames, 2 * labels + 1, 3, dtype=torch.bool)
    mask[:length, : 2 * target + 1] = True
    for u in equal:
        mask[:, 2 * u + 1, 2] = False
    return mask


class TestCtc(StructureContract):
    cases: ClassVar[list[Case]] = [
        Case(Ctc(), (4, 5, 3), [sized(4, 2, 3, 2), sized(4, 2, 4, 2, (1,)), sized(4, 2, 2, 1), sized(4, 2, 3, 0)]),
        Case(Ctc(), (3, 1, 3), [sized(3, 0, 1, 0)]),
        Case(Ctc(), (1, 3, 3), [sized(1, 1, 0, 0)]),
        Case(Ctc(), (0, 1, 3)),
    ]

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        exists = case.structure.parts(torch.zeros(case.shape), mask)
        frames, states = (int(exists.any(-1).any(dim).sum()) for dim in (-1, -2))
        small = case.structure.enumerate(frames, max(states, 1), 3)
        full = small.new_zeros(len(small), *case.shape)
        full[:, :frames, : max(states, 1)] = small
        return full[((full == 0) | exists).flatten(1).all(-1)]


def problem(batch: int = 5, frames: int = 12, labels: int = 4, symbols: int = 4) -> tuple[Tensor, ...]:
    """Log-probabilities with gradient, targets with repeated labels, and unequal lengths."""
    torch.manual_seed(0)
    log_probs = (2 * torch.randn(batch, frames, symbols, dtype=torch.float64)).log_softmax(-1).requires_grad_()
    targets = torch.randint(1, symbols, (batch, labels))
    targets[0] = 1
    return log_probs, targets, torch.tensor([12, 9, 12, 10, 8]), torch.tensor([4, 4, 3, 0, 1])


@pytest.mark.parametrize("blank", [0, 3])
def test_log_partition_is_the_loss_of_torch(blank: int) -> None:
    log_probs, targets, frames, labels = problem()
    targets = (targets + blank) % 4  # none is the blank
    scores, mask = Ctc().scores(log_probs, targets, frames, labels, blank=blank)
    ours = -Ctc().log_partition(scores, mask)
    theirs = ctc_loss(log_probs.transpose(0, 1), targets, frames, labels, blank, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # torch's backward pass supposes that the log-probabilities come from a softmax.
    logits = torch.randn(5, 12, 4, dtype=torch.float64, requires_grad=True)

    def loss(native: bool) -> Tensor:
        probs = logits.log_softmax(-1)
        if native:
            return ctc_loss(probs.transpose(0, 1), targets, frames, labels, blank, reduction="sum")
        return -Ctc().log_partition(*Ctc().scores(probs, targets, frames, labels, blank=blank)).sum()

    expected, found = (torch.autograd.grad(loss(native), logits)[0] for native in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_float32_agrees_with_the_loss_of_torch() -> None:
    log_probs, targets, frames, labels = problem()
    scores, mask = Ctc().scores(log_probs.detach().float(), targets, frames, labels)
    theirs = ctc_loss(log_probs.detach().transpose(0, 1), targets, frames, labels, reduction="none")
    torch.testing.assert_close(-Ctc().log_partition(scores, mask).double(), theirs, rtol=1e-5, atol=1e-5)


def test_states_spell_the_targets() -> None:
    log_probs, targets, frames, labels = problem()
    scores, mask = Ctc().scores(log_probs.detach(), targets, frames, labels)
    for vertex in (Ctc().argmax(scores, mask), Ctc().sample(scores, mask)):
        for states, own, length, count in zip(Ctc().read(vertex), targets, frames, labels, strict=True):
            assert (states[length:] == -1).all()
            path = [int(s) for s in states[:length]]
            assert path[0] in (0, 1)
            spelt = [s // 2 for i, s in enumerate(path) if s % 2 == 1 and (i == 0 or path[i - 1] != s)]
            assert spelt == list(range(int(count))), own


def test_too_few_frames_are_refused() -> None:
    scores, mask = Ctc().scores(torch.randn(1, 3, 4), torch.tensor([[1, 1]]))
    assert Ctc().log_partition(scores, mask).isfinite()
    scores, mask = Ctc().scores(torch.randn(1, 2, 4), torch.tensor([[1, 1]]))  # equal labels need a blank between them
    with pytest.raises(ValueError, match=r"example \[0\] has no vertex"):
        Ctc().log_partition(scores, mask)
    for shape in ((4, 4, 3), (4, 5, 2)):
        with pytest.raises(ValueError, match="2 U"):
            Ctc().argmax(torch.zeros(shape))


def test_what_follows_the_labels_may_be_anything() -> None:
    log_probs = torch.randn(2, 4, 5).log_softmax(-1)
    counts = torch.tensor([2, 1])
    found = [
        Ctc().log_partition(*Ctc().scores(log_probs, torch.tensor([[1, 2], [2, pad]]), target_lengths=counts))
        for pad in (0, 2, -1, 99)
    ]
    assert all(torch.equal(found[0], other) for other in found)


def test_targets_of_a_whole_batch() -> None:
    log_probs = torch.randn(3, 6, 4).log_softmax(-1)
    frames, counts = torch.tensor([6, 5, 4]), torch.tensor([2, 1, 2])
    for options in ({}, {"frame_lengths": frames, "target_lengths": counts}):
        each = Ctc().log_partition(*Ctc().scores(log_probs, torch.tensor([[1, 2]] * 3), **options))
        for targets in (torch.tensor([1, 2]), torch.tensor([[1, 2]])):
            assert torch.equal(Ctc().log_partition(*Ctc().scores(log_probs, targets, **options)), each)


def test_lengths_out_of_range_are_refused() -> None:
    log_probs, targets = torch.randn(2, 4, 5), torch.tensor([[1, 2], [1, 2]])
    for given, most in (({"frame_lengths": [4, 9]}, 4), ({"target_lengths": [-2, 1]}, 2)):
        lengths = {name: torch.tensor(value) for name, value in given.items()}
        with pytest.raises(ValueError, match=f"lengths of Ctc are from 0 to {most} for these scores"):
            Ctc().scores(log_probs, targets, **lengths)
        with pytest.raises(TypeError, match="integers"):
            Ctc().scores(log_probs, targets, **{name: value.float() for name, value in lengths.items()})


def test_labels_without_a_frame_are_refused() -> None:
    """PyTorch's loss is infinite there; that of an empty mask would be 0."""
    ctc, targets = Ctc(), torch.tensor([[1, 2], [1, 2]])
    log_probs = torch.randn(2, 4, 5).log_softmax(-1)
    with pytest.raises(ValueError, match=r"example \[1\] has labels but no frame"):
        ctc.scores(log_probs, targets, torch.tensor([4, 0]))
    with pytest.raises(ValueError, match=r"example \[1\] has labels but no frame"):
        ctc.scores(log_probs, targets, torch.tensor([4, 0]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"example \[0\] has labels but no frame"):
        ctc.scores(log_probs[:, :0], targets)
    scores, mask = ctc.scores(log_probs, targets, torch.tensor([4, 0]), torch.tensor([2, 0]))
    assert ctc.log_partition(scores, mask)[1] == 0  # neither frames nor labels
