"""Batches: order, shards, and a position that survives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from structgrad.data import Batches, Steps


def batches(**options: object) -> Batches:
    return Batches({"x": torch.arange(10)}, 3, **options)  # type: ignore[arg-type]


def seen(loader: object, count: int | None = None) -> list[list[int]]:
    return [batch["x"].tolist() for batch in itertools.islice(loader, count)]  # type: ignore[call-overload]


def test_every_example_once_in_order() -> None:
    assert seen(batches()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert len(batches()) == 4


def test_a_reader_that_takes_exactly_len_batches_can_start_again() -> None:
    """The same as Lightning's validation."""
    loader = batches()
    assert seen(loader, len(loader)) == seen(loader, len(loader))


def test_shuffled_epochs_differ_and_repeat_with_the_seed() -> None:
    loader, again = batches(shuffle=True, seed=3), batches(shuffle=True, seed=3)
    first, second = seen(loader), seen(loader)
    assert first != second
    assert [seen(again), seen(again)] == [first, second]
    assert all(len(set(itertools.chain(*epoch))) == 9 for epoch in (first, second))
    assert seen(batches(shuffle=True, seed=4)) != first


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_saved_position_continues(stop: int) -> None:
    whole = seen(Steps(batches(shuffle=True), 9))
    interrupted = Steps(batches(shuffle=True), 9)
    start = seen(interrupted, stop)
    resumed = Steps(batches(shuffle=True), 9)
    resumed.load_state_dict(interrupted.state_dict())
    assert start + seen(resumed) == whole
    assert len(whole) == 9


def test_processes_share_every_batch() -> None:
    shards = [Batches({"x": torch.arange(8)}, 4).shard(rank, 2) for rank in range(2)]
    assert [seen(shard) for shard in shards] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_collate_is_applied() -> None:
    def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": batch["x"] * 2}

    assert seen(batches(collate=double), 1) == [[0, 2, 4]]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        Batches({"x": torch.arange(3), "y": torch.arange(4)}, 1)
    with pytest.raises(ValueError, match="multiple of their number"):
        Batches({"x": torch.arange(3)}, 3).shard(0, 2)
    with pytest.raises(ValueError, match="an example for each"):
        Batches({"x": torch.arange(5)}, 4).shard(0, 2)
    with pytest.raises(ValueError, match="positive"):
        Batches({"x": torch.arange(5)}, 0)
    with pytest.raises(ValueError, match="do not fill"):
        Batches({"x": torch.arange(3)}, 4, shuffle=True)


def pairs(**options: object) -> Batches:
    return Batches({"x": torch.arange(10)}, 3, shuffle=True, beside={"y": torch.arange(7)}, **options)  # type: ignore[arg-type]


def test_examples_beside_others_are_cycled_in_an_order_of_their_own() -> None:
    """Seven batches of three are three passes over seven examples, across the epochs of three batches."""
    loader = pairs()
    batches = list(itertools.chain(loader, loader, loader))[:7]
    assert [len(b["x"]) for b in batches] == [len(b["y"]) for b in batches] == [3] * 7
    drawn = torch.cat([b["y"] for b in batches]).reshape(3, 7)
    assert drawn.sort(1).values.tolist() == [list(range(7))] * 3
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    whole = [b["x"].tolist() for b in batches]
    assert whole == seen(Steps(Batches({"x": torch.arange(10)}, 3, shuffle=True), 7))


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_saved_position_continues_beside(stop: int) -> None:
    def both(loader: object, count: int | None = None) -> list[list[list[int]]]:
        return [[b["x"].tolist(), b["y"].tolist()] for b in itertools.islice(loader, count)]  # type: ignore[call-overload]

    whole = both(Steps(pairs(), 9))
    interrupted = Steps(pairs(), 9)
    start = both(interrupted, stop)
    resumed = Steps(pairs(), 9)
    resumed.load_state_dict(interrupted.state_dict())
    assert start + both(resumed) == whole


def test_fewer_examples_beside_than_a_batch_and_shares_of_them() -> None:
    tensors, beside = {"x": torch.arange(8)}, {"y": torch.arange(3)}
    whole = next(iter(Batches(tensors, 8, shuffle=True, beside=beside)))["y"]
    assert whole.bincount(minlength=3).min() >= 2
    shares = [next(iter(Batches(tensors, 8, shuffle=True, beside=beside).shard(r, 2)))["y"] for r in range(2)]
    assert torch.stack(shares, 1).flatten().tolist() == whole.tolist()


def test_bad_examples_beside_are_refused() -> None:
    with pytest.raises(ValueError, match="shuffle=True"):
        Batches({"x": torch.arange(3)}, 1, beside={"y": torch.arange(3)})
    with pytest.raises(ValueError, match="other names; got x"):
        Batches({"x": torch.arange(3)}, 1, shuffle=True, beside={"x": torch.arange(3)})
    with pytest.raises(ValueError, match="at least one"):
        Batches({"x": torch.arange(3)}, 1, shuffle=True, beside={"y": torch.arange(0)})
    with pytest.raises(ValueError, match="equally long"):
        Batches({"x": torch.arange(3)}, 1, shuffle=True, beside={"y": torch.arange(1), "z": torch.arange(2)})
