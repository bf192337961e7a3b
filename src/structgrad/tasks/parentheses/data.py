"""Balanced sequences of brackets of several types: sampled with exactly uniform shapes, or read from
files, and cached.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from structgrad.data import DamagedDataError, DataError, cache
from structgrad.data.lines import file_of_split, lines_of

SPLITS = ("train", "val", "test")
#: Token ids. 0 is padding, and "no child" in trees. An opening bracket of type k is 1 + k, a
#: closing one 1 + types + k.
PAD = NO_CHILD = 0

#: Part of the key of a cache. Raise it when the same configuration would give other sequences.
_GENERATOR_VERSION = 1
#: The number of sequences drawn between two updates of the progress bar.
_BLOCK = 10_000
#: The largest number of pairs for which the number of shapes fits into 64 bits.
_MOST_PAIRS = 35
#: A bracket in a file: ``(3`` and ``)3`` have a type, the others are of types 0 to 3.
_BRACKET = re.compile(r"([()])(\d+)|([()\[\]{}<>])")
_OPENING, _CLOSING = "([{<", ")]}>"


def vocabulary_size(types: int) -> int:
    """The number of token ids, including "no child"."""
    return 1 + 2 * types


def to_text(tokens: Tensor, types: int) -> list[str]:
    """Opening brackets as ``(k``, closing ones as ``)k``, without padding."""
    return [f"({t - 1}" if t <= types else f"){t - 1 - types}" for t in tokens.tolist() if t != PAD]


# --- shapes --------------------------------------------------------------------------------------------------------


def completions(pairs: int) -> NDArray[np.int64]:
    """The number of ways to complete a sequence: int64 ``[2 pairs + 1, 2 pairs + 2]``.

    Entry ``[r, h]`` counts the balanced continuations by r brackets of a sequence with h open
    brackets. ``[2 pairs, 0]`` is the number of balanced shapes, a Catalan number. The entry is 0
    for an h that ``2 pairs - r`` brackets cannot reach.

    Raises:
        ValueError: if a number does not fit into 64 bits.
    """
    if not 0 <= pairs <= _MOST_PAIRS:
        raise ValueError(f"pairs must be at most {_MOST_PAIRS}, beyond which shapes outnumber 64 bits; got {pairs}")
    ways = np.zeros((2 * pairs + 1, 2 * pairs + 2), np.int64)
    ways[0, 0] = 1
    for rest in range(1, 2 * pairs + 1):
        # Only heights that r brackets can close; higher ones have no completion.
        for height in range(min(rest, 2 * pairs - rest) + 1):
            ways[rest, height] = ways[rest - 1, height + 1] + (ways[rest - 1, height - 1] if height else 0)
    return ways


def shape_of(rank: NDArray[np.int64], pairs: int) -> NDArray[np.bool_]:
    """The balanced shapes with these numbers: a bijection from ``0 .. Catalan(pairs) - 1``.

    Args:
        rank: int64 ``[n]``.
        pairs: number of pairs of brackets.

    Returns:
        bool ``[n, 2 pairs]``, True for an opening bracket; ascending ranks are in descending
        lexicographic order.
    """
    ways = completions(pairs)
    rest, height = rank.copy(), np.zeros(len(rank), np.int64)
    opens = np.empty((len(rank), 2 * pairs), np.bool_)
    for step in range(2 * pairs):
        # Shapes that open a bracket here come first.
        opening = ways[2 * pairs - step - 1, height + 1]
        opens[:, step] = rest < opening
        rest = np.where(opens[:, step], rest, rest - opening)
        height = np.where(opens[:, step], height + 1, height - 1)
    return opens


def draw(rng: np.random.Generator, pairs: NDArray[np.int64], types: int, length: int) -> NDArray[np.int16]:
    """Random balanced sequences: shapes are uniform among those of their size, types are uniform.

    Args:
        rng: source of randomness.
        pairs: int64 ``[n]``, the number of pairs of each sequence.
        types: number of types.
        length: the length to which the result is padded.

    Returns:
        int16 ``[n, length]``.
    """
    tokens = np.zeros((len(pairs), length), np.int16)
    for size in np.unique(pairs):
        rows = np.flatnonzero(pairs == size)
        opens = shape_of(rng.integers(0, completions(size)[2 * size, 0], len(rows)), int(size))
        chosen = rng.integers(0, types, (len(rows), size))
        # On one level opening and closing brackets alternate, so partners are side by side.
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
    """The sequences of an experiment: generated or read from files once, then from the cache.

    Without files, sizes and types are drawn uniformly, shapes uniformly among the balanced ones of
    the size. A sequence that was drawn before is drawn again. So sizes with few sequences have less
    than their share. Splits are random parts of the drawn sequences.

    Args:
        cache: folder of generated data; each configuration gets a folder of its own in it.
        types: t, the number of types of brackets.
        pairs: smallest and largest number of pairs.
        train: number of training sequences.
        val: number of validation sequences.
        test: number of test sequences.
        seed: seed of the generator, and of the order of the sequences of files.
        files: a folder with ``train.txt``, ``val.txt`` and ``test.txt``, or ``.txt.gz``, that
            replace the generator, see :func:`read_brackets`. The first ``train``, ``val`` or
            ``test`` sequences of each file within the range of ``pairs`` are used; None: all of
            them.

    Raises:
        ValueError: for an impossible range, or for more sequences than exist.
    """

    cache: str | Path
    types: int = 10
    pairs: Sequence[int] = (2, 10)
    train: int | None = 20_000
    val: int | None = 2_500
    test: int | None = 2_500
    seed: int = 0
    files: str | Path | None = None
    _loaded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the configuration."""
        bounds, most = tuple(self.pairs), _MOST_PAIRS if self.files is None else math.inf
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= most:
            raise ValueError(f"data.pairs must be [least, most] with 1 <= least <= most <= {most}; got {list(bounds)}")
        if not 1 <= self.types <= 10_000:
            raise ValueError(f"data.types must lie between 1 and 10,000; got {self.types}")
        if any(size is not None and size < 1 for size in self.sizes.values()):
            raise ValueError(f"data.train, val, test must be positive; got {', '.join(map(str, self.sizes.values()))}")
        if self.files is None:
            exist = count(self.types, bounds[0], bounds[1])
            if self._wanted > exist:
                raise ValueError(
                    f"there are {exist:,} sequences of {bounds[0]} to {bounds[1]} pairs and {self.types} types; "
                    f"data.train, val, test are {self._wanted:,} together"
                )

    @property
    def sizes(self) -> dict[str, int | None]:
        """Split -> number of sequences; None: all of a file."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def _wanted(self) -> int:
        """The number of sequences to generate."""
        given = [size for size in self.sizes.values() if size is not None]
        if len(given) < len(SPLITS):
            raise ValueError("null takes all sequences of a file (data.files); generated ones need a number")
        return sum(given)

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest possible sequence."""
        return 2 * self.pairs[1]

    @property
    def key(self) -> dict[str, object]:
        """Everything on which the sequences depend."""
        content: dict[str, object] = {"types": self.types, **self.sizes, "seed": self.seed, "pairs": list(self.pairs)}
        if self.files is None:
            return content | {"generator": _GENERATOR_VERSION}
        return content | {"files": {name: hashlib.sha256(self._file(name).read_bytes()).hexdigest() for name in SPLITS}}

    @property
    def folder(self) -> Path:
        """The cache folder of this configuration."""
        return cache.folder_of(self.cache, "parentheses", self.key)

    def prepare(self) -> None:
        """Generate or read and store the sequences unless an intact cache exists. It is safe in several processes at
        once.
        """
        make = generate if self.files is None else ParenthesesData._read
        cache.ensure(
            self.folder,
            self.key,
            lambda: {
                name: pa.table({"tokens": cache.column_of(tokens.numpy())}) for name, tokens in make(self).items()
            },
        )

    def _file(self, name: str) -> Path:
        content = "a sequence a line; docs/tasks/parentheses.md says more"
        return file_of_split(str(self.files), name, ".txt", content)

    def _read(self) -> dict[str, Tensor]:
        rng, out = np.random.default_rng(self.seed), {}
        for name, size in self.sizes.items():
            file, (least, most) = self._file(name), self.pairs
            chosen = [row for row in read_brackets(file, self.types) if least <= len(row) // 2 <= most][:size]
            if len(chosen) < (size or 1):
                wanted = "needs some" if size is None else f"is {size}"
                raise DataError(
                    f"{file} has {len(chosen)} sequences of {least} to {most} pairs (task.data.pairs); "
                    f"task.data.{name} {wanted}"
                )
            tokens = np.zeros((len(chosen), self.max_length), np.int16)
            for place, row in enumerate(rng.permutation(len(chosen))):  # files may be sorted
                tokens[place, : len(chosen[row])] = chosen[row]
            out[name] = torch.from_numpy(tokens)
        return out

    def split(self, name: str) -> Tensor:
        """The sequences of a split, from the cache (see :meth:`prepare`): int16 ``[n, length]``, padded with 0."""
        if name not in self._loaded:
            table = cache.load(self.folder, name)
            self._loaded[name] = torch.from_numpy(cache.array_of(table, "tokens", (self.max_length,)))
        return self._loaded[name]


def count(types: int, least: int, most: int) -> int:
    """The number of balanced sequences of ``least`` to ``most`` pairs."""
    return sum(math.comb(2 * n, n) // (n + 1) * types**n for n in range(least, most + 1))


def generate(data: ParenthesesData, *, progress: bool = True) -> dict[str, Tensor]:
    """Draw the sequences of a configuration; no two are the same, within and between splits.

    Args:
        data: the configuration.
        progress: show a progress bar, on a terminal.

    Returns:
        split name -> int16 ``[n, length]``, in random order.
    """
    rng = np.random.default_rng(data.seed)
    wanted = data._wanted
    found: dict[bytes, None] = {}
    with tqdm(total=wanted, desc="Generating parentheses", unit="seq", disable=None if progress else True) as bar:
        while len(found) < wanted:
            pairs = rng.integers(data.pairs[0], data.pairs[1] + 1, _BLOCK)
            found |= dict.fromkeys(keys_of(draw(rng, pairs, data.types, data.max_length)))
            bar.update(min(len(found), wanted) - bar.n)
    # Convert bytes back to numbers. Later draws have fewer small sizes, so the order is made
    # random.
    rows = np.frombuffer(b"".join(list(found)[:wanted]), np.int16).reshape(wanted, data.max_length)
    shuffled = torch.from_numpy(rows[rng.permutation(wanted)])
    return dict(zip(SPLITS, shuffled.split([size or 0 for size in data.sizes.values()]), strict=True))


def keys_of(tokens: NDArray[np.int16]) -> list[bytes]:
    """The rows of ``[n, length]`` as objects for sets and dictionaries."""
    content = np.ascontiguousarray(tokens)
    keys: list[bytes] = content.view(f"V{content.shape[1] * content.itemsize}").reshape(-1).tolist()
    return keys


def read_brackets(file: Path, types: int) -> list[list[int]]:
    """Read balanced sequences, one a line; white space between brackets is optional.

    Args:
        file: text in UTF-8, gzip if its name ends in ``.gz``. ``(3`` opens a bracket of type 3 and
            ``)3`` closes it. Without numbers ``()``, ``[]``, ``{}`` and ``<>`` are of types 0 to 3.
        types: number of types, at most.

    Returns:
        the tokens of each sequence.

    Raises:
        DamagedDataError: with file and line, for other characters, a type that does not exist, or a
            sequence that is not balanced.
    """
    sequences = []
    for where, line in lines_of(file):
        tokens: list[int] = []
        still_open: list[int] = []
        text = "".join(line.split())
        if rest := _BRACKET.sub("", text):
            raise DamagedDataError(f"{where}: {rest[:20]!r} is no bracket; those are ( ) [ ] {{ }} < > (3 )3")
        for numbered, number, plain in _BRACKET.findall(text):
            shape = numbered or plain
            opens = shape in _OPENING
            kind = int(number) if numbered else (_OPENING if opens else _CLOSING).index(shape)
            if kind >= types:
                raise DamagedDataError(
                    f"{where}: {shape}{number} is of type {kind}; task.data.types={types} ends before"
                )
            if not opens and (not still_open or still_open.pop() != kind):
                raise DamagedDataError(f"{where}: {shape}{number} closes no bracket that was opened last")
            if opens:
                still_open.append(kind)
            tokens.append(1 + kind + (0 if opens else types))
        if still_open:
            raise DamagedDataError(f"{where}: {len(still_open)} brackets are not closed")
        sequences.append(tokens)
    return sequences
