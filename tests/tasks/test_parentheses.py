"""Data, networks and task of the balanced parentheses."""

from __future__ import annotations

import gzip
import math
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from structgrad.data import DamagedDataError, DataError, MissingDataError
from structgrad.estimators import RELAX, SST, Outcome, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.estimators.baselines import NoBaseline
from structgrad.structures import Arborescence, BinaryTree, GroundTruth, NoStructure
from structgrad.structures.base import Structure
from structgrad.tasks.parentheses import Parentheses, ParenthesesData, trees
from structgrad.tasks.parentheses.data import (
    completions,
    count,
    draw,
    generate,
    keys_of,
    read_brackets,
    shape_of,
    to_text,
)
from structgrad.tasks.parentheses.model import TokenEncoder, TreeDecoder
from structgrad.tasks.parentheses.task import Generation
from structgrad.testing import computing
from tests.tasks.given import SURROGATE, Given, weighted_sums
from tests.tasks.trainers import quiet_trainer

# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [0, 1, 2, 3, 5])
def test_every_shape_has_one_number(pairs: int) -> None:
    catalan = math.comb(2 * pairs, pairs) // (pairs + 1)
    assert completions(pairs)[2 * pairs, 0] == catalan
    shapes = shape_of(np.arange(catalan), pairs)
    assert len(np.unique(shapes, axis=0)) == catalan
    assert shapes.tolist() == sorted(shapes.tolist(), reverse=True)
    height = np.where(shapes, 1, -1).cumsum(1)
    assert (height >= 0).all()
    assert not pairs or (height[:, -1] == 0).all()


def test_the_most_pairs_are_counted_exactly() -> None:
    assert completions(35)[70, 0] == math.comb(70, 35) // 36
    last = shape_of(np.array([math.comb(70, 35) // 36 - 1]), 35)[0]
    assert last.tolist() == [True, False] * 35
    with pytest.raises(ValueError, match="at most 35"):
        completions(36)


def test_drawn_sequences_are_uniform() -> None:
    """Chi-squared at a level of 1 in 1,000: 5 shapes with 2^3 types of three pairs."""
    drawn = draw(np.random.default_rng(0), np.full(20_000, 3), types=2, length=8)
    assert trees.is_balanced(torch.from_numpy(drawn).long(), 2).all()
    assert not drawn[:, 6:].any()
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == count(2, 3, 3) == 40
    assert stats.chisquare(counts).pvalue > 1e-3


def small(cache: Path, **changes: Any) -> ParenthesesData:
    return ParenthesesData(cache, **({"types": 3, "pairs": (1, 4), "train": 200, "val": 40, "test": 40} | changes))


def test_splits_are_distinct_and_cached(tmp_path: Path) -> None:
    data = small(tmp_path)
    data.prepare()
    splits = [data.split(name) for name in ("train", "val", "test")]
    assert [len(split) for split in splits] == [200, 40, 40]
    every = torch.cat(splits)
    assert len(set(keys_of(every.numpy()))) == 280
    assert trees.is_balanced(every.long(), 3).all()
    sizes = (every != 0).sum(1) // 2
    assert sizes.min() == 1
    assert sizes.max() == 4
    again = generate(data, progress=False)
    assert all(torch.equal(again[name], data.split(name)) for name in again)
    assert not torch.equal(generate(small(tmp_path, seed=1), progress=False)["train"], splits[0])


def test_every_sequence_that_exists_can_be_asked_for(tmp_path: Path) -> None:
    data = small(tmp_path, types=2, pairs=(2, 3), train=40, val=4, test=4)
    splits = generate(data, progress=False)
    assert sum(len(split) for split in splits.values()) == count(2, 2, 3) == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": (4, 2)}, "data.pairs"),
        ({"pairs": (0, 2)}, "data.pairs"),
        ({"pairs": (2, 36)}, "data.pairs"),
        ({"types": 0}, "data.types"),
        ({"val": 0}, "must be positive"),
        ({"pairs": (1, 2), "types": 2}, "there are 10 sequences of 1 to 2 pairs and 2 types"),
    ],
)
def test_impossible_data_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_own_sequences(tmp_path: Path) -> None:
    lines = ["( [ ] )", "", "(2 )2 {}", "()", "([()])"]
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    with gzip.open(tmp_path / "test.txt.gz", "wt") as file:
        file.write("\r\n".join(lines))
    data = small(tmp_path / "cache", files=tmp_path, types=4, pairs=(2, 3), train=None, val=2, test=3)
    data.prepare()
    found = [{" ".join(to_text(row, 4)) for row in data.split(name)} for name in ("train", "val", "test")]
    first_two = {"(0 (1 )1 )0", "(2 )2 (2 )2"}  # "()" has one pair only
    assert found == [first_two | {"(0 (1 (0 )0 )1 )0"}, first_two, first_two | {"(0 (1 (0 )0 )1 )0"}]
    assert data.split("val").shape == (2, 6)
    with pytest.raises(DataError, match=r"val\.txt has 3 sequences of 2 to 3 pairs .*task\.data\.val is 4"):
        small(tmp_path / "cache", files=tmp_path, types=4, pairs=(2, 3), train=None, val=4, test=3).prepare()
    with pytest.raises(ValueError, match="null takes all sequences of a file"):
        small(tmp_path, val=None)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(MissingDataError, match=r"no .*val\.txt: .* a sequence a line"):
        small(tmp_path / "cache", files=tmp_path).prepare()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("( a )", "'a' is no bracket"),
        ("(]", r"\] closes no bracket"),
        ("())", r"\) closes no bracket"),
        ("(2 (0 )2 )0", r"\)2 closes no bracket"),
        ("([]", "1 brackets are not closed"),
        ("(3 )3", r"\(3 is of type 3; task\.data\.types=3"),
        ("[3 ]3", "'33' is no bracket"),
    ],
)
def test_damaged_lines_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "train.txt"
    file.write_text(f"()\n{line}\n")
    with pytest.raises(DamagedDataError, match=rf"train\.txt:2: {reason}"):
        read_brackets(file, 3)


