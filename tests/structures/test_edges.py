"""Numbers at the edges of float32: every oracle and loss against sums over all vertices, or itself, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structgrad import losses
from structgrad.structures import OneHot, Structure
from structgrad.testing import computing
from tests.structures.test_second_derivatives import CASES

LOWEST = torch.finfo(torch.float32).min


def some_lowest(scores: Tensor) -> Tensor:
    """A quarter of the parts at the lowest number, as models mask."""
    chosen = torch.randperm(scores[0].numel())[: max(1, scores[0].numel() // 4)]
    flat = scores.flatten(1).clone()
    flat[:, chosen] = LOWEST
    return flat.reshape(scores.shape)


EDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "offset 1e4": lambda s: s + 1e4,
    "offset -1e4": lambda s: s - 1e4,
    "offset 1e7": lambda s: s + 1e7,
    "offset -1e7": lambda s: s - 1e7,
    "temperature 1e-6": lambda s: s / 1e-6,
    "temperature 1e-3": lambda s: s / 1e-3,
    "temperature 1e3": lambda s: s / 1e3,
    "temperature 1e6": lambda s: s / 1e6,
    "some lowest": some_lowest,
    "all lowest": lambda s: torch.full_like(s, LOWEST),
}
LISTED = [name for name, (s, _) in CASES.items() if "enumerate" in s.oracles and s.vertex_layout is s.layout]


class Exact:
    """Sums over all vertices in float64, relative to the best one."""

    def __init__(self, structure: Structure, scores: Tensor) -> None:
        self.structure, self.parts = structure, structure.layout.flatten(structure.parts(scores))
        self.vertices = structure.layout.flatten(structure.enumerate(*scores.shape[1:])) * self.parts[0]
        self.scores = torch.where(self.parts, structure.layout.flatten(scores).double(), 0.0)
        self.values = self.scores @ self.vertices.T
        self.log_p = (self.values - self.values.amax(-1, keepdim=True)).log_softmax(-1)

    def flat(self, shown: Tensor) -> Tensor:
        """Of what is shown like a vertex, float64."""
        return torch.where(self.parts, self.structure.layout.flatten(shown).double(), 0.0)

    def of(self, vertex: Tensor, table: Tensor) -> Tensor:
        """The entries of ``[3, V]`` that belong to vertices ``[3, *parts]``, which must be some."""
        same = (self.flat(vertex)[:, None] == self.vertices).all(-1)
        assert same.any(-1).all(), "not a vertex"
        return table.gather(1, same.int().argmax(-1, keepdim=True))[:, 0]


@pytest.mark.parametrize("path", ["native", "plain"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", LISTED)
def test_oracles(name: str, edge: str, path: str) -> None:
    structure, shape = CASES[name]
    scores = EDGES[edge](torch.randn(3, *shape))
    exact = Exact(structure, scores)
    size = exact.scores.abs().amax(-1).clamp_min(1)
    best = exact.values.amax(-1)
    finite = best.abs() < -LOWEST  # other values round to an infinity
    entropy = -(exact.log_p.exp() * exact.log_p.clamp_min(-1e300)).sum(-1)
    with computing(path):
        found = {o: getattr(structure, o)(scores) for o in ("argmax", "sample") if o in structure.oracles}
        torch.testing.assert_close(exact.of(found["argmax"], exact.values) / size, best / size, rtol=0, atol=1e-6)
        if "sample" in found:
            # What no Gibbs sample is, but once in e^30.
            assert (exact.of(found["sample"], exact.log_p) > -30).all()
            log_p = structure.log_prob(found["argmax"], scores).double()
            expected = exact.of(found["argmax"], exact.log_p)
            torch.testing.assert_close(log_p[finite], expected[finite], rtol=1e-5, atol=1e-5)
        if "top_k" in structure.oracles:
            _, values = structure.top_k(scores, 2)
            torch.testing.assert_close(values[finite, 0].double(), best[finite], rtol=1e-6, atol=1e-6)
        if "log_partition" in structure.oracles:
            log_z = structure.log_partition(scores)[finite].double()
            torch.testing.assert_close(log_z, exact.values.logsumexp(-1)[finite], rtol=1e-6, atol=1e-6)
            mean = exact.flat(structure.marginals(scores))
            torch.testing.assert_close(mean, exact.log_p.exp() @ exact.vertices, rtol=0, atol=2e-6)
            if exact.scores.abs().amax() < 1e30 or (structure.constant_size and "some" not in edge):
                torch.testing.assert_close(structure.entropy(scores).double(), entropy, rtol=1e-5, atol=1e-5)
        if "project" in structure.oracles:
            point = exact.flat(structure.project(scores))
            ahead = ((exact.vertices[None] - point[:, None]) * (exact.scores - point)[:, None]).sum(-1).amax(-1)
            assert (ahead <= 1e-5 * size).all()
        if "sparsemap" in structure.oracles:
            sparse = structure.sparsemap(scores)
            totals = torch.zeros(3).index_add(0, sparse.rows, sparse.weights)
            torch.testing.assert_close(totals, torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge != "all lowest"])
@pytest.mark.parametrize("alpha", [1.0, 1.00001, 1.5, 2.0, 4.0, 20.0])
def test_entmax_and_its_loss(alpha: float, edge: str) -> None:
    """In float32 as in float64."""
    scores = EDGES[edge](torch.randn(4, 5)).requires_grad_()
    wide = scores.detach().double().requires_grad_()
    labels = torch.tensor([0, 1, 2, 3])
    point, exact = OneHot().entmax(scores, alpha), OneHot().entmax(wide, alpha)
    torch.testing.assert_close(point.double(), exact, rtol=0, atol=1e-6)
    loss, exact = losses.entmax_loss(scores, labels, alpha=alpha), losses.entmax_loss(wide, labels, alpha=alpha)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert (loss >= 0).all()
    (gradient,), (expected,) = torch.autograd.grad(loss.sum(), scores), torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge != "all lowest"])
@pytest.mark.parametrize("name", ["one_hot", "k_subset", "spanning_tree", "linear_chain", "budget_subset"])
def test_losses(name: str, edge: str) -> None:
    """In float32 as in float64, relative to the size of the scores, of which the losses are differences."""
    structure, shape = CASES[name]
    scores = EDGES[edge](torch.randn(3, *shape))
    target = structure.argmax(torch.randn(3, *shape))
    size = torch.where(structure.parts(scores), scores, 0.0).abs().amax().double().clamp_min(1)
    for loss in (losses.negative_log_likelihood, losses.sparsemap_loss, losses.structured_hinge_loss):
        narrow = loss(structure, scores, target)
        exact = loss(structure, scores.double(), target.double())
        assert (narrow >= 0).all()
        bounded = exact < -LOWEST
        torch.testing.assert_close(
            narrow[bounded].double() / size, exact[bounded] / size, rtol=1e-5, atol=1e-6, msg=loss.__name__
        )


RELAXED = [(name, relaxation) for name, (structure, _) in CASES.items() for relaxation in structure.relaxations]


@pytest.mark.parametrize(("name", "relaxation"), RELAXED)
def test_relaxations(name: str, relaxation: str) -> None:
    """In float32 as in float64, at all edges."""
    structure, shape = CASES[name]
    draws = structure.relaxations[relaxation].draws
    for edge, moved in EDGES.items():
        if edge == "all lowest":
            continue
        scores = moved(torch.randn(*([draws] if draws else []), 3, *shape))
        narrow = structure.relax(relaxation, scores, None, 1.0).double()
        exact = structure.relax(relaxation, scores.double(), None, 1.0)
        torch.testing.assert_close(narrow, exact, rtol=0, atol=2e-6, msg=edge)


@pytest.mark.parametrize("name", ["one_hot", "k_subset", "spanning_tree", "linear_chain", "budget_subset"])
def test_perturbed_loss(name: str) -> None:
    """Its value with the noise that its samples have, in float32 as in float64; its gradient is finite."""
    structure, shape = CASES[name]
    for edge, moved in EDGES.items():
        if edge in ("all lowest", "some lowest"):
            continue
        scores = moved(torch.randn(3, *shape)).requires_grad_()
        target = structure.argmax(torch.randn(3, *shape))
        exists = structure.parts(scores)
        torch.manual_seed(1)
        loss = losses.perturbed_loss(structure, scores, target, n_samples=4)
        torch.manual_seed(1)
        noisy = torch.where(exists, scores.detach(), 0.0).double() + torch.randn(4, 3, *shape)
        best = structure.argmax(noisy) * exists
        value = (best * noisy).flatten(2).sum(2).mean(0) - (target * exists * scores.detach().double()).flatten(1).sum(
            1
        )
        torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-4, msg=edge)
        assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()


#: The same edges where float64 ends.
WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "offset 1e14": lambda s: s + 1e14,
    "offset -1e14": lambda s: s - 1e14,
    "temperature 1e-6": lambda s: s / 1e-6,
    "temperature 1e6": lambda s: s / 1e6,
}


@pytest.mark.parametrize("name", [name for name in LISTED if CASES[name][0].constant_size])
def test_float64(name: str) -> None:
    """Marginals and entropies of vertices of one size, whose parts are the same but for what the number itself lost."""
    structure, shape = CASES[name]
    if "marginals" not in structure.oracles:
        pytest.skip("no Gibbs distribution")
    for edge, moved in WIDE.items():
        scores = moved(torch.randn(3, *shape, dtype=torch.float64))
        shown = Exact(structure, scores - scores.flatten(1)[:, :1].reshape(3, *[1] * len(shape)))
        mean = shown.flat(structure.marginals(scores))
        torch.testing.assert_close(mean, shown.log_p.exp() @ shown.vertices, rtol=0, atol=1e-9, msg=edge)
        entropy = -(shown.log_p.exp() * shown.log_p.clamp_min(-1e300)).sum(-1)
        torch.testing.assert_close(structure.entropy(scores), entropy, rtol=1e-9, atol=1e-9, msg=edge)
