"""Sums of messages over all pairs: compiled, and as torch says it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structgrad.algorithms import bfloat16
from structgrad.tasks.listops import messages
from structgrad.tasks.listops.data import PAD
from structgrad.tasks.listops.messages import Pairs, sum_messages
from structgrad.tasks.listops.model import GraphNetwork

LENGTHS = torch.tensor([1, 4, 2, 5])


def inputs(receivers: Tensor, senders: Tensor, hidden: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    n = int(senders.max())
    shapes = (int(receivers.sum()), hidden), (int(senders.sum()), hidden), (hidden, hidden), (hidden,)
    made = [torch.randn(shape, dtype=dtype) for shape in (*shapes, (len(senders), n, n))]
    return [t.requires_grad_() for t in made]


@pytest.fixture(params=[1, 18, 10**9], ids="chunks of {}".format)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_PAIRS", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("hidden", [3, 32, 60])
@pytest.mark.parametrize("receivers", [LENGTHS, torch.ones_like(LENGTHS)], ids=["all", "first"])
def test_compiled_and_in_torch_agree(hidden: int, receivers: Tensor) -> None:
    arguments, pairs = inputs(receivers, LENGTHS, hidden), Pairs(receivers, LENGTHS)
    results = []
    for function in (sum_messages, messages._in_torch):
        heard = function(*arguments, pairs)
        upstream = torch.linspace(-1, 1, heard.numel(), dtype=heard.dtype).view_as(heard)
        results.append((heard, *torch.autograd.grad(heard, arguments, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(sum_messages(*arguments, pairs), results[1][0])


@pytest.mark.usefixtures("chunks")
def test_dropout_is_the_same_in_both_passes_and_in_torch() -> None:
    arguments, pairs = inputs(LENGTHS, LENGTHS, 60), Pairs(LENGTHS, LENGTHS)
    torch.manual_seed(0)
    heard = sum_messages(*arguments, pairs, 0.25)
    torch.manual_seed(0)
    drawn = messages.Drawn(int(torch.randint(2**32, ())), 2**30)
    receivers, senders, *others = arguments
    expected = messages._in_torch(receivers / 0.75, senders / 0.75, *others, pairs, drawn)
    upstream = torch.linspace(-1, 1, heard.numel(), dtype=heard.dtype).view_as(heard)
    torch.testing.assert_close(heard, expected)
    torch.testing.assert_close(
        torch.autograd.grad(heard, arguments, upstream), torch.autograd.grad(expected, arguments, upstream)
    )
    assert not torch.allclose(heard, sum_messages(*arguments, pairs, 0.25))


def test_dropped_units_look_independent() -> None:
    """Their share, and the agreement of units that are 1, a row and a key apart (5 standard errors)."""
    pairs, p = Pairs(torch.tensor([300]), torch.tensor([300])), 0.3
    first, second = (messages._kept(64, pairs, messages.Drawn(key, int(p * 2**32))) for key in (12_345, 4_000_000_000))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    for kept, share in (
        (first, 1 - p),
        (first[:, 1:] * first[:, :-1], (1 - p) ** 2),
        (first[1:] * first[:-1], (1 - p) ** 2),
        (first * second, (1 - p) ** 2),
    ):
        assert abs(float(kept.mean()) - share) < 5 * (share * (1 - share) / kept.numel()) ** 0.5


def test_derivatives() -> None:
    arguments, pairs = inputs(LENGTHS, LENGTHS, 3), Pairs(LENGTHS, LENGTHS)

    def of(*tensors: Tensor) -> Tensor:
        return sum_messages(*tensors, pairs)  # type: ignore[call-arg]

    assert torch.autograd.gradcheck(of, arguments)
    assert torch.autograd.gradgradcheck(of, arguments)


@pytest.mark.usefixtures("chunks")
def test_products_in_bfloat16_differ_by_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "has_bfloat16_units", lambda: True)
    lengths = LENGTHS.repeat(10)
    arguments, pairs = inputs(lengths, lengths, 60, torch.float32), Pairs(lengths, lengths)
    results = []
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            heard = sum_messages(*arguments, pairs)
            upstream = torch.linspace(-1, 1, heard.numel()).view_as(heard)
            results.append((heard.detach(), *torch.autograd.grad(heard, arguments, upstream)))
        finally:
            torch.set_float32_matmul_precision(before)
    exact, rounded = results
    assert {t.dtype for t in rounded} == {torch.float32}
    value, *gradients = (float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True))
    assert 1e-4 < value < 1e-2  # bfloat16 has 8 bits; 0 would mean that it was not used
    # A relu near 0 switches: of gradients a share is lost whose root is what this norm sees.
    assert min(gradients) > 1e-4
    assert max(gradients) < 0.1


def test_what_lies_beyond_a_graph_is_not_looked_at() -> None:
    *others, adjacency = inputs(LENGTHS, LENGTHS, 3)
    pairs = Pairs(LENGTHS, LENGTHS)
    exist = torch.arange(adjacency.shape[1]) < LENGTHS[:, None]
    inside = exist[:, :, None] & exist[:, None]
    poisoned = adjacency.detach().masked_fill(~inside, torch.nan).requires_grad_()
    for create_graph in (False, True):
        heard = sum_messages(*others, poisoned, pairs)
        *grads, grad = torch.autograd.grad(heard.square().sum(), [*others, poisoned], create_graph=create_graph)
        assert all(t.isfinite().all() for t in (heard, *grads, grad))
        assert grad[inside].any()
        assert not grad[~inside].any()


def test_nan_and_infinity_are_passed_on() -> None:
    for value in (torch.nan, torch.inf):
        arguments, pairs = inputs(LENGTHS, LENGTHS, 3, torch.float32), Pairs(LENGTHS, LENGTHS)
        with torch.no_grad():
            arguments[0][2, 1] = value  # the second graph's
        heard = sum_messages(*arguments, pairs)
        assert not heard[2].isfinite().all()
        assert heard[[0, 1, 3, 4, 5, *range(6, 12)]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_packed_and_padded_networks_agree(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structgrad.algorithms.threads._WORTH_A_THREAD", 1)
    torch.manual_seed(0)
    network = GraphNetwork(8, 3, 0.1).double().eval()
    tokens = torch.randint(1, 12, (6, 7))
    lengths = torch.tensor([7, 1, 3, 7, 2, 0])
    exist = torch.arange(7) < lengths[:, None]
    tokens[~exist] = PAD
    scores = 100 * torch.randn(6, 7, 7, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for function in (network, network._padded):
            network.zero_grad()
            leaf = scores.sigmoid().requires_grad_()
            logits = function(tokens, leaf * (exist[:, :, None] & exist[:, None]))
            logits.logsumexp(1).sum().backward()
            results.append([logits, leaf.grad, *(p.grad for p in network.parameters())])
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vectorised_jacobian() -> None:
    arguments, pairs = inputs(LENGTHS, LENGTHS, 3), Pairs(LENGTHS, LENGTHS)
    found = []
    for function in (sum_messages, messages._in_torch):
        upstream = torch.linspace(-1, 1, 2 * 12 * 3, dtype=torch.float64).view(2, 12, 3)
        found.append(torch.autograd.grad(function(*arguments, pairs), arguments, upstream, is_grads_batched=True))
    torch.testing.assert_close(*found)
