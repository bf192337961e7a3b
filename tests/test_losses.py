"""Supervised losses: against their definition by enumeration, against other packages, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import entmax
import pytest
import torch
from scipy import optimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from structgrad import losses
from structgrad.structures import KSubset, Matching, OneHot, SpanningTree, Subset
from structgrad.structures.base import Structure, UnsupportedError
from tests.cases import CASES

STRUCTURES: list[tuple[Structure, tuple[int, ...]]] = [
    (case.plain, case.shape) for case in CASES.values() if "enumerate" in case.plain.oracles and case.plain.is_linear
]
IDS = [f"{structure.name}-{structure.layout.name}" for structure, _ in STRUCTURES]
each_structure = pytest.mark.parametrize(("structure", "shape"), STRUCTURES, ids=IDS)


def problem(structure: Structure, shape: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 scores of five examples, right vertices of them, and all vertices."""
    vertices = structure.enumerate(*shape)
    target = vertices[torch.randint(len(vertices), (5,))]
    return scale * torch.randn(5, *shape, dtype=torch.float64), target, vertices


def values(structure: Structure, scores: Tensor, vertices: Tensor) -> Tensor:
    """``<x, s>``, ``[batch, V]``."""
    flatten = structure.layout.flatten
    return flatten(scores) @ flatten(vertices).T


@each_structure
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_negative_log_likelihood_is_that_of_the_enumerated_distribution(
    structure: Structure, shape: tuple[int, ...], scale: float
) -> None:
    if "log_prob" not in structure.oracles:
        pytest.skip("its partition function is intractable")
    scores, target, vertices = problem(structure, shape, scale)
    loss = losses.negative_log_likelihood(structure, scores, target)
    right = structure.inner(target, scores)
    torch.testing.assert_close(loss, values(structure, scores, vertices).logsumexp(-1) - right, rtol=1e-9, atol=1e-9)


