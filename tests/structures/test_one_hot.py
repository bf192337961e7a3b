"""OneHot: the contract, and entmax as a second opinion."""

from __future__ import annotations

import torch

from structgrad.structures.one_hot import OneHot
from tests.structures.template import Case, StructureContract, vector_masks


class TestOneHot(StructureContract):
    cases = [  # noqa: RUF012
        Case(OneHot(), (5,), [*vector_masks(5, 3, 2, 1), torch.tensor([False, True, False, True, True])]),
        Case(OneHot(), (1,)),
        Case(OneHot(), (2,), vector_masks(2, 1)),
    ]
