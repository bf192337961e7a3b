"""Learning to explain: networks, metrics, training with every row of its tables, pictures, configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from structgrad.data import Batches
from structgrad.estimators import RELAX, SST, Reinforce, SurrogateGradient
from structgrad.estimators.base import Estimator
from structgrad.structures import BudgetSubset, CorrelatedKSubset, KSubset, NoStructure, OneHot, Subset
from structgrad.structures.base import Structure
from structgrad.tasks.base import StepOutput
from structgrad.tasks.l2x import L2X, PlantedReviews
from structgrad.tasks.l2x.data import PAD, Reviews
from structgrad.tasks.l2x.model import Decoder, EncoderName, FixedEncoder, LearntEncoder, linear_weights
from structgrad.tasks.l2x.pictures import Explanation, draw, load, save, write_page
from structgrad.tasks.l2x.task import word_metrics
from structgrad.training.run import assemble
from tests.tasks.given import SURROGATE, Given, weighted_sums
from tests.tasks.trainers import quiet_trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedReviews:
    data = PlantedReviews(
        cache=tmp_path_factory.mktemp("cache"),
        words=14,
        train=40,
        val=10,
        test=12,
        sentence=(3, 5),
        spans=(1, 1),
        fillers=5,
    )
    data.prepare()
    return data


def make(structure: Structure, estimator: Estimator | None, data: Any, **options: Any) -> L2X:
    torch.manual_seed(0)
    small = {"embedding_size": 6, "filters": 5, "hidden": 4, "batch_size": 10, "eval_batch_size": 5}
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return L2X(structure=structure, estimator=estimator, optimizer=optimizer, data=data, **(small | options))


def reviews(tokens: list[list[int]], ratings: list[float], relevant: list[list[int]] | None = None) -> Reviews:
    shape = (len(tokens), len(tokens[0]))
    known = torch.zeros(shape) if relevant is None else torch.tensor(relevant)
    annotated = torch.full((len(tokens),), relevant is not None)
    return Reviews(torch.tensor(tokens, dtype=torch.int32), torch.tensor(ratings), known.bool(), annotated)


# --- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [None, 5])
def test_scores_are_those_of_the_papers_convolutions(filters: int | None) -> None:
    """Four of one filter: words, and pairs as a sum of three (D.6)."""
    encoder = LearntEncoder(6, True, 0.0, filters)
    embedded = torch.randn(3, 7, 6)
    features = embedded.transpose(1, 2)
    if encoder.features is not None:
        features = encoder.features(features)
        assert features.shape == (3, 5, 7)
    weight, bias = encoder.scores.weight, encoder.scores.bias
    narrow = [F.conv1d(features, weight[i][None, :, None], bias[i][None])[:, 0] for i in range(3)]
    wide = F.conv1d(features, torch.stack([weight[3], weight[4]], -1)[None], (bias[3] + bias[4])[None])[:, 0]
    expected = torch.cat([narrow[0], narrow[1][:, :-1] + narrow[2][:, :-1] + wide], 1)
    torch.testing.assert_close(encoder(torch.zeros(3, 7), embedded), expected)
    alone = LearntEncoder(6, False, 0.0, filters)
    assert alone(torch.zeros(3, 7), embedded).shape == (3, 7)


def test_decoder_sees_chosen_words_where_they_stand() -> None:
    decoder = Decoder(6, 5, 4, 0.0)
    embedded, chosen = torch.randn(2, 9, 6), torch.zeros(2, 9)
    chosen[:, [2, 3, 7]] = 1.0
    rating = decoder(embedded, chosen)
    others = torch.where(chosen[..., None] > 0, embedded, torch.randn(2, 9, 6))
    torch.testing.assert_close(decoder(others, chosen), rating)
    changed = embedded.clone()
    changed[:, 3] += 1.0
    assert (decoder(changed, chosen) != rating).all()
    moved = torch.zeros(2, 9).index_fill(1, torch.tensor([2, 4, 7]), 1.0)
    assert (decoder(embedded[:, [0, 1, 2, 8, 3, 5, 6, 7, 4]], moved) != rating).all()
    assert ((rating > 0) & (rating < 1)).all()


def rating_by_hand(decoder: Decoder, embedded: Tensor, chosen: Tensor) -> Tensor:
    """D.6: two convolutions over the chosen words, the maximum over places, a hidden layer, a sigmoid."""
    features = (embedded * chosen[:, None]).T[None]
    for i in (0, 2):
        convolution = decoder.features[i]
        assert isinstance(convolution, nn.Conv1d)
        features = F.conv1d(features, convolution.weight, convolution.bias, padding=1).relu()
    (first, last) = (layer for layer in decoder.rating if isinstance(layer, nn.Linear))
    hidden = F.linear(features[0].max(1).values, first.weight, first.bias).relu()
    return F.linear(hidden, last.weight, last.bias)[0].sigmoid()


def test_decoder_is_its_definition() -> None:
    torch.manual_seed(0)
    decoder = Decoder(6, 5, 4, 0.3).double().eval()
    embedded, chosen = torch.randn(4, 9, 6).double(), torch.rand(4, 9).double()
    expected = [rating_by_hand(decoder, *each) for each in zip(embedded, chosen, strict=True)]
    torch.testing.assert_close(decoder(embedded, chosen), torch.stack(expected))


def test_decoder_is_differentiable_in_relaxed_words() -> None:
    decoder = Decoder(3, 4, 4, 0.0).double()
    embedded, chosen = torch.randn(2, 6, 3, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(decoder, (embedded.requires_grad_(), chosen.requires_grad_()))


@pytest.mark.parametrize("pairs", [False, True])
def test_fixed_scores_choose_words_before_padding(pairs: bool) -> None:
    encoder = FixedEncoder(torch.tensor([9.0, 0.1, 0.7, 0.3]), pairs)
    tokens = torch.tensor([[1, 2, 3, 0], [3, 0, 0, 0]])
    scores = encoder(tokens, torch.randn(2, 4, 6))
    structure: Structure = CorrelatedKSubset(2) if pairs else KSubset(2)
    chosen = structure.argmax(scores)[:, :4]
    assert chosen[0].tolist() == [0, 1, 1, 0]
    assert chosen[1, 0] == 1
    uniform = FixedEncoder(torch.zeros(4), False)(tokens[:1].expand(6000, 4), torch.empty(6000, 4, 6))
    counts = KSubset(2).sample(uniform).sum(0)
    # Two of three words, each with probability 2/3: within 4 standard errors.
    assert counts[3] == 0
    torch.testing.assert_close(counts[:3] / 6000, torch.full((3,), 2 / 3), atol=4 * (2 / 9 / 6000) ** 0.5, rtol=0)


def test_linear_weights_are_ridge_regression_with_the_best_penalty() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, (60, 5))
    truth = np.array([0.0, 0.1, -0.1, 0.05, 0.0, -0.02])
    ratings = 0.5 + truth[tokens].sum(1) + 0.01 * rng.standard_normal(60)
    train, val = (
        reviews(tokens[:40].tolist(), ratings[:40].tolist()),
        reviews(tokens[40:].tolist(), ratings[40:].tolist()),
    )
    ours = linear_weights(train, val, 6).double().numpy()
    counts = np.stack([(tokens == word).sum(1) * (word != PAD) for word in range(6)], 1).astype(float)
    x, y = counts[:40], ratings[:40] - ratings[:40].mean()
    errors, solutions = [], []
    for penalty in (0.3, 1.0, 3.0, 10.0, 30.0):
        solutions.append(np.linalg.solve(x.T @ x + penalty**2 * np.eye(6), x.T @ y))
        errors.append(np.square(counts[40:] @ solutions[-1] + ratings[:40].mean() - ratings[40:]).mean())
    np.testing.assert_allclose(ours, solutions[int(np.argmin(errors))], atol=1e-5)
    assert ours[0] == 0
    np.testing.assert_allclose(ours[1:], truth[1:], atol=0.02)


# --- metrics -------------------------------------------------------------------------------------------------------


def test_precision_leaves_padding_out_and_counts_at_least_one() -> None:
    tokens = torch.tensor([[5, 6, 7, PAD], [5, PAD, PAD, PAD], [5, 6, 7, 8]])
    relevant = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    chosen = torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 1], [0.2, 0.4, 0.3, 0.9]])
    precision, count = word_metrics(chosen, tokens, relevant)
    torch.testing.assert_close(precision, torch.tensor([0.5, 0.0, 0.6 / 1.8]))
    torch.testing.assert_close(count, torch.tensor([2.0, 0.0, 1.8]))


def test_error_is_of_rated_and_precision_of_annotated_reviews(planted: PlantedReviews) -> None:
    """Rated reviews without annotations, and annotated ones without a rating, in one test set."""
    test = planted.split("test")
    parts = {name: tensor.clone() for name, tensor in test.tensors.items()}
    parts["ratings"][7:] = torch.nan
    parts["annotated"][:7] = False
    assert len(test) == 12
    structure = KSubset(3)
    task = make(structure, SurrogateGradient(structure, "identity"), planted)
    task.configure_model()
    trainer = quiet_trainer()
    task.batches = lambda split: Batches(parts, 5)  # type: ignore[method-assign]
    (metrics,) = trainer.test(task, verbose=False)
    task.eval()
    # In the batches of the test: words that occur twice have equal scores, up to rounding, which depends on the batch.
    batches = [{name: tensor[start : start + 5] for name, tensor in parts.items()} for start in range(0, 12, 5)]
    with torch.no_grad():
        estimates = [task._estimate(batch) for batch in batches]
    chosen = torch.cat([estimate.vertices for estimate, _ in estimates])
    predicted = torch.cat([value for _, value in estimates])
    precision, _ = word_metrics(chosen, parts["tokens"], parts["relevant"])
    error = (predicted - parts["ratings"])[:7].square().mean()
    assert metrics["test/mse"] == pytest.approx(float(error), rel=1e-5)
    assert metrics["test/loss"] == pytest.approx(float(error), rel=1e-5)
    assert metrics["test/precision"] == pytest.approx(float(precision[7:].mean()), rel=1e-5)
    assert metrics["test/words"] == 3


def test_an_evaluation_is_the_mean_over_several_subsets(planted: PlantedReviews) -> None:
    """Of the same model: each metric is the mean of those of single subsets, drawn one after the other."""
    structure = KSubset(3)
    task = make(structure, SST(structure), planted, eval_samples=3)
    task.configure_model()
    task.eval()
    batch = planted.split("test").tensors
    torch.manual_seed(1)
    with torch.no_grad():
        found = task.step(batch)
    task.eval_samples = 1
    torch.manual_seed(1)
    with torch.no_grad():
        single = [task.step(batch) for _ in range(3)]

    def value(out: StepOutput, name: str) -> float:
        total, count = out.metrics[name]
        return float(total / count)

    for name in ("mse", "precision", "words"):
        each = [value(out, name) for out in single]
        assert value(found, name) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert len({value(out, "mse") for out in single}) == 3
    assert float(found.loss) == pytest.approx(value(found, "mse"), rel=1e-5)
    with pytest.raises(ValueError, match="eval_samples must be at least 1"):
        make(structure, SST(structure), planted, eval_samples=0)


def test_loss_and_metrics_of_given_words_by_hand(planted: PlantedReviews) -> None:
    """Two subsets for each of two reviews, in mixed order; only the first review is annotated."""
    tokens = torch.tensor([[3, 4, 5, 6], [7, 8, PAD, PAD]], dtype=torch.int32)
    ratings = torch.tensor([0.9, 0.2]).double()
    relevant, annotated = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]]).bool(), torch.tensor([True, False])
    rows, weights = torch.tensor([1, 0, 1, 0]), torch.tensor([0.3, 0.6, 0.7, 0.4]).double()
    chosen = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]).double()
    estimator = Given(Subset(), chosen, rows, weights)
    task = make(Subset(), estimator, planted, dropout=0.0)
    task.configure_model()
    assert task.embedding is not None
    batch = {"tokens": tokens, "ratings": ratings, "relevant": relevant, "annotated": annotated}
    for training in (True, False):
        out = task.double().train(training).step(batch)
        errors = [
            float((rating_by_hand(task.decoder, task.embedding(tokens[row]), words) - ratings[row]) ** 2)
            for row, words in zip(rows.tolist(), chosen, strict=True)
        ]
        mse = weighted_sums(rows, errors, weights)
        torch.testing.assert_close(out.loss.detach(), (SURROGATE if training else 1) * mse.mean())
        metrics = {name: tuple(map(float, value)) for name, value in out.metrics.items() if isinstance(value, tuple)}
        assert metrics["mse"] == pytest.approx((float(mse.sum()), 2))
        assert metrics["precision"] == pytest.approx((0.6 * 1 / 2 + 0.4 * 2 / 2, 1))
        assert metrics["words"] == pytest.approx((0.3 * 1 + 0.6 * 2 + 0.7 * 2 + 0.4 * 2, 2))
        assert estimator.kl_weight == 0


@pytest.mark.parametrize("name", ["simple", "complex", "random_words", "linear_weights"])
def test_encoders_by_name(planted: PlantedReviews, name: EncoderName) -> None:
    """One filter a word (simple), after two convolutions (complex); equal scores; unsigned weights of the ridge
    regression of training reviews.
    """
    task = make(Subset(), SST(Subset()), planted, encoder=name, dropout=0.4)
    task.configure_model()
    encoder = task.encoder
    if name in ("simple", "complex"):
        assert isinstance(encoder, LearntEncoder)
        assert (encoder.features is not None) == (name == "complex")
        dropouts = [m.p for part in (encoder, task.decoder) for m in part.modules() if isinstance(m, nn.Dropout)]
        assert dropouts == [0.4, 0.4]
        return
    assert isinstance(encoder, FixedEncoder)
    if name == "random_words":
        assert not encoder.weights.any()
        return
    train, val = planted.split("train"), planted.split("val")
    words = len(planted.vocabulary.words)
    x, other = (F.one_hot(part.tokens.long(), words).sum(1)[:, 1:].double().numpy() for part in (train, val))
    mean = float(train.ratings.double().mean())
    solutions = [
        np.linalg.solve(x.T @ x + penalty**2 * np.eye(words - 1), x.T @ (train.ratings.numpy() - mean))
        for penalty in (0.3, 1.0, 3.0, 10.0, 30.0)
    ]
    best = min(solutions, key=lambda solution: float(np.square(other @ solution + mean - val.ratings.numpy()).mean()))
    assert (best < 0).any()
    np.testing.assert_allclose(encoder.weights[1:].numpy(), np.abs(best), atol=1e-5)


# --- training ------------------------------------------------------------------------------------------------------


ROWS: dict[str, Callable[[], Estimator]] = {
    "exp_family": lambda: SST(KSubset(3)),
    "euclidean": lambda: SST(KSubset(3), "euclidean"),
    "l2x": lambda: SST(KSubset(3), "l2x"),
    "softsub": lambda: SST(KSubset(3), "softsub", n_samples=2),
    "correlated": lambda: SST(CorrelatedKSubset(3)),
    "e_reinforce_plus": lambda: Reinforce(KSubset(3), "E", "loo", 2),
    "t_reinforce_plus": lambda: Reinforce(KSubset(3), "T", "loo", 2),
    "nvil": lambda: Reinforce(CorrelatedKSubset(3), "X", "nvil", context_size=6),
    "relax": lambda: RELAX(KSubset(3)),
    "imle": lambda: SurrogateGradient(KSubset(3), "imle", step=1000.0),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("encoder", ["simple", "complex"])
def test_fits_tests_and_draws(row: str, encoder: str, planted: PlantedReviews, tmp_path: Path) -> None:
    estimator = ROWS[row]()
    task = make(estimator.structure, estimator, planted, encoder=encoder, dropout=0.0)
    trainer = quiet_trainer(max_steps=4, val_check_interval=2)
    task.configure_model()
    assert task.encoder is not None
    before = {name: tensor.clone() for name, tensor in task.encoder.named_parameters() if name.endswith("weight")}
    trainer.fit(task)
    assert before
    assert all((task.encoder.get_parameter(name) != tensor).any() for name, tensor in before.items())
    assert {"val/mse", "val/precision", "val/words", "val/decoder_calls"} <= set(trainer.callback_metrics)
    (metrics,) = trainer.test(task, verbose=False)
    assert metrics["test/words"] == 3
    assert 0 <= metrics["test/precision"] <= 1
    assert [p.name for p in task.pictures(tmp_path)] == ["reviews.png", "reviews.html"]
    explanations = load(tmp_path / "reviews.json")
    assert [sum(e.chosen) for e in explanations] == [3] * 8
    assert explanations[0].words == planted.words_of([0])[0]


@pytest.mark.parametrize("encoder", ["random_words", "linear_weights"])
def test_references_learn_a_decoder_only(encoder: str, planted: PlantedReviews) -> None:
    structure = KSubset(3)
    estimator: Estimator = Reinforce(structure, "X")
    if encoder == "linear_weights":
        estimator = SurrogateGradient(structure, "identity")
    task = make(structure, estimator, planted, encoder=encoder)
    task.configure_model()
    assert task.encoder is not None
    assert not list(task.encoder.parameters())
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    quiet_trainer(max_steps=4, limit_val_batches=0).fit(task)
    changed = {name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("encoder")}


def test_learning_rate_falls_linearly(planted: PlantedReviews) -> None:
    structure = KSubset(2)
    task = make(structure, SST(structure), planted, decay_factor=0.1, decay_share=0.5)
    rates: list[float] = []
    step = task.training_step

    def seen(*arguments: Any) -> Tensor:
        rates.append(task.trainer.optimizers[0].param_groups[0]["lr"])
        return step(*arguments)

    task.training_step = seen  # type: ignore[method-assign]
    quiet_trainer(max_steps=12, limit_val_batches=0).fit(task)
    expected = [1e-2 * (1 - 0.9 * min(i / 6, 1)) for i in range(12)]
    assert rates == pytest.approx(expected)


def test_pretrained_vectors_start_the_embedding(planted: PlantedReviews, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = planted.vocabulary
    vectors = np.random.default_rng(0).standard_normal((len(vocabulary.words), 6)).astype(np.float32)
    vectors[PAD] = 0
    monkeypatch.setattr(vocabulary, "vectors", vectors)
    structure = KSubset(2)
    task = make(structure, SST(structure), planted)
    task.configure_model()
    assert task.embedding is not None
    np.testing.assert_array_equal(task.embedding.weight.detach().numpy(), vectors)
    assert task.embedding.weight.requires_grad
    with pytest.raises(RuntimeError, match=r"vectors have 6 numbers; set task\.embedding_size=6"):
        make(structure, SST(structure), planted, embedding_size=7).prepare_data()


class Largest(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("row", ["exp_family", "correlated", "t_reinforce_plus"])
def test_a_step_has_no_loop_over_reviews_and_no_vocabulary_for_every_word(row: str, planted: PlantedReviews) -> None:
    estimator = ROWS[row]()
    task = make(estimator.structure, estimator, planted)
    task.configure_model()
    words = 20_000
    task.embedding = nn.Embedding(words, 6, padding_idx=PAD)
    train = planted.split("train").tensors
    modes = []
    for size in (4, 40):
        task.zero_grad()
        with Largest() as mode:
            task.step({name: tensor[:size] for name, tensor in train.items()}).loss.backward()
        modes.append(mode)
    assert modes[0].calls == modes[1].calls
    assert modes[1].numbers < 40 * 14 * words
    assert modes[1].numbers == 6 * words  # the gradient of the embedding


@pytest.mark.parametrize("structure", [KSubset(3), CorrelatedKSubset(3)])
def test_padding_is_chosen_where_it_may_be(structure: Structure, planted: PlantedReviews) -> None:
    batch = {name: tensor[:6] for name, tensor in planted.split("train").tensors.items()}
    for row, length in enumerate((14, 5, 3, 2, 1, 0)):
        batch["tokens"][row, length:] = PAD
    for choose_padding, least in ((False, [3, 3, 3, 2, 1, 0]), (True, [3, 0, 0, 0, 0, 0])):
        task = make(structure, SST(structure), planted, choose_padding=choose_padding)
        task.configure_model()
        task.eval()
        chosen = torch.stack([task._estimate(batch)[0].vertices[:, :14] for _ in range(20)])
        assert (chosen.sum(-1) == 3).all()
        words = (chosen * (batch["tokens"] != PAD)).sum(-1).amin(0)
        assert words.tolist() == least
        task.train()
        assert task.step(batch).loss.isfinite()


def test_neighbours_count_where_padding_may_not_be_chosen(planted: PlantedReviews) -> None:
    """The best two of four words and two places of padding, by enumeration, scores of neighbours included."""
    structure = CorrelatedKSubset(2)
    task = make(structure, SST(structure), planted, choose_padding=False)
    mask = task._exist(torch.tensor([[5, 6, 7, 8, PAD, PAD]])).expand(50, -1)
    scores = torch.randn(50, 11, generator=torch.Generator().manual_seed(0))
    chosen = structure.argmax(scores, mask)[:, :6]
    neighbours = 0
    for found, own in zip(chosen, scores.tolist(), strict=True):
        pairs = {(i, j): own[i] + own[j] + (own[6 + i] if j == i + 1 else 0) for j in range(4) for i in range(j)}
        best = max(pairs, key=lambda pair: pairs[pair])
        neighbours += best != tuple(sorted(sorted(range(4), key=lambda i: own[i])[-2:]))
        assert found.nonzero()[:, 0].tolist() == list(best)
    assert neighbours > 10  # times the best words alone are not the best pair


@pytest.mark.parametrize("structure", [Subset(), OneHot(), BudgetSubset(3)], ids=lambda s: s.name)
@pytest.mark.parametrize("choose_padding", [True, False])
def test_any_structure_over_words_may_choose(
    structure: Structure, choose_padding: bool, planted: PlantedReviews, tmp_path: Path
) -> None:
    task = make(structure, SST(structure), planted, choose_padding=choose_padding)
    fitted = quiet_trainer(max_steps=2, val_check_interval=1)
    fitted.fit(task)
    (metrics,) = fitted.test(task, verbose=False)
    assert 0 <= metrics["test/precision"] <= 1
    assert len(task.pictures(tmp_path)) == 2
    assert task.least == 1


def test_what_cannot_work_is_refused(planted: PlantedReviews) -> None:
    matrix = KSubset(2, "matrix")
    for structure, estimator, options, message in (
        (matrix, SST(matrix), {}, "needs a latent structure over a vector"),
        (KSubset(99), SST(KSubset(99)), {}, "KSubset has no vertex over 14 words"),
        (NoStructure(), None, {}, "needs a latent structure over a vector"),
        (KSubset(2), SST(KSubset(2)), {"encoder": "clever"}, "encoder must be one of simple, complex"),
        (KSubset(2), SST(KSubset(2)), {"decay_share": 0.0}, "decay_share"),
        (KSubset(2), SST(KSubset(2)), {"filters": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(structure, estimator, planted, **options)  # type: ignore[arg-type]


# --- pictures ------------------------------------------------------------------------------------------------------


def explanation(**changes: Any) -> Explanation:
    content: dict[str, Any] = {
        "words": ["smells", "of", "<b>malt</b>", "&", "$hops$", "."],
        "relevant": [True, True, True, False, False, False],
        "chosen": [True, False, True, False, True, False],
        "rating": 0.5,
        "prediction": 0.4321,
    }
    return Explanation(**(content | changes))


def test_page_marks_chosen_over_annotated_words(tmp_path: Path) -> None:
    page = write_page(
        {"plain": [explanation()], "correlated": [explanation(rating=None)]}, "A & B", tmp_path / "p.html"
    )
    text = page.read_text()
    assert text.count('<span class="a"><mark class="hit">smells</mark></span>') == 2
    assert text.count('<mark class="miss">$hops$</mark>') == 2
    assert '<span class="a">of</span>' in text
    assert "<b>malt" not in text
    assert "2 of 3 chosen words decide; rating 0.50, predicted 0.43" in text
    assert "rating not used" in text
    assert "A &amp; B" in text
    # Needs nothing from elsewhere.
    assert "src=" not in text
    assert "http" not in text


def test_models_side_by_side_must_explain_the_same_reviews(tmp_path: Path) -> None:
    columns = {"one": [explanation()], "other": [explanation(words=["a"] * 6)]}
    for make_picture in (partial(write_page, title="t"), draw):
        with pytest.raises(ValueError, match="one and other explain different reviews"):
            make_picture(columns, path=tmp_path / "x.png")
    assert load(save([explanation()], tmp_path / "e.json")) == [explanation()]


def colours(file: Path) -> dict[tuple[int, ...], int]:
    """The number of pixels with a colour."""
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(int(c) for c in value): int(n) for value, n in zip(values, counts, strict=True)}


GROUND, HIT, MISS = (0xDC, 0xEB, 0xF9), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_an_empty_review_is_shown(tmp_path: Path) -> None:
    empty = Explanation([], [], [], None, 0.5)
    assert "0 of 0 chosen words decide" in write_page({"plain": [empty]}, "t", tmp_path / "p.html").read_text()
    assert draw({"plain": [empty, explanation()]}, tmp_path / "p.png").exists()


def test_picture_shows_the_marks(tmp_path: Path) -> None:
    seen = colours(draw({"plain": [explanation()]}, tmp_path / "p.png"))
    assert min(seen[GROUND], seen[HIT], seen[MISS]) > 100
    without = colours(draw({"plain": [explanation(chosen=[False] * 6)]}, tmp_path / "q.png"))
    legend = "the marks of the legend only"
    assert without[HIT] < seen[HIT] / 2, legend
    assert without[MISS] < seen[MISS], legend


def test_page_in_a_browser(tmp_path: Path) -> None:
    """Headless Chromium shows the marks, two models side by side and nothing beyond the window's width."""
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("needs Chromium (Debian: chromium)")
    columns = {"plain": [explanation()] * 3, "correlated": [explanation(chosen=[True] * 6)] * 3}
    page, picture = write_page(columns, "reviews", tmp_path / "page.html"), tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, f"--screenshot={picture}", "--window-size=1000,800", "--hide-scrollbars", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    seen = colours(picture)
    assert min(seen[GROUND], seen[HIT], seen[MISS]) > 300
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    marked = (np.abs(pixels - np.array(HIT)).sum(2) == 0).any(0).nonzero()[0]
    assert marked.min() < 450  # the left model
    assert 550 < marked.max() < 1000  # the right one


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", ["task=l2x", *overrides])