@each_structure
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_sparsemap_loss_is_the_maximum_over_distributions_of_vertices(
    structure: Structure, shape: tuple[int, ...], scale: float
) -> None:
    if "euclidean" not in structure.relaxations:
        pytest.skip("it has no projection")
    scores, target, vertices = problem(structure, shape, scale)
    loss = losses.sparsemap_loss(structure, scores, target)
    flat = structure.layout.flatten(vertices).numpy()
    for b in range(len(scores)):
        s = structure.layout.flatten(scores[b]).numpy()
        y = structure.layout.flatten(target[b]).numpy()

        def negative(w: object, s: object = s) -> float:
            m = w @ flat
            return float(m @ m / 2 - s @ m)

        found = optimize.minimize(
            negative,
            [1 / len(flat)] * len(flat),
            bounds=[(0, 1)] * len(flat),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        expected = -found.fun - s @ y + y @ y / 2
        assert float(loss[b]) == pytest.approx(expected, abs=1e-6)


@each_structure
def test_hinge_is_the_enumerated_maximum(structure: Structure, shape: tuple[int, ...]) -> None:
    scores, target, vertices = problem(structure, shape)
    loss = losses.structured_hinge_loss(structure, scores, target, cost=0.7)
    flatten = structure.layout.flatten
    different = (flatten(vertices)[None] - flatten(target)[:, None]).abs().sum(-1)
    expected = (values(structure, scores, vertices) + 0.7 * different).amax(-1) - structure.inner(target, scores)
    torch.testing.assert_close(loss, expected)


def relaxations() -> list[tuple[Structure, tuple[int, ...], str]]:
    """Every relaxation of the structures that has a loss."""
    return [
        (structure, shape, name)
        for structure, shape in STRUCTURES
        for name, relaxation in structure.relaxations.items()
        if relaxation.regularizer is not None or name == "exp_family"
    ]


@pytest.mark.parametrize(
    ("structure", "shape", "relaxation"),
    relaxations(),
    ids=[f"{s.name}-{s.layout.name}-{r}" for s, _, r in relaxations()],
)
class TestFenchelYoung:
    def loss(self, structure: Structure, relaxation: str, target: Tensor) -> object:
        return lambda s: losses.fenchel_young_loss(structure, s, target, relaxation=relaxation)

    def test_gradient_is_the_derivative_of_the_value(
        self, structure: Structure, shape: tuple[int, ...], relaxation: str
    ) -> None:
        # Scores of other sizes would lie on kinks of the projection no more often; a seed without one is fixed.
        scores, target, _ = problem(structure, shape)
        assert gradcheck(self.loss(structure, relaxation, target), scores.requires_grad_(), atol=1e-5)

    def test_gradient_is_relaxation_minus_target(
        self, structure: Structure, shape: tuple[int, ...], relaxation: str
    ) -> None:
        scores, target, _ = problem(structure, shape)
        loss = losses.fenchel_young_loss(structure, scores.requires_grad_(), target, relaxation=relaxation)
        (gradient,) = torch.autograd.grad(loss.sum(), scores)
        expected = structure.relax(relaxation, scores.detach()) - target
        exists = structure.parts(scores)
        torch.testing.assert_close(gradient, torch.where(exists, expected, 0.0), atol=1e-6, rtol=1e-6)

    def test_not_negative_and_float32_survives_large_scores(
        self, structure: Structure, shape: tuple[int, ...], relaxation: str
    ) -> None:
        scores, target, _ = problem(structure, shape, 100.0)
        wide = losses.fenchel_young_loss(structure, scores, target, relaxation=relaxation)
        narrow = losses.fenchel_young_loss(structure, scores.float(), target, relaxation=relaxation)
        assert (wide >= -1e-9).all()
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-3)

    def test_missing_parts_are_not_looked_at(
        self, structure: Structure, shape: tuple[int, ...], relaxation: str
    ) -> None:
        """Whatever their scores are, the loss is that of the vertices that are left, and their gradient is 0."""
        mask = next(case.mask for case in CASES.values() if case.plain is structure)[-1:]
        target = structure.argmax(torch.randn(1, *shape, dtype=torch.float64), mask)
        scores = torch.randn(1, *shape, dtype=torch.float64)
        exists = structure.parts(scores, mask)
        found = []
        for filler in (0.0, 50.0, torch.nan):
            filled = torch.where(exists, scores, filler).requires_grad_()
            loss = losses.fenchel_young_loss(structure, filled, target, mask, relaxation=relaxation)
            (gradient,) = torch.autograd.grad(loss.sum(), filled)
            assert gradient.isfinite().all()
            assert (gradient[~exists] == 0).all()
            expected = structure.relax(relaxation, scores, mask) - target
            torch.testing.assert_close(gradient, torch.where(exists, expected, 0.0), atol=1e-6, rtol=1e-6)
            found.append(loss)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("relaxation", ["euclidean", "exp_family", "categorical"])
def test_second_derivatives(relaxation: str) -> None:
    scores, target, _ = problem(OneHot(), (4,))
    loss = lambda s: losses.fenchel_young_loss(OneHot(), s, target, relaxation=relaxation)  # noqa: E731
    assert gradgradcheck(loss, scores.requires_grad_())


