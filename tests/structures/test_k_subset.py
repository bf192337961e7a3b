"""KSubset: the contract, and its further relaxations against their definitions."""

from __future__ import annotations

import torch

from structgrad.structures.k_subset import KSubset
from tests.structures.template import Case, StructureContract, length_masks, vector_masks


class TestKSubset(StructureContract):
    cases = [  # noqa: RUF012
        Case(KSubset(2), (5,), [*vector_masks(5, 4, 3, 2), torch.tensor([False, True, False, True, True])]),
        Case(KSubset(1), (1,)),
        Case(KSubset(1), (4,), vector_masks(4, 1)),
        Case(KSubset(3), (3,)),
        Case(KSubset(3, "undirected"), (4, 4), length_masks(4, 3)),
    ]
