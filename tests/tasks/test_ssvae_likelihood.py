"""Likelihood of black and white pixels: in one pass, and as torch says it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structgrad.algorithms import threads
from structgrad.tasks.ssvae import likelihood
from structgrad.tasks.ssvae.likelihood import negative_log_likelihood


def arguments(scale: float = 3.0, pixels: int = 253) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (scale * torch.randn(5, pixels)).requires_grad_()
    return logits, torch.randint(2, (3, pixels)).float(), torch.tensor([2, 0, 0, 1, 2])


@pytest.mark.parametrize("scale", [0.0, 3.0, 100.0, 1e30])
@pytest.mark.parametrize("pixels", [1, 100, 253])
@pytest.mark.parametrize("workers", [1, 2])
def test_losses_and_gradients(scale: float, pixels: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    logits, images, rows = arguments(scale, pixels)
    results = []
    for function in (negative_log_likelihood, likelihood._in_torch):
        losses = function(logits, images, rows)
        results.append((losses, *torch.autograd.grad(losses, logits, torch.arange(5.0))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert negative_log_likelihood(logits, images, rows).equal(results[0][0])


def test_second_derivatives() -> None:
    logits, images, rows = arguments()
    found = []
    for function in (negative_log_likelihood, likelihood._in_torch):
        (gradient,) = torch.autograd.grad(function(logits, images, rows).log().sum(), logits, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
    torch.testing.assert_close(*found)


def test_vectorised_jacobian() -> None:
    logits, images, rows = arguments()
    upstream = torch.randn(2, len(rows))
    losses = [f(logits, images, rows) for f in (negative_log_likelihood, likelihood._in_torch)]
    found = [torch.autograd.grad(value, logits, upstream, is_grads_batched=True) for value in losses]
    torch.testing.assert_close(*found)


def test_what_is_not_a_number_is_seen() -> None:
    logits, images, rows = arguments()
    with torch.no_grad():
        logits[1, 7] = torch.nan
    losses = negative_log_likelihood(logits, images, rows)
    assert losses.isnan().tolist() == [False, True, False, False, False]
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isnan().nonzero().tolist() == [[1, 7]]


def test_images_can_have_a_gradient() -> None:
    logits, images, rows = arguments()
    images.requires_grad_()
    found = torch.autograd.grad(negative_log_likelihood(logits, images, rows).sum(), [logits, images])
    torch.testing.assert_close(found[1], torch.zeros_like(images).index_add(0, rows, -logits.detach()))


def test_what_does_not_fit_is_refused() -> None:
    """Compiled code would read memory of others."""
    logits, images, rows = arguments()
    for moved in (rows + 1, rows - 1):
        with pytest.raises(IndexError, match="numbers from 0 to 2"):
            negative_log_likelihood(logits, images, moved)
    for some in ((logits, images[:, 1:], rows), (logits, images, rows[:4])):
        with pytest.raises(ValueError, match="logits for"):
            negative_log_likelihood(*some)