def test_sparsemap_loss_has_the_projections_jacobian_as_its_hessian() -> None:
    structure = SpanningTree()
    scores, target, _ = problem(structure, (4, 4))
    scores, target = scores[:1], target[:1]
    hessian = torch.autograd.functional.hessian(lambda s: losses.sparsemap_loss(structure, s, target).sum(), scores)
    exists = structure.parts(scores)
    jacobian = torch.autograd.functional.jacobian(lambda s: torch.where(exists, structure.project(s), 0.0), scores)
    torch.testing.assert_close(hessian, jacobian)
    assert jacobian.abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_against_entmax(scale: float) -> None:
    scores = scale * torch.randn(6, 5)
    labels = torch.randint(5, (6,))
    pairs = [
        (losses.sparsemax_loss(scores, labels), entmax.SparsemaxLoss(reduction="none")(scores, labels)),
        (losses.entmax_loss(scores, labels), entmax.Entmax15Loss(reduction="none")(scores, labels)),
        (losses.entmax_loss(scores, labels, alpha=1.3), entmax.EntmaxBisectLoss(1.3, reduction="none")(scores, labels)),
        (
            losses.entmax_loss(scores, labels, alpha=1.0),
            torch.nn.functional.cross_entropy(scores, labels, reduction="none"),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_entmax_loss_accepts_distributions_and_has_the_right_gradient(alpha: float) -> None:
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 4, dtype=torch.float64).softmax(-1)
    assert gradcheck(lambda s: losses.entmax_loss(s, target, alpha=alpha), scores, atol=1e-5)
    itself = OneHot().entmax(scores, alpha).detach()
    torch.testing.assert_close(
        losses.entmax_loss(scores, itself, alpha=alpha), torch.zeros(3).double(), atol=1e-7, rtol=0
    )


def test_perturbed_loss_of_one_hot_with_gumbel_noise_is_softmax() -> None:
    """E max(s + Z) = logsumexp(s) + Euler's gamma: value, gradient and Hessian within 5 standard errors (error
    probability of all 35 numbers below 1e-4; the seed is fixed).
    """
    scores, label, repeats = torch.tensor([0.5, -0.3, 1.0, 0.0]).double(), 2, 200_000
    target = torch.eye(4, dtype=torch.float64)[label]
    batch = scores.expand(repeats, 4).clone().requires_grad_()
    loss = losses.perturbed_loss(OneHot(), batch, target.expand(repeats, 4), utility="gumbel", n_samples=1)
    (gradient,) = torch.autograd.grad(loss.sum(), batch, create_graph=True)
    rows = torch.stack([torch.autograd.grad(gradient[:, i].sum(), batch, retain_graph=True)[0] for i in range(4)], 1)
    p = scores.softmax(0)
    value = scores.logsumexp(0) + 0.5772156649 - scores[label]
    for samples, expected in ((loss, value), (gradient, p - target), (rows, p.diag() - p[:, None] * p)):
        samples = samples.detach()
        error = samples.std(0) / repeats**0.5
        assert ((samples.mean(0) - expected).abs() <= 5 * error).all()


@each_structure
def test_perturbed_loss_has_mean_argmax_minus_target_as_gradient(structure: Structure, shape: tuple[int, ...]) -> None:
    """And its value is the mean of the enumerated maxima."""
    scores, target, vertices = problem(structure, shape)
    torch.manual_seed(3)
    loss = losses.perturbed_loss(structure, scores.requires_grad_(), target, sigma=0.5, n_samples=7)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    torch.manual_seed(3)
    noise = torch.randn(7, *scores.shape, dtype=torch.float64)
    perturbed = scores.detach() + 0.5 * noise
    mean = structure.argmax(perturbed).mean(0)
    torch.testing.assert_close(gradient, torch.where(structure.parts(scores), mean - target, 0.0))
    largest = values(structure, perturbed.flatten(0, 1), vertices).amax(-1).reshape(7, -1).mean(0)
    torch.testing.assert_close(loss, largest - structure.inner(target, scores))


@pytest.mark.parametrize("relaxation", ["categorical", "binary"])
def test_entropic_losses_of_means_are_divergences(relaxation: str) -> None:
    """``KL(y || m*(s))`` for a target inside of the polytope, where the regulariser of the target counts."""
    torch.manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.float64)
    if relaxation == "categorical":
        target = torch.randn(3, 4, dtype=torch.float64).softmax(-1)
        loss = losses.fenchel_young_loss(OneHot(), scores, target, relaxation="categorical")
        expected = (target * (target.log() - scores.log_softmax(-1))).sum(-1)
    else:
        target = torch.rand(3, 4, dtype=torch.float64)
        loss = losses.fenchel_young_loss(Subset(), scores, target, relaxation="binary")
        p = scores.sigmoid()
        expected = (target * (target / p).log() + (1 - target) * ((1 - target) / (1 - p)).log()).sum(-1)
    torch.testing.assert_close(loss, expected)


