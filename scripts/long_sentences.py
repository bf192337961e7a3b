"""List the sentences of pages and docstrings that have more than 30 words.

    python scripts/long_sentences.py [FILE OR FOLDER ...]      by default all prose of the repository

Code, tables, headings, claims of papers and the entries of docstrings are left out. An inline piece
of code, a formula or the target of a link counts as one word.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "src", "examples", "scripts", "benchmarks", "tests")
WORDS = 30
_NO_PROSE = ("|", "#", "<", ">>>", "- Claim:", "![")


def long_sentences(*places: Path) -> tuple[list[tuple[int, str, str]], int]:
    """Words, place and text of every long sentence, the longest first, and the number of all sentences."""
    files = [f for p in places for f in ([p] if p.is_file() else sorted([*p.rglob("*.md"), *p.rglob("*.py")]))]
    found, number = [], 0
    for file in files:
        for line, sentence in sentences(file):
            number += 1
            count = len(re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "X", sentence).split())
            if count > WORDS:
                found.append((count, f"{file}:{line}", sentence))
    return sorted(found, reverse=True), number


def sentences(file: Path) -> Iterator[tuple[int, str]]:
    """The line of the paragraph, and the text, of every sentence in a file."""
    for first, text in _texts(file):
        for line, paragraph in _paragraphs(text):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`*\[])", paragraph):
                yield first + line, sentence


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """The first line and the content of a page, or of every docstring of a module."""
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield 1, content
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The index of the first line, and the text, of every paragraph and item of a list."""
    start, lines, fenced = 0, list[str](), False
    for index, line in enumerate([*text.splitlines(), ""]):
        bare = line.strip()
        fence = bare.startswith("```")
        fenced ^= fence
        # Indented: code on a page, the entries of Args, Returns and so on in a docstring.
        skipped = fence or fenced or not bare or bare.startswith(_NO_PROSE) or line.startswith("    ")
        item = re.match(r"([-*]|\d+\.)\s+", bare)
        if (skipped or item) and lines:
            yield start, " ".join(lines)
            lines = []
        if not skipped:
            start = index if not lines else start
            lines.append(bare[item.end() :] if item else bare)


def main() -> None:
    """The command."""
    found, number = long_sentences(*[Path(p) for p in sys.argv[1:]] or [ROOT / p for p in PROSE])
    print(f"{len(found)} of {number} sentences have more than {WORDS} words")
    for count, place, sentence in found:
        print(f"{place}: {count} words: {sentence[:100]}...")


if __name__ == "__main__":
    main()