@pytest.mark.usefixtures("_configs")
def test_data_are_chosen_by_budget_or_by_hand() -> None:
    def name(*overrides: str) -> str:
        return str(composed(*overrides).task.data._target_).rsplit(".", 1)[1]

    assert name() == "BeerAdvocate"
    assert name("budget=quick") == name("budget=smoke") == "SentimentTreebank"
    assert name("budget=quick", "data=planted_reviews") == "PlantedReviews"
    assert composed("budget=smoke", "data=planted_reviews").task.data.train == 200
    assert composed("task.data.aspect=taste").task.data.aspect == "taste"


@pytest.mark.usefixtures("_configs")
@pytest.mark.parametrize("budget", ["quick", "smoke"])
def test_small_budgets_choose_three_words_where_a_structure_has_a_size(budget: str) -> None:
    for structure in ("k_subset", "correlated_k_subset"):
        assert composed(f"budget={budget}", f"structure={structure}").structure.k == 3
    assert composed(f"budget={budget}", "structure.k=4").structure.k == 4
    assemble(composed(f"budget={budget}", "structure=budget_subset", "estimator=reinforce"))
    with pytest.raises(ConfigCompositionException, match="data"):
        compose("config", ["task=listops", "data=planted_reviews"])


@pytest.mark.usefixtures("_configs")
@pytest.mark.parametrize(
    "data", ["beeradvocate", "sentiment_treebank", "planted_reviews", "movie_rationales", "json_reviews"]
)
def test_every_data_set_fits(data: str) -> None:
    assert isinstance(assemble(composed(f"data={data}")), L2X)


