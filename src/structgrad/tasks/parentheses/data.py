"""Balanced sequences of brackets of several types: sampled with exactly uniform shapes, and cached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from structgrad.data import cache

SPLITS = ("train", "val", "test")
#: Token ids: 0 is padding, in trees "no child"; an opening bracket of type k is 1 + k, a closing one 1 + types + k.
PAD = NO_CHILD = 0

#: Part of the key of a cache; raise it when the same configuration would give other sequences.
_GENERATOR_VERSION = 1
#: Sequences drawn between two updates of the progress bar.
_BLOCK = 10_000
#: The number of shapes of more pairs exceeds 64 bits.
_MOST_PAIRS = 35


def vocabulary_size(types: int) -> int:
    """Token ids, "no child" included."""
    return 1 + 2 * types


def to_text(tokens: Tensor, types: int) -> list[str]:
    """Opening brackets ``(k``, closing ones ``)k``, without padding."""
    return [f"({t - 1}" if t <= types else f"){t - 1 - types}" for t in tokens.tolist() if t != PAD]


# --- shapes --------------------------------------------------------------------------------------------------------


def completions(pairs: int) -> NDArray[np.int64]:
    """In how many ways a sequence can be completed: int64 ``[2 pairs + 1, 2 pairs + 2]``.

    Entry ``[r, h]`` counts the continuations by r brackets of a sequence with h open brackets that end balanced;
    ``[2 pairs, 0]`` is the number of balanced shapes, Catalan's. 0 for h that ``2 pairs - r`` brackets do not reach.

    Raises:
        ValueError: where it does not fit into 64 bits.
    """
    if not 0 <= pairs <= _MOST_PAIRS:
        raise ValueError(f"pairs must be at most {_MOST_PAIRS}, beyond which shapes outnumber 64 bits; got {pairs}")
    ways = np.zeros((2 * pairs + 1, 2 * pairs + 2), np.int64)
    ways[0, 0] = 1
    for rest in range(1, 2 * pairs + 1):
        # Of the heights that r brackets can close; higher ones have no completion.
        for height in range(min(rest, 2 * pairs - rest) + 1):
            ways[rest, height] = ways[rest - 1, height + 1] + (ways[rest - 1, height - 1] if height else 0)
    return ways


def shape_of(rank: NDArray[np.int64], pairs: int) -> NDArray[np.bool_]:
    """The balanced shapes with these numbers: a bijection from ``0 .. Catalan(pairs) - 1``.

    Args:
        rank: int64 ``[n]``.
        pairs: of brackets.

    Returns:
        bool ``[n, 2 pairs]``, True where a bracket opens; ascending ranks are descending in lexicographic order.
    """
    ways = completions(pairs)
    rest, height = rank.copy(), np.zeros(len(rank), np.int64)
    opens = np.empty((len(rank), 2 * pairs), np.bool_)
    for step in range(2 * pairs):
        # Shapes that open here come first.
        opening = ways[2 * pairs - step - 1, height + 1]
        opens[:, step] = rest < opening
        rest = np.where(opens[:, step], rest, rest - opening)
        height = np.where(opens[:, step], height + 1, height - 1)
    return opens


def draw(rng: np.random.Generator, pairs: NDArray[np.int64], types: int, length: int) -> NDArray[np.int16]:
    """Random balanced sequences: shapes uniform among those of their size, types uniform.

    Args:
        rng: source of randomness.
        pairs: int64 ``[n]``, of each sequence.
        types: number of types.
        length: that the result is padded to.

    Returns:
        int16 ``[n, length]``.
    """
    tokens = np.zeros((len(pairs), length), np.int16)
    for size in np.unique(pairs):
        rows = np.flatnonzero(pairs == size)
        opens = shape_of(rng.integers(0, completions(size)[2 * size, 0], len(rows)), int(size))
        chosen = rng.integers(0, types, (len(rows), size))
        # Brackets of one level alternate between opening and closing ones, partners side by side.
        level = np.cumsum(np.where(opens, 1, -1), 1) - opens
        pairwise = np.argsort(level, 1, kind="stable").reshape(len(rows), size, 2)
        kind = np.empty(opens.shape, np.int64)
        np.put_along_axis(kind, pairwise[:, :, 0], chosen, 1)
        np.put_along_axis(kind, pairwise[:, :, 1], chosen, 1)
        tokens[rows, : 2 * size] = 1 + kind + np.where(opens, 0, types)
    return tokens


# --- configuration -------------------------------------------------------------------------------------------------


@dataclass
class ParenthesesData:
    """The sequences of an experiment: generated once, then read from the cache.

    Sizes are drawn uniformly, shapes uniformly among the balanced ones of the size, types uniformly; a sequence that
    was drawn before is drawn again, so that sizes with few sequences have less than their share. Splits are random
    parts of what was drawn.

    Args:
        cache: folder of generated data; each configuration gets a folder of its own in it.
        types: of brackets, t.
        pairs: least and greatest number of pairs.
        train: number of training sequences.
        val: number of validation sequences.
        test: number of test sequences.
        seed: of the generator.

    Raises:
        ValueError: for an impossible range or more sequences than there are.
    """

    cache: str | Path
    types: int = 10
    pairs: Sequence[int] = (2, 10)
    train: int = 20_000
    val: int = 2_500
    test: int = 2_500
    seed: int = 0
    _loaded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the configuration."""
        bounds = tuple(self.pairs)
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= _MOST_PAIRS:
            raise ValueError(
                f"data.pairs must be [least, most] with 1 <= least <= most <= {_MOST_PAIRS}; got {list(bounds)}"
            )
        if not 1 <= self.types <= 10_000:
            raise ValueError(f"data.types must lie between 1 and 10,000; got {self.types}")
        if min(self.train, self.val, self.test) < 1:
            raise ValueError(f"data.train, val, test must be positive; got {self.train}, {self.val}, {self.test}")
        wanted, exist = self.train + self.val + self.test, count(self.types, bounds[0], bounds[1])
        if wanted > exist:
            raise ValueError(
                f"there are {exist:,} sequences of {bounds[0]} to {bounds[1]} pairs and {self.types} types; "
                f"data.train, val, test are {wanted:,} together"
            )

    @property
    def max_length(self) -> int:
        """Tokens of the longest possible sequence."""
        return 2 * self.pairs[1]

    @property
    def key(self) -> dict[str, object]:
        """What the sequences depend on."""
        content: dict[str, object] = {name: getattr(self, name) for name in ("types", "train", "val", "test", "seed")}
        return content | {"pairs": list(self.pairs), "generator": _GENERATOR_VERSION}

    @property
    def folder(self) -> Path:
        """Where this configuration is cached."""
        return cache.folder_of(self.cache, "parentheses", self.key)

    def prepare(self) -> None:
        """Generate and store the sequences unless an intact cache is there; safe in several processes at once."""
        cache.ensure(
            self.folder,
            self.key,
            lambda: {
                name: pa.table({"tokens": cache.column_of(tokens.numpy())}) for name, tokens in generate(self).items()
            },
        )

    def split(self, name: str) -> Tensor:
        """The sequences of a split, from the cache (see :meth:`prepare`): int16 ``[n, length]``, padded with 0."""
        if name not in self._loaded:
            table = cache.load(self.folder, name)
            self._loaded[name] = torch.from_numpy(cache.array_of(table, "tokens", (self.max_length,)))
        return self._loaded[name]