def test_text() -> None:
    assert to_text(torch.tensor([3, 1, 4, 6, 0]), 3) == ["(2", "(0", ")0", ")2"]


# --- networks -------------------------------------------------------------------------------------------------------


def decoder(types: int = 2, hidden: int = 8) -> TreeDecoder:
    model = TreeDecoder(types, 6, hidden).double()
    # Far from uniform.
    torch.nn.init.normal_(model.bias)
    return model


def step_by_step(model: TreeDecoder, places: list[int]) -> Tensor:
    """The loss of one tree, one place at a time."""
    state, total = None, torch.zeros((), dtype=torch.float64)
    token = torch.tensor([[model.vocabulary]])
    for place, target in enumerate(places):
        out, state = model.lstm(model.embedding(token), state)
        scores = F.relu(model.project(out[0, 0])) @ model.embedding.weight[: model.vocabulary].T + model.bias
        if place == 0:
            scores = scores[1:]
            total = total - scores.log_softmax(0)[target - 1]
        else:
            total = total - scores.log_softmax(0)[target]
        token = torch.tensor([[target]])
    return total


@pytest.mark.parametrize("path", ["native", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_unequal_trees_are_those_one_place_at_a_time(path: str, dtype: torch.dtype) -> None:
    model = decoder()
    tokens = torch.tensor([[1, 3, 0, 0], [1, 2, 4, 3], [2, 0, 0, 0], [2, 4, 1, 0]])
    parents = torch.tensor([[0, 0, -1, -1], [3, 0, 1, 3], [0, -1, -1, -1], [1, 1, 1, -1]])
    lengths = (tokens > 0).sum(1)
    places = trees.level_order(tokens, parents)
    expected = torch.stack([step_by_step(model, p[: 2 * n + 1].tolist()) for p, n in zip(places, lengths, strict=True)])
    with computing(path):
        torch.testing.assert_close(model.to(dtype)(places, lengths), expected.to(dtype))


def test_encoder_packs_and_pads_alike() -> None:
    torch.manual_seed(0)
    model = TokenEncoder(2, 6, 8)
    tokens = torch.tensor([[1, 3, 0, 0], [1, 2, 4, 3], [0, 0, 0, 0], [2, 4, 0, 0]])
    results = []
    for path in ("native", "plain"):
        with computing(path):
            scores, summary = model(tokens)
            scores = scores.where(tokens > 0, 0.0)
            known = summary[[0, 1, 3]]  # there is no summary of nothing
            total = scores.square().sum() + known.square().sum()
            results.append((scores, known, *torch.autograd.grad(total, list(model.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_generated_trees_follow_their_likelihood() -> None:
    """Chi-squared at a level of 1 in 1,000 over all trees of at most two tokens, the rest in one class."""
    model = decoder(types=1)
    with torch.no_grad():
        model.bias[0] += 1.5
    samples = 20_000
    places, complete = model.generate(samples, 5, torch.Generator().manual_seed(0))
    assert ((places != 0).sum(1)[complete] <= 2).all()
    one = [[a, 0, 0, 0, 0] for a in (1, 2)]
    two = [[a, *pair, 0, 0] for a in (1, 2) for b in (1, 2) for pair in ([b, 0], [0, b])]
    every = torch.tensor(one + two)
    probabilities = torch.exp(-model(every, (every > 0).sum(1))).detach()
    counts = torch.stack([((places == row).all(1) & complete).sum() for row in every])
    assert counts.sum() == complete.sum()
    observed = torch.cat([counts, (samples - counts.sum())[None]])
    expected = samples * torch.cat([probabilities, (1 - probabilities.sum())[None]])
    assert expected.min() > 5
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_encoder_is_two_lstms_in_opposite_directions() -> None:
    """Token i is scored by all up to i and all from i on; the summary is what each LSTM says last."""
    torch.manual_seed(0)
    model = TokenEncoder(2, 6, 8).double()
    tokens = torch.tensor([[1, 2, 4, 3], [2, 4, 0, 0]])
    scores, summary = model(tokens)
    for row, n in enumerate((4, 2)):
        embedded = model.embedding(tokens[row : row + 1, :n])
        ahead, back = model.forwards(embedded)[0][0], model.backwards(embedded.flip(1))[0][0].flip(0)
        torch.testing.assert_close(scores[row, :n], model.score(torch.cat([ahead, back], 1))[:, 0])
        torch.testing.assert_close(summary[row], torch.cat([ahead[-1], back[0]]))


def test_encoder_does_not_see_padding() -> None:
    encoder = TokenEncoder(2, 6, 8).double()
    tokens = torch.tensor([[1, 2, 4, 3], [2, 4, 0, 0]])
    scores, summary = encoder(tokens)
    alone, alone_summary = encoder(tokens[1:, :2])
    torch.testing.assert_close(scores[1, :2], alone[0])
    torch.testing.assert_close(summary[1], alone_summary[0])
    # Both directions count.
    changed, _ = encoder(torch.tensor([[1, 2, 4, 4]]))
    assert changed[0, 0] != scores[0, 0]
    with pytest.raises(ValueError, match="must be even"):
        TokenEncoder(2, 6, 7)


# --- task -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ParenthesesData:
    made = small(tmp_path_factory.mktemp("cache"))
    made.prepare()
    return made


def make(
    data: ParenthesesData, structure: Structure, estimator: Estimator | None = None, **options: Any
) -> Parentheses:
    return Parentheses(
        structure=structure,
        estimator=estimator,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        data=data,
        **(
            {
                "generation": Generation(unique=30, limit=90, length=8, batch_size=20),
                "batch_size": 20,
                "eval_batch_size": 30,
                "embedding": 8,
                "hidden": 16,
            }
            | options
        ),
    )


TREE = BinaryTree()
ORDERS: dict[str, tuple[Structure, Estimator | None]] = {
    "left_to_right": (NoStructure(), None),
    "smart": (GroundTruth(), None),
    "relax": (TREE, RELAX(TREE)),
    "t_reinforce_plus": (TREE, Reinforce(TREE, "T", "loo", n_samples=2)),
    "e_reinforce": (TREE, Reinforce(TREE, "E", "ema")),
}


@pytest.mark.parametrize("order", ORDERS)
def test_trains_tests_generates_and_draws(order: str, data: ParenthesesData, tmp_path: Path) -> None:
    task = make(data, *ORDERS[order])
    trainer = quiet_trainer(max_steps=4, val_check_interval=2)
    trainer.fit(task)
    assert "val/perplexity" in trainer.callback_metrics
    (result,) = trainer.test(task, verbose=False)
    assert all(torch.isfinite(p).all() for p in task.parameters())
    assert result["test/perplexity"] == pytest.approx(math.exp(result["test/nll"]))
    shares = [result[f"test/{name}"] for name in ("old", "new_balanced", "unbalanced")]
    assert sum(shares) == pytest.approx(1)
    assert 0 < result["test/unique"] <= 30
    assert result["test/unique"] <= result["test/drawn"] <= 90
    assert ("test/smart_parents" in result) == (order not in ("left_to_right", "smart"))
    for picture in task.pictures(tmp_path / "pictures"):
        assert matplotlib.image.imread(picture).std() > 0.01


def test_likelihoods_of_fixed_orders(data: ParenthesesData) -> None:
    for structure, order in ((NoStructure(), trees.left_to_right), (GroundTruth(), partial(trees.smart, types=3))):
        task = make(data, structure).eval()
        total = count_tokens = 0.0
        for batch in task.batches("val"):
            tokens = batch["labelled"]
            assert len(batch["unlabelled"]) == 0
            places, lengths = trees.level_order(tokens, order(tokens)), (tokens > 0).sum(1)
            losses = task.decoder(places, lengths)
            out = task.step(batch)
            torch.testing.assert_close(out.loss, losses.mean())
            total, count_tokens = total + float(losses.detach().sum()), count_tokens + float(lengths.sum())
            task._accumulate(out)
        sums = task._sums["nll"]
        assert float(sums[0]) == pytest.approx(total, rel=1e-5)
        assert float(sums[1]) == count_tokens


def test_a_share_comes_with_the_smart_tree_in_training_only(data: ParenthesesData) -> None:
    task = make(data, TREE, RELAX(TREE), labelled=0.25)
    sizes = [(len(b["labelled"]), len(b["unlabelled"])) for b in task.batches("train")]
    assert sum(a for a, _ in sizes) == 50
    assert all(a + b == 20 for a, b in sizes)
    assert all(len(b["labelled"]) == 0 for b in task.batches("val"))
    # Whatever is in a batch.
    tokens = data.split("train")[:6].long()
    for n in (0, 3, 6):
        task.train()
        out = task.step({"labelled": tokens[:n], "unlabelled": tokens[n:]})
        assert out.size == 6
        assert torch.isfinite(out.loss)


def test_encoder_and_decoder_learn_the_smart_tree_of_labelled_sequences(data: ParenthesesData) -> None:
    task = make(data, TREE, RELAX(TREE), label_weight=3.0)
    tokens = data.split("train")[:6].long()
    parents = trees.smart(tokens, task.data.types)
    assert not torch.equal(parents, trees.left_to_right(tokens))
    expected = task._nll(tokens, parents) - 3 * task._log_q(tokens, parents, task.encoder(tokens)[0])
    out = task.train().step({"labelled": tokens, "unlabelled": tokens[:0]})
    torch.testing.assert_close(out.loss, expected.mean())


#: Two sequences with two trees each: tokens, parents, tokens below and at each token, and places in level order.
NESTED, PAIR = [1, 2, 5, 4], [1, 4]
TREES: dict[str, tuple[list[int], list[int], list[list[int]], list[int]]] = {
    "nested, smart": (NESTED, [0, 3, 1, 0], [[0, 1, 2, 3], [1, 2], [2], [1, 2, 3]], [1, 0, 4, 2, 0, 0, 5, 0, 0]),
    "nested, left to right": (
        NESTED,
        [0, 0, 1, 2],
        [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]],
        [1, 0, 2, 0, 5, 0, 4, 0, 0],
    ),
    "pair, smart": (PAIR, [0, 0], [[0, 1], [1]], [1, 0, 4, 0, 0]),
    "pair, closing first": (PAIR, [1, 1], [[0], [0, 1]], [4, 1, 0, 0, 0]),
}


def log_q(scores: Tensor, below: list[list[int]]) -> Tensor:
    """Of the tree that Gumbel noise gives: every token is the largest of its subtree."""
    return torch.stack([scores[token] - scores[subtree].logsumexp(0) for token, subtree in enumerate(below)]).sum()


@pytest.mark.parametrize("training", [True, False])
def test_loss_and_metrics_of_given_and_latent_trees_by_hand(data: ParenthesesData, training: bool) -> None:
    """One sequence comes with its tree. Two others have two latent trees each, in mixed order."""
    torch.manual_seed(0)
    names = ("pair, smart", "nested, smart", "pair, closing first", "nested, left to right")
    rows, weights = torch.tensor([1, 0, 1, 0]), torch.tensor([0.3, 0.6, 0.7, 0.4]).double()
    vertices = torch.zeros(4, 4, 4, dtype=torch.float64)
    for vertex, name in zip(vertices, names, strict=True):
        for token, parent in enumerate(TREES[name][1]):
            vertex[parent, token] = float(parent != token)
    estimator = Given(TREE, vertices, rows, weights)
    task = make(data, TREE, estimator, label_weight=5.0).double().train(training)
    torch.nn.init.normal_(task.decoder.bias)
    labelled, unlabelled = torch.tensor([[3, 2, 5, 6]]), torch.tensor([NESTED, [*PAIR, 0, 0]])
    out = task.step({"labelled": labelled, "unlabelled": unlabelled})

    bounds, entropies = [], []
    for name, row in zip(names, rows.tolist(), strict=True):
        tokens, _, below, places = TREES[name]
        own = log_q(task.encoder(unlabelled)[0][row, : len(tokens)], below)
        bounds.append(float(step_by_step(task.decoder, places) + own))
        entropies.append(-float(own))
    bound = weighted_sums(rows, bounds, weights)
    nll = step_by_step(task.decoder, [3, 0, 6, 2, 0, 0, 5, 0, 0])
    of_label = -5 * log_q(task.encoder(labelled)[0][0], TREES["nested, smart"][2])
    expected = (nll + of_label + (SURROGATE if training else 1) * bound.sum()) / 3
    torch.testing.assert_close(out.loss, expected)

    metrics = {name: tuple(map(float, value)) for name, value in out.metrics.items() if isinstance(value, tuple)}
    assert metrics["nll"] == pytest.approx((float(nll + bound.sum()), 10))  # 4 + 4 + 2 tokens
    assert metrics["entropy"] == pytest.approx((float(weighted_sums(rows, entropies, weights).sum()), 6))
    # Left to right, two tokens of the nested sequence have the smart parent; closing first, none of the pair has.
    assert metrics["smart_parents"] == pytest.approx((0.3 * 2 + 0.6 * 4 + 0.7 * 0 + 0.4 * 2, 6))
    assert estimator.mask is not None
    assert estimator.context is not None
    assert estimator.mask.tolist() == [[True] * 4, [True, True, False, False]]
    torch.testing.assert_close(estimator.context, task.encoder(unlabelled)[1])
    if not training:
        predictions = task.step({"labelled": labelled[:0], "unlabelled": unlabelled}).predictions
        assert predictions is not None
        assert predictions().prediction == [TREES["nested, smart"][1], TREES["pair, closing first"][1]]
        assert predictions().target == [TREES["nested, smart"][1], TREES["pair, smart"][1]]


def test_the_bound_is_the_likelihood_where_the_posterior_is_exact(data: ParenthesesData) -> None:
    """For one pair there are two trees: with q their posterior, every sampled tree gives -log p(x) exactly."""
    task = make(data, TREE, Reinforce(TREE, "T")).double().eval()
    tokens = torch.tensor([[1, 4]] * 64)
    parents = torch.tensor([[0, 0], [1, 1]])
    nll = task.decoder(trees.level_order(tokens[:2], parents), torch.tensor([2, 2])).detach()
    posterior = (-nll).log_softmax(0)
    scores = posterior.expand(64, 2)
    estimate, _, _, metrics = task._latent(tokens, scores, torch.zeros(64, 16), tokens[:0], tokens[:0])
    torch.testing.assert_close(estimate.objective, -(-nll).logsumexp(0).expand(64))
    assert 0 < metrics["smart_parents"][0] < metrics["smart_parents"][1] == 128
    torch.testing.assert_close(task._log_q(tokens[:2], parents, scores[:2]), posterior)


def test_gradient_of_the_bound_for_encoder_and_decoder(data: ParenthesesData) -> None:
    """Against the sum over all 14 trees of four tokens, within five standard errors."""
    torch.manual_seed(1)
    task = make(data, TREE, Reinforce(TREE, "T", "loo", n_samples=2)).double().train()
    tokens = torch.tensor([[1, 4, 2, 5]])
    vertices = TREE.enumerate(4)
    parents = trees.parents_of(vertices, torch.ones(14, 4, dtype=torch.bool))
    # Encoder and decoder, one number each.
    watched = [task.encoder.score.weight, task.decoder.project.bias]
    scores, _ = task.encoder(tokens)
    log_q = task._log_q(tokens.expand(14, 4), parents, scores.expand(14, 4))
    nll = task._nll(tokens.expand(14, 4), parents)
    assert float(log_q.detach().exp().sum()) == pytest.approx(1)
    exact = torch.autograd.grad((log_q.exp() * (nll + log_q)).sum(), watched)
    draws = 50
    estimates: list[list[Tensor]] = []
    for _ in range(draws):
        encoded = (t.expand(48, -1) for t in task.encoder(tokens))
        estimate, *_ = task._latent(tokens.expand(48, 4), *encoded, tokens[:0], tokens[:0])
        estimates.append([g.flatten() for g in torch.autograd.grad(estimate.surrogate.mean(), watched)])
    for index, true in enumerate(exact):
        sampled = torch.stack([e[index] for e in estimates])
        error = sampled.std(0) / math.sqrt(draws)
        assert ((sampled.mean(0) - true.flatten()).abs() < 5 * error + 1e-12).all()
        assert (error < true.abs().max()).all()


def test_generation_is_judged_by_its_definition(data: ParenthesesData, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(data, NoStructure())
    width = 17
    train, val = (F.pad(data.split(name).long(), (0, width - 8)) for name in ("train", "val"))
    wrong = torch.zeros(4, width, dtype=torch.int64)
    wrong[:, 0] = torch.arange(1, 5)
    pool = torch.cat([train[:10], val[:5], wrong])
    drawn: list[int] = []

    def generated(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.arange(sum(drawn), sum(drawn) + samples) % len(pool)
        drawn.append(samples)
        return pool[chosen], trees.is_balanced(pool[chosen], 3)

    monkeypatch.setattr(task, "generate", generated)
    shares = task.judge()
    # All 19 are found, then nothing new up to the limit.
    assert shares == {"old": 10 / 19, "new_balanced": 5 / 19, "unbalanced": 4 / 19, "unique": 19.0, "drawn": 90.0}
    task.generation.unique = 10
    drawn.clear()
    assert task.judge() == {"old": 1.0, "new_balanced": 0.0, "unbalanced": 0.0, "unique": 10.0, "drawn": 10.0}


def test_a_tree_that_is_cut_off_is_unbalanced(data: ParenthesesData, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(data, NoStructure())
    places = torch.tensor([[1, 0, 4, 0, 0], [1, 0, 4, 0, 0]])
    monkeypatch.setattr(task.decoder, "generate", lambda *_: (places, torch.tensor([True, False])))
    tokens, right = task.generate(2, torch.Generator())
    assert tokens[:, :3].tolist() == [[1, 4, 0]] * 2
    assert right.tolist() == [True, False]


def test_generation_does_not_depend_on_other_random_numbers(data: ParenthesesData) -> None:
    task = make(data, NoStructure())
    first = task.judge()
    torch.rand(7)
    assert task.judge() == first


def test_impossible_combinations(data: ParenthesesData) -> None:
    arborescence = Arborescence()
    with pytest.raises(ValueError, match="binary tree"):
        make(data, arborescence, Reinforce(arborescence, "T"))
    with pytest.raises(ValueError, match="takes no estimator"):
        make(data, NoStructure(), RELAX(TREE))
    with pytest.raises(ValueError, match="takes an estimator"):
        make(data, TREE)
    with pytest.raises(ValueError, match="labelled"):
        make(data, TREE, RELAX(TREE), labelled=1.5)
    with pytest.raises(ValueError, match="needs relaxation 'exp_family', which BinaryTree lacks") as caught:
        SST(TREE, temperature=1.0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Gumbel utilities, not Gaussian"):
        make(data, TREE, Reinforce(TREE, "U", utility="gaussian"))
    make(data, TREE, Reinforce(TREE, "U"))
    relaxing = RELAX(TREE)
    relaxing.needs_differentiable_objective = True  # type: ignore[misc]
    with pytest.raises(ValueError, match="no relaxation; RELAX evaluates relaxed ones") as caught:
        make(data, TREE, relaxing)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="=7 would cut off"):
        make(data, NoStructure(), generation=Generation(length=7))
    with pytest.raises(ValueError, match="limit at least unique"):
        Generation(unique=10, limit=5)


def test_learns(data: ParenthesesData) -> None:
    task = make(data, TREE, RELAX(TREE), labelled=0.5)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.03)
    losses = []
    for _ in range(3):
        for batch in task.batches("train"):
            loss = task.step(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.93 * sum(losses[:5])


def test_the_estimator_knows_that_the_loss_adds_no_kl(data: ParenthesesData) -> None:
    """The objective has log q itself. A baseline that follows the whole loss must not subtract a KL."""
    weights = []

    class Probe(NoBaseline):
        def predict(self, outcome: Outcome) -> Tensor:
            weights.append(outcome.kl_weight)
            return super().predict(outcome)

    task = make(data, TREE, Reinforce(TREE, "T", Probe()))
    (batch, *_) = task.batches("train")
    task.train().step(batch)
    assert weights == [0.0]
