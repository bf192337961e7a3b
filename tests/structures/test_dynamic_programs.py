"""The structures of dynamic programs: enumeration, torch-struct, and plain torch against compiled code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from structgrad.algorithms import hypergraph
from structgrad.algorithms.hypergraph import ONE, ZERO, Builder
from structgrad.common.private import is_functorch_tensor
from structgrad.structures import (
    Alignment,
    Arborescence,
    Constituency,
    DagPath,
    LinearChain,
    ProjectiveTree,
    SemiMarkov,
    Structure,
    family_dynamic_programs,
)
from structgrad.testing import Case, StructureContract, length_masks


@pytest.fixture(scope="module")
def torch_struct() -> Any:
    """The second opinion, which the extra ``bench`` brings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_struct", reason="needs torch-struct (make .venv/installed-bench)")


EDGES = [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [0, 3], [0, 3], [3, 4], [5, 3]]
EVERY: dict[str, tuple[Structure, tuple[int, ...]]] = {
    "linear_chain": (LinearChain(3), (3, 3, 3)),
    "semi_markov": (SemiMarkov(2, 2), (3, 2, 2, 2)),
    "alignment": (Alignment(), (3, 4)),
    "constituency": (Constituency(2), (4, 4, 2)),
    "projective_tree": (ProjectiveTree(), (5, 5)),
    "inner_root": (ProjectiveTree(2), (5, 5)),
    "dag_path": (DagPath(EDGES, target=3), (9,)),
}


