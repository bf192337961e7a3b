"""ListOps expressions: the generator, their cache on disk, and the reader of published ``.tsv``
files.

The generator is that of Nangia and Bowman (2018) under the restrictions of Paulus et al. (2020),
D.5.1, who leave out the operator SM, the sum modulo 10. Every argument is an operator with
probability 1/4 and otherwise a digit. Arguments of an operator at the greatest depth are digits.
Rejection keeps lengths within a range; expressions of depth 1 may be shorter if none is that long.
Every depth has the same share, and its expressions are grown with that depth as the greatest. Depth
counts nested operators; it is the height of the parse in edges.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from structgrad.algorithms.compiled import njit
from structgrad.data import cache
from structgrad.data.lines import file_of_split

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
OPERATORS = ("MIN", "MAX", "MED", "SM")
#: Token ids: padding is 0, digit d is 1 + d, then three operators, the closing bracket, and SM.
#: Models without SM have no embedding for it.
VOCABULARY = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "]", "[SM")
PAD, CLOSE = 0, VOCABULARY.index("]")
_ID = {token: i for i, token in enumerate(VOCABULARY)}
#: Token id -> number of the operator.
_KINDS = {_ID[f"[{name}"]: kind for kind, name in enumerate(OPERATORS)}
_FIRST_OPERATOR, _SM_TOKEN = _ID["[MIN"], _ID["[SM"]
_MIN, _MAX, _MED, _SM = range(4)
#: Names of the columns of published files.
_LABELS, _EXPRESSIONS = ("label", "target", "value"), ("expression", "source", "sentence", "input")

#: Part of the key of a cache. Raise it when the same configuration would give other expressions or
#: parents.
_GENERATOR_VERSION = 2
#: The number of expressions grown between two updates of the progress bar.
_BLOCK = 100_000
#: A depth with no new expression in this many attempts is called impossible.
_GIVE_UP = 20_000_000


class ListOpsFileError(ValueError):
    """A line of a published file cannot be read; the message names file, line and reason."""


# --- expressions ---------------------------------------------------------------------------------------------------


@dataclass
class Expressions:
    """Expressions of unequal length, padded.

    Attributes:
        tokens: int64 ``[n, length]``, ids in :data:`VOCABULARY`, 0 where padded.
        parents: int64 ``[n, length]``, position of the operator to which a token belongs, as an
            argument or as its closing bracket; -1 for the first token and padding.
        values: int64 ``[n]``, the values of the expressions, 0..9.
        lengths: int64 ``[n]``.
        depths: int64 ``[n]``, number of nested operators.
    """

    tokens: Tensor
    parents: Tensor
    values: Tensor
    lengths: Tensor
    depths: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the form of :class:`structgrad.data.Batches`."""
        return {name: getattr(self, name) for name in ("tokens", "parents", "values", "lengths", "depths")}


