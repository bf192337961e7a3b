"""The matrix-tree theorem: the torch version and the compiled one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.launches import Launches
from scipy import stats

from structgrad.algorithms import matrix_tree
from structgrad.structures import Arborescence
from tests.kernels import by_operators, compiled, needs_triton, quiet
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


def far_scores(kind: str) -> torch.Tensor:
    """Scores ``[8, 7, 7]`` of which some products are below the smallest float64."""
    scores = torch.randn(8, 7, 7, dtype=torch.float64)
    if kind == "cycles":  # others are near, so that the parts of many edges are strictly between 0 and 1
        scores[:, 0] -= 900
        scores[:, [1, 2, 3, 4], [2, 1, 4, 3]] += 900
    elif kind == "one edge":  # an inverse is still right
        scores[:, 1, 2] = -1e6
    return scores * (1e13 if kind == "huge" else 1.0)


@pytest.mark.parametrize("kind", ["cycles", "one edge", "huge"])
def test_compiled_code_of_far_scores_agrees_with_plain_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = far_scores(kind).requires_grad_()
    exists, root = STRUCTURE.parts(scores), torch.zeros(8, dtype=torch.int64)
    exists[1, 3] = exists[1, :, 3] = False  # an absent node
    exists[2, 3, 4:] = False
    uniform = torch.rand(24, 7, 7, dtype=torch.float64)
    with monkeypatch.context() as alone:
        for name in ("torch_marginals", "torch_log_partition", "torch_sample"):
            alone.delattr(matrix_tree, name)
        mean, upstream = matrix_tree.marginals(scores, exists, root), torch.randn_like(scores)
        (slope,) = torch.autograd.grad(mean, scores, upstream)
        logz = matrix_tree.log_partition(scores.detach(), exists, root)
        sample = matrix_tree.sample_arborescences(scores, exists, root, uniform)
    expected = matrix_tree.torch_marginals(scores, exists, root)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-11)
    (other,) = torch.autograd.grad(expected, scores, upstream)
    torch.testing.assert_close(slope, other, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(logz, matrix_tree.torch_log_partition(scores.detach(), exists, root))
    torch.testing.assert_close(sample, matrix_tree.torch_sample(scores.detach(), exists, root, uniform))


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


def graphs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and parts ``[6, 4, 4]`` with missing edges, absent nodes, nothing but a root, nothing at all."""
    scores = torch.randn(6, 4, 4, dtype=torch.float64)
    mask = torch.ones(6, 4, 4, dtype=torch.bool)
    mask[1, 2, 3] = mask[1, 1, 2] = False
    mask[2, 3] = mask[2, :, 3] = False
    mask[3, 1] = mask[3, :, 1] = False
    mask[4, 1:] = mask[4, :, 1:] = False
    mask[5, :, 2] = False  # no arborescence
    root = torch.tensor([0, 0, 0, 2, 0, 0])
    head = torch.arange(4)
    return scores, mask & (head != root[:, None])[:, None, :] & (head != head[:, None]), root


@needs_triton
@quiet
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_agree_with_the_cpu(scale: float, dtype: torch.dtype) -> None:
    scores, exists, root = graphs()
    scores = (scale * scores).to(dtype).requires_grad_()
    expected = matrix_tree.log_partition(scores, exists, root)
    logz = by_operators(matrix_tree.log_partition, scores, exists, root)
    assert expected[5] == -torch.inf
    torch.testing.assert_close(logz, expected, rtol=1e-12, atol=1e-12)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    upstream = torch.randn(5, dtype=torch.float64)
    (slope,) = torch.autograd.grad(logz[:5] @ upstream, scores, create_graph=True)
    (expected_slope,) = torch.autograd.grad(expected[:5] @ upstream, scores, create_graph=True)
    torch.testing.assert_close(slope, expected_slope, **tolerance)
    direction = torch.randn_like(scores)
    (bend,) = torch.autograd.grad((slope * direction).sum(), scores)
    (expected_bend,) = torch.autograd.grad((expected_slope * direction).sum(), scores)
    torch.testing.assert_close(bend[:5], expected_bend[:5], **tolerance)

    mean, expected = (
        by_operators(matrix_tree.marginals, scores, exists, root),
        matrix_tree.marginals(scores, exists, root),
    )
    torch.testing.assert_close(mean, expected, **tolerance)
    (ours,) = torch.autograd.grad(mean, scores, direction)
    (other,) = torch.autograd.grad(expected, scores, direction)
    torch.testing.assert_close(ours[:5], other[:5], **tolerance)
    assert (ours[5] == 0).all()
    assert (ours[~exists] == 0).all()


