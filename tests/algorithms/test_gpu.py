"""Tensors that take GPU operators."""

from __future__ import annotations

import pytest
import torch
from benchmarks.launches import Launches

from structgrad.algorithms import gpu, matrix_tree
from structgrad.structures import Arborescence


def test_tensors_that_take_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    here, nowhere = torch.empty(2), torch.empty(2, device="meta")
    assert not gpu.takes(here, 1, 10)
    assert gpu.takes(nowhere, 10, 10)
    assert not gpu.takes(nowhere, 11, 10)
    monkeypatch.setattr(gpu, "DEVICES", {"cpu", "meta"})  # as if the CPU were a GPU
    monkeypatch.setattr(gpu, "triton", object())
    assert gpu.takes(here, 10, 10)
    assert not torch.func.vmap(lambda x: torch.tensor(gpu.takes(x, 1, 10)))(here).any()
    monkeypatch.setattr(gpu, "triton", None)
    assert not gpu.takes(here, 10, 10)
    assert gpu.takes(nowhere, 10, 10)


def test_problems_too_large_for_a_program_take_plain_torch() -> None:
    scores = torch.empty(1, matrix_tree.LARGEST + 1, matrix_tree.LARGEST + 1, device="meta")
    with Launches() as counted:
        Arborescence().marginals(scores)
    assert not any(name.startswith("structgrad") for name in counted.launches)
    assert counted.launches.total() > matrix_tree.LARGEST


def test_sizes_of_blocks() -> None:
    assert [gpu.block(n) for n in (0, 1, 16, 17, 128, 129)] == [16, 16, 16, 32, 128, 256]
    assert [gpu.warps(n * n) for n in (16, 32, 64, 128, 256)] == [1, 2, 8, 16, 16]