Options = dict[str, object]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (losses.NegativeLogLikelihood, {}),
        (losses.SparseMAPLoss, {}),
        (losses.FenchelYoungLoss, {"relaxation": "binary"}),
        (losses.PerturbedLoss, {"sigma": 1e-12}),
        (losses.StructuredHingeLoss, {"cost": 0.3}),
        (losses.SparsemaxLoss, {}),
        (losses.EntmaxLoss, {"alpha": 1.3}),
    ],
)
def test_missing_parts_leave_the_loss_of_a_smaller_problem(loss: type[losses.Loss], options: Options) -> None:
    """By a mask or by lengths, whatever the scores of the missing parts are, in functions and modules."""
    of_classes = loss in (losses.SparsemaxLoss, losses.EntmaxLoss)
    structure: Structure = OneHot() if of_classes else KSubset(2)
    scores = torch.tensor([[0.4, -0.3, 0.5, 9.0, torch.nan]], dtype=torch.float64)
    target = torch.tensor([[0.0, 1, 1, 0, 0]], dtype=torch.float64)
    if of_classes:
        target = torch.tensor([[0.0, 1, 0, 0, 0]], dtype=torch.float64)
    module = loss(**options) if of_classes else loss(structure, **options)  # type: ignore[arg-type]
    expected = module(scores[:, :3], target[:, :3])
    assert expected > 0
    mask, lengths = torch.tensor([True, True, True, False, False]), torch.tensor([3])
    torch.testing.assert_close(module(scores, target, mask), expected)
    torch.testing.assert_close(module(scores, target, lengths=lengths), expected)
    if loss is losses.StructuredHingeLoss:  # by hand: the best is {0, 2}, and two parts of {1, 2} differ
        assert expected.item() == pytest.approx(0.9 + 0.3 * 2 - 0.2)


def test_one_and_no_part() -> None:
    one = torch.zeros(2, 1, requires_grad=True)
    for loss in (losses.sparsemap_loss, losses.negative_log_likelihood, losses.structured_hinge_loss):
        assert loss(OneHot(), one, torch.ones(2, 1)).tolist() == [0.0, 0.0]
        assert loss(Subset(), torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]
        assert loss(SpanningTree(), torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)).tolist() == [0.0, 0.0]


def test_modules_reduce_what_the_functions_return() -> None:
    structure = KSubset(2)
    scores, target, _ = problem(structure, (4,))
    labels = target.argmax(-1)
    for module, losses_of_examples in (
        (losses.NegativeLogLikelihood, losses.negative_log_likelihood(structure, scores, target)),
        (losses.SparseMAPLoss, losses.sparsemap_loss(structure, scores, target)),
        (losses.StructuredHingeLoss, losses.structured_hinge_loss(structure, scores, target)),
    ):
        torch.testing.assert_close(module(structure, reduction="none")(scores, target), losses_of_examples)
        torch.testing.assert_close(module(structure)(scores, target), losses_of_examples.mean())
        torch.testing.assert_close(module(structure, reduction="sum")(scores, target), losses_of_examples.sum())
    torch.testing.assert_close(losses.SparsemaxLoss()(scores, labels), losses.sparsemax_loss(scores, labels).mean())
    torch.testing.assert_close(
        losses.EntmaxLoss(1.2)(scores, labels), losses.entmax_loss(scores, labels, alpha=1.2).mean()
    )
    binary = losses.FenchelYoungLoss(structure, "binary")(scores, target)
    torch.testing.assert_close(binary, losses.fenchel_young_loss(structure, scores, target, relaxation="binary").mean())
    torch.manual_seed(1)
    perturbed = losses.PerturbedLoss(structure, "gumbel", 0.5, 3)(scores, target)
    torch.manual_seed(1)
    again = losses.perturbed_loss(structure, scores, target, utility="gumbel", sigma=0.5, n_samples=3).mean()
    torch.testing.assert_close(perturbed, again)