def holes(*shape: int, seed: int, share: float = 0.85) -> Tensor:
    """A mask with parts missing at random."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def up_to(steps: int, *rest: int) -> Callable[[int], Tensor]:
    """Mask of a sequence of so many positions, over ``[steps, *rest]``."""
    return lambda length: (torch.arange(steps) < length - 1).reshape(-1, *[1] * len(rest)).expand(steps, *rest)


def segments(steps: int, longest: int, labels: int, length: int) -> Tensor:
    """Mask of a sequence of so many positions cut into segments."""
    end = torch.arange(steps)[:, None] + torch.arange(longest) + 1
    return (end < length)[:, :, None, None].expand(steps, longest, labels, labels)


class SequenceContract(StructureContract):
    """Vertices under a mask: those of the shape that is left, without those that use what is missing."""

    #: How many of the leading dimensions are cut.
    cut: ClassVar[int] = 1

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        exists = case.structure.parts(torch.zeros(case.shape), mask)
        sizes = []
        for dim in range(self.cut):
            there = exists.movedim(dim, 0).flatten(1).any(-1).nonzero()
            sizes.append(int(there.max()) + 1 if len(there) else 0)
        small = case.structure.enumerate(*self.smaller(case, exists, sizes), *case.shape[self.cut :])
        full = small.new_zeros(len(small), *case.shape)
        full[(slice(None), *[slice(s) for s in small.shape[1:]])] = small
        return full[((full == 0) | exists).flatten(1).all(-1)]

    def smaller(self, case: Case, exists: Tensor, sizes: list[int]) -> list[int]:
        """Of the cut dimensions, by the last entries in use."""
        return sizes


class TestLinearChain(SequenceContract):
    cases: ClassVar[list[Case]] = [
        Case(LinearChain(2), (3, 2, 2), [*map(up_to(3, 2, 2), (3, 2, 1)), holes(3, 2, 2, seed=0)]),
        Case(LinearChain(3), (2, 3, 3), [up_to(2, 3, 3)(2), holes(2, 3, 3, seed=2)]),
        Case(LinearChain(1), (2, 1, 1)),
        Case(LinearChain(2), (0, 2, 2)),
    ]

    def test_scores_and_tags(self) -> None:
        structure = LinearChain(3)
        labels, pairs = torch.randn(4, 5, 3), torch.randn(3, 3)
        scores, mask = structure.transitions(labels, pairs), torch.stack([up_to(4, 3, 3)(n) for n in (5, 4, 2, 1)])
        tags = structure.read(structure.sample(scores, mask))
        assert [int((t >= 0).sum()) for t in tags] == [5, 4, 2, 0]
        whole = structure.argmax(scores)
        tags = structure.read(whole)
        expected = labels.gather(2, tags[..., None]).sum((1, 2)) + pairs[tags[:, :-1], tags[:, 1:]].sum(1)
        torch.testing.assert_close(structure.inner(whole, scores), expected)

    def test_against_torch_struct(self, torch_struct: Any) -> None:
        scores = torch.randn(3, 5, 4, 4, dtype=torch.float64)
        lengths = torch.tensor([6, 4, 2])
        mask = torch.stack([up_to(5, 4, 4)(int(n)) for n in lengths])
        # Theirs are [to, from].
        theirs = torch_struct.LinearChainCRF(scores.mT.contiguous(), lengths, args={"validate_args": False})
        torch.testing.assert_close(LinearChain(4).log_partition(scores, mask), theirs.partition)
        torch.testing.assert_close(LinearChain(4).marginals(scores, mask), theirs.marginals.mT)
        torch.testing.assert_close(LinearChain(4).entropy(scores, mask), theirs.entropy)


class TestSemiMarkov(SequenceContract):
    cases: ClassVar[list[Case]] = [
        Case(SemiMarkov(2, 2), (3, 2, 2, 2), [*(segments(3, 2, 2, n) for n in (3, 2, 1)), holes(3, 2, 2, 2, seed=0)]),
        Case(SemiMarkov(1, 4), (3, 4, 1, 1), [segments(3, 4, 1, 2)]),
        Case(SemiMarkov(2, 2), (0, 2, 2, 2)),
    ]

    def smaller(self, case: Case, exists: Tensor, sizes: list[int]) -> list[int]:
        used = exists.flatten(2).any(-1).nonzero()
        return [int((used.sum(1) + 1).max()) if len(used) else 0]

    def test_against_torch_struct(self, torch_struct: Any) -> None:
        scores = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
        # Theirs have a segment of length k at index k, and are [to, from].
        theirs = torch_struct.SemiMarkovCRF(torch.nn.functional.pad(scores.mT, (0, 0, 0, 0, 1, 0), value=-1e9))
        torch.testing.assert_close(SemiMarkov(2, 3).log_partition(scores), theirs.partition)

    def test_one_step_is_a_chain(self) -> None:
        scores = torch.randn(4, 5, 3, 3)
        segmented = SemiMarkov(3, 1).marginals(scores.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(segmented, LinearChain(3).marginals(scores))


class TestAlignment(SequenceContract):
    cut: ClassVar[int] = 2
    cases: ClassVar[list[Case]] = [
        Case(
            Alignment(),
            (3, 3),
            [*length_masks(3, 2, 0), torch.ones(3, 3).triu(-1).tril(1).bool(), torch.ones(3, 3).tril().bool()],
        ),
        Case(Alignment(), (2, 4), [torch.arange(4).expand(2, 4) < 2]),
        Case(Alignment(), (1, 1)),
        Case(Alignment(), (0, 3)),
    ]


class TestConstituency(SequenceContract):
    cut: ClassVar[int] = 2
    cases: ClassVar[list[Case]] = [
        Case(Constituency(), (4, 4, 1), [m[..., None] for m in length_masks(4, 3, 2, 1, 0)]),
        Case(Constituency(2), (3, 3, 2), [m[..., None].expand(3, 3, 2) for m in length_masks(3, 2, 1)]),
        Case(Constituency(2), (3, 3, 2), [holes(3, 3, 2, seed=1)]),
        Case(Constituency(3), (1, 1, 3)),
        Case(Constituency(3), (0, 0, 3)),
    ]

    def test_against_torch_struct(self, torch_struct: Any) -> None:
        scores, lengths = torch.randn(3, 6, 6, 2, dtype=torch.float64), torch.tensor([6, 4, 1])
        mask = torch.stack(length_masks(6, *lengths.tolist()))[..., None]
        theirs = torch_struct.TreeCRF(scores.clone(), lengths)
        torch.testing.assert_close(Constituency(2).log_partition(scores, mask), theirs.partition)
        torch.testing.assert_close(Constituency(2).marginals(scores, mask), theirs.marginals)


class TestProjectiveTree(SequenceContract):
    cut: ClassVar[int] = 2
    cases: ClassVar[list[Case]] = [
        Case(ProjectiveTree(), (4, 4), [*length_masks(4, 3, 2, 1, 0), holes(4, 4, seed=1)]),
        Case(ProjectiveTree(1), (4, 4), length_masks(4, 3, 2)),
        Case(ProjectiveTree(), (1, 1)),
        Case(ProjectiveTree(), (0, 0)),
        Case(ProjectiveTree(single_root=True), (4, 4), [*length_masks(4, 3, 1), holes(4, 4, seed=1)]),
        Case(ProjectiveTree(2, single_root=True), (3, 3)),
    ]

    def smaller(self, case: Case, exists: Tensor, sizes: list[int]) -> list[int]:
        return [max(sizes)] * 2 if max(sizes) else [int(case.shape[0] > 0)] * 2

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        if not case.structure.parts(torch.zeros(case.shape), mask).any():
            return torch.zeros(1, *case.shape, dtype=torch.float64)
        return super().vertices(case, mask)

    def test_against_torch_struct(self, torch_struct: Any) -> None:
        """Their root is a node of its own, whose edges lie on the diagonal."""
        scores, lengths = torch.randn(3, 6, 6, dtype=torch.float64), torch.tensor([6, 4, 3])
        mask = torch.stack(length_masks(6, *lengths.tolist()))
        within = scores[:, 1:, 1:].clone()
        within.diagonal(dim1=1, dim2=2).copy_(scores[:, 0, 1:])
        within.requires_grad_()
        theirs = torch_struct.DependencyCRF(within * 1, lengths - 1)
        torch.testing.assert_close(ProjectiveTree().log_partition(scores, mask), theirs.partition)
        (expected,) = torch.autograd.grad(theirs.partition.sum(), within)
        ours = ProjectiveTree().marginals(scores, mask)
        torch.testing.assert_close(ours[:, 0, 1:], expected.diagonal(dim1=1, dim2=2))
        off = ~torch.eye(5, dtype=torch.bool)
        torch.testing.assert_close(ours[:, 1:, 1:] * off, expected * off)

    def test_a_single_root_against_torch_struct(self, torch_struct: Any) -> None:
        scores = torch.randn(3, 6, 6, dtype=torch.float64)
        within = scores[:, 1:, 1:].clone()
        within.diagonal(dim1=1, dim2=2).copy_(scores[:, 0, 1:])
        theirs = torch_struct.DependencyCRF(within.requires_grad_() * 1, multiroot=False).partition
        torch.testing.assert_close(ProjectiveTree(single_root=True).log_partition(scores), theirs)

    def test_a_single_root_lies_at_an_end(self) -> None:
        with pytest.raises(ValueError, match="has no vertex"):
            ProjectiveTree(1, single_root=True).argmax(torch.randn(4, 4))

    def test_all_trees_of_three_are_projective_from_their_end(self) -> None:
        scores = torch.randn(20, 3, 3)
        torch.testing.assert_close(ProjectiveTree().marginals(scores), Arborescence().marginals(scores))
        counts = [len(ProjectiveTree().enumerate(n, n)) for n in range(1, 7)]
        assert counts == [1, 1, 3, 12, 55, 273]  # ternary trees, binom(3 n, n) / (2 n + 1)

    def test_a_position_left_out_is_refused(self) -> None:
        present = torch.tensor([True, False, True, True])
        with pytest.raises(ValueError, match="has no vertex"):
            ProjectiveTree().argmax(torch.randn(4, 4), present[:, None] & present)
        with pytest.raises(ValueError, match="root 4 is not one of the 4 nodes"):
            ProjectiveTree(4).argmax(torch.randn(4, 4))


class TestDagPath(StructureContract):
    cases: ClassVar[list[Case]] = [
        Case(DagPath(EDGES, target=3), (9,), [torch.tensor([1, 1, 1, 0, 1, 0, 1, 0, 1]) > 0]),
        Case(DagPath([[7, 2], [2, 4]], source=7, target=4), (2,), [torch.zeros(2, dtype=torch.bool)]),
    ]

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        return super().vertices(case, mask) if mask.any() else torch.zeros(1, *case.shape, dtype=torch.float64)

    def test_what_is_no_graph_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must not form a cycle"):
            DagPath([[0, 1], [1, 2], [2, 1], [2, 3]])
        with pytest.raises(ValueError, match="must be pairs"):
            DagPath([])
        with pytest.raises(ValueError, match="must be pairs"):
            DagPath([[0, 1, 2]])
        for wrong in ([[0, 1.7], [1, 2]], [["0", 1]]):
            with pytest.raises(TypeError, match="nodes must be whole numbers; got"):
                DagPath(wrong)
        with pytest.raises(ValueError, match="numbers from 0 on; got source 0, target -1"):
            DagPath([[0, 1], [1, 2]], target=-1)
        assert DagPath(torch.tensor([[0, 1], [1, 2]]), np.int64(0), torch.tensor(2)).edges == ((0, 1), (1, 2))
        for source, target in ((0, 4), (1, 0), (0, 9), (3, 3)):
            with pytest.raises(ValueError, match="no path of edges leads"):
                DagPath([[0, 1], [1, 3], [2, 4]], source, target)
        with pytest.raises(ValueError, match=r"scores over 2 edges have shape \[..., 2\]"):
            DagPath([[0, 1], [1, 2]]).argmax(torch.zeros(3))

    def test_an_alignment_is_a_path(self) -> None:
        """The grid as a graph, with the score of a cell on every edge into it."""
        n, m = 3, 4
        edges, cells = [[0, 1]], [0]
        for i in range(n):
            for j in range(m):
                for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)):
                    if min(a, b) >= 0:
                        edges.append([a * m + b + 1, i * m + j + 1])
                        cells.append(i * m + j)
        scores = torch.randn(5, n, m)
        torch.testing.assert_close(
            DagPath(edges).log_partition(scores.flatten(1)[:, cells]), Alignment().log_partition(scores)
        )


@pytest.mark.parametrize("name", EVERY)
def test_plain_torch_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for other devices, here on the CPU."""
    structure, shape = EVERY[name]
    torch.manual_seed(0)
    scores = torch.randn(4, 2, *shape)
    mask = torch.ones(shape, dtype=torch.bool)
    if name in ("linear_chain", "projective_tree"):
        mask = torch.stack([mask, mask & (torch.arange(shape[0]) < 2).reshape(-1, *[1] * (len(shape) - 1))])
        mask[1] &= (torch.arange(shape[1]) < 2)[:, None] if name == "linear_chain" else torch.arange(shape[1]) < 2

    def everything() -> list[Tensor]:
        leaf = scores.clone().requires_grad_()
        mean = structure.marginals(leaf, mask)
        (gradient,) = torch.autograd.grad((mean * mean).sum(), leaf)
        vertices, values = structure.top_k(leaf, 5, mask)
        known = torch.where(values.isfinite(), values, 0.0)
        (of_values,) = torch.autograd.grad(known.sum(), leaf)
        best = structure.argmax(scores, mask)
        log_z, entropy = structure.log_partition(leaf, mask), structure.entropy(leaf, mask)
        return [
            log_z,
            structure.log_partition(scores, mask),
            mean,
            gradient,
            entropy,
            best,
            vertices,
            values,
            of_values,
        ]

    compiled = everything()
    with monkeypatch.context() as patch:
        patch.setattr(family_dynamic_programs, "_compiled", lambda *tensors: False)
        plain = everything()
        repeated = scores[:1, :1].expand(4000, 1, *shape)
        frequencies = structure.sample(repeated).mean((0, 1))
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other)
    # Each frequency of 4000 draws within five standard errors of its mean.
    mean = structure.marginals(scores[0, 0])
    error = (mean * (1 - mean) / 4000).sqrt()
    assert ((frequencies - mean).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("name", EVERY)
def test_extremes(name: str) -> None:
    """Impossible parts are never chosen, however bad the others are; one vertex outweighs the rest."""
    structure, shape = EVERY[name]
    torch.manual_seed(1)
    for scale in (-1e4, 1e4):
        scores = scale * torch.rand(3, *shape)
        best = structure.argmax(scores)
        torch.testing.assert_close(structure.marginals(scores).round(), structure.sample(scores))
        torch.testing.assert_close(structure.log_prob(best, scores).exp(), torch.ones(3), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", EVERY)
def test_no_vertex_is_refused(name: str) -> None:
    structure, shape = EVERY[name]
    scores = torch.randn(2, *shape)
    mask = torch.ones(2, *shape, dtype=torch.bool)
    flat = mask[1].view(-1)
    flat[:] = False
    flat[structure.parts(scores[1]).flatten().nonzero()[-1]] = True  # one part alone
    if name == "dag_path":
        flat[:] = torch.arange(9) == 0
    for oracle in ("argmax", "log_partition", "marginals", "sample", "entropy", "project"):
        with pytest.raises(ValueError, match=r"example \[1\] has no vertex"):
            getattr(structure, oracle)(scores, mask)
    with pytest.raises(ValueError, match=r"example \[1\] has no vertex"):
        structure.top_k(scores, 2, mask)


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode(name: str) -> None:
    structure, shape = EVERY[name]
    scores = torch.randn(2, *shape)
    expected = structure.marginals(scores), structure.argmax(scores), structure.log_partition(scores)
    with torch.inference_mode():
        again = scores.clone()
        found = structure.marginals(again), structure.argmax(again), structure.log_partition(again)
        assert structure.sample(again).shape == again.shape
    torch.testing.assert_close(found, expected)


def test_bad_arguments_are_refused() -> None:
    for make in (
        lambda: LinearChain(0),
        lambda: SemiMarkov(0, 1),
        lambda: SemiMarkov(1, 0),
        lambda: Constituency(0),
        lambda: ProjectiveTree(-1),
    ):
        with pytest.raises(ValueError, match=r"must be (at least 1|a node)"):
            make()
    for structure, shape in (
        (LinearChain(3), (4, 2, 2)),
        (SemiMarkov(2, 3), (4, 2, 2, 2)),
        (Constituency(2), (4, 4, 3)),
    ):
        with pytest.raises(ValueError, match="have shape"):
            structure.argmax(torch.zeros(shape))
    with pytest.raises(ValueError, match="k must be at least 1"):
        LinearChain(2).top_k(torch.zeros(1, 2, 2), 0)


def test_a_graph_that_branches_and_has_gaps() -> None:
    """Padding, tails that cannot be built, and edges without parts."""
    builder = Builder()
    a, b = builder.level([[ONE, ONE], [ONE, ZERO]], ONE, [[0, 1], [2, -1]])
    (dead,) = builder.level([[ZERO]], ONE, 3)
    (top,) = builder.level([[a, dead]], [[b, a]], [[-1, 3]])
    graph = builder.build([ONE, top])
    assert graph.nodes == 6
    assert graph.depth == 3
    scores = torch.randn(1, 4, dtype=torch.float64)
    expected = scores[0, :2].logsumexp(0) + scores[0, 2]
    arguments = scores, torch.ones_like(scores, dtype=torch.bool), torch.tensor([1]), graph.number
    torch.testing.assert_close(hypergraph.moments(*arguments, False)[0][0], expected)
    np.testing.assert_allclose(hypergraph.top_k(*arguments, 3)[0][0, 2], -np.inf)


def test_graphs_that_are_made_under_torch_func_serve_other_calls() -> None:
    """What a transform wraps ends with it, and torch.compile refused such graphs ever after."""
    scores = torch.randn(2, 3, 7)  # of a size that no other test has
    torch.func.vmap(Alignment().marginals)(scores)
    goals = Alignment()._hypergraph(scores.shape[1:])._on(scores.device)[0]
    assert not is_functorch_tensor(goals)
    torch.testing.assert_close(torch.func.vmap(Alignment().marginals)(scores), Alignment().marginals(scores))


def test_graphs_that_are_made_in_inference_mode_serve_training() -> None:
    """Validation comes before training; autograd refuses tensors of inference mode."""
    scores = torch.randn(2, 3, 8)  # of a size that no other test has
    graph = Alignment()._hypergraph(scores.shape[1:])
    with torch.inference_mode():
        goals, levels = graph._on(scores.device)
    assert not any(t.is_inference() for t in (goals, *levels[0]))
