"""Subset: the contract in all layouts, and what public code got wrong."""

from __future__ import annotations

import torch

from structgrad.structures.subset import Subset
from tests.structures.template import Case, StructureContract, length_masks, vector_masks


class TestSubset(StructureContract):
    cases = [  # noqa: RUF012
        Case(Subset(), (4,), [*vector_masks(4, 2, 1, 0), torch.tensor([False, True, False, True])]),
        Case(Subset(), (1,)),
        Case(Subset("matrix"), (2, 2), [torch.tensor([[True, False], [True, True]])]),
        Case(Subset("directed"), (3, 3), length_masks(3, 2, 1)),
        Case(Subset("undirected"), (4, 4), length_masks(4, 3, 2, 1)),
    ]
