"""The networks of learning to explain (Paulus et al. 2020, D.6): word encoders, and the decoder of
chosen words.
"""

from __future__ import annotations

import abc
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsqr
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad.tasks.l2x.data import PAD, Reviews

EncoderName = Literal["simple", "complex", "random_words", "linear_weights"]

#: Scores of padding in the two references, which choose padding only if there are too few words.
_LAST = -100.0
#: Ridge penalties of the linear model; the validation error selects one.
_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)


class WordEncoder(nn.Module, abc.ABC):
    """Scores the words of a review.

    Args:
        pairs: whether neighbouring words are scored together, too.
    """

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs

    @abc.abstractmethod
    def forward(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """Score.

        Args:
            tokens: int ``[batch, n]``.
            embedded: their embeddings, ``[batch, n, size]``.

        Returns:
            ``[batch, n]``; with pairs ``[batch, 2n - 1]``, first words, then pairs (i, i + 1).
        """


class LearntEncoder(WordEncoder):
    """Dropout, then convolutions of one filter each; that of the words' scores is one word wide.

    The score of a pair is the sum of three. Two are one word wide at its first word, one is two
    words wide (Paulus et al. 2020, D.6). Here all are one matrix product. The complex encoder first
    applies two convolutions to the embeddings. They are three words wide, with ReLU, and padded to
    keep the length.

    Args:
        size: size of an embedding.
        pairs: see :class:`WordEncoder`.
        dropout: dropout probability.
        filters: number of filters of the two convolutions; None for the simple encoder, which has
            none.
    """

    def __init__(self, size: int, pairs: bool, dropout: float, filters: int | None) -> None:
        super().__init__(pairs)
        self.features = None if filters is None else _convolutions(size, filters)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(size if filters is None else filters, 5 if pairs else 1)

    def forward(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """See :class:`WordEncoder`."""
        if self.features is not None:
            # Words last in memory: dropout draws its mask in that order, whatever the convolutions' own.
            embedded = self.features(embedded.transpose(1, 2)).contiguous().transpose(1, 2)
        terms: Tensor = self.scores(self.dropout(embedded))
        if not self.pairs:
            return terms[..., 0]
        return torch.cat([terms[..., 0], terms[:, :-1, 1:4].sum(-1) + terms[:, 1:, 4]], 1)


class FixedEncoder(WordEncoder):
    """A fixed score for each word of the vocabulary; padding comes last, pairs score 0.

    Args:
        weights: ``[vocabulary]``; the weight of padding is never read.
        pairs: see :class:`WordEncoder`.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, pairs: bool) -> None:
        super().__init__(pairs)
        self.register_buffer("weights", weights)

    def forward(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """See :class:`WordEncoder`."""
        scores = torch.where(tokens == PAD, _LAST, self.weights[tokens.long()])
        return F.pad(scores, (0, tokens.shape[1] - 1)) if self.pairs else scores


def make_encoder(
    name: EncoderName, *, size: int, pairs: bool, dropout: float, filters: int, train: Reviews, val: Reviews, words: int
) -> WordEncoder:
    """The encoder with this name.

    Args:
        name: ``simple`` and ``complex`` are the paper's. ``random_words`` scores all words alike,
            so a random subset consists of arbitrary words. ``linear_weights`` scores a word by
            :func:`linear_weights`.
        size: size of an embedding.
        pairs: see :class:`WordEncoder`.
        dropout: dropout probability.
        filters: number of filters of the complex encoder.
        train: reviews on which the linear model is fitted.
        val: reviews on which its penalty is selected.
        words: size of the vocabulary.
    """
    if name == "random_words":
        return FixedEncoder(torch.zeros(words), pairs)
    if name == "linear_weights":
        return FixedEncoder(linear_weights(train, val, words).abs(), pairs)
    return LearntEncoder(size, pairs, dropout, filters if name == "complex" else None)


def linear_weights(train: Reviews, val: Reviews, words: int) -> Tensor:
    """Weights of a linear model of the rating, from the counts of words: float32 ``[words]``.

    It is a ridge regression. The squared error on ``val`` selects its penalty.

    Args:
        train: reviews with ratings.
        val: likewise.
        words: size of the vocabulary; the weight of padding is 0.
    """
    counts, ratings = _counts(train, words), train.ratings.double().numpy()
    val_counts, val_ratings = _counts(val, words), val.ratings.double().numpy()
    mean = ratings.mean()
    best, error = np.zeros(words), np.inf
    for penalty in _PENALTIES:
        weights = lsqr(counts, ratings - mean, damp=penalty, iter_lim=200)[0]
        this = float(np.square(val_counts @ weights + mean - val_ratings).mean())
        if this < error:
            best, error = weights, this
    return torch.from_numpy(best).float()


def _counts(reviews: Reviews, words: int) -> csr_matrix:
    review, place = (reviews.tokens != PAD).nonzero(as_tuple=True)
    token = reviews.tokens[review, place].numpy()
    return csr_matrix((np.ones(len(token)), (review.numpy(), token)), shape=(len(reviews), words))


class Decoder(nn.Module):
    """The rating from the chosen words.

    It has two convolutions, three words wide and padded, over the masked embeddings, with ReLU; the
    maximum over the words; dropout; one hidden layer, ReLU; a sigmoid.

    Args:
        size: size of an embedding.
        filters: number of filters of the convolutions.
        hidden: number of hidden units.
        dropout: dropout probability.
    """

    def __init__(self, size: int, filters: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.features = _convolutions(size, filters)
        self.rating = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(filters, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, embedded: Tensor, chosen: Tensor) -> Tensor:
        """Ratings in [0, 1]: ``[N]``.

        Args:
            embedded: ``[N, n, size]``.
            chosen: ``[N, n]``, the fraction of each word that is seen; hard or relaxed.
        """
        masked = embedded * chosen[..., None]
        rating: Tensor = self.rating(self.features(masked.transpose(1, 2)).amax(2))
        return rating[:, 0]


class _OverWords(nn.Conv1d):
    """A convolution three words wide, padded: ``[N, size, n]`` -> ``[N, filters, n]``.

    Features of a word lie side by side in memory. On a CPU torch takes them as they are in two
    dimensions only, and copies them in one.
    """

    def __init__(self, size: int, filters: int) -> None:
        super().__init__(size, filters, 3, padding=1)

    def forward(self, words: Tensor) -> Tensor:
        if words.device.type != "cpu":
            return super().forward(words)
        return F.conv2d(words.unsqueeze(2), self.weight.unsqueeze(2), self.bias, padding=(0, 1)).squeeze(2)


def _convolutions(size: int, filters: int) -> nn.Sequential:
    """``[N, size, n]`` -> ``[N, filters, n]``."""
    return nn.Sequential(_OverWords(size, filters), nn.ReLU(), _OverWords(filters, filters), nn.ReLU())
