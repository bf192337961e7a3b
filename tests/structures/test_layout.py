"""Layouts: how parts are counted and shown, and that nobody asks for one by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from structgrad.estimators import RODEO, SST, AdaptiveIMLE, Estimator, StraightThrough, SurrogateGradient, Utility
from structgrad.structures import KSubset, Labelled, Layout, SpanningTree, Structure, Subset
from structgrad.structures.layout import Directed, Matrix, Undirected, Vector, make_layout
from structgrad.testing import Case, StructureContract


class Palindrome(Layout):
    """``[n]``, equal from both ends: the parts are the first half, each shown at both ends (the middle one once)."""

    def __init__(self) -> None:
        super().__init__("palindrome", ("n",))

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        n = scores.shape[-1]
        first = torch.arange(n, device=scores.device) < (n + 1) // 2
        return (first if mask is None else mask & first).expand(scores.shape)

    def mirror(self, parts: Tensor) -> Tensor:
        return self.unflatten(self.flatten(parts), parts.shape[-1:])

    def flatten(self, parts: Tensor) -> Tensor:
        return parts[..., : (parts.shape[-1] + 1) // 2]

    def unflatten(self, flat: Tensor, shape: torch.Size) -> Tensor:
        return torch.cat([flat, flat[..., : shape[-1] // 2].flip(-1)], -1)


class TestPalindrome(StructureContract):
    """A layout that the library has never heard of, under all oracles of subsets."""

    cases: ClassVar[list[Case]] = [
        Case(Subset(Palindrome()), (5,), [torch.arange(5) != i for i in (1, 2)]),
        Case(KSubset(2, Palindrome()), (6,), [torch.arange(6) != i for i in (0, 2)]),
    ]


class Fixed(Utility):
    """Scores plus numbers that depend on the part alone."""

    is_location_family: ClassVar[bool] = True

    def _sample(self, scores: Tensor) -> Tensor:
        return scores + torch.arange(scores.shape[-1]).to(scores).sin() / 2

    def log_prob(self, utility: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros_like(utility)

    def kl(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores)


ESTIMATORS: dict[str, Callable[[Structure], Estimator]] = {
    **{
        f"sst_{relaxation}_{backward}": lambda s, r=relaxation, b=backward: SST(s, r, Fixed(), backward=b)  # type: ignore[misc]
        for relaxation in ("exp_family", "euclidean")
        for backward in ("exact", "finite_difference")
    },
    "identity": lambda s: SurrogateGradient(s),
    "spigot": lambda s: SurrogateGradient(s, "spigot", 7.0),
    "blackbox": lambda s: SurrogateGradient(s, "blackbox", 20.0),
    "imle": lambda s: SurrogateGradient(s, "imle", 20.0, Fixed()),
    "adaptive_imle": lambda s: AdaptiveIMLE(s, Fixed()),
    "softmax_st": lambda s: StraightThrough(s),
    "simple": lambda s: StraightThrough(s, forward="sample"),
    "rodeo": lambda s: RODEO(s, 3),
}


@pytest.mark.parametrize("subset", [Subset, lambda layout=None: KSubset(2, layout or Vector())])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_mirrored_layout_has_the_gradient_of_its_parts(name: str, subset: Callable[..., Structure]) -> None:
    """Five shown entries of three parts against the three parts, whose objective shows them itself."""
    if name == "rodeo" and subset is not Subset:
        return
    layout = Palindrome()
    torch.manual_seed(0)
    parts = torch.randn(2, 3, dtype=torch.float64)
    weight, curve = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def objective(vertices: Tensor, rows: Tensor) -> Tensor:
        return (vertices @ weight).tanh() @ curve + vertices[:, 0] * rows

    gradients = []
    for shown in (True, False):
        torch.manual_seed(1)
        estimator = ESTIMATORS[name](subset(layout) if shown else subset()).double()
        for parameter in estimator.parameters():
            torch.nn.init.normal_(parameter)
        if isinstance(estimator, AdaptiveIMLE):
            estimator.alpha.fill_(3.0)
        # What lies beyond the parts is never looked at.
        scores = torch.cat([parts, torch.full((2, 2), torch.nan)], 1) if shown else parts.clone()
        scores.requires_grad_()
        estimate = estimator(
            scores, objective if shown else lambda v, rows: objective(layout.unflatten(v, torch.Size([5])), rows)
        )
        (gradient,) = torch.autograd.grad(estimate.surrogate.sum(), scores)
        assert (gradient[:, 3:] == 0).all()
        gradients.append(gradient[:, :3])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("layout", [Vector(), Directed(), Undirected(), Palindrome()], ids=repr)
def test_pull_back_is_the_transpose_of_mirror(layout: Layout) -> None:
    torch.manual_seed(0)
    shape = (5,) * layout.ndim
    x, y = torch.randn(2, 3, *shape, dtype=torch.float64)
    exists = layout.parts(x)
    x = torch.where(exists, x, 0.0)
    pulled = layout.pull_back(y)
    left, right = (layout.mirror(x) * y).sum(), (x * pulled).sum()
    torch.testing.assert_close(left, right)
    if layout.is_mirrored:
        assert (pulled[~exists] == 0).all()
        torch.testing.assert_close(Layout.pull_back(layout, y), pulled)
    torch.testing.assert_close(layout.unflatten(layout.flatten(x), torch.Size(shape)), layout.mirror(x))


def test_the_transpose_that_follows_is_differentiable() -> None:
    gradient = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Palindrome().pull_back, gradient)
    assert not Palindrome().pull_back(gradient.detach()).requires_grad


def test_both_directions_of_an_edge_are_weighed() -> None:
    scores = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    upper = torch.ones(4, 4, dtype=torch.bool).triu(1)
    labelled = Labelled(SpanningTree(), labels=3).layout
    for weights in ((0.5, 0.5), (1.0, 4.2)):
        expected = weights[0] * scores + weights[1] * scores.transpose(1, 2)
        torch.testing.assert_close(labelled.symmetrize(scores, weights)[:, upper], expected[:, upper])
        alone = Undirected().symmetrize(scores[..., 0], weights)
        torch.testing.assert_close(alone[:, upper], expected[..., 0][:, upper])
        assert torch.equal(Directed().symmetrize(scores[..., 0], weights), scores[..., 0])


def test_names() -> None:
    assert [type(make_layout(name)) for name in ("vector", "matrix", "directed", "undirected")] == [  # type: ignore[arg-type]
        Vector,
        Matrix,
        Directed,
        Undirected,
    ]
    with pytest.raises(ValueError, match="layout must be one of vector, matrix, directed, undirected, or a Layout"):
        Subset("diagonal")  # type: ignore[arg-type]
    assert repr(Undirected()) == "Undirected()"
    assert repr(Layout("spans", ("n", "n"))) == "Layout('spans', ('n', 'n'))"
    layout = Palindrome()
    assert make_layout(layout) is layout
