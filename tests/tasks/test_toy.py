"""Toy problems: objectives by hand, and every kind of estimator makes progress."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from torch import Tensor

from structgrad.data import DamagedDataError, MissingDataError
from structgrad.estimators import RELAX, SST, ImportanceWeighted, Marginalize, Perturbed, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import (
    Alignment,
    Arborescence,
    BinaryTree,
    Constituency,
    CorrelatedKSubset,
    DagPath,
    KSubset,
    LinearChain,
    Matching,
    OneHot,
    Permutation,
    ProjectiveTree,
    SemiMarkov,
    SpanningTree,
    Structure,
    Subset,
)
from structgrad.tasks.toy import Toy
from structgrad.tasks.toy.objectives import (
    RELEASED,
    Quadratic,
    away_from_first,
    changes,
    childless_root,
    detour,
    far_from_star,
    fewer_children,
    height,
    left_branches,
    levels,
    number,
    off_diagonal,
    unevenness,
)
from tests.cases import CASES

ADAM = partial(torch.optim.Adam, lr=0.05)


def test_childless_root() -> None:
    star = torch.zeros(2, 4, 4)
    star[0, 0, 1:] = 1
    star[1, [0, 1, 2], [1, 2, 3]] = 1
    torch.testing.assert_close(childless_root(star), torch.tensor([0.0, 2 / 3]))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_height_of_every_binary_tree(n: int) -> None:
    """By walking up from every node."""
    vertices = BinaryTree().enumerate(n)
    for vertex, computed in zip(vertices, height(vertices), strict=True):
        depths = []
        for node in range(n):
            depth = 0
            while vertex[:, node].any():
                node, depth = int(vertex[:, node].argmax()), depth + 1
            depths.append(depth)
        assert computed == max(depths)
    assert height(vertices).min() == n.bit_length() - 1
    assert height(vertices).max() == n - 1


def test_far_from_star() -> None:
    values = far_from_star(SpanningTree().enumerate(5, 5))
    assert (values.abs() < 1e-12).sum() == 5
    assert values.max() == pytest.approx(1 - (2 * 1 + 3 * 4) / 20)


def test_unevenness() -> None:
    permutations = list(itertools.permutations(range(4)))
    values = unevenness(torch.eye(4, dtype=torch.float64)[torch.tensor(permutations)])
    expected = [sum(abs(a - b) for a, b in itertools.pairwise(p)) / 3 for p in permutations]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert values.min() == 1


def test_objectives_of_dynamic_programs_over_every_vertex() -> None:
    def ends(values: Tensor) -> list[float]:
        return [values.min().item(), values.max().item()]

    assert ends(changes(LinearChain(3).enumerate(4, 3, 3))) == [0, 1]
    assert ends(number(SemiMarkov(1, 3).enumerate(6, 3, 1, 1))) == pytest.approx([1 / 3, 1])
    assert ends(detour(Alignment().enumerate(4, 4))) == [0, 1]
    values = left_branches(Constituency().enumerate(5, 5, 1))
    assert ends(values) == pytest.approx([0, 3 / 4])
    assert int((values.abs() < 1e-12).sum()) == 1
    right, left = torch.zeros(2, 5, 5, 1).unbind()
    for k in range(4):
        right[k, 4] = left[0, k + 1] = 1
    assert left_branches(torch.stack([right, left])).tolist() == pytest.approx([0, 3 / 4])


#: Structure -> the least and the largest objective, ours and the released one, of the vertices of size 4: by hand.
ENDS: dict[str, tuple[Structure, tuple[float, float] | None, tuple[float, float] | None]] = {
    "arborescence": (Arborescence(), (0, 2 / 3), (-3, -1)),
    "binary_tree": (BinaryTree(), (2, 3), (-4, -3)),
    "spanning_tree": (SpanningTree(), (0, 1 - 10 / 12), (1 / 2, 5 / 6)),
    "matching": (Matching(), (1, 7 / 3), (-4, 0)),
    "permutation": (Permutation(), None, (-4, 0)),
    "projective_tree": (ProjectiveTree(), (0, 2 / 3), None),
    "linear_chain": (LinearChain(2), (0, 1), None),
    "semi_markov": (SemiMarkov(1, 2), (2 / 3, 1), None),
    "alignment": (Alignment(), (0, 1), None),
    "constituency": (Constituency(), (0, 2 / 3), None),
    "dag_path": (DagPath([[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]), (2 / 5, 3 / 5), None),
}


@pytest.mark.parametrize("objective", ["ours", "released"])
@pytest.mark.parametrize("name", ENDS)
def test_each_structure_has_the_objective_of_the_table(name: str, objective: Any) -> None:
    """The tables of docs/tasks/toy.md, over every vertex."""
    structure, ours, released = ENDS[name]
    expected = ours if objective == "ours" else released
    if expected is None:
        pytest.skip("it has no objective of its own")
    estimator = Reinforce(structure, "T") if name == "binary_tree" else Perturbed(structure)
    task = Toy(structure=structure, estimator=estimator, optimizer=ADAM, size=4, objective=objective)
    values = task.objective(structure.enumerate(*task.scores.shape))
    assert [values.min().item(), values.max().item()] == pytest.approx(expected)


def test_a_step_is_the_expected_objective_and_nothing_else() -> None:
    """Loss, metric and gradient of an exact sum, against the enumeration; no divergence is added."""
    structure = OneHot()
    task = Toy(structure=structure, estimator=Marginalize(structure), optimizer=ADAM, size=4, objective="quadratic")
    task.scores.data.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    out = task.step({"row": torch.arange(1)})
    scores = task.scores.detach().clone().requires_grad_()
    expected = scores.softmax(0) @ task.objective(torch.eye(4))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.metrics["objective"], expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, task.scores), torch.autograd.grad(expected, scores), rtol=1e-5, atol=1e-6
    )


def test_the_quadratic_objective_is_the_documented_one() -> None:
    """``(<a, x> + |B x|^2 / 4) / sqrt(P)`` with standard normal a and B, the same for all runs."""
    generator = torch.Generator().manual_seed(23)
    a, b = torch.randn(6, generator=generator), torch.randn(6, 4, generator=generator)
    vertices = torch.rand(5, 2, 3)
    expected = [(a @ x + (x @ b).square().sum() / 4) / 6**0.5 for x in vertices.reshape(5, 6)]
    torch.testing.assert_close(Quadratic((2, 3))(vertices), torch.stack(expected))


def test_objectives_of_the_released_code() -> None:
    star, path = torch.zeros(2, 5, 5).unbind()
    star[0, 1:] = 1
    path[torch.arange(4), torch.arange(1, 5)] = 1
    assert fewer_children(torch.stack([star, path])).tolist() == [-4, -1]
    trees = BinaryTree().enumerate(5)
    assert levels(trees).min() == -5
    assert levels(trees).max() == -3
    edges = torch.stack([star, path])
    assert away_from_first(edges + edges.transpose(1, 2)).tolist() == [0.5, 7 / 8]
    assert off_diagonal(torch.stack([torch.eye(4), torch.eye(4).flip(0)])).tolist() == [-4, 0]
    for structure in (Arborescence(), BinaryTree(), SpanningTree(), Matching()):
        task = Toy(structure=structure, estimator=Reinforce(structure, "T"), optimizer=ADAM, objective="released")
        assert task.objective is RELEASED[type(structure)]
    with pytest.raises(ValueError, match="the released code has the structures Arborescence"):
        Toy(structure=OneHot(), estimator=Reinforce(OneHot()), optimizer=ADAM, objective="released")


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_toy_problem(name: str) -> None:
    """A step and an evaluation with what the structure has; the objective differs between vertices."""
    structure = CASES[name].plain
    estimator: Estimator = Perturbed(structure, n_samples=4)
    if {"sample", "entropy"} <= structure.oracles:
        estimator = Reinforce(structure, "X", "loo", n_samples=4)
    elif "trace" in structure.oracles:
        estimator = Reinforce(structure, "T", "loo", n_samples=4)
    task = Toy(structure=structure, estimator=estimator, optimizer=ADAM, size=4, eval_samples=50)
    (batch,) = task.batches("train")
    loss = task.step(batch).loss
    loss.backward()
    assert loss.isfinite()
    assert task.scores.grad.isfinite().all()
    torch.manual_seed(0)
    vertices = structure.argmax(torch.randn(50, *task.scores.shape))
    assert len(task.objective(vertices).unique()) > 1


@pytest.mark.parametrize(
    "structure",
    [OneHot(), Subset(), KSubset(3), Permutation(), Arborescence(), CorrelatedKSubset(2)],
    ids=lambda s: s.name,
)
def test_every_structure_has_an_objective(structure: Structure) -> None:
    """It is not linear, the same for all runs, and falls."""
    torch.manual_seed(0)
    action = "T" if isinstance(structure, Permutation) else "X"
    estimators: list[Estimator] = [Reinforce(structure, action, "loo", n_samples=8)]  # type: ignore[arg-type]
    if not isinstance(structure, Permutation):
        estimators.append(SST(structure, n_samples=8))
    for estimator in estimators:
        task = Toy(
            structure=structure, estimator=estimator, optimizer=ADAM, size=5, eval_samples=500, objective="quadratic"
        )
        shape = structure.argmax(task.scores.detach()[None]).shape[1:]
        again, vertex = Quadratic(tuple(shape)), torch.rand(3, *shape)
        torch.testing.assert_close(task.objective(vertex), again(vertex))
        assert (again(2 * vertex) - 2 * again(vertex) > 0).all()
        (batch,) = task.batches("val")

        def evaluate(task: Toy = task, batch: Any = batch) -> float:
            with torch.no_grad():
                return float(task.eval().step(batch).metrics["objective"])  # type: ignore[arg-type]

        before = evaluate()
        optimizer = task.train().configure_optimizers()
        for _ in range(60):
            (one,) = task.batches("train")
            optimizer.zero_grad()
            task.step(one).loss.backward()
            optimizer.step()
        assert evaluate() < before - 0.05


def fit(task: Toy, steps: int) -> None:
    optimizer = task.configure_optimizers()
    for _ in range(steps):
        (batch,) = task.batches("train")
        optimizer.zero_grad()
        task.step(batch).loss.backward()
        optimizer.step()


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    """Costs of an assignment: training finds the cheapest one."""
    file = tmp_path / "costs.npz"

    def make(**changes: Any) -> Toy:
        options: dict[str, Any] = {"objective": "quadratic", "coefficients": file, "size": 3}
        matching = Matching()
        return Toy(
            structure=matching,
            estimator=SST(matching, relaxation="sinkhorn", n_samples=8),
            optimizer=ADAM,
            **options | changes,
        )

    costs = np.array([[3, 1, 2], [1, 3, 3], [2, 3, 0]])
    np.savez(file, linear=costs)
    task = make()
    vertex = torch.tensor([[[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    assert task.objective(vertex).tolist() == [2.0]
    fit(task, 60)
    torch.testing.assert_close(task.structure.argmax(task.scores.detach()[None]), vertex)
    np.savez(file, linear=costs, square=np.stack([np.eye(3), np.ones((3, 3))]))
    assert make().objective(vertex).tolist() == [2.0 + (1 + 9) / 2]
    for arrays, reason in (
        ({"linear": costs[:2]}, r"linear must be \[3, 3\] like a vertex; got \[2, 3\]"),
        ({"linear": costs, "square": costs}, r"square must be \[3, 3, 3\] like a vertex; got \[3, 3\]"),
        ({"linear": costs * np.nan}, "linear must be finite"),
        ({"square": costs}, "with the array linear"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(DamagedDataError, match=reason):
            make()
    with pytest.raises(MissingDataError, match=r"docs/tasks/toy\.md"):
        make(coefficients=tmp_path / "none.npz")
    with pytest.raises(ValueError, match="coefficients are those of objective=quadratic"):
        make(objective="ours")


STRUCTURES: dict[str, Structure] = {
    "arborescence": Arborescence(),
    "binary_tree": BinaryTree(),
    "spanning_tree": SpanningTree(),
    "matching": Matching(),
}
PROGRAMS: list[Structure] = [
    LinearChain(3),
    SemiMarkov(2, 3),
    Alignment(),
    Constituency(),
    ProjectiveTree(),
    DagPath([[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]),
]


def estimator(kind: str, name: str) -> Estimator:
    """An estimator with three samples a step."""
    structure = STRUCTURES[name]
    if kind == "relax":
        return RELAX(structure, "flat", [5] if name == "binary_tree" else [5, 5], n_samples=3)
    if kind == "sst":
        relaxation: Any = "sinkhorn" if name == "matching" else "exp_family"
        return SST(
            structure, relaxation, utility="neg_exponential" if name == "arborescence" else "gumbel", n_samples=3
        )
    return Reinforce(structure, "T", "loo", n_samples=3)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in STRUCTURES for k in ("loo", "relax", "sst") if (n, k) != ("binary_tree", "sst")]
)
def test_the_objective_falls(name: str, kind: str) -> None:
    task = Toy(structure=STRUCTURES[name], estimator=estimator(kind, name), optimizer=ADAM, size=5, eval_samples=500)

    def evaluate() -> float:
        task.eval()
        (batch,) = task.batches("val")
        with torch.no_grad():
            value: Tensor = task.step(batch).metrics["objective"]  # type: ignore[assignment]
        task.train()
        return value.item()

    before = evaluate()
    fit(task, 150)
    assert evaluate() < before - 0.05 * abs(before)


@pytest.mark.parametrize("structure", PROGRAMS, ids=lambda s: s.name)
def test_the_objective_of_dynamic_programs_falls(structure: Structure) -> None:
    estimators: list[Estimator] = [SST(structure, n_samples=3), Reinforce(structure, "X", "loo", n_samples=3)]
    for estimator in estimators:
        torch.manual_seed(0)
        task = Toy(structure=structure, estimator=estimator, optimizer=ADAM, size=5)
        before = task.objective(structure.marginals(task.scores[None])).item()
        optimizer = task.configure_optimizers()
        for _ in range(60):
            (batch,) = task.batches("train")
            optimizer.zero_grad()
            task.step(batch).loss.backward()
            optimizer.step()
        assert task.objective(structure.marginals(task.scores[None])).item() < before - 0.05


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one of ours, released, quadratic"):
        Toy(structure=OneHot(), estimator=Reinforce(OneHot()), optimizer=ADAM, objective="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"KSubset has no vertex over size 5"):
        Toy(structure=KSubset(7), estimator=Reinforce(KSubset(7)), optimizer=ADAM, size=5)
    with pytest.raises(ValueError, match="needs an estimator"):
        Toy(structure=BinaryTree(), estimator=None, optimizer=ADAM)
    with pytest.raises(ValueError, match="size >= 2"):
        Toy(structure=BinaryTree(), estimator=Reinforce(BinaryTree(), "T"), optimizer=ADAM, size=1)


def test_the_figure_finds_its_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "scripts"))
    from toy_figure import finals, read, train

    with initialize_config_dir(str(root / "configs"), version_base="1.3"):
        folder = train(["structure=binary_tree", "estimator=e_reinforce", "budget=smoke", "trainer=cpu",
                        "logger=csv", f"paths.runs={tmp_path}"])  # fmt: skip
    steps, values = read(folder)
    assert len(steps) == len(values) > 0
    assert (folder / "pictures" / "shares.png").exists()
    panels = finals(root / "results" / "toy").axes
    assert len(panels) == 4


def test_the_estimator_knows_that_there_is_no_kl() -> None:
    """All trees of three nodes are stars, so the true gradient is 0; a bound's would be that of its KL."""
    tree = SpanningTree()
    task = Toy(structure=tree, estimator=ImportanceWeighted(tree, 5), optimizer=ADAM, size=3)
    (batch,) = task.batches("train")
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"this loss weighs it by 0$"):
            task.train(mode).step(batch)
