"""Numbers at the edges of float32: every oracle and loss against sums over all vertices, or itself, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structgrad import losses
from structgrad.structures import KSubset, OneHot, Structure
from structgrad.testing import computing
from tests.structures.test_second_derivatives import CASES

LOWEST = torch.finfo(torch.float32).min


def at_the_end(share: float, *ends: float) -> Callable[[Tensor], Tensor]:
    """This share of the parts at ends of the number format (each at one of them), as models mask and force."""

    def moved(scores: Tensor) -> Tensor:
        parts = scores[0].numel()
        flat = scores.flatten(1).clone()
        chosen = torch.randperm(parts)[: max(1, int(share * parts))]
        flat[:, chosen] = torch.tensor(ends, dtype=scores.dtype)[torch.randint(len(ends), (len(chosen),))]
        return flat.reshape(scores.shape)

    return moved


EDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "offset 1e4": lambda s: s + 1e4,
    "offset -1e4": lambda s: s - 1e4,
    "offset 1e7": lambda s: s + 1e7,
    "offset -1e7": lambda s: s - 1e7,
    "temperature 1e-6": lambda s: s / 1e-6,
    "temperature 1e-3": lambda s: s / 1e-3,
    "temperature 1e3": lambda s: s / 1e3,
    "temperature 1e6": lambda s: s / 1e6,
    "some lowest": at_the_end(0.25, LOWEST),
    "most lowest": at_the_end(0.7, LOWEST),
    "all lowest": at_the_end(1.0, LOWEST),
    "some highest": at_the_end(0.25, -LOWEST),
    "all highest": at_the_end(1.0, -LOWEST),
    "lowest and highest": at_the_end(0.5, LOWEST, -LOWEST),
}
LISTED = [name for name, (s, _) in CASES.items() if "enumerate" in s.oracles and s.vertex_layout is s.layout]


@functools.cache
def listed(structure: Structure, *shape: int) -> Tensor:
    """All vertices, ``[V, P]``."""
    return structure.layout.flatten(structure.enumerate(*shape))


class Exact:
    """Sums over all vertices in float64, relative to the best one.

    Scores at the ends of the number format are counted apart: the vertices with the best count are the
    only ones, and their probabilities follow from their other scores.
    """

    def __init__(self, structure: Structure, scores: Tensor) -> None:
        self.structure, self.parts = structure, structure.layout.flatten(structure.parts(scores))
        self.vertices = listed(structure, *scores.shape[1:]) * self.parts[0]
        self.scores = torch.where(self.parts, structure.layout.flatten(scores).double(), 0.0)
        self.far = self.scores.abs() > 1e30
        self.count = torch.where(self.far, self.scores.sign(), 0.0) @ self.vertices.T
        self.best = self.count == self.count.amax(-1, keepdim=True)
        self.ordinary = torch.where(self.far, 0.0, self.scores)
        values = self.ordinary @ self.vertices.T
        self.values = values - self.count * LOWEST
        values = values.masked_fill(~self.best, -torch.inf)
        self.log_p = (values - values.amax(-1, keepdim=True)).log_softmax(-1)
        # Where sums in float64 have the digits: no best vertex has a far part and none cancel, or a constant goes out
        # of all parts.
        uses = (self.far.double() @ self.vertices.T > 0) & self.best
        self.told = ~uses.any(-1) & ~(self.scores > 1e30).any(-1)
        if structure.constant_size:
            self.told |= (self.far | ~self.parts).all(-1) & (self.scores.amax(-1) * self.scores.amin(-1) >= 0)

    def flat(self, shown: Tensor) -> Tensor:
        """Of what is shown like a vertex, float64."""
        return torch.where(self.parts, self.structure.layout.flatten(shown).double(), 0.0)

    def at(self, vertex: Tensor) -> Tensor:
        """The indices ``[3, 1]`` of vertices ``[3, *parts]``, which must be some."""
        same = (self.flat(vertex)[:, None] == self.vertices).all(-1)
        assert same.any(-1).all(), "not a vertex"
        return same.int().argmax(-1, keepdim=True)

    def of(self, vertex: Tensor, table: Tensor) -> Tensor:
        """The entries of ``[3, V]`` that belong to vertices ``[3, *parts]``."""
        return table.gather(1, self.at(vertex))[:, 0]


@pytest.mark.parametrize("path", ["native", "plain"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", LISTED)
def test_oracles(name: str, edge: str, path: str) -> None:
    if name == "factor_graph" and path == "plain" and "est" in edge:
        pytest.skip("in plain torch local polytopes keep few digits at scores of 1e4 and more")
    check_oracles(name, edge, path)


@pytest.mark.parametrize("edge", ["some lowest", "all lowest", "offset 1e7"])
@pytest.mark.parametrize("name", ["one_hot", "k_subset", "budget_subset", "spanning_tree"])
def test_kernels(name: str, edge: str) -> None:
    check_oracles(name, edge, "kernels")


def test_kernels_of_arborescences() -> None:
    check_oracles("arborescence", "some lowest", "kernels")


@pytest.mark.parametrize("name", LISTED)
def test_derivatives_beside_far_scores(name: str) -> None:
    """Those of log-partitions and entropies are those of the distribution of the remaining vertices."""
    structure, shape = CASES[name]
    if "log_partition" not in structure.oracles:
        pytest.skip("no Gibbs distribution")
    scores = EDGES["most lowest"](torch.randn(3, *shape)).double().requires_grad_()
    exact = Exact(structure, scores.detach())
    p = exact.log_p.exp()
    mean = p @ exact.vertices
    (slope,) = torch.autograd.grad(structure.log_partition(scores).sum(), scores)
    torch.testing.assert_close(exact.flat(slope), mean, rtol=0, atol=1e-9)
    structure.entropy(scores).sum().backward()
    assert scores.grad is not None
    near = exact.ordinary @ exact.vertices.T  # entropy = log Z - <mean, s>; its slope is -Cov s
    centred = exact.vertices - mean[:, None]
    covariance = (p[..., None] * centred * (near - (p * near).sum(-1, keepdim=True))[..., None]).sum(1)
    torch.testing.assert_close(exact.flat(scores.grad), -covariance, rtol=1e-7, atol=1e-7)


def test_far_scores_of_different_sizes_are_refused() -> None:
    """Where every vertex needs one of them; else they are as good as missing."""
    scores = torch.tensor([[0.3, 0.1, -1e30, LOWEST]])
    assert KSubset(2).marginals(scores).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="different sizes"):
        KSubset(3).marginals(scores)


def test_divergences_beside_far_scores() -> None:
    """Of distributions with the same far parts: those of the vertices that remain."""
    p, q = torch.randn(2, 5, 4, dtype=torch.float64)
    p[:, :2], q[:, :2] = -1e300, -1e300
    one, rest = KSubset(3), torch.tensor([0, 0, 1.0, 1.0], dtype=torch.float64)
    for divergence in (one.kl, one.cross_entropy, lambda p, q: one.renyi(p, q, 0.5)):
        expected = torch.log(torch.tensor(2.0, dtype=torch.float64)) if divergence == one.cross_entropy else 0.0
        # The last two parts are in every vertex that remains, with one of the first two.
        torch.testing.assert_close(divergence(p, q), rest[:1] + expected + torch.zeros(5, dtype=torch.float64))


def check_oracles(name: str, edge: str, path: str) -> None:
    structure, shape = CASES[name]
    scores = EDGES[edge](torch.randn(3, *shape))
    exact = Exact(structure, scores)
    size = exact.scores.abs().amax(-1).clamp_min(1)
    best = exact.values.amax(-1)
    finite = (best.abs() < -LOWEST) & (exact.told | (path == "native"))  # other values round to an infinity
    entropy = -(exact.log_p.exp() * exact.log_p.clamp_min(-1e300)).sum(-1)
    # Elsewhere than in eager CPU code nobody looks whether far scores take all digits of the others.
    told = exact.told if path != "native" else torch.ones_like(exact.told)
    with computing(path):
        found = {o: getattr(structure, o)(scores) for o in ("argmax", "sample") if o in structure.oracles}
        torch.testing.assert_close(exact.of(found["argmax"], exact.values) / size, best / size, rtol=0, atol=1e-6)
        worse = exact.log_p.amax(-1) - exact.of(found["argmax"], exact.log_p)
        assert (worse <= 1e-5 * exact.ordinary.abs().amax(-1).clamp_min(1))[told].all()
        if "sample" in found:
            # What no Gibbs sample is, but once in e^30.
            assert (exact.of(found["sample"], exact.log_p) > -30)[told].all()
            log_p = structure.log_prob(found["argmax"], scores).double()
            expected = exact.of(found["argmax"], exact.log_p)
            torch.testing.assert_close(log_p[finite], expected[finite], rtol=1e-5, atol=1e-5)
        if "top_k" in structure.oracles:
            vertices, values = structure.top_k(scores, 2)
            torch.testing.assert_close(values[finite, 0].double(), best[finite], rtol=1e-6, atol=1e-6)
            assert exact.best.gather(1, exact.at(vertices[:, 0]))[:, 0][told].all()
        if "log_partition" in structure.oracles:
            log_z = structure.log_partition(scores)[finite].double()
            torch.testing.assert_close(log_z, exact.values.logsumexp(-1)[finite], rtol=1e-6, atol=1e-6)
            mean = exact.flat(structure.marginals(scores))
            torch.testing.assert_close(mean[told], (exact.log_p.exp() @ exact.vertices)[told], rtol=0, atol=2e-6)
            if path == "native" or exact.scores.abs().amax() < 1e30 or (structure.constant_size and "all" in edge):
                torch.testing.assert_close(
                    structure.entropy(scores).double()[told], entropy[told], rtol=1e-5, atol=1e-5
                )
        if "project" in structure.oracles:
            point = exact.flat(structure.project(scores))
            ahead = (exact.vertices[None] - point[:, None]) * (exact.ordinary - point)[:, None]
            ahead = ahead.sum(-1).masked_fill(~exact.best, -torch.inf).amax(-1)
            off = (point * torch.where(exact.far, exact.scores.sign(), 0.0)).sum(-1) - exact.count.amax(-1)
            assert (off.abs() <= 1e-5)[told].all()
            assert (ahead <= 1e-5 * exact.ordinary.abs().amax(-1).clamp_min(1))[told].all()
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
    bounded = exact < -LOWEST
    torch.testing.assert_close(loss[bounded].double(), exact[bounded], rtol=1e-5, atol=1e-5)
    assert (loss >= 0).all()
    (gradient,), (expected,) = torch.autograd.grad(loss.sum(), scores), torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["one_hot", "k_subset", "spanning_tree", "linear_chain", "budget_subset"])
def test_losses(name: str, edge: str) -> None:
    """In float32 as in float64, and the scores that are not far as if the far parts were decided."""
    structure, shape = CASES[name]
    scores = EDGES[edge](torch.randn(3, *shape))
    target = structure.argmax(torch.where(scores.abs() > 1e30, scores, torch.randn(3, *shape)))
    size = torch.where(structure.parts(scores) & (scores.abs() < 1e30), scores, 0.0).abs().amax().double().clamp_min(1)
    for loss in (losses.negative_log_likelihood, losses.sparsemap_loss, losses.structured_hinge_loss):
        narrow = loss(structure, scores, target)
        exact = loss(structure, scores.double(), target.double())
        assert (narrow >= 0).all()
        assert (exact < 1e10).all()  # the target has the best far parts
        torch.testing.assert_close(narrow.double() / size, exact / size, rtol=1e-5, atol=1e-6, msg=loss.__name__)


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
        scores = moved(torch.randn(3, *shape)).requires_grad_()
        far = scores.detach().abs() > 1e30
        target = structure.argmax(torch.where(far, scores.detach(), torch.randn(3, *shape)))
        exists = structure.parts(scores)
        torch.manual_seed(1)
        loss = losses.perturbed_loss(structure, scores, target, n_samples=4)
        torch.manual_seed(1)
        # What is far decides; 1e7 for it leaves the rest its digits.
        decided = torch.where(far, scores.detach().sign() * 1e7, torch.where(exists, scores.detach(), 0.0)).double()
        noisy = decided + torch.randn(4, 3, *shape)
        best = structure.argmax(noisy) * exists
        value = (best * noisy).flatten(2).sum(2).mean(0) - (target * exists * decided).flatten(1).sum(1)
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
