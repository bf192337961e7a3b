"""The LSTM over packed tokens against torch's own, its derivatives, and numbers at the ends of the format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from structgrad.tasks.lstm import lstm_over, padded_outputs
from structgrad.testing import computing

TOKENS, FEATURES, HIDDEN = 7, 5, 20


def networks(seed: int = 0) -> tuple[nn.LSTM, nn.Embedding]:
    torch.manual_seed(seed)
    return nn.LSTM(FEATURES, HIDDEN), nn.Embedding(TOKENS, FEATURES, padding_idx=0)


def sequences(lengths: list[int]) -> PackedSequence:
    tokens = torch.randint(TOKENS, (len(lengths), max(lengths)))
    return pack_padded_sequence(tokens, torch.tensor(lengths), batch_first=True, enforce_sorted=False)


def theirs(lstm: nn.LSTM, embedding: nn.Embedding, tokens: PackedSequence) -> Tensor:
    states: Tensor = lstm(PackedSequence(embedding(tokens.data), *tokens[1:]))[0].data
    return states


@pytest.mark.parametrize("lengths", [[4, 9, 1, 9, 2], [3, 3], [1], [1, 1, 1]])
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_and_gradients(lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structgrad.algorithms.threads._WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lstm, embedding = networks()
    tokens = sequences(lengths)
    ours, expected = lstm_over(lstm, embedding, tokens), theirs(lstm, embedding, tokens)
    torch.testing.assert_close(ours.data, expected)
    assert ours.unsorted_indices is tokens.unsorted_indices
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours.data, [*lstm.parameters(), embedding.weight], upstream, retain_graph=True),
        torch.autograd.grad(expected, [*lstm.parameters(), embedding.weight], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    # A backward pass leaves what it needs for another one.
    again = torch.autograd.grad(ours.data, lstm.weight_hh_l0, upstream, retain_graph=True)
    assert again[0].equal(torch.autograd.grad(ours.data, lstm.weight_hh_l0, upstream)[0])
    with torch.no_grad():
        assert lstm_over(lstm, embedding, tokens).data.equal(ours.data)


def test_second_derivatives() -> None:
    lstm, embedding = networks()
    tokens = sequences([3, 1, 4])
    inputs = [*lstm.parameters(), embedding.weight]
    found = []
    for function in (lambda *a: lstm_over(*a).data, theirs):
        gradients = torch.autograd.grad(function(lstm, embedding, tokens).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.sin().sum() for g in gradients]).sum(), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["native", "plain"])
def test_double_precision_and_plain_torch(path: str) -> None:
    lstm, embedding = networks()
    tokens = sequences([3, 1, 4])
    with computing(path):
        wide = lstm_over(lstm.double(), embedding.double(), tokens).data
        narrow = lstm_over(lstm.float(), embedding.float(), tokens).data
    torch.testing.assert_close(wide, theirs(lstm.double(), embedding.double(), tokens))
    torch.testing.assert_close(narrow, wide.float())


def test_far_numbers() -> None:
    """Gates of +-1e4 saturate, and what is not finite is seen."""
    lstm, embedding = networks()
    tokens = sequences([5, 6])
    with torch.no_grad():
        embedding.weight.mul_(1e4)
    torch.testing.assert_close(lstm_over(lstm, embedding, tokens).data, theirs(lstm, embedding, tokens))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            embedding.weight[3, 0] = bad
        ours, expected = lstm_over(lstm, embedding, tokens).data, theirs(lstm, embedding, tokens)
        torch.testing.assert_close(ours, expected, equal_nan=True)


def test_dropout_draws_the_mask_that_it_draws_for_torchs_outputs() -> None:
    torch.manual_seed(0)
    lstm, embedding = nn.LSTM(FEATURES, HIDDEN, batch_first=True), nn.Embedding(TOKENS, FEATURES)
    lengths = torch.tensor([2, 5, 0, 3])
    tokens = torch.randint(TOKENS, (4, 6))
    exist = (torch.arange(6) < lengths[:, None])[..., None]
    results = []
    for path in ("native", "plain"):
        with computing(path):
            outputs = padded_outputs(lstm, embedding, tokens, lengths)
        torch.manual_seed(1)
        results.append(torch.nn.functional.dropout(outputs, 0.5) * exist)
    torch.testing.assert_close(*results)


def test_tokens_without_an_embedding_are_refused() -> None:
    """Compiled code would read, and in the backward pass write, memory of others."""
    lstm, embedding = networks()
    for token in (-1, TOKENS):
        tokens = pack_padded_sequence(torch.tensor([[1, token, 2]]), torch.tensor([3]), batch_first=True)
        with pytest.raises(IndexError, match="numbers from 0 to 6"):
            lstm_over(lstm, embedding, tokens)


def test_vectorised_jacobian() -> None:
    lstm, embedding = networks()
    tokens = sequences([3, 1, 4])
    inputs, upstream = [*lstm.parameters(), embedding.weight], torch.randn(2, 8, HIDDEN)
    found = [
        torch.autograd.grad(states, inputs, upstream, is_grads_batched=True)
        for states in (lstm_over(lstm, embedding, tokens).data, theirs(lstm, embedding, tokens))
    ]
    torch.testing.assert_close(*found)


def test_no_sequences() -> None:
    _, embedding = networks()
    lstm, none = nn.LSTM(FEATURES, HIDDEN, batch_first=True), torch.zeros(0, 4, dtype=torch.int64)
    assert padded_outputs(lstm, embedding, none, none.sum(1)).shape == (0, 4, HIDDEN)
