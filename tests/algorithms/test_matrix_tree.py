"""The matrix-tree theorem: the torch version and the compiled one."""

from __future__ import annotations

import torch
from scipy import stats

from structgrad.algorithms import matrix_tree
from structgrad.structures import Arborescence
from tests.structures._trees import cases_for_both_paths

STRUCTURE = Arborescence()


def test_plain_torch_agrees_with_the_compiled_code() -> None:
    scores, exists = cases_for_both_paths(STRUCTURE)
    root = torch.zeros(len(scores), dtype=torch.int64)
    for scale in (1.0, 40.0, 1000.0):  # the last one takes the logarithms in the compiled code
        s = (scale * scores).requires_grad_()
        mean = matrix_tree.marginals(s, exists, root)
        plain = matrix_tree.torch_marginals(s, exists, root)
        torch.testing.assert_close(plain, mean, rtol=1e-9, atol=1e-11)
        logz = matrix_tree.log_partition(s, exists, root)
        torch.testing.assert_close(matrix_tree.torch_log_partition(s, exists, root), logz)
        upstream = torch.randn_like(mean)
        (ours,) = torch.autograd.grad((mean * upstream).sum(), s)
        (other,) = torch.autograd.grad((plain * upstream).sum(), s)
        torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-9)


def test_plain_torch_samples_the_same_law() -> None:
    every = STRUCTURE.enumerate(4, 4)
    scores = torch.randn(4, 4, dtype=torch.float64)
    expected = torch.where(every > 0, scores, 0.0).sum((1, 2)).softmax(0)
    exists = STRUCTURE.parts(every[:1]).expand(40_000, 4, 4)
    repeated = scores.expand(40_000, 4, 4)
    root = torch.zeros(40_000, dtype=torch.int64)
    sample = matrix_tree.torch_sample(repeated, exists, root, torch.rand_like(repeated))
    same = (sample.flatten(1)[:, None] == every.flatten(1)).all(-1)
    assert same.any(1).all()
    # Level 1e-4; the seed is fixed.
    assert stats.chisquare(same.sum(0).numpy(), (40_000 * expected).numpy()).pvalue > 1e-4