def test_refusals() -> None:
    scores, target, _ = problem(KSubset(2), (4,))
    with pytest.raises(UnsupportedError, match="of KSubset is none; it has euclidean, categorical, binary"):
        losses.fenchel_young_loss(KSubset(2), scores, target, relaxation="l2x")
    with pytest.raises(UnsupportedError, match="Matching lacks"):
        losses.NegativeLogLikelihood(Matching())
    with pytest.raises(ValueError, match="another shape"):
        losses.sparsemap_loss(KSubset(2), scores, target[:, :3])
    with pytest.raises(ValueError, match="alpha"):
        losses.entmax_loss(scores, target, alpha=0.5)
    with pytest.raises(ValueError, match="cost"):
        losses.structured_hinge_loss(KSubset(2), scores, target, cost=-1.0)
    with pytest.raises(ValueError, match="reduction"):
        losses.SparsemaxLoss("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sigma"):
        losses.PerturbedLoss(KSubset(2), sigma=-1.0)
    with pytest.raises(TypeError, match="n_samples must be a whole number"):
        losses.PerturbedLoss(KSubset(2), n_samples=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cost"):
        losses.StructuredHingeLoss(KSubset(2), cost=-1.0)


def test_modules_show_their_options() -> None:
    assert repr(losses.EntmaxLoss(1.2)) == "EntmaxLoss(alpha=1.2, reduction='mean', ignore_index=None)"
    text = repr(losses.PerturbedLoss(KSubset(2), "gumbel", 0.5))
    assert "utility='gumbel', sigma=0.5, n_samples=10, reduction='mean'" in text


@pytest.mark.parametrize("loss", [losses.sparsemax_loss, losses.entmax_loss])
def test_classes_of_any_integer_type(loss: Callable[..., Tensor]) -> None:
    scores, classes = torch.randn(3, 4), torch.tensor([0, 3, 2])
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(loss(scores, classes.to(dtype)), loss(scores, classes))


def test_perturbed_loss_in_inference_mode() -> None:
    """Where Lightning validates."""
    scores, target, _ = problem(KSubset(2), (4,))
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            found.append(losses.PerturbedLoss(KSubset(2))(scores, target).item())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("loss", [losses.sparsemax_loss, losses.entmax_loss])
def test_classes_that_do_not_exist(loss: Callable[..., Tensor]) -> None:
    """Ignored, they would leave the loss of no class at all, which may be below 0."""
    scores, mask = torch.zeros(3, 4), torch.tensor([True, True, True, False])
    assert (loss(scores, torch.tensor([0, 1, 2]), mask) > 0).all()
    with pytest.raises(ValueError, match=r"example \[1\] has a missing class as its target"):
        loss(scores, torch.tensor([0, 3, 2]), mask)
    for wrong in (4, -100):
        with pytest.raises(ValueError, match=r"example \[2\] has a target that is none of the 4 classes"):
            loss(scores, torch.tensor([0, 3, wrong]))


@pytest.mark.parametrize("make", [losses.SparsemaxLoss, losses.EntmaxLoss])
def test_ignored_classes_have_no_part_in_the_mean(make: Callable[..., losses.Loss]) -> None:
    scores = torch.randn(4, 5, requires_grad=True)
    mask = torch.tensor([False, True, True, True, True])
    target = torch.tensor([1, -100, 3, -100])
    loss = make(ignore_index=-100)(scores, target, mask)
    torch.testing.assert_close(loss, make()(scores[[0, 2]], target[[0, 2]], mask))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient[[1, 3]] == 0).all()
    assert (gradient[[0, 2]] != 0).any()
    each = make(reduction="none", ignore_index=-100)(scores, target, mask)
    assert (each == 0).tolist() == [False, True, False, True]