@njit(cache=True)
def _evaluate(operator: int, arguments: NDArray[np.int16]) -> int:
    if operator == _MIN:
        return int(arguments.min())
    if operator == _MAX:
        return int(arguments.max())
    if operator == _SM:
        return int(arguments.sum()) % 10
    ordered = np.sort(arguments)
    n = len(ordered)
    # The floor of the mean of the two middle values, which are the same if n is odd.
    return int(ordered[(n - 1) // 2] + ordered[n // 2]) // 2


@njit(cache=True)
def _grow(
    rng: np.random.Generator,
    operators: NDArray[np.int64],
    probability: float,
    least: int,
    most: int,
    max_depth: int,
    tokens: NDArray[np.int16],
    parents: NDArray[np.int16],
) -> tuple[int, int, int]:
    """Grow one expression into ``tokens`` and ``parents``: (length, depth, value); length 0 if too long."""
    head = np.empty(max_depth, np.int16)  # the open operators: position, kind, number of arguments, arguments so far
    kind = np.empty(max_depth, np.int64)
    wanted = np.empty(max_depth, np.int64)
    have = np.zeros(max_depth, np.int64)
    arguments = np.empty((max_depth, most), np.int16)
    level, depth, length = -1, 0, 0
    while True:
        if length == len(tokens):
            return 0, 0, 0
        parents[length] = head[level] if level >= 0 else -1
        if level >= 0 and have[level] == wanted[level]:
            tokens[length] = CLOSE
            length += 1
            value = _evaluate(kind[level], arguments[level, : wanted[level]])
            level -= 1
            if level < 0:
                return length, depth, value
            arguments[level, have[level]] = value
            have[level] += 1
        elif level < 0 or (level + 1 < max_depth and rng.random() < probability):
            level += 1
            depth = max(depth, level + 1)
            head[level] = length
            kind[level] = operators[rng.integers(0, len(operators))]
            wanted[level] = rng.integers(least, most + 1)
            have[level] = 0
            tokens[length] = _SM_TOKEN if kind[level] == _SM else _FIRST_OPERATOR + kind[level]
            length += 1
        else:
            digit = rng.integers(0, 10)
            tokens[length] = 1 + digit
            arguments[level, have[level]] = digit
            have[level] += 1
            length += 1


@njit(cache=True)
def _grow_block(
    rng: np.random.Generator,
    attempts: int,
    operators: NDArray[np.int64],
    probability: float,
    least: int,
    most: int,
    shortest: int,
    wanted_depth: int,
    tokens: NDArray[np.int16],
    parents: NDArray[np.int16],
    values: NDArray[np.int16],
    lengths: NDArray[np.int16],
    depths: NDArray[np.int16],
) -> int:
    """Try ``attempts`` expressions and keep those of wanted length and depth; return how many were
    kept.
    """
    kept = 0
    for _ in range(attempts):
        length, depth, value = _grow(
            rng, operators, probability, least, most, wanted_depth, tokens[kept], parents[kept]
        )
        if length >= shortest and length > 0 and depth == wanted_depth:
            tokens[kept, length:] = PAD
            parents[kept, length:] = -1
            values[kept], lengths[kept], depths[kept] = value, length, depth
            kept += 1
    return kept


# --- configuration -------------------------------------------------------------------------------------------------


@dataclass
class ListOpsData:
    """The expressions of an experiment: generated once, then read from the cache.

    Args:
        cache: folder of generated data; each configuration gets a folder of its own in it.
        train: number of training expressions.
        val: number of validation expressions.
        test: number of test expressions.
        length: shortest and longest expression, in tokens, brackets included. Generated expressions
            of depth 1 have at most ``arguments[1] + 2`` tokens. If the shortest is longer, it does
            not count for them.
        depth: smallest and largest depth; every depth has the same share of every split.
        arguments: smallest and largest number of arguments of an operator.
        operators: names among MIN, MAX, MED and SM, the sum modulo 10 of the original data. Without
            SM, files that have it are refused.
        operator_probability: probability that an argument is an operator.
        seed: seed of the generator.
        test_file: a published ``.tsv`` file that replaces the test set.
        files: a folder with ``train.tsv``, ``val.tsv`` and ``test.tsv``, or ``.tsv.gz``, that
            replace the generator. The first ``train``, ``val`` or ``test`` expressions of each file
            within the ranges of length and depth are used.
        columns: label and expression in these files and in ``test_file``, by the names in their
            header or by position, from 0; None: see :func:`read_tsv`.

    Raises:
        ValueError: for an empty or impossible range, or an unknown operator; from :meth:`prepare`,
            for a file with too few expressions.
        MissingDataError: from :meth:`prepare`, for a missing file.
    """

    cache: str | Path
    train: int = 100_000
    val: int = 10_000
    test: int = 10_000
    length: Sequence[int] = (10, 49)
    depth: Sequence[int] = (1, 5)
    arguments: Sequence[int] = (2, 5)
    operators: Sequence[str] = ("MIN", "MAX", "MED")
    operator_probability: float = 0.25
    seed: int = 0
    test_file: str | Path | None = None
    files: str | Path | None = None
    columns: Sequence[str | int] | None = None
    _loaded: dict[str, Expressions] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the configuration."""
        for name in ("length", "depth", "arguments"):
            bounds = tuple(getattr(self, name))
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"data.{name} must be [least, most] with 1 <= least <= most; got {list(bounds)}")
        if min(self.train, self.val, self.test) < 1:
            raise ValueError(f"data.train, val, test must be positive; got {self.train}, {self.val}, {self.test}")
        unknown = sorted(set(self.operators) - set(OPERATORS))
        if unknown or not self.operators or len(set(self.operators)) != len(self.operators):
            raise ValueError(
                f"data.operators must be distinct, out of {', '.join(OPERATORS)}; got {list(self.operators)}"
            )
        if not 0 <= self.operator_probability < 1:
            raise ValueError(f"data.operator_probability must lie in [0, 1); got {self.operator_probability}")
        if self.columns is not None and len(self.columns) != 2:
            raise ValueError(f"data.columns must be [label, expression]; got {list(self.columns)}")
        # In the shortest expression of the greatest depth, every operator except the innermost has
        # one operator as argument.
        deepest, fewest = self.depth[1], self.arguments[0]
        shortest = deepest * (fewest + 1) + 1
        if self.files is None and shortest > self.length[1]:
            raise ValueError(f"depth {deepest} takes {shortest} tokens or more; data.length ends at {self.length[1]}")

    def shortest_at(self, depth: int) -> int:
        """The number of tokens of the shortest expressions of a depth."""
        shortest, (fewest, most) = self.length[0], self.arguments
        none_is_longer = self.files is None and depth == 1 and shortest > most + 2
        return fewest + 2 if none_is_longer else shortest

    @property
    def tokens(self) -> int:
        """The number of token ids that a model needs."""
        return len(VOCABULARY) if "SM" in self.operators else _SM_TOKEN

    @property
    def key(self) -> dict[str, object]:
        """Everything on which the expressions depend."""
        if self.files is not None:
            own: dict[str, object] = {name: getattr(self, name) for name in SPLITS}
            columns = None if self.columns is None else list(self.columns)
            own |= {"sums": True} if "SM" in self.operators else {}
            own |= {"length": list(self.length), "depth": list(self.depth), "columns": columns}
            own |= {"generator": _GENERATOR_VERSION}
            return own | {"files": {name: hashlib.sha256(self._file(name).read_bytes()).hexdigest() for name in SPLITS}}
        names = ("train", "val", "test", "operator_probability", "seed")
        ranges = ("length", "depth", "arguments", "operators")
        content: dict[str, object] = {name: getattr(self, name) for name in names}
        return content | {name: list(getattr(self, name)) for name in ranges} | {"generator": _GENERATOR_VERSION}

    @property
    def folder(self) -> Path:
        """The cache folder of this configuration."""
        return cache.folder_of(self.cache, "listops", self.key)

    def prepare(self) -> None:
        """Generate and store the expressions unless an intact cache exists. It is safe in several processes at once."""
        make = generate if self.files is None else ListOpsData._read
        cache.ensure(self.folder, self.key, lambda: {name: _to_arrow(e) for name, e in make(self).items()})

    def _file(self, name: str) -> Path:
        return file_of_split(str(self.files), name, ".tsv", "a label and an expression a line")

    def _read(self) -> dict[str, Expressions]:
        out = {}
        for name in SPLITS:
            file, size = self._file(name), getattr(self, name)
            every = read_tsv(file, self.columns, self.operators)
            wanted = (self.length[0] <= every.lengths) & (every.lengths <= self.length[1])
            wanted &= (self.depth[0] <= every.depths) & (every.depths <= self.depth[1])
            rows = wanted.nonzero()[:size, 0]
            if len(rows) < size:
                other = f"task.data.{name}={len(rows)}" if len(rows) else "other task.data.length= and task.data.depth="
                raise ValueError(
                    f"{file} has {len(rows)} expressions with lengths {list(self.length)} and depths "
                    f"{list(self.depth)}, fewer than task.data.{name}={size}; type {other}"
                )
            out[name] = Expressions(**{key: tensor[rows] for key, tensor in every.tensors.items()})
        return out

    def split(self, name: str) -> Expressions:
        """The expressions of a split, from the cache (see :meth:`prepare`), or from ``test_file``."""
        if name not in self._loaded:
            if name == "test" and self.test_file is not None:
                self._loaded[name] = read_tsv(Path(self.test_file), self.columns, self.operators)
            else:
                self._loaded[name] = _from_arrow(cache.load(self.folder, name))
        return self._loaded[name]


def generate(data: ListOpsData, *, progress: bool = True) -> dict[str, Expressions]:
    """Grow the expressions of a configuration; no two are the same, within and between splits.

    Args:
        data: the configuration.
        progress: show a progress bar, on a terminal.

    Returns:
        split name -> expressions, in random order.

    Raises:
        ValueError: if there are not enough distinct expressions of some depth within the lengths.
    """
    rng = np.random.default_rng(data.seed)
    shallowest, deepest = data.depth
    sizes = {name: getattr(data, name) for name in SPLITS}
    shares = {
        name: {d: len(range(d - shallowest, size, deepest - shallowest + 1)) for d in range(shallowest, deepest + 1)}
        for name, size in sizes.items()
    }
    wanted = {d: sum(share[d] for share in shares.values()) for d in range(shallowest, deepest + 1)}
    operators = np.array([OPERATORS.index(o) for o in data.operators], np.int64)
    seen: set[bytes] = set()
    found: dict[int, list[tuple[NDArray[np.int16], ...]]] = {d: [] for d in wanted}
    with tqdm(
        total=sum(wanted.values()), desc="Generating ListOps", unit="expr", disable=None if progress else True
    ) as bar:
        for depth, number in wanted.items():
            shortest, longest = data.shortest_at(depth), data.length[1]
            tokens, parents = (np.empty((_BLOCK, longest), np.int16) for _ in range(2))
            values, lengths, depths = (np.empty(_BLOCK, np.int16) for _ in range(3))
            count = idle = 0
            while count < number:
                kept = _grow_block(
                    rng, _BLOCK, operators, data.operator_probability, *data.arguments, shortest, depth,
                    tokens, parents, values, lengths, depths,
                )  # fmt: skip
                new = np.zeros(kept, np.bool_)
                for i, row in enumerate(tokens[:kept]):
                    content = row.tobytes()
                    new[i] = content not in seen
                    seen.add(content)
                chosen = np.flatnonzero(new)[: number - count]
                found[depth].append((tokens[chosen], parents[chosen], values[chosen], lengths[chosen], depths[chosen]))
                count += len(chosen)
                idle = 0 if len(chosen) else idle + _BLOCK
                bar.update(len(chosen))
                if count < number and idle >= _GIVE_UP:
                    raise ValueError(
                        f"{_GIVE_UP:,} attempts gave no new expression of depth {depth} with {shortest} to "
                        f"{longest} tokens and {data.arguments[0]} to {data.arguments[1]} arguments "
                        f"(found {count:,} of {number:,})"
                    )

    columns = {d: [np.concatenate(column) for column in zip(*found[d], strict=True)] for d in wanted}
    start = dict.fromkeys(wanted, 0)
    out: dict[str, Expressions] = {}
    for name, share in shares.items():
        order = rng.permutation(sizes[name])
        merged = [
            np.concatenate([columns[d][c][start[d] : start[d] + share[d]] for d in wanted])[order] for c in range(5)
        ]
        start = {d: start[d] + share[d] for d in wanted}
        out[name] = Expressions(*(torch.from_numpy(column.astype(np.int64)) for column in merged))
    return out


# --- cache ---------------------------------------------------------------------------------------------------------


def _to_arrow(expressions: Expressions) -> pa.Table:
    import pyarrow as pa

    exist = expressions.tokens != PAD
    offsets = pa.array(np.concatenate([[0], np.cumsum(expressions.lengths.numpy())]).astype(np.int32))

    def ragged(padded: Tensor) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(padded[exist].numpy().astype(np.int16)))

    return pa.table(
        {
            "tokens": ragged(expressions.tokens),
            "parents": ragged(expressions.parents),
            "value": expressions.values.numpy().astype(np.int8),
            "depth": expressions.depths.numpy().astype(np.int16),
        }
    )


def _from_arrow(table: pa.Table) -> Expressions:
    def column(name: str) -> Tensor:
        return torch.from_numpy(table[name].to_numpy().astype(np.int64))

    lists = {name: table[name].combine_chunks() for name in ("tokens", "parents")}
    lengths = torch.from_numpy(np.diff(lists["tokens"].offsets.to_numpy()).astype(np.int64))
    exist = torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(name: str, fill: int) -> Tensor:
        out = torch.full(exist.shape, fill, dtype=torch.int64)
        out[exist] = torch.from_numpy(lists[name].flatten().to_numpy().astype(np.int64))
        return out

    return Expressions(padded("tokens", PAD), padded("parents", -1), column("value"), lengths, column("depth"))


# --- published files -----------------------------------------------------------------------------------------------


def parse(words: Sequence[str], operators: Sequence[str] = OPERATORS) -> tuple[list[int], list[int], int, int]:
    """Read one bracketed expression.

    Args:
        words: its tokens, e.g. ``["[MIN", "3", "5", "]"]``.
        operators: the allowed operators; SM may be missing and is then unknown.

    Returns:
        token ids, parents, value and depth, as in :class:`Expressions`.

    Raises:
        ValueError: with the reason, for an unknown token or brackets that do not match.
    """
    tokens: list[int] = []
    parents: list[int] = []
    open_operators: list[tuple[int, int, list[int]]] = []  # position, kind, arguments
    value: int | None = None
    depth = 0
    for word in words:
        if word not in _ID or word == VOCABULARY[PAD]:
            known = ", ".join(VOCABULARY[_FIRST_OPERATOR:])
            raise ValueError(f"unknown token {word!r}; known are digits, {known}")
        if _ID[word] == _SM_TOKEN and "SM" not in operators:
            raise UnwantedOperatorError
        if value is not None:
            raise ValueError(f"{word!r} after the end of the expression")
        token, position = _ID[word], len(tokens)
        tokens.append(token)
        parents.append(open_operators[-1][0] if open_operators else -1)
        if token in _KINDS:
            open_operators.append((position, _KINDS[token], []))
            depth = max(depth, len(open_operators))
            continue
        if token == CLOSE:
            if not open_operators:
                raise ValueError("']' without an operator")
            _, kind, arguments = open_operators.pop()
            if not arguments:
                raise ValueError(f"[{OPERATORS[kind]} without arguments")
            result = int(_evaluate(kind, np.array(arguments, np.int16)))
        else:
            result = token - 1
        if open_operators:
            open_operators[-1][2].append(result)
        else:
            value = result
    if value is None:
        raise ValueError(f"{len(open_operators)} missing ']'" if open_operators else "no expression")
    return tokens, parents, value, depth


class UnwantedOperatorError(ValueError):
    """An expression has the operator SM, which is not among the allowed ones."""


def read_tsv(
    path: Path, columns: Sequence[str | int] | None = None, operators: Sequence[str] = OPERATORS
) -> Expressions:
    """Read a published ListOps file: lines of ``label<TAB>expression``. Its binary bracketing "("
    ")" is dropped.

    A byte order mark, blank lines and a header line are skipped. A header may name a ``label`` (or
    ``target``, ``value``) and an ``expression`` (or ``source``, ``sentence``, ``input``). It then
    says where they are, among any number of columns.

    Args:
        path: path of the file, gzip if its name ends in ``.gz``.
        columns: label and expression, by their names in the header or by position, from 0, among
            any number of columns.
        operators: the allowed operators; SM may be missing and is then refused.

    Raises:
        FileNotFoundError: if the file does not exist.
        ListOpsFileError: with the line, if it is malformed, has an unknown token, or a label other
            than the value of its expression.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    packed = path.suffix == ".gz"
    try:
        content = (gzip.decompress if packed else bytes)(path.read_bytes())
        lines = content.decode("utf-8-sig").splitlines()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ListOpsFileError(f"{path}: not a {'gzip' if packed else 'text'} file ({error})") from None
    rows = []
    places: Sequence[int] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        try:
            if places is None:
                is_head = not set(line) & set("0123456789[]()")
                places = _places(cells, is_head, columns)
                if is_head:
                    continue
            if max(places) >= len(cells):
                expected = "label<TAB>expression" if columns is None else f"{max(places) + 1} columns or more"
                raise ValueError(f"expected {expected}; got {len(cells)} column{'s' * (len(cells) > 1)}: {line[:40]!r}")
            label, expression = (cells[place] for place in places)
            if label not in set("0123456789"):
                raise ValueError(f"the label must be a digit; got {label!r}")
            row = parse([w for w in expression.split() if w not in "()"], operators)
            if row[2] != int(label):
                raise ValueError(f"the label is {label} but the expression evaluates to {row[2]}")
        except UnwantedOperatorError:
            show = "zcat" if packed else "cat"
            raise ListOpsFileError(
                f"{path}, line {number}: the operator [SM, the sum modulo 10; task.data.operators=[MIN,MAX,MED,SM] "
                f"reads it, {show} {path} | grep -vF '[SM' > without.tsv leaves such lines out"
            ) from None
        except ValueError as error:
            raise ListOpsFileError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ListOpsFileError(f"{path}: the file has no expression{' below its header' if places else ''}")
    lengths = torch.tensor([len(tokens) for tokens, *_ in rows])
    shape = (len(rows), int(lengths.max()))
    tokens, parents = torch.full(shape, PAD), torch.full(shape, -1)
    for i, (row_tokens, row_parents, _, _) in enumerate(rows):
        tokens[i, : len(row_tokens)] = torch.tensor(row_tokens)
        parents[i, : len(row_parents)] = torch.tensor(row_parents)
    values, depths = (torch.tensor([row[k] for row in rows]) for k in (2, 3))
    return Expressions(tokens, parents, values, lengths, depths)


def _places(cells: Sequence[str], is_head: bool, columns: Sequence[str | int] | None) -> list[int]:
    """The positions of label and expression, from the first line of a file.

    Raises:
        ValueError: if the columns are not known.
    """
    names = [cell.strip() for cell in cells]
    if columns is not None:
        missing = [column for column in columns if isinstance(column, str) and column not in names]
        if missing:
            raise ValueError(f"there is no column {missing[0]}; there are {', '.join(names)}")
        return [names.index(column) if isinstance(column, str) else column for column in columns]
    if not is_head:
        return [0, 1]
    known = [name.lower() for name in names]
    label = next((known.index(name) for name in _LABELS if name in known), None)
    expression = next((known.index(name) for name in _EXPRESSIONS if name in known), None)
    if len(names) == 2 and (label, expression) != (None, None):
        label = (0 if expression is None else 1 - expression) if label is None else label
        expression = 1 - label
    if label is None or expression is None:
        raise ValueError(f"which columns? there are {', '.join(names)}; type task.data.columns=[<label>,<expression>]")
    return [label, expression]


def to_text(tokens: Tensor) -> list[str]:
    """The tokens of one expression ``[length]`` as words, without padding."""
    return [VOCABULARY[t] for t in tokens.tolist() if t != PAD]
