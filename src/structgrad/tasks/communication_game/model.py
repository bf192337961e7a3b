"""Sender and receiver (architecture of Lazaridou et al. 2017, as in Correia et al. 2020)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from structgrad.common.ranges import check_choice
from structgrad.tasks.communication_game.scalars import network_of_numbers

SymbolMap = Literal["embedding", "linear"]

#: Gathering a game's candidates for one symbol costs about as much as a product of them with this
#: many symbols.
_GATHERED = 40


class Sender(nn.Module):
    """Scores of the symbols from the features of one image; no biases.

    A linear map gives ``embedding`` numbers. Each number by itself goes through the same network,
    ``hidden`` sigmoid units and one sigmoid output. A linear map gives the scores, which are
    divided by ``temperature``.

    Args:
        features: number of features of an image.
        embedding: number of values to which an image is reduced.
        hidden: number of units of the network for each value.
        symbols: number of symbols.
        temperature: divides the scores.
    """

    def __init__(self, features: int, embedding: int, hidden: int, symbols: int, temperature: float) -> None:
        super().__init__()
        self.embed = nn.Linear(features, embedding, bias=False)
        self.inward = nn.Parameter(torch.empty(hidden).uniform_(-1, 1))
        bound = 1 / math.sqrt(hidden)
        self.outward = nn.Parameter(torch.empty(hidden).uniform_(-bound, bound))
        self.score = nn.Linear(embedding, symbols, bias=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, features]`` -> ``[batch, symbols]``."""
        numbers = self.embed(features)
        values = network_of_numbers(numbers.flatten(), self.inward, self.outward)
        scores: Tensor = self.score(values.reshape(numbers.shape).sigmoid())
        return scores / self.temperature


class Receiver(nn.Module):
    """Scores of the candidates of a game from a symbol: dot products of embeddings; no biases.

    Args:
        features: number of features of an image.
        embedding: size of the embeddings of images and symbols.
        symbols: number of symbols.
        symbol_map: how their embeddings are initialised: ``embedding``, N(0, 1) as in torch's
            embedding; or ``linear``, uniform within 1/sqrt(symbols) as in torch's linear map of
            messages.

    Raises:
        ValueError: for another ``symbol_map``.
    """

    def __init__(self, features: int, embedding: int, symbols: int, symbol_map: SymbolMap = "embedding") -> None:
        super().__init__()
        check_choice("symbol_map", symbol_map, get_args(SymbolMap))
        self.embed = nn.Linear(features, embedding, bias=False)
        self.symbols = nn.Embedding(symbols, embedding)
        if symbol_map == "linear":
            nn.init.uniform_(self.symbols.weight, -1 / math.sqrt(symbols), 1 / math.sqrt(symbols))

    def forward(self, vertices: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
        """Scores ``[N, candidates]``.

        With few symbols a game the cost follows their number. With many, all symbols are compared
        with all candidates in one product, from which the requested scores are taken.

        Args:
            vertices: ``[N, symbols]``, hard or relaxed.
            rows: int64 ``[N]``: the game of each vertex.
            candidates: embedded, ``[games, candidates, embedding]``.
        """
        table = self.symbols.weight
        games, number, _ = candidates.shape
        if _GATHERED * len(rows) > len(table) * games and not vertices.requires_grad:
            scores = (table @ candidates.transpose(1, 2)).reshape(-1, number)
            return scores.index_select(0, rows * len(table) + vertices.argmax(-1))
        messages = vertices @ table if vertices.requires_grad else table[vertices.argmax(-1)]
        return (candidates.index_select(0, rows) @ messages[..., None])[..., 0]