@needs_triton
@quiet
def test_kernels_have_derivatives_of_second_order() -> None:
    scores, exists, root = graphs()
    scores, exists, root = scores[1:2].requires_grad_(), exists[1:2], root[1:2]
    upstream, direction = torch.randn(2, 1, 4, 4, dtype=torch.float64).requires_grad_()

    def thirds(marginals: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        mean = marginals(scores, exists, root)
        (slope,) = torch.autograd.grad(mean, scores, upstream, create_graph=True)
        return torch.autograd.grad((slope * direction).sum(), [scores, upstream])

    ours = thirds(lambda *a: by_operators(matrix_tree.marginals, *a))
    for one, other in zip(ours, thirds(matrix_tree.torch_marginals), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@needs_triton
@quiet
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_same_noise_gives_the_same_sample(scale: float) -> None:
    scores, exists, root = (torch.cat([g[:5]] * 3) for g in graphs())
    scores = scale * torch.randn_like(scores)
    uniform = torch.rand_like(scores)
    expected = matrix_tree.torch_sample(scores, exists, root, uniform)
    torch.testing.assert_close(matrix_tree.sample_arborescences(scores, exists, root, uniform), expected)
    sample = by_operators(matrix_tree.sample_arborescences, scores, exists, root, uniform)
    torch.testing.assert_close(sample, expected)


@needs_triton
@quiet
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0), (2, 1, 1), (2, 2, 2)])
def test_kernels_of_nothing_and_little(shape: tuple[int, int, int]) -> None:
    scores = torch.randn(shape, requires_grad=True)
    exists, root = STRUCTURE.parts(scores), torch.zeros(len(scores), dtype=torch.int64)
    for function in (matrix_tree.log_partition, matrix_tree.marginals):
        value = by_operators(function, scores, exists, root)
        torch.testing.assert_close(value, function(scores, exists, root))
        (slope,) = torch.autograd.grad(value.sum(), scores)
        torch.testing.assert_close(slope, torch.autograd.grad(function(scores, exists, root).sum(), scores)[0])
    assert by_operators(matrix_tree.sample_arborescences, scores, exists, root).sum() == len(scores) * max(
        shape[1] - 1, 0
    )


@needs_triton
@quiet
def test_compilers_pass_through_the_operators() -> None:
    scores = torch.randn(2, 3, 3, requires_grad=True)
    compiled_marginals = torch.compile(STRUCTURE.marginals, backend="aot_eager", fullgraph=True)
    direction = torch.randn_like(scores)
    ours, expected = by_operators(compiled_marginals, scores), STRUCTURE.marginals(scores)
    torch.testing.assert_close(ours, expected)
    (slope,) = torch.autograd.grad((ours * direction).sum(), scores)
    torch.testing.assert_close(slope, torch.autograd.grad((expected * direction).sum(), scores)[0])


def test_one_launch_each_way() -> None:
    scores = torch.randn(2, matrix_tree.LARGEST, matrix_tree.LARGEST, device="meta", requires_grad=True)
    exists, root = STRUCTURE.parts(scores), torch.zeros(2, dtype=torch.int64, device="meta")
    upstream = torch.empty_like(scores)
    with Launches() as counted:
        mean = matrix_tree.marginals(scores, exists, root)
        torch.autograd.grad(mean, scores, upstream)
    assert counted.launches == {"structgrad::matrix_tree_marginals": 1, "structgrad::matrix_tree_covariance": 1}


@needs_triton
@pytest.mark.parametrize("n", [10, pytest.param(matrix_tree.LARGEST, marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu(n: int) -> None:
    lines = compiled(
        "import torch\n"
        "from structgrad.algorithms import matrix_tree\n"
        f"scores = torch.zeros(2, {n}, {n}, requires_grad=True)\n"
        f"arguments = scores, torch.ones(2, {n}, {n}, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)\n"
        "gpu.DEVICES.add('cpu')\n"
        "matrix_tree.log_partition(*arguments)\n"
        "matrix_tree.marginals(*arguments).sum().backward()\n"
        "matrix_tree.sample_arborescences(*arguments)\n"
    )
    assert lines.count("\n") == 5  # the elimination twice