@pytest.mark.usefixtures("_configs")
@pytest.mark.parametrize(
    "row",
    [
        "estimator=sst",
        "estimator=sst_euclidean",
        "estimator=sst_categorical",
        "estimator=sst_binary",
        "structure=correlated_k_subset",
        "estimator=l2x",
        "estimator=softsub",
        "estimator=e_reinforce_plus",
        "estimator=t_reinforce_plus",
        "estimator=relax",
        "estimator=imle",
    ],
)
def test_rows_by_configuration_alone(row: str) -> None:
    config = composed(row, "task.encoder=complex", "structure.k=7")
    task = assemble(config)
    assert isinstance(task, L2X)
    assert task.structure.k == 7  # type: ignore[attr-defined]
    assert task.encoder_name == "complex"
    assert task.batch_size == (25 if "plus" in row else 100)
    if "reinforce" not in row and "imle" not in row and "relax" not in row:
        assert config.search["estimator.temperature"] == {"distribution": "uniform", "low": 0.1, "high": 2.0}


def test_script_puts_runs_side_by_side(tmp_path: Path) -> None:
    for name, chosen in (("k_subset", [True, False, True, False, True, False]), ("correlated_k_subset", [True] * 6)):
        save([explanation(chosen=chosen)] * 2, tmp_path / name / "pictures" / "reviews.json")
        summary = {"structure": name, "estimator": "sst", "seed": 0, "data": "d", "config": {"structure": {"k": 3}}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    command = [sys.executable, "scripts/l2x_reviews.py", str(tmp_path / "k_subset")]
    output = tmp_path / "both"
    runs = [str(tmp_path / "correlated_k_subset"), "--output", str(output)]
    subprocess.run([*command, *runs], check=True, cwd=ROOT, capture_output=True)
    text = output.with_suffix(".html").read_text()
    assert text.index("k_subset, sst, k = 3, seed 0") < text.index("correlated_k_subset, sst, k = 3, seed 0")
    subprocess.run([*command, "--output", str(tmp_path / "one")], check=True, cwd=ROOT, capture_output=True)
    both, one = (Image.open(path.with_suffix(".png")) for path in (output, tmp_path / "one"))
    assert both.height > 1.5 * one.height  # one below the other
    done = subprocess.run([*command, str(tmp_path / "nothing")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing'} is no finished run of task=l2x")
    assert done.stderr.count("\n") == 1


def test_convolutions_over_words_are_torchs() -> None:
    """Two dimensions in the place of one change no number, derivative or name."""
    torch.manual_seed(0)
    ours = Decoder(5, 4, 3, 0.0).features
    plain = nn.Sequential(nn.Conv1d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1), nn.ReLU())
    plain.load_state_dict(ours.state_dict())
    words = torch.randn(2, 7, 5, requires_grad=True)
    results = []
    for network in (ours, plain):
        features = network(words.transpose(1, 2))
        gradients = torch.autograd.grad(features.square().sum(), [words, *network.parameters()], create_graph=True)
        total = torch.stack([g.square().sum() for g in gradients]).sum()
        results.append((features, *gradients, *torch.autograd.grad(total, [words, *network.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
