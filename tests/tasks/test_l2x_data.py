"""Reviews: the readers of published files, damaged ones included, and the generator."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structgrad.data import DamagedDataError, DataError, MissingDataError
from structgrad.estimators import SST
from structgrad.structures import KSubset
from structgrad.tasks.l2x import L2X, BeerAdvocate, JsonReviews, MovieRationales, PlantedReviews, SentimentTreebank
from structgrad.tasks.l2x.data import PAD, ReviewData
from structgrad.tasks.l2x.planted_reviews import _OPINIONS
from tests.tasks.trainers import quiet_trainer

RATED = "0.1 0.2 0.3 0.4 0.5\tdark head , smells of malt\n"
VECTORS = "".join(f"{word} {i} {-i}\n" for i, word in enumerate(("dark", "head", ",", "smells", "of", "malt", "sweet")))
ANNOTATED = {"x": ["sweet", "malt", "of", "head"], "0": [], "1": [[0, 2], [3, 4]], "2": [], "3": [[4, 4]], "y": [1]}


def pack(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


@pytest.fixture
def beer(tmp_path: Path) -> Callable[..., BeerAdvocate]:
    """Small files in the published formats; options may replace the text of any."""
    folder = tmp_path / "data" / "beeradvocate"

    def make(
        train: str = RATED + "0.9 0.8 0.7 0.6 0.5\thead head\n",
        heldout: str = "".join(f"0 0.{i} 0 0 0\tmalt\n" for i in range(5)),
        annotations: str = json.dumps(ANNOTATED) + "\n",
        vectors: str = VECTORS,
        **options: Any,
    ) -> BeerAdvocate:
        pack(folder / "reviews.aspect1.train.txt.gz", train)
        pack(folder / "reviews.aspect1.heldout.txt.gz", heldout)
        pack(folder / "review+wiki.filtered.200.txt.gz", vectors)
        (folder / "annotations.json").write_text(annotations)
        return BeerAdvocate(data=tmp_path / "data", cache=tmp_path / "cache", **{"words": 4} | options)

    return make


def prepared(data: ReviewData) -> ReviewData:
    data.prepare()
    return data


# --- BeerAdvocate --------------------------------------------------------------------------------------------------


def test_beer_files_are_read_as_published(beer: Callable[..., BeerAdvocate]) -> None:
    data = prepared(beer())
    words = data.vocabulary.words
    assert words == ["<pad>", "dark", "head", ",", "smells", "of", "malt", "sweet"]
    assert data.vocabulary.vectors is not None
    np.testing.assert_array_equal(data.vocabulary.vectors[[0, 3]], [[0, 0], [2, -2]])
    train = data.split("train")
    assert [[words[i] for i in row] for row in train.tokens.tolist()] == [
        ["dark", "head", ",", "smells"],  # cut
        ["head", "head", "<pad>", "<pad>"],
    ]
    torch.testing.assert_close(train.ratings, torch.tensor([0.2, 0.8]))
    assert not train.annotated.any()
    # First half of the held-out file for validation, second for the test, and the annotated ones after it.
    torch.testing.assert_close(data.split("val").ratings, torch.tensor([0.0, 0.1]))
    test = data.split("test")
    torch.testing.assert_close(test.ratings, torch.tensor([0.2, 0.3, 0.4, torch.nan]), equal_nan=True)
    assert test.annotated.tolist() == [False, False, False, True]
    assert test.relevant[3].tolist() == [True, True, False, True]
    assert data.words_of([0, 3]) == [["malt"], ["sweet", "malt", "of", "head"]]


def test_beer_without_pretrained_vectors_learns_a_vocabulary_from_training(beer: Callable[..., BeerAdvocate]) -> None:
    data = prepared(beer(embeddings=None, least=2))
    assert data.vocabulary.words == ["<pad>", "<unk>", "head"]
    assert data.vocabulary.vectors is None
    assert data.split("test").tokens[:, 0].tolist() == [1, 1, 1, 1]


def test_sizes_are_the_first_of_each_part(beer: Callable[..., BeerAdvocate]) -> None:
    data = prepared(beer())
    data.test = 1
    assert data.split("test").annotated.tolist() == [False, True]
    assert data.words_of([0, 1]) == [["malt"], ["sweet", "malt", "of", "head"]]
    data.val = 3
    with pytest.raises(DataError, match=r"has 2 reviews for val; task.data.val asks for 3"):
        data.split("val")
    with pytest.raises(ValueError, match=r"data\.train must be at least 1"):
        PlantedReviews(cache="unused", train=0)
    with pytest.raises(ValueError, match=r"aspect must be one of appearance"):
        BeerAdvocate(data="unused", cache="unused", aspect="smell")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": RATED + "0.1 0.2 0.3 0.4\thead\n"}, r"aspect1.train.txt.gz:2: expected 5 ratings, a tab and"),
        ({"train": RATED + "0.1 0.2 0.3 0.4 0.5 head\n"}, r"aspect1.train.txt.gz:2: .*are not ratings"),
        ({"train": "0.1 0.2 0.3 0.4 0.5\n"}, r"aspect1.train.txt.gz:1: expected 5 ratings, a tab and"),
        ({"heldout": RATED + "\n0 0 0 0 3.5\thead\n"}, r"aspect1.heldout.txt.gz:3: ratings lie within \[0, 1\]"),
        ({"heldout": "0 nan 0 0 0\thead\n"}, r"aspect1.heldout.txt.gz:1: ratings lie within \[0, 1\]"),
        ({"heldout": RATED + "0 0 0 0 0\tunheard of\n"}, r"aspect1.heldout.txt.gz:2: .* no word 'unheard'.*<unk>"),
        ({"annotations": '{"x": ["malt"], "1": [[0, 2]]}'}, r"annotations.json:1: span \[0, 2\) .* within 1 words"),
        ({"annotations": '{"x": ["malt"], "1": [[-1, 1]]}'}, r"annotations.json:1: span \[-1, 1\)"),
        ({"annotations": '{"x": ["malt"], "0": []}'}, r'annotations.json:1: expected an object with "x".*"1"'),
        ({"annotations": '{"x": ["malt"], "1": [3]}'}, r"annotations.json:1: expected an object"),
        ({"annotations": json.dumps(ANNOTATED) + "\n{"}, r"annotations.json:2: expected an object"),
        ({"vectors": VECTORS + "new 1\n"}, r"200.txt.gz:8: 1 numbers; the lines before have 2"),
        ({"vectors": VECTORS + "new 1 x\n"}, r"200.txt.gz:8: expected a word and numbers"),
        ({"vectors": VECTORS + "head 1 2\n"}, r"200.txt.gz:8: a second vector for 'head'"),
        ({"vectors": "head\n"}, r"200.txt.gz:1: expected a word and numbers"),
        ({"vectors": ""}, r"200.txt.gz: no vectors"),
    ],
)
def test_damaged_beer_files_are_named_with_their_line(
    beer: Callable[..., BeerAdvocate], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(DamagedDataError, match=message) as caught:
        beer(**changes).prepare()
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_an_error(beer: Callable[..., BeerAdvocate]) -> None:
    data = beer()
    whole = data.files["train"].read_bytes()
    data.files["train"].write_bytes(whole[:-12])
    with pytest.raises(DamagedDataError, match=r"aspect1.train.txt.gz:\d+"):
        data.prepare()
    data = BeerAdvocate(data=data.data, cache=data.cache, words=4)
    data.files["train"].write_text("no gzip")
    with pytest.raises(DamagedDataError, match=r"aspect1.train.txt.gz:1: Not a gzipped file"):
        data.prepare()


@pytest.mark.parametrize("made", [True, False])
def test_unknown_words_may_share_a_vector(beer: Callable[..., BeerAdvocate], made: bool) -> None:
    vectors = VECTORS if made else VECTORS + "<unk> 9 9\n"
    data = prepared(beer(heldout="0 0 0 0 0\tunheard\n" * 2, vectors=vectors, unknown="<unk>"))
    (token,) = data.split("val").tokens[:, 0].tolist()
    assert data.vocabulary.words[token] == "<unk>"
    assert data.vocabulary.vectors is not None
    assert data.vocabulary.vectors[token].tolist() == ([0, 0] if made else [9, 9])
    assert data.words_of([0]) == [["unheard"]]


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    for data, names in (
        (
            BeerAdvocate(data=tmp_path, cache=tmp_path, aspect="taste"),
            ("aspect3.train.txt.gz", "aspect3.heldout.txt.gz", "annotations.json", "filtered.200.txt.gz"),
        ),
        (SentimentTreebank(data=tmp_path, cache=tmp_path), ("train.txt.gz", "dev.txt.gz", "test.txt.gz")),
    ):
        with pytest.raises(MissingDataError) as caught:
            data.prepare()
        assert all(f"{tmp_path}/" in str(caught.value) and name in str(caught.value) for name in names)
        assert "\n" not in str(caught.value)


def test_the_cache_follows_the_files(beer: Callable[..., BeerAdvocate]) -> None:
    first = prepared(beer())
    stamp = (first._folder / "manifest.json").stat().st_mtime_ns
    same = prepared(beer())
    assert (same._folder / "manifest.json").stat().st_mtime_ns == stamp
    changed = prepared(beer(train=RATED * 3))
    assert (len(first.split("train")), len(changed.split("train"))) == (2, 3)


# --- sentiment treebank --------------------------------------------------------------------------------------------


@pytest.fixture
def trees(tmp_path: Path) -> Callable[..., SentimentTreebank]:
    """Three files of one tree, that of training as asked for."""

    def make(train: str, **options: Any) -> SentimentTreebank:
        for name, text in (("train", train), ("dev", "(1 (2 a) (0 bore))\n"), ("test", "(3 fine)\n")):
            pack(tmp_path / "data" / "sentiment_treebank" / f"{name}.txt.gz", text)
        return SentimentTreebank(data=tmp_path / "data", cache=tmp_path / "cache", **{"least": 1, "words": 5} | options)

    return make


def test_trees_give_rating_and_relevant_words(trees: Callable[..., SentimentTreebank]) -> None:
    text = "(3 (2 A) (4 (4 fine) (2 (1 8\u00a01\\/2) (2 -RRB-))))\n"
    data = prepared(trees(text))
    train = data.split("train")
    words = data.vocabulary.words
    # The no-break space is part of the word.
    assert [words[i] for i in train.tokens[0].tolist()] == ["a", "fine", "8\u00a01\\/2", "-rrb-", "<pad>"]
    assert train.relevant[0].tolist() == [False, True, True, False, False]
    assert train.ratings.tolist() == [0.75]
    assert data.split("val").tokens[0].tolist() == [words.index("a"), 1, PAD, PAD, PAD]
    assert data.split("test").ratings.tolist() == [0.75]
    assert data.words_of([0]) == [["fine"]]
    assert "A" in prepared(trees(text, lowercase=False)).vocabulary.words


@pytest.mark.parametrize(
    "line",
    ["(3 (2 a) (5 b))", "(3 (2 a) (4 b)", "(3 (2 a) (4 b)))", "(3 (2 a) b)", "a", "(3 (2 a)) (2 b)", "(3", "(x a)"],
)
def test_damaged_trees_are_named_with_their_line(trees: Callable[..., SentimentTreebank], line: str) -> None:
    with pytest.raises(DamagedDataError, match=r"train.txt.gz:2: "):
        trees(f"(3 fine)\n{line}\n").prepare()


def test_the_treebank(shared_data: Path, tmp_path: Path) -> None:
    """The counts of its data sheet."""
    data = prepared(SentimentTreebank(data=shared_data, cache=tmp_path, lowercase=False, least=1))
    for split, reviews, tokens, roots in (
        ("train", 8544, 163563, [1092, 2218, 1624, 2322, 1288]),
        ("val", 1101, 21274, [139, 289, 229, 279, 165]),
        ("test", 2210, 42405, [279, 633, 389, 510, 399]),
    ):
        part = data.split(split)  # type: ignore[arg-type]
        assert len(part) == reviews
        assert (part.tokens != PAD).sum() == tokens
        assert (part.ratings * 4).long().bincount().tolist() == roots
    assert len(data.vocabulary.words) == 2 + 18280
    train = data.split("train")
    assert train.relevant.sum() / (train.tokens != PAD).sum() == pytest.approx(0.1415, abs=5e-5)


# --- JSON lines ----------------------------------------------------------------------------------------------------

LINES = {
    "train": '{"text": "A fine film .\\n A  poor end", "rating": 1, "spans": [[0, 2]], "id": 7}\n\n'
    '{"tokens": ["a", "poor", "film"], "rating": 0.25, "spans": []}\n',
    "dev": '{"text": "a film", "rating": 0, "spans": null}\n',
    "test": '{"text": "fine fine film", "rating": null, "spans": [[0, 1], [2, 3]]}\n{"text": "a end", "rating": 1.0}\n',
}


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., JsonReviews]:
    """Files of one's own; options may replace the text of any."""

    def make(zipped: bool = True, lines: dict[str, str] | None = None, **options: Any) -> JsonReviews:
        for part, text in (LINES | (lines or {})).items():
            file = tmp_path / "data" / "reviews" / f"{part}.jsonl"
            if zipped:
                pack(file.with_name(f"{part}.jsonl.gz"), text)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        return JsonReviews(data=tmp_path / "data", cache=tmp_path / "cache", **{"words": 5, "least": 1} | options)

    return make