def count(types: int, least: int, most: int) -> int:
    """How many balanced sequences of ``least`` to ``most`` pairs there are."""
    return sum(math.comb(2 * n, n) // (n + 1) * types**n for n in range(least, most + 1))


def generate(data: ParenthesesData, *, progress: bool = True) -> dict[str, Tensor]:
    """Draw the sequences of a configuration, no two of them the same in or between splits.

    Args:
        data: the configuration.
        progress: show a progress bar.

    Returns:
        split name -> int16 ``[n, length]``, in random order.
    """
    rng = np.random.default_rng(data.seed)
    wanted = data.train + data.val + data.test
    found: dict[bytes, None] = {}
    with tqdm(total=wanted, desc="Generating parentheses", unit="seq", disable=not progress) as bar:
        while len(found) < wanted:
            pairs = rng.integers(data.pairs[0], data.pairs[1] + 1, _BLOCK)
            found |= dict.fromkeys(keys_of(draw(rng, pairs, data.types, data.max_length)))
            bar.update(min(len(found), wanted) - bar.n)
    # Bytes back to numbers. Later draws have fewer of the small sizes, hence the random order.
    rows = np.frombuffer(b"".join(list(found)[:wanted]), np.int16).reshape(wanted, data.max_length)
    shuffled = torch.from_numpy(rows[rng.permutation(wanted)])
    return dict(zip(SPLITS, shuffled.split([data.train, data.val, data.test]), strict=True))


def keys_of(tokens: NDArray[np.int16]) -> list[bytes]:
    """The rows of ``[n, length]`` as objects that sets and dictionaries take."""
    content = np.ascontiguousarray(tokens)
    keys: list[bytes] = content.view(f"V{content.shape[1] * content.itemsize}").reshape(-1).tolist()
    return keys
