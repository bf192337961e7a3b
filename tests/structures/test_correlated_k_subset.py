"""CorrelatedKSubset: the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from structgrad.structures.correlated_k_subset import CorrelatedKSubset
from structgrad.testing import Case, StructureContract


def sequence_masks(n: int, *lengths: int) -> list[Tensor]:
    """Masks over n items and n - 1 pairs."""
    return [torch.cat([torch.arange(n) < m, torch.arange(n - 1) < m - 1]) for m in lengths]


class TestCorrelatedKSubset(StructureContract):
    cases = [  # noqa: RUF012
        Case(CorrelatedKSubset(2), (9,), sequence_masks(5, 4, 3, 2)),
        Case(CorrelatedKSubset(1), (1,)),
        Case(CorrelatedKSubset(1), (7,), sequence_masks(4, 2, 1)),
        Case(CorrelatedKSubset(3), (5,)),
    ]