@pytest.mark.parametrize("zipped", [True, False])
def test_reviews_of_ones_own_are_read(own: Callable[..., JsonReviews], zipped: bool) -> None:
    data = prepared(own(zipped))
    train, test = data.split("train"), data.split("test")
    words = data.vocabulary.words
    assert [[words[t] for t in row] for row in train.tokens.tolist()] == [
        ["a", "fine", "film", ".", "a"],
        ["a", "poor", "film", "<pad>", "<pad>"],
    ]
    assert train.ratings.tolist() == [1.0, 0.25]
    assert train.relevant.tolist() == [[True, True, False, False, False], [False] * 5]
    assert train.annotated.tolist() == [True, True]
    assert data.split("val").annotated.tolist() == [False]
    assert test.ratings.isnan().tolist() == [True, False]
    assert test.relevant[0].tolist() == [True, False, True, False, False]
    assert test.annotated.tolist() == [True, False]
    assert data.words_of([0]) == [["fine", "fine", "film"]]
    frequent = prepared(own(zipped, least=2)).vocabulary.words
    assert frequent == ["<pad>", "<unk>", "a", "film", "poor"]


def test_own_vectors_are_taken_of_words_that_occur(own: Callable[..., JsonReviews], tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text("film 1 2\nzebra 5 6\nfine 3 4\n")
    vocabulary = prepared(own(embeddings=str(tmp_path / "vectors.txt"))).vocabulary
    assert vocabulary.words == ["<pad>", "film", "fine", "<unk>"]
    assert vocabulary.vectors is not None
    assert vocabulary.vectors.tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]
    with pytest.raises(MissingDataError, match=r"put these files there: .*nowhere\.txt"):
        own(embeddings="nowhere.txt").prepare()
    with pytest.raises(MissingDataError, match="where `make word-vectors` puts GloVe's"):
        own(embeddings="nowhere.txt").prepare()
    fetched = Path(own().cache) / "vectors" / "fetched.txt"
    fetched.parent.mkdir(parents=True)
    fetched.write_text("film 7 8\n")
    found = prepared(own(embeddings="fetched.txt")).vocabulary
    assert found.vectors is not None
    assert found.vectors.tolist() == [[0, 0], [7, 8], [0, 0]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("text", "expected an object with"),
        ('["a"]', "expected an object with"),
        ('{"rating": 1}', "expected an object with"),
        ('{"text": 3, "rating": 1}', "expected an object with"),
        ('{"tokens": ["a", 3], "rating": 1}', "tokens are strings"),
        ('{"text": "a", "rating": "good"}', "expected an object with"),
        ('{"text": "a"}', 'there is no "rating"'),
        ('{"text": "a", "rating": 5}', r"within \[0, 1\]; got 5"),
        ('{"text": "a", "rating": NaN}', r"within \[0, 1\]; got nan"),
        ('{"text": "a b", "rating": 1, "spans": [[1, 3]]}', r"span \[1, 3\) does not lie within 2 words"),
        ('{"text": "a b", "rating": 1, "spans": [1]}', "expected an object with"),
    ],
)
def test_damaged_lines_are_named(own: Callable[..., JsonReviews], line: str, reason: str) -> None:
    with pytest.raises(DamagedDataError, match=rf"train\.jsonl\.gz:2: .*{reason}") as caught:
        own(lines={"train": '{"text": "a", "rating": 1}\n' + line + "\n"}).prepare()
    assert "\n" not in str(caught.value)


