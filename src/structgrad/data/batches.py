"""Batches of in-memory tensors: deterministic, sharded over processes, resumable in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Batches:
    """Iterates over dictionaries of tensors, batch by batch.

    This is a data loader for data that fit in memory, without worker processes. The order of an
    epoch depends only on (seed, epoch), and :meth:`state_dict` holds the position. So a resumed run
    sees exactly the batches of an uninterrupted one. Lightning saves and restores that state with
    its checkpoints.

    Args:
        tensors: equally long tensors, ``[n, ...]`` each; their length is that of an epoch.
        batch_size: number of examples in a batch, over all processes together.
        shuffle: draw a new order every epoch, and drop the last, incomplete batch.
        seed: seed of the order.
        collate: applied to every batch, e.g. to cut padding or to resample pixels.
        beside: tensors of another common length (labelled examples beside unlabelled ones). Every
            batch gets ``batch_size`` of them too. They have an order of their own, which is drawn
            again whenever it is used up, independently of epochs. This needs ``shuffle``.

    Raises:
        ValueError: if the tensors differ in length or share a name with those beside them, or if
            ``shuffle`` is set and there are fewer examples than a batch takes.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        collate: Callable[[Batch], Batch] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tensors, self.beside = dict(tensors), dict(beside or {})
        self.n, self.cycle = _length(self.tensors), _length(self.beside) if beside else 0
        if beside and not self.cycle:
            raise ValueError("tensors beside others must have at least one example")
        if beside and not shuffle:
            raise ValueError(
                "tensors beside others need shuffle=True: without an order of its own a cycle has no place"
            )
        if common := self.tensors.keys() & self.beside.keys():
            raise ValueError(f"tensors beside others must have other names; got {', '.join(sorted(common))} twice")
        if batch_size <= 0:
            raise ValueError(f"batch size must be positive; got {batch_size}")
        if shuffle and self.n < batch_size:
            raise ValueError(f"{self.n} examples do not fill one batch of {batch_size}")
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.collate = collate
        self.rank, self.world_size = 0, 1
        self.epoch = 0
        self.position = 0

    def shard(self, rank: int, world_size: int) -> Batches:
        """Give this process its share of every batch; returns itself.

        Args:
            rank: this process.
            world_size: number of processes.

        Raises:
            ValueError: if a batch cannot be divided so that every process gets an example.
        """
        last = self.n % self.batch_size
        if self.batch_size % world_size or (not self.shuffle and 0 < last < world_size):
            raise ValueError(
                f"{world_size} processes cannot share {self.n} examples in batches of {self.batch_size}: the size "
                "must be a multiple of their number, and the last batch must have an example for each"
            )
        self.rank, self.world_size = rank, world_size
        return self

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self.n // self.batch_size if self.shuffle else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch, from the position of :meth:`load_state_dict` if there is one."""
        order = _order(self.n, (self.seed, self.epoch)) if self.shuffle else torch.arange(self.n)
        cycled = self._cycle()
        for index in range(self.position, len(self)):
            start = index * self.batch_size
            chosen = order[start : start + self.batch_size][self.rank :: self.world_size]
            batch = {name: _rows(tensor, chosen) for name, tensor in self.tensors.items()}
            if self.beside:
                chosen = next(cycled)[self.rank :: self.world_size]
                batch |= {name: _rows(tensor, chosen) for name, tensor in self.beside.items()}
            # The position moves before the batch is handed out. So a checkpoint written after the
            # batch continues with the next one. A reader that stops at the last batch then begins
            # the next epoch.
            self.epoch, self.position = (self.epoch, index + 1) if index + 1 < len(self) else (self.epoch + 1, 0)
            yield batch if self.collate is None else self.collate(batch)

    def _cycle(self) -> Iterator[Tensor]:
        """The examples beside that go into the batches from the current position on:
        ``[batch_size]`` each.

        What lies before the position is skipped, not remembered. It follows from the number of
        batches so far.
        """
        if not self.beside:
            return
        done = (self.epoch * len(self) + self.position) * self.batch_size
        passed, skipped = divmod(done, self.cycle)
        waiting = torch.arange(0)
        while True:
            while len(waiting) < self.batch_size:
                order = _order(self.cycle, (self.seed, passed, 1))
                waiting = torch.cat([waiting, order[skipped:]])
                passed, skipped = passed + 1, 0
            yield waiting[: self.batch_size]
            waiting = waiting[self.batch_size :]

    def state_dict(self) -> dict[str, Any]:
        """The position of the iteration."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from this position."""
        self.epoch, self.position = state["epoch"], state["position"]


def _length(tensors: Mapping[str, Tensor]) -> int:
    lengths = {name: len(t) for name, t in tensors.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"tensors must be equally long; got {lengths}")
    return next(iter(lengths.values()))


def _rows(tensor: Tensor, chosen: Tensor) -> Tensor:
    """``tensor[chosen]`` in a quarter of the time, because whole rows are copied."""
    return tensor.index_select(0, chosen.to(tensor.device))


def _order(n: int, key: tuple[int, ...]) -> Tensor:
    """A random order of n examples that depends on the key alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash(key) % 2**63))


class Steps:
    """Repeats training batches, epoch after epoch, for a fixed number of optimiser steps.

    Lightning sees one long epoch. So its progress bar shows the time left of the whole run, and
    validation falls on fixed steps. A resumed run continues in the middle of an epoch of the data.

    Args:
        batches: the data.
        steps: the number of steps in total.
        accumulated: number of batches in a step, whose gradients are averaged.

    Attributes:
        between: called between two steps, after one is complete and before the next begins; may
            raise.
        done: number of batches so far.
    """

    def __init__(self, batches: Batches, steps: int, accumulated: int = 1) -> None:
        self.batches, self.steps, self.accumulated = batches, steps, accumulated
        self.between: Callable[[], None] = lambda: None
        self.done = 0

    def __len__(self) -> int:
        """The total number of batches."""
        return self.steps * self.accumulated

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the remaining steps."""
        while self.done < len(self):
            for batch in self.batches:
                self.done += 1
                yield batch
                if self.done % self.accumulated == 0:
                    self.between()  # when the next batch is asked for, the last step is complete
                if self.done == len(self):
                    return

    def state_dict(self) -> dict[str, Any]:
        """The position of the iteration."""
        return {"done": self.done, "batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from this position."""
        self.done = state["done"]
        self.batches.load_state_dict(state["batches"])
