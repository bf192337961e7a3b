"""Chu-Liu-Edmonds: the torch version and the compiled one."""

from __future__ import annotations

import torch

from structgrad.algorithms import chu_liu_edmonds
from structgrad.structures import Arborescence
from tests.structures._trees import cases_for_both_paths, weight

STRUCTURE = Arborescence()


def test_plain_torch_agrees_with_the_compiled_argmax() -> None:
    for rounded in (False, True):
        scores, exists = cases_for_both_paths(STRUCTURE)
        scores = scores.round() if rounded else scores
        vertex, choices, reached = chu_liu_edmonds.minimum_arborescence(scores, exists, 0)
        plain, plain_choices, plain_reached = chu_liu_edmonds.torch_minimum_arborescence(scores, exists, 0)
        found, other = (weight(STRUCTURE, v, scores.nan_to_num()) for v in (vertex, plain))
        torch.testing.assert_close(other, found)
        assert torch.equal(reached, plain_reached)
        if not rounded:
            assert torch.equal(vertex, plain)
            assert torch.equal(choices, plain_choices)
        total = chu_liu_edmonds.log_entering(scores, exists, choices)
        torch.testing.assert_close(chu_liu_edmonds.torch_log_entering(scores, exists, choices), total)
