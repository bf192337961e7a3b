"""Beer reviews with ratings of four aspects, in the files of Lei et al. (2016)."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from structgrad.common.ranges import check_choice
from structgrad.data import DamagedDataError
from structgrad.data.lines import lines_of
from structgrad.tasks.l2x.data import ReviewData, Text, Vocabulary, fingerprints

#: In the order of the ratings and of the annotations. A fifth rating, overall, has no file.
ASPECTS = ("appearance", "aroma", "palate", "taste")
_RATINGS = 5


@dataclass(kw_only=True)
class BeerAdvocate(ReviewData):
    """Beer reviews with ratings of four aspects (McAuley et al. 2012), in the files of Lei et al.
    (2016).

    The held-out file of an aspect is split in two halves, the first for validation and the second
    for the test (Paulus et al. 2020, D.6). The deciding words are known for other reviews, the
    annotated ones, whose ratings are not used.

    Args:
        data: folder of data sets, ``paths.data``; the files are in ``beeradvocate`` within.
        aspect: one of :data:`ASPECTS`.
        embeddings: name of the file of pretrained vectors, which is also the vocabulary. None: they
            are learnt, with a vocabulary from the training reviews.
        unknown: None to refuse reviews with a word that the pretrained vectors lack. Otherwise the
            entry that replaces such words (a vector of zeros, if the file has no such entry).
        least: if embeddings are learnt, a word that occurs less often in training is unknown.
    """

    title: ClassVar[str] = "BeerAdvocate"

    data: str | Path
    aspect: str = "aroma"
    embeddings: str | None = "review+wiki.filtered.200.txt.gz"
    unknown: str | None = None
    least: int = 2
    words: int = 350

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("data.aspect", self.aspect, ASPECTS)

    @property
    def files(self) -> dict[str, Path]:
        """The files that are read."""
        folder, number = Path(self.data) / "beeradvocate", ASPECTS.index(self.aspect)
        files = {
            "train": folder / f"reviews.aspect{number}.train.txt.gz",
            "heldout": folder / f"reviews.aspect{number}.heldout.txt.gz",
            "annotations": folder / "annotations.json",
        }
        return files if self.embeddings is None else files | {"embeddings": folder / self.embeddings}

    def key(self) -> dict[str, Any]:
        """See :class:`ReviewData`."""
        how = "publication by Lei et al. (2016), Rationalizing Neural Predictions, says where they are kept"
        prints = fingerprints(self.files, self.title, f"the {how}; data=sentiment_treebank needs no download")
        options = {"aspect": self.aspect, "unknown": self.unknown, "least": self.least}
        return {"files": prints, **options}

    def read(self) -> tuple[dict[str, list[Text]], Vocabulary]:
        """See :class:`ReviewData`.

        Raises:
            DamagedDataError: for a line that is not in the format; the message names file and line.
        """
        files, number = self.files, ASPECTS.index(self.aspect)
        heldout = list(read_rated(files["heldout"], number))
        half = len(heldout) // 2
        texts = {
            "train": list(read_rated(files["train"], number)),
            "val": heldout[:half],
            "test": heldout[half:],
            "annotated": list(read_annotated(files["annotations"], number)),
        }
        if self.embeddings is None:
            return texts, Vocabulary.of(texts["train"], self.least)
        return texts, read_embeddings(files["embeddings"], self.unknown)


def read_rated(file: Path, aspect: int) -> Iterator[Text]:
    """Read reviews, one a line: five ratings in [0, 1], a tab, and the words.

    Raises:
        DamagedDataError: for a line in another format; the message names file and line.
    """
    for where, line in lines_of(file):
        head, tab, words = line.partition("\t")
        tokens = words.split(" ")
        try:
            ratings = [float(number) for number in head.split()]
        except ValueError:
            raise DamagedDataError(f"{where}: {head[:40]!r} are not ratings") from None
        if not tab or len(ratings) != _RATINGS:
            raise DamagedDataError(f"{where}: expected {_RATINGS} ratings, a tab and the words; got {line[:40]!r}")
        if not all(0 <= rating <= 1 for rating in ratings):
            raise DamagedDataError(f"{where}: ratings lie within [0, 1]; got {head}")
        yield Text(where, [token for token in tokens if token], ratings[aspect])


def read_annotated(file: Path, aspect: int) -> Iterator[Text]:
    """Read one JSON object a line: words ``x``, and under the number of each aspect its spans
    ``[start, end)``.

    Raises:
        DamagedDataError: for a line in another format; the message names file and line.
    """
    for where, line in lines_of(file):
        try:
            content = json.loads(line)
            tokens, spans = content["x"], content[str(aspect)]
            bounds = [(int(start), int(end)) for start, end in spans]
        except (ValueError, KeyError, TypeError) as error:
            expected = f'"x" with words and "{aspect}" with spans'
            raise DamagedDataError(f"{where}: expected an object with {expected} ({error!r})") from None
        relevant = np.zeros(len(tokens), np.bool_)
        for start, end in bounds:
            if not 0 <= start <= end <= len(tokens):
                raise DamagedDataError(f"{where}: span [{start}, {end}) does not lie within {len(tokens)} words")
            relevant[start:end] = True
        yield Text(where, tokens, float("nan"), relevant)


def read_embeddings(file: Path, unknown: str | None, wanted: Container[str] | None = None) -> Vocabulary:
    """Read one word and its vector a line, separated by spaces.

    Args:
        file: text, gzip if its name ends in ``.gz``.
        unknown: see :class:`BeerAdvocate`.
        wanted: words that are kept; None for all.

    Raises:
        DamagedDataError: for a line in another format, or a second line for a word; the message
            names file and line.
    """
    words = ["<pad>"]
    vectors: list[NDArray[np.float32]] = []
    seen = set(words)
    for where, line in lines_of(file):
        word, *numbers = line.rstrip(" ").split(" ")
        if wanted is not None and word not in wanted and word != unknown:
            continue
        try:
            vector = np.array([float(number) for number in numbers], np.float32)
        except ValueError:
            raise DamagedDataError(f"{where}: expected a word and numbers; got {line[:40]!r}") from None
        if not len(vector):
            raise DamagedDataError(f"{where}: expected a word and numbers; got {line[:40]!r}")
        if vectors and len(vector) != len(vectors[0]):
            raise DamagedDataError(f"{where}: {len(vector)} numbers; the lines before have {len(vectors[0])}")
        if word in seen:
            raise DamagedDataError(f"{where}: a second vector for {word!r}")
        seen.add(word)
        words.append(word)
        vectors.append(vector)
    if not vectors:
        raise DamagedDataError(f"{file}: no vectors")
    if unknown is not None and unknown not in seen:
        words.append(unknown)
        vectors.append(np.zeros_like(vectors[0]))
    matrix = np.concatenate([np.zeros_like(vectors[0])[None], np.stack(vectors)])
    return Vocabulary(words, matrix, None if unknown is None else words.index(unknown))
