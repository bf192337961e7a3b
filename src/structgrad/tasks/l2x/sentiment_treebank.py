"""The Stanford Sentiment Treebank as reviews: real sentences in which every word has a label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from structgrad.data import DamagedDataError
from structgrad.data.lines import lines_of
from structgrad.tasks.l2x.data import ReviewData, Text, Vocabulary, fingerprints

_NEUTRAL, _HIGHEST = 2, 4


@dataclass(kw_only=True)
class SentimentTreebank(ReviewData):
    """Sentences of film reviews (Socher et al. 2013). The rating is the sentence's label divided by
    4.

    A word decides if its own label is not neutral.

    Args:
        data: folder of data sets, ``paths.data``; the files are in ``sentiment_treebank`` within.
        lowercase: whether words become lower case.
        least: a word that occurs less often in training is unknown.
    """

    title: ClassVar[str] = "Stanford Sentiment Treebank"

    data: str | Path
    lowercase: bool = True
    least: int = 2
    words: int = 56

    @property
    def files(self) -> dict[str, Path]:
        """The files that are read."""
        folder = Path(self.data) / "sentiment_treebank"
        return {
            part: folder / f"{name}.txt.gz" for part, name in (("train", "train"), ("val", "dev"), ("test", "test"))
        }

    def key(self) -> dict[str, Any]:
        """See :class:`ReviewData`."""
        how = "trees, one a line, are at nlp.stanford.edu/sentiment; compress them with gzip"
        prints = fingerprints(self.files, self.title, f"the {how}")
        return {"files": prints, "lowercase": self.lowercase, "least": self.least}

    def read(self) -> tuple[dict[str, list[Text]], Vocabulary]:
        """See :class:`ReviewData`.

        Raises:
            DamagedDataError: for a line that is no tree; the message names file and line.
        """
        texts = {part: list(read_trees(file, lowercase=self.lowercase)) for part, file in self.files.items()}
        return texts, Vocabulary.of(texts["train"], self.least)


def read_trees(file: Path, *, lowercase: bool) -> Iterator[Text]:
    """Trees in brackets, ``(3 (2 a) (4 (3 fine) (2 film)))``, one a line.

    Raises:
        DamagedDataError: for a line in another format; the message names file and line.
    """
    for where, line in lines_of(file):
        tokens: list[str] = []
        labels: list[int] = []
        root, label, depth = -1, -1, 0
        # Split at the ASCII space only, because some words contain a no-break space.
        for piece in line.split(" "):
            if piece.startswith("("):
                if piece[1:] not in ("0", "1", "2", "3", "4") or (tokens and not depth):
                    raise DamagedDataError(f"{where}: expected '(' and a label 0 to {_HIGHEST}; got {piece!r}")
                label = int(piece[1:])
                root = label if root < 0 else root
                depth += 1
            else:
                word = piece.rstrip(")")
                depth -= len(piece) - len(word)
                if not word or word == piece or label < 0 or depth < 0:
                    raise DamagedDataError(f"{where}: expected a word and closing brackets; got {piece!r}")
                tokens.append(word.lower() if lowercase else word)
                labels.append(label)
                label = -1
        if not tokens or depth:
            raise DamagedDataError(f"{where}: the brackets of the tree do not close")
        yield Text(where, tokens, root / _HIGHEST, np.array(labels) != _NEUTRAL)
