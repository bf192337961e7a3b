"""Reviews in JSON lines: your own, and film reviews in which people marked the deciding words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from structgrad.data import DamagedDataError
from structgrad.data.lines import lines_of
from structgrad.tasks.l2x.beeradvocate import read_embeddings
from structgrad.tasks.l2x.data import ReviewData, Text, Vocabulary, fingerprints

_PARTS = {"train": "train", "val": "dev", "test": "test"}


@dataclass(kw_only=True)
class JsonReviews(ReviewData):
    """Your own reviews, one JSON object a line.

    An object has these keys; others are ignored:

    - ``text``, whose words are separated by white space, or ``tokens``, a list of words;
    - a rating in [0, 1] (null for test reviews whose rating is not used);
    - if the deciding words are known, spans ``[start, end)`` of token numbers.

    Args:
        data: folder of data sets, ``paths.data``.
        folder: folder with ``train``, ``dev`` and ``test``, each ``.jsonl`` or ``.jsonl.gz``;
            absolute or within ``data``.
        rating: key of the rating.
        spans: key of the spans.
        embeddings: file of vectors, a word and its vector a line: absolute, within the folder, or
            within ``vectors`` in the cache, where ``scripts/word_vectors.py`` writes. Only words
            that occur are read. None: embeddings are learnt.
        lowercase: whether words become lower case.
        least: if embeddings are learnt, a word that occurs less often in training is unknown.
            Otherwise a word without a vector is unknown.
    """

    title: ClassVar[str] = "Reviews in JSON lines"

    data: str | Path
    folder: str = "reviews"
    rating: str = "rating"
    spans: str = "spans"
    embeddings: str | None = None
    lowercase: bool = True
    least: int = 2
    words: int = 350

    @property
    def files(self) -> dict[str, Path]:
        """The files that are read."""
        folder = Path(self.data) / self.folder
        files = {}
        for part, name in _PARTS.items():
            plain = folder / f"{name}.jsonl"
            files[part] = plain if plain.is_file() else folder / f"{name}.jsonl.gz"
        if self.embeddings is not None:
            fetched = Path(self.cache) / "vectors" / self.embeddings
            files["embeddings"] = fetched if fetched.is_file() else folder / self.embeddings
        return files

    def key(self) -> dict[str, Any]:
        """See :class:`ReviewData`."""
        how = (
            f'or without .gz: an object a line with "text" or "tokens", "{self.rating}" in [0, 1] and, where known, '
            f'"{self.spans}", the token ranges [start, end) that decide; docs/tasks/l2x.md says more'
        )
        if self.embeddings is not None:
            how += f"; vectors may also lie in {Path(self.cache) / 'vectors'}, where `make word-vectors` puts GloVe's"
        options = {"rating": self.rating, "spans": self.spans, "lowercase": self.lowercase, "least": self.least}
        return {"files": fingerprints(self.files, self.title, how), **options}

    def read(self) -> tuple[dict[str, list[Text]], Vocabulary]:
        """See :class:`ReviewData`.

        Raises:
            DamagedDataError: for a line in another format; the message names file and line.
        """
        files = self.files
        texts = {
            part: list(
                read_reviews(
                    files[part], rating=self.rating, spans=self.spans, lowercase=self.lowercase, rated=part != "test"
                )
            )
            for part in _PARTS
        }
        if self.embeddings is None:
            return texts, Vocabulary.of(texts["train"], self.least)
        occurring = {token for some in texts.values() for text in some for token in text.tokens}
        return texts, read_embeddings(files["embeddings"], "<unk>", occurring)


@dataclass(kw_only=True)
class MovieRationales(JsonReviews):
    """Film reviews, negative or positive, with rationales (Zaidan et al. 2007; ERASER benchmark,
    DeYoung et al. 2020).

    The label is the rating, and the words that people marked decide. In the test part all evidence
    is marked, in the others only enough of it. So precision is comparable within a part only.
    """

    title: ClassVar[str] = "Movie reviews with rationales"

    folder: str = "movie_rationales"
    rating: str = "label"
    spans: str = "rationale"
    least: int = 5
    words: int = 1000


def read_reviews(file: Path, *, rating: str, spans: str, lowercase: bool, rated: bool) -> Iterator[Text]:
    """See :class:`JsonReviews`.

    Args:
        file: ``.jsonl`` or ``.jsonl.gz``.
        rating: key of the rating.
        spans: key of the spans.
        lowercase: whether words become lower case.
        rated: whether every review must have a rating.

    Raises:
        DamagedDataError: for a line in another format; the message names file and line.
    """
    for where, line in lines_of(file):
        try:
            content = json.loads(line)
            tokens = content["text"].split() if "text" in content else list(content["tokens"])
            if not all(isinstance(token, str) for token in tokens):
                raise TypeError("tokens are strings")
            given = content.get(rating)
            value = math.nan if given is None else float(given)
            bounds = None if content.get(spans) is None else [(int(start), int(end)) for start, end in content[spans]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f'"text" or "tokens", "{rating}" and, where known, "{spans}"'
            raise DamagedDataError(f"{where}: expected an object with {expected} ({error!r})") from None
        if given is None and rated:
            raise DamagedDataError(f'{where}: there is no "{rating}", which only reviews of the test may lack')
        if given is not None and not 0 <= value <= 1:
            raise DamagedDataError(f"{where}: ratings lie within [0, 1]; got {given!r}")
        relevant = None
        if bounds is not None:
            relevant = np.zeros(len(tokens), np.bool_)
            for start, end in bounds:
                if not 0 <= start <= end <= len(tokens):
                    raise DamagedDataError(f"{where}: span [{start}, {end}) does not lie within {len(tokens)} words")
                relevant[start:end] = True
        yield Text(where, [token.lower() if lowercase else token for token in tokens], value, relevant)
