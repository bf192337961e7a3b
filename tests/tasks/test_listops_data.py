"""The generator, the cache and the reader of published files."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from structgrad.data import MissingDataError
from structgrad.tasks.listops.data import (
    CLOSE,
    PAD,
    VOCABULARY,
    Expressions,
    ListOpsData,
    ListOpsFileError,
    generate,
    parse,
    read_tsv,
    to_text,
)


def small(cache: Path, **changes: Any) -> ListOpsData:
    options = {"train": 100, "val": 30, "test": 30, "length": (6, 20), "depth": (1, 3), "arguments": (2, 5)}
    return ListOpsData(cache, **(options | changes))


def same(a: Expressions, b: Expressions) -> bool:
    # The longest expression decides the padding, which is no part of the data.
    n = int(a.lengths.max())
    return (
        n == int(b.lengths.max())
        and torch.equal(a.tokens[:, :n], b.tokens[:, :n])
        and torch.equal(a.parents[:, :n], b.parents[:, :n])
        and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("values", "lengths", "depths"))
    )


def by_hand(words: list[str]) -> tuple[int, int]:
    """Value and depth by recursive descent: a second opinion."""

    def read(position: int) -> tuple[int, int, int]:
        word = words[position]
        if word.isdigit():
            return int(word), 0, position + 1
        position += 1
        arguments, depth = [], 0
        while words[position] != "]":
            value, below, position = read(position)
            arguments.append(value)
            depth = max(depth, below)
        arguments.sort()
        n = len(arguments)
        median = (arguments[(n - 1) // 2] + arguments[n // 2]) // 2
        value = {"[MIN": arguments[0], "[MAX": arguments[-1], "[MED": median}[word]
        return value, depth + 1, position + 1

    value, depth, end = read(0)
    assert end == len(words)
    return value, depth


def test_expressions_of_depth_1_may_be_shorter_if_none_is_that_long(tmp_path: Path) -> None:
    paper = small(tmp_path, length=(10, 49), depth=(1, 5))
    assert [paper.shortest_at(depth) for depth in (1, 2, 5)] == [4, 10, 10]
    assert small(tmp_path, length=(7, 49)).shortest_at(1) == 7  # those with five arguments are
    assert small(tmp_path, length=(10, 49), files=tmp_path).shortest_at(1) == 10  # files are filtered by length
    expressions = generate(paper, progress=False)["train"]
    flat = expressions.depths == 1
    assert expressions.lengths[flat].min() == 4
    assert expressions.lengths[flat].max() == 7
    assert expressions.lengths[~flat].min() >= 10


def test_expressions_are_as_long_as_the_authors(tmp_path: Path) -> None:
    """Against the sizes of the authors' files of 10,000 lines with parentheses, at 4.4 standard errors of our mean
    and of theirs.
    """
    theirs = {2: 855_565, 3: 1_340_140, 4: 1_887_535, 5: 2_261_719}  # characters
    data = small(tmp_path, train=20_000, length=(10, 49), depth=(2, 5))
    expressions = generate(data, progress=False)["train"]
    operators = torch.isin(expressions.tokens, torch.tensor([VOCABULARY.index(f"[{o}") for o in data.operators])).sum(1)
    # "8<TAB>( ( ( [MAX 3 ) 2 ) ] )": n tokens have n - 1 pairs of parentheses and 3 n - 3 spaces.
    characters = (6 * expressions.lengths - 2 + 3 * operators).double()
    for depth, size in theirs.items():
        ours = characters[expressions.depths == depth]
        error = ours.std() * (1 / len(ours) + 1 / 10_000) ** 0.5
        assert abs(ours.mean() - size / 10_000) < 4.4 * error, depth


def test_expressions_are_what_was_asked_for(tmp_path: Path) -> None:
    splits = generate(small(tmp_path, operators=("MIN", "MED")), progress=False)
    seen = set()
    for name, size in (("train", 100), ("val", 30), ("test", 30)):
        e = splits[name]
        assert len(e) == size
        shares = e.depths.bincount(minlength=4)[1:]
        assert shares.sum() == size
        assert shares.max() - shares.min() <= 1
        for i in range(size):
            words = to_text(e.tokens[i])
            seen.add(tuple(words))
            assert 6 <= len(words) <= 20
            assert len(words) == e.lengths[i]
            assert "[MAX" not in words
            assert by_hand(words) == (e.values[i], e.depths[i])
            tokens, parents, value, depth = parse(words)
            assert tokens == e.tokens[i, : len(words)].tolist()
            assert parents == e.parents[i, : len(words)].tolist()
            assert (value, depth) == (e.values[i], e.depths[i])
            assert (e.tokens[i, len(words) :] == PAD).all()
            assert (e.parents[i, len(words) :] == -1).all()
            operands = (torch.tensor(parents) >= 0) & (torch.tensor(tokens) != CLOSE)
            children = torch.tensor(parents)[operands].bincount()
            assert children[children > 0].min() >= 2
            assert children.max() <= 5
    assert len(seen) == 160


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again, other = (generate(small(tmp_path, seed=s), progress=False)["train"] for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_parents_by_hand() -> None:
    tokens, parents, value, depth = parse(["[MAX", "3", "[MIN", "8", "2", "]", "4", "]"])
    assert [VOCABULARY[t] for t in tokens] == ["[MAX", "3", "[MIN", "8", "2", "]", "4", "]"]
    assert parents == [-1, 0, 0, 2, 2, 2, 0, 0]
    assert (value, depth) == (4, 2)
    assert parse(["[MED", "1", "4", "8", "9", "]"])[2] == 6
    assert parse(["7"]) == ([8], [-1], 7, 0)
    assert tokens[-1] == CLOSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": (20, 6)}, "data.length"),
        ({"depth": (0, 3)}, "data.depth"),
        ({"operators": ("MIN", "SUM")}, "data.operators"),
        ({"val": 0}, "must be positive"),
        ({"operator_probability": 1.0}, "operator_probability"),
        ({"length": (6, 8)}, "depth 3 takes 10 tokens"),
    ],
)
def test_impossible_configurations_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_what_cannot_be_found_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structgrad.tasks.listops.data._GIVE_UP", 300_000)
    with pytest.raises(ValueError, match="depth 2 with 8 to 9 tokens and 2 to 2 arguments"):  # 7 or 10
        generate(small(tmp_path, length=(8, 9), depth=(2, 2), arguments=(2, 2)), progress=False)
    # One operator and two digits make 100 expressions.
    few = small(tmp_path, train=380, val=10, test=10, depth=(1, 1), length=(4, 4), operators=("MIN",))
    with pytest.raises(ValueError, match=r"found 100 of 400"):
        generate(few, progress=False)


def test_cache_gives_back_what_was_generated(tmp_path: Path) -> None:
    data = small(tmp_path)
    data.prepare()
    for name, expected in generate(data, progress=False).items():
        assert same(small(tmp_path).split(name), expected)
    assert small(tmp_path, seed=1).folder != data.folder
    assert small(tmp_path, test_file="elsewhere").folder == data.folder


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "bad manifest", "missing", "interrupted"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    data = small(tmp_path)
    data.prepare()
    expected = data.split("train")
    manifest = data.folder / "manifest.json"
    arrow = next((data.folder / "train").glob("*.arrow"))
    if damage == "truncated":
        arrow.write_bytes(arrow.read_bytes()[:-100])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "missing":
        arrow.unlink()
    else:  # a process was killed while it generated: only its working folder is there
        data.folder.rename(data.folder.with_suffix(".abc.part"))
    with caplog.at_level(logging.WARNING):
        fresh = small(tmp_path)
        fresh.prepare()
    assert same(fresh.split("train"), expected)
    notices = [r.getMessage() for r in caplog.records if "rebuilding" in r.getMessage()]
    assert len(notices) == (damage != "interrupted")
    assert all("\n" not in notice for notice in notices)

    caplog.clear()
    before = arrow.stat().st_mtime_ns
    small(tmp_path).prepare()
    assert next((data.folder / "train").glob("*.arrow")).stat().st_mtime_ns == before
    assert not caplog.records


def test_published_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "published.tsv"
    file.write_text("4\t( ( ( ( [MAX 3 ) ( ( ( [MIN 8 ) 2 ) ] ) ) 4 ) ] )\n5\t5\n")
    e = read_tsv(file)
    assert to_text(e.tokens[0]) == ["[MAX", "3", "[MIN", "8", "2", "]", "4", "]"]
    assert e.parents.tolist() == [[-1, 0, 0, 2, 2, 2, 0, 0], [-1] * 8]
    assert (e.values.tolist(), e.lengths.tolist(), e.depths.tolist()) == ([4, 5], [8, 1], [2, 0])
    assert same(small(tmp_path, test_file=file).split("test"), e)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("4 [MAX 4 ]", "label<TAB>expression"),
        ("12\t[MAX 4 ]", "label must be a digit; got '12'"),
        ("\t[MAX 4 ]", "label must be a digit; got ''"),
        ("4\t( ( [SUM 4 ) ] )", r"unknown token '\[SUM'"),
        ("4\t[MAX 4", r"1 missing '\]'"),
        ("4\t[MAX 4 ] ]", "after the end"),
        ("4\t]", "without an operator"),
        ("4\t[MAX ]", r"\[MAX without arguments"),
        ("4\t", "no expression"),
        ("3\t[MAX 4 ]", "the label is 3 but the expression evaluates to 4"),
        ("4", "label<TAB>expression"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "bad.tsv"
    file.write_text(f"4\t[MAX 4 ]\n{line}\n")
    with pytest.raises(ListOpsFileError, match=f"bad.tsv, line 2: .*{reason}"):
        read_tsv(file)


def test_packed_files_blank_lines_and_headers(tmp_path: Path) -> None:
    lines = ["label\texpression", "", "4\t[MAX 4 1 ]", "   ", "1\t[MIN 4 1 ]", ""]
    orders = {"label first": lines, "swapped": ["Source\tTarget", "[MAX 4 1 ]\t4", "[MIN 4 1 ]\t1"]}
    orders["among others"] = ["id\tsentence\tvalue", "a\t[MAX 4 1 ]\t4", "b\t[MIN 4 1 ]\t1"]
    for name, content in orders.items():
        packed = tmp_path / f"{name}.tsv.gz"
        packed.write_bytes(gzip.compress("\r\n".join(content).encode()))
        assert read_tsv(packed).values.tolist() == [4, 1], name
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ListOpsFileError, match=r"others\.tsv\.gz: not a gzip file"):
        read_tsv(packed)
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("gold\tthing\n4\t[MAX 4 1 ]\n")
    with pytest.raises(ListOpsFileError, match=r"gold, thing; type task\.data\.columns=\[<label>,<expression>\]"):
        read_tsv(wrong)
    unknown = tmp_path / "unknown.tsv"
    unknown.write_text("a\tb\tc\n1\t2\t3\n")
    with pytest.raises(ListOpsFileError, match=r"a, b, c; type task\.data\.columns=\[<label>,<expression>\]"):
        read_tsv(unknown)


def test_sums_modulo_10(tmp_path: Path) -> None:
    """An operator of the original data; read and generated if asked for, and otherwise refused with both ways out."""
    every = ("MIN", "MAX", "MED", "SM")
    file = tmp_path / "original.tsv"
    file.write_text("4\t[MAX 4 ]\n1\t[SM 9 [MIN 7 5 ] 7 ]\n")
    with pytest.raises(ListOpsFileError, match=r"line 2: .*operators=\[MIN,MAX,MED,SM\] reads it, cat .* \| grep -vF"):
        small(tmp_path, test_file=file).split("test")
    data = small(tmp_path, test_file=file, operators=every)
    e = data.split("test")
    assert e.values.tolist() == [4, 1]
    assert to_text(e.tokens[1]) == ["[SM", "9", "[MIN", "7", "5", "]", "7", "]"]
    assert int(e.tokens.max()) == data.tokens - 1
    assert small(tmp_path).tokens == data.tokens - 1  # models without it keep their size
    data.prepare()
    made = data.split("train")
    words = [to_text(tokens) for tokens in made.tokens]
    assert any("[SM" in expression for expression in words)
    assert [parse(expression)[2] for expression in words] == made.values.tolist()


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tsv(tmp_path / "nowhere.tsv")
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(ListOpsFileError, match=r"the file has no expression$"):
        read_tsv(tmp_path / "empty.tsv")
    (tmp_path / "head.tsv").write_text("label\texpression\n")
    with pytest.raises(ListOpsFileError, match=r"no expression below its header$"):
        read_tsv(tmp_path / "head.tsv")


def test_expressions_of_ones_own(tmp_path: Path) -> None:
    """Columns in any place, by name or position; those out of range are left out; a model trains on them."""
    lines = ["[MAX 1 2 ]\t2", "[MIN 1 [MAX 3 4 ] ]\t1", "[MED 4 5 6 7 8 ]\t6", "7\t7", "[MIN 9 8 ]\t8"]
    for name in ("train", "val", "test"):
        rows = [f"{k}\t{line}" for k, line in enumerate(lines)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["id\tSource\tTarget", *rows]) + "\n")
    options: dict[str, Any] = {"files": tmp_path, "train": 2, "val": 2, "test": 1, "length": (3, 6), "depth": (1, 2)}
    data = ListOpsData(tmp_path / "cache", columns=("Target", "Source"), **options)
    data.prepare()
    texts = [" ".join(to_text(tokens)) for tokens in data.split("train").tokens]
    assert texts == ["[MAX 1 2 ]", "[MIN 9 8 ]"]
    assert data.split("train").values.tolist() == [2, 8]
    longer = ListOpsData(tmp_path / "cache", columns=("Target", "Source"), **options | {"train": 1, "length": (8, 9)})
    with pytest.raises(
        ValueError, match=r"train\.tsv has 0 expressions with lengths \[8, 9\] .*type other task"
    ):  # also at depth 1
        longer.prepare()
    assert data.split("train").parents[0].tolist()[:4] == [-1, 0, 0, 0]
    with pytest.raises(
        ValueError, match=r"train\.tsv has 2 expressions with lengths \[3, 6\] .*type task\.data\.train=2"
    ):
        ListOpsData(tmp_path / "cache", columns=("Target", "Source"), **options | {"train": 3}).prepare()
    with pytest.raises(ListOpsFileError, match=r"line 1: there is no column Label; there are id, Source, Target"):
        ListOpsData(tmp_path / "cache", columns=("Label", "Source"), **options).prepare()
    for name in ("train", "val", "test"):  # the same without a header
        file = tmp_path / f"{name}.tsv"
        file.write_text("\n".join(file.read_text().splitlines()[1:]))
    by_place = ListOpsData(tmp_path / "cache", columns=(2, 1), **options)
    by_place.prepare()
    assert (by_place.split("train").tokens == data.split("train").tokens).all()
    with pytest.raises(ListOpsFileError, match=r"line 1: expected 6 columns or more; got 3"):
        ListOpsData(tmp_path / "cache", columns=(5, 1), **options).prepare()
    (tmp_path / "val.tsv").unlink()
    with pytest.raises(MissingDataError, match=r"There is no .*val\.tsv"):
        ListOpsData(tmp_path / "cache", **options).prepare()
