"""Generated reviews in which contiguous spans decide the rating, so that the truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from structgrad.tasks.l2x.beeradvocate import ASPECTS
from structgrad.tasks.l2x.data import ReviewData, Text, Vocabulary

_CUES = (
    ("look", "colour", "head", "lacing"),
    ("smell", "aroma", "nose", "scent"),
    ("feel", "body", "texture", "carbonation"),
    ("taste", "flavour", "finish", "palate"),
)
_OPINIONS = (
    ("awful", "terrible", "horrid", "foul"),
    ("poor", "weak", "dull", "thin"),
    ("fair", "decent", "average", "plain"),
    ("good", "nice", "pleasant", "fine"),
    ("superb", "wonderful", "excellent", "perfect"),
)


@dataclass(kw_only=True)
class PlantedReviews(ReviewData):
    """Generated reviews in which contiguous spans decide the rating, so that the truth is known.

    A review is a row of sentences. Each is about one of four aspects, or about nothing. A sentence
    about an aspect starts with a word that names it. Some of its other words are opinions, and the
    rest are fillers. The level of an opinion is the review's rating of that aspect, up to noise.
    Sentences about nothing have fillers only. Opinions are the same words for all aspects, so an
    opinion counts only if it is next to a word that names the aspect. The rating is that of aroma.
    The words of the sentences about aroma are those that decide. Ratings are uniform on [0, 1].

    Args:
        words: number of words in every review; the last sentence is cut.
        train: number of reviews.
        val: number of reviews.
        test: number of reviews.
        sentence: smallest and largest number of words in a sentence.
        spans: smallest and largest number of sentences about the aspect.
        opinions: fraction of opinions among the words of a sentence about an aspect.
        fillers: number of different fillers, drawn with weights 1/rank.
        noise: standard deviation of an opinion's level (0 to 4) around that of the rating.
        correlation: correlation of the normal scores of the ratings of two aspects.
        seed: seed of the generator.

    Raises:
        ValueError: for options out of range.
    """

    title: ClassVar[str] = "planted reviews (generated)"

    words: int = 350
    train: int = 10_000
    val: int = 1_000
    test: int = 1_000
    sentence: Sequence[int] = (8, 20)
    spans: Sequence[int] = (1, 2)
    opinions: float = 0.3
    fillers: int = 500
    noise: float = 0.5
    correlation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.sentence, self.spans = tuple(self.sentence), tuple(self.spans)
        for name, (low, high) in (("sentence", self.sentence), ("spans", self.spans)):
            if not 1 <= low <= high:
                raise ValueError(f"data.{name} must be two numbers, 1 <= fewest <= most; got {[low, high]}")
        if self.spans[1] * self.sentence[1] > self.words:
            raise ValueError(f"{self.spans[1]} spans of {self.sentence[1]} words do not fit into {self.words} words")
        if not (0 <= self.opinions <= 1 and 0 <= self.correlation <= 1 and self.noise >= 0 and self.fillers >= 1):
            raise ValueError("data.opinions and data.correlation lie in [0, 1], noise and fillers are positive")

    def key(self) -> dict[str, Any]:
        """See :class:`ReviewData`."""
        names = "train val test sentence spans opinions fillers noise correlation seed"
        options = {name: getattr(self, name) for name in names.split()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

    def read(self) -> tuple[dict[str, list[Text]], Vocabulary]:
        """See :class:`ReviewData`."""
        rng = np.random.default_rng(self.seed)
        fillers = [f"word{i + 1}" for i in range(self.fillers)]
        weights = 1 / np.arange(1, self.fillers + 1)
        texts = {
            part: [self._review(rng, fillers, weights / weights.sum()) for _ in range(getattr(self, part))]
            for part in ("train", "val", "test")
        }
        known = [word for group in (*_CUES, *_OPINIONS) for word in group]
        return texts, Vocabulary(["<pad>", *known, *fillers], None, None)

    def _review(self, rng: np.random.Generator, fillers: list[str], weights: NDArray[np.float64]) -> Text:
        target, aspects = ASPECTS.index("aroma"), len(ASPECTS)
        shared, own = rng.standard_normal(), rng.standard_normal(aspects)
        ratings = ndtr(np.sqrt(self.correlation) * shared + np.sqrt(1 - self.correlation) * own)
        # Sentences about other aspects or nothing (the last number) fill the space between the
        # spans.
        spans = rng.integers(self.spans[0], self.spans[1] + 1)
        lengths = list(rng.integers(self.sentence[0], self.sentence[1] + 1, spans))
        about = [target] * spans
        others = [aspect for aspect in range(aspects + 1) if aspect != target]
        while sum(lengths) < self.words:
            lengths.append(rng.integers(self.sentence[0], self.sentence[1] + 1))
            about.append(int(rng.choice(others)))
        # Only the last added sentence is cut, so no span is.
        lengths[-1] -= sum(lengths) - self.words
        tokens: list[str] = []
        relevant: list[bool] = []
        for i in rng.permutation(len(lengths)):
            drawn = rng.choice(len(fillers), lengths[i], p=weights)
            sentence = [fillers[j] for j in drawn]
            if about[i] < aspects:
                levels = 4 * ratings[about[i]] + self.noise * rng.standard_normal(lengths[i])
                for j in (rng.random(lengths[i]) < self.opinions).nonzero()[0]:
                    sentence[j] = rng.choice(_OPINIONS[int(np.clip(np.rint(levels[j]), 0, 4))])
                sentence[0] = rng.choice(_CUES[about[i]])
            tokens += [str(word) for word in sentence]
            relevant += [about[i] == target] * len(sentence)
        return Text("generated", tokens, float(ratings[target]), np.array(relevant))
