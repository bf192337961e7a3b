"""Reviews with ratings and the words that decide: the common form of all data sets, and its cache."""

from __future__ import annotations

import abc
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from structgrad.data import DamagedDataError, DataError, MissingDataError, cache
from structgrad.tasks.base import Split

#: Token id of padding, and the token for words that the vocabulary does not have.
PAD, UNKNOWN = 0, "<unk>"
#: Part of the key of a cache. Raise it when the same files or settings would give other arrays.
_VERSION = 1


# --- what every data set gives -------------------------------------------------------------------------------------


@dataclass
class Reviews:
    """Reviews, cut and padded to one length.

    Attributes:
        tokens: int32 ``[n, words]``, :data:`PAD` at padding.
        ratings: float32 ``[n]`` in [0, 1]; NaN if the rating is not used.
        relevant: bool ``[n, words]``, the words that decide.
        annotated: bool ``[n]``, whether ``relevant`` is known.
    """

    tokens: Tensor
    ratings: Tensor
    relevant: Tensor
    annotated: Tensor

    def __len__(self) -> int:
        return len(self.ratings)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the form of :class:`structgrad.data.Batches`."""
        return {name: getattr(self, name) for name in ("tokens", "ratings", "relevant", "annotated")}

    def first(self, n: int | None) -> Reviews:
        """The first n reviews; all for None."""
        return Reviews(**{name: tensor[:n] for name, tensor in self.tensors.items()})


@dataclass
class Text:
    """A review as it was read.

    Attributes:
        where: file and line, for messages.
        tokens: its words.
        rating: in [0, 1]; NaN if it is not used.
        relevant: for each word, whether it decides; None if that is not known.
    """

    where: str
    tokens: list[str]
    rating: float
    relevant: NDArray[np.bool_] | None = None


@dataclass
class Vocabulary:
    """The words that have an id; the id is their place in the list.

    Attributes:
        words: the first is padding.
        vectors: float32 ``[len(words), size]``, 0 for padding; None if embeddings are learnt.
        unknown: id of all other words; None if there must be none.
    """

    words: list[str]
    vectors: NDArray[np.float32] | None
    unknown: int | None

    @classmethod
    def of(cls, texts: Iterable[Text], least: int) -> Vocabulary:
        """The words that occur at least ``least`` times, the most frequent first; others are
        unknown.
        """
        counts = Counter(token for text in texts for token in text.tokens)
        frequent = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
        return cls(["<pad>", UNKNOWN, *frequent], None, 1)

    def encode(self, texts: Sequence[Text], length: int) -> pa.Table:
        """The arrays of :class:`Reviews`, with texts cut and padded to ``length`` words, and the
        words for readers.

        Raises:
            DamagedDataError: for a word outside the vocabulary, if there must be none.
        """
        ids = {word: i for i, word in enumerate(self.words)}
        tokens = np.full((len(texts), length), PAD, np.int32)
        relevant = np.zeros((len(texts), length), np.uint8)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.tokens[:length]):
                known = ids.get(word, self.unknown)
                if known is None:
                    raise DamagedDataError(
                        f"{text.where}: the embeddings have no word {word!r}; "
                        f"task.data.unknown='{UNKNOWN}' gives one vector to all such words"
                    )
                tokens[row, place] = known
            if text.relevant is not None:
                known_length = min(length, len(text.relevant))
                relevant[row, :known_length] = text.relevant[:known_length]
        ratings = np.array([text.rating for text in texts], np.float32)
        annotated = np.array([text.relevant is not None for text in texts], np.uint8)
        columns: dict[str, NDArray[Any]] = {
            "tokens": tokens,
            "ratings": ratings[:, None],
            "relevant": relevant,
            "annotated": annotated[:, None],
        }
        shown = [" ".join(text.tokens[:length]) for text in texts]
        return pa.table({name: cache.column_of(array) for name, array in columns.items()} | {"text": shown})


def _decode(table: pa.Table, words: int) -> Reviews:
    tokens, relevant = (torch.from_numpy(cache.array_of(table, name, (words,))) for name in ("tokens", "relevant"))
    ratings, annotated = (torch.from_numpy(cache.array_of(table, name, ())) for name in ("ratings", "annotated"))
    return Reviews(tokens, ratings, relevant.bool(), annotated.bool())


@dataclass(kw_only=True)
class ReviewData(abc.ABC):
    """Reviews in three parts, prepared once and cached.

    Args:
        cache: folder of prepared data, ``paths.cache``.
        words: the length to which reviews are cut and padded.
        train: number of reviews of a part, the first ones; None for all.
        val: likewise.
        test: likewise; also of the annotated reviews if those are others.

    Raises:
        ValueError: for a size below 1.
    """

    #: The title for tables and pictures.
    title: ClassVar[str]

    cache: str | Path
    words: int
    train: int | None = None
    val: int | None = None
    test: int | None = None
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("words", "train", "val", "test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1; got {value}")

    @abc.abstractmethod
    def key(self) -> dict[str, Any]:
        """Everything on which the arrays depend, in a form that JSON can hold.

        Raises:
            MissingDataError: if files are missing.
        """

    @abc.abstractmethod
    def read(self) -> tuple[dict[str, list[Text]], Vocabulary]:
        """The texts of ``train``, ``val``, ``test`` and, if the annotated ones are others,
        ``annotated``.
        """

    def prepare(self) -> None:
        """Read or generate the reviews, unless they are cached."""
        cache.ensure(self._folder, self._key, self._make)

    def split(self, split: Split) -> Reviews:
        """The reviews of a part; annotated ones without a rating come last in the test.

        Raises:
            DataError: if there are fewer reviews than requested.
        """
        tables = self._load()
        reviews, size = tables[split], getattr(self, split)
        if size is not None and len(reviews) < size:
            raise DataError(f"{self.title} has {len(reviews)} reviews for {split}; task.data.{split} asks for {size}")
        chosen: Reviews = reviews.first(size)
        if split == "test" and "annotated" in tables:
            more = tables["annotated"].first(size)
            return Reviews(**{name: torch.cat([a, more.tensors[name]]) for name, a in chosen.tensors.items()})
        return chosen

    def in_words_of(self, vocabulary: Vocabulary, split: Split) -> Reviews:
        """The reviews of a part, read anew, with the ids of another vocabulary, that of the
        training.

        Raises:
            DataError: for a word outside the vocabulary, if that has no entry for unknown words.
        """
        texts, _ = self.read()
        size = getattr(self, split)
        chosen = texts[split][:size] + (texts.get("annotated", [])[:size] if split == "test" else [])
        try:
            return _decode(vocabulary.encode(chosen, self.words), self.words)
        except DamagedDataError as error:
            reason = str(error).partition(";")[0]
            raise DataError(f"{reason}; a run with task.data.unknown='{UNKNOWN}' takes such words") from error

    def words_of(self, rows: Sequence[int]) -> list[list[str]]:
        """The words of reviews in ``split("test")``, including unknown ones."""
        rated = len(self._load()["test"].first(self.test))
        tables = {
            name: cache.load(self._folder, name)["text"] for name in ("test", "annotated") if name in self._load()
        }
        texts = [tables["test"][row] if row < rated else tables["annotated"][row - rated] for row in rows]
        return [text.as_py().split(" ") if text.as_py() else [] for text in texts]

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that have an id."""
        vocabulary: Vocabulary = self._load()["vocabulary"]
        return vocabulary

    @cached_property
    def _key(self) -> dict[str, Any]:
        return {"version": _VERSION, "data": type(self).__name__, "words": self.words, **self.key()}

    @cached_property
    def _folder(self) -> Path:
        return cache.folder_of(self.cache, "l2x", self._key)

    def _make(self) -> dict[str, pa.Table]:
        texts, vocabulary = self.read()
        tables = {name: vocabulary.encode(some, self.words) for name, some in texts.items()}
        unknown = [i == vocabulary.unknown for i in range(len(vocabulary.words))]
        tables["vocabulary"] = pa.table({"word": vocabulary.words, "unknown": unknown})
        if vocabulary.vectors is not None:
            tables["vectors"] = pa.table({"vector": cache.column_of(vocabulary.vectors)})
        return tables

    def _load(self) -> dict[str, Any]:
        if not self._loaded:
            folder = self._folder
            for name in ("train", "val", "test", "annotated"):
                if (folder / name).is_dir():
                    self._loaded[name] = _decode(cache.load(folder, name), self.words)
            table = cache.load(folder, "vocabulary")
            words, is_unknown = table["word"].to_pylist(), table["unknown"].to_pylist()
            vectors = None
            if (folder / "vectors").is_dir():
                table = cache.load(folder, "vectors")
                size = table.schema.field("vector").type.list_size
                vectors = cache.array_of(table, "vector", (size,))
            unknown = is_unknown.index(True) if True in is_unknown else None
            self._loaded["vocabulary"] = Vocabulary(words, vectors, unknown)
        return self._loaded


# --- for those that read files ---------------------------------------------------------------------------------------


def fingerprints(files: Mapping[str, Path], title: str, how: str) -> dict[str, str]:
    """Hashes of the contents of files.

    Raises:
        MissingDataError: if files are missing; the message names them all.
    """
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise MissingDataError(f"{title}: put these files there: {', '.join(missing)} ({how})")
    prints = {}
    for name, path in files.items():
        with path.open("rb") as file:
            prints[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return prints
