"""Every oracle under ``torch.func.vmap`` over masks, alone and together with scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import CASES

ORACLES = ("log_partition", "marginals", "entropy", "project", "argmax")
PAIRS = [
    (name, oracle)
    for name, case in CASES.items()
    for oracle in (*ORACLES, *(r.method for r in case.plain.relaxations.values() if r.draws is None))
    if oracle in {*case.plain.oracles, *(r.method for r in case.plain.relaxations.values())}
]


@pytest.mark.parametrize(("name", "oracle"), list(dict.fromkeys(PAIRS)))
def test_vmap_over_masks(name: str, oracle: str) -> None:
    case = CASES[name]
    if name == "factor_graph" and oracle in ("log_partition", "marginals", "entropy"):
        with pytest.raises(NotImplementedError, match="listed for each mask, which vmap cannot be over"):
            torch.func.vmap(getattr(case.plain, oracle))(torch.zeros(2, *case.shape), case.mask)
        return
    function = getattr(case.plain, oracle)
    scores = torch.randn(2, *case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([torch.ones(case.shape, dtype=torch.bool), case.masks[0].expand(case.shape)])
    together = torch.stack([function(s, m) for s, m in zip(scores, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(function)(scores, masks), together)

    def of_mask(mask: Tensor) -> Tensor:
        found: Tensor = function(scores[0], mask)
        return found

    alone = torch.stack([of_mask(mask) for mask in masks])
    torch.testing.assert_close(torch.func.vmap(of_mask)(masks), alone)
    if oracle == "log_partition":
        slopes = torch.func.vmap(torch.func.grad(function))(scores, masks)
        expected = torch.stack([case.plain.marginals(s, m) for s, m in zip(scores, masks, strict=True)])
        counted = torch.stack([case.plain.parts(s, m) for s, m in zip(scores, masks, strict=True)])
        torch.testing.assert_close(slopes[counted], expected[counted])
