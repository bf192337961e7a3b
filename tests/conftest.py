"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

# Before anything imports it: the assertions of the shipped tests say their values.
pytest.register_assert_rewrite("structgrad.testing")

# Where there is no GPU its kernels are interpreted, which Triton decides when they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from structgrad.testing import DEVICE  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One process more than processors, unless xdist's variable says how many: tests of sweeps wait for others."""
    return (yield) + ("PYTEST_XDIST_AUTO_NUM_WORKERS" not in os.environ)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The contract of structures is also for GPUs; what is for them is skipped where one is asked for and none is."""
    none = pytest.mark.skip(reason=f"STRUCTGRAD_TEST_DEVICE={DEVICE}, and this machine has no CUDA device")
    for item in items:
        if getattr(item, "function", pytest_collection_modifyitems).__qualname__.startswith("StructureContract."):
            item.add_marker(pytest.mark.gpu)
        if DEVICE.type == "cuda" and not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(none)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """No test leaves variables behind: Lightning writes ranks, and a process with one waits for the others."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data directory; skips where it is absent."""
    folder = Path(os.environ.get("STRUCTGRAD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data directory {folder} (set STRUCTGRAD_DATA)")
    return folder