def test_own_reviews_train_a_model(own: Callable[..., JsonReviews]) -> None:
    task = L2X(
        structure=KSubset(2),
        estimator=SST(KSubset(2)),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        data=prepared(own()),  # type: ignore[arg-type]
        embedding_size=4,
        filters=4,
        hidden=4,
        batch_size=2,
    )
    fitted = quiet_trainer(max_steps=2, val_check_interval=1)
    fitted.fit(task)
    (metrics,) = fitted.test(task, verbose=False)
    assert 0 <= metrics["test/precision"] <= 1


def test_movie_reviews(shared_data: Path, tmp_path: Path) -> None:
    """Sizes and shares that ../shared/data/README.md states, of whole reviews."""
    data = MovieRationales(data=shared_data, cache=tmp_path / "cache", words=2809)
    data.prepare()
    parts = {split: data.split(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert [len(part) for part in parts.values()] == [1600, 200, 199]
    assert [float(part.ratings.mean()) for part in parts.values()] == pytest.approx([0.5, 0.5, 99 / 199])
    lengths = (parts["test"].tokens != PAD).sum(1)
    assert int(lengths.sum()) == 158_212
    assert float((parts["test"].relevant.sum(1) / lengths).mean()) == pytest.approx(0.3139, abs=5e-5)


# --- planted reviews -----------------------------------------------------------------------------------------------


def planted(cache: Path, **options: Any) -> PlantedReviews:
    small = {"words": 40, "train": 200, "val": 20, "test": 20, "sentence": [4, 7], "spans": [1, 2], "fillers": 9}
    return PlantedReviews(cache=cache, **small | options)  # type: ignore[arg-type]


def test_planted_spans_are_whole_sentences_that_tell_the_rating(tmp_path: Path) -> None:
    data = prepared(planted(tmp_path, noise=0.0, opinions=1.0))
    train, words = data.split("train"), data.vocabulary.words
    assert (train.tokens != PAD).all()
    cues = {"smell", "aroma", "nose", "scent"}
    levels = {
        word: level for level, group in enumerate(("awful", "poor", "fair", "good", "superb")) for word in [group]
    }
    for tokens, relevant, rating in zip(train.tokens, train.relevant, train.ratings, strict=True):
        starts = (relevant & ~torch.cat([torch.zeros(1, dtype=torch.bool), relevant[:-1]])).nonzero()
        text = [words[i] for i in tokens.tolist()]
        named = [i for i, word in enumerate(text) if word in cues]
        assert 1 <= len(named) <= 2
        assert all(relevant[i] for i in named)
        assert {int(i) for i in starts} <= set(named)
        assert 4 <= relevant.sum() <= 14
        for i in relevant.nonzero()[:, 0].tolist():
            if text[i] in levels:
                assert abs(levels[text[i]] - 4 * float(rating)) <= 0.5
    # Ratings are uniform: mean and variance within 4 standard errors.
    assert float(train.ratings.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 200) ** 0.5)
    assert float(train.ratings.var()) == pytest.approx(1 / 12, abs=4 * (1 / 180 / 200) ** 0.5)


def test_planted_ratings_of_aspects_are_equal_if_fully_correlated(tmp_path: Path) -> None:
    """Then sentences about all aspects tell the rating of aroma; without correlation or with noise, not all do."""
    levels = {word: level for level, group in enumerate(_OPINIONS) for word in group}
    differ = []
    for correlation, noise in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        data = prepared(planted(tmp_path, noise=noise, opinions=1.0, correlation=correlation))
        train, words = data.split("train"), data.vocabulary.words
        differ.append(
            sum(
                abs(levels[words[token]] - 4 * rating) > 0.5 + 1e-5
                for tokens, rating in zip(train.tokens.tolist(), train.ratings.tolist(), strict=True)
                for token in tokens
                if words[token] in levels
            )
        )
    assert [count > 0 for count in differ] == [True, False, True]


def test_planted_reviews_depend_on_their_seed_alone(tmp_path: Path) -> None:
    first, again, other = (
        prepared(planted(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(first.split("train").tokens, again.split("train").tokens)
    assert not torch.equal(first.split("train").tokens, other.split("train").tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentence": [5, 4]}, r"data.sentence must be two numbers"),
        ({"spans": [0, 1]}, r"data.spans must be two numbers"),
        ({"spans": [1, 9]}, r"9 spans of 7 words do not fit into 40 words"),
        ({"correlation": 1.5}, r"lie in \[0, 1\]"),
    ],
)
def test_impossible_planted_reviews_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planted(tmp_path, **options)


# --- in training ---------------------------------------------------------------------------------------------------


def test_beer_files_train_a_model_from_their_vectors(beer: Callable[..., BeerAdvocate]) -> None:
    structure = KSubset(2)
    task = L2X(
        structure=structure,
        estimator=SST(structure),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        data=beer(),
        embedding_size=2,
        filters=3,
        hidden=3,
        batch_size=2,
    )
    trainer = quiet_trainer(max_steps=3, val_check_interval=1)
    trainer.fit(task)
    (metrics,) = trainer.test(task, verbose=False)
    # Three rated reviews, and an annotated one of which three words in four decide.
    assert 0 < metrics["test/mse"] < 1
    assert metrics["test/precision"] in (0.5, 1.0)
