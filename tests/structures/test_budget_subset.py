"""BudgetSubset: the contract."""

from __future__ import annotations

import torch

from structgrad.structures.budget_subset import BudgetSubset
from structgrad.testing import Case, StructureContract, length_masks, vector_masks


class TestBudgetSubset(StructureContract):
    cases = [  # noqa: RUF012
        Case(BudgetSubset(2), (5,), [*vector_masks(5, 3, 1, 0), torch.tensor([False, True, False, True, True])]),
        Case(BudgetSubset(4), (2,)),
        Case(BudgetSubset(3), (4,)),
        Case(BudgetSubset(1), (1,)),
        Case(BudgetSubset(2, "undirected"), (4, 4), length_masks(4, 3, 2, 1)),
    ]
