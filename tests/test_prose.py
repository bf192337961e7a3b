"""Pages and docstrings are written for readers whose second language English is."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from long_sentences import PROSE, long_sentences, sentences  # noqa: E402

#: How many sentences may have more than 30 words. This number may only fall.
MOST = 5


def test_sentences_are_short() -> None:
    found, _ = long_sentences(*[ROOT / place for place in PROSE])
    assert len(found) <= MOST, "\n".join(f"{place}: {count} words" for count, place, _ in found)


def test_what_is_a_sentence(tmp_path: Path) -> None:
    """Code, tables and headings are left out; items of lists are paragraphs of their own."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nOne two.\nThree `a b` four. Five\n\n- six\n  seven\n- eight\n\n| a |\n\n    code\n")
    assert [text for _, text in sentences(page)] == ["One two.", "Three `a b` four.", "Five", "six seven", "eight"]
    module = tmp_path / "module.py"
    module.write_text('def f(x):\n    """Text.\n\n    Args:\n        x: left out.\n    """\n')
    assert [text for _, text in sentences(module)] == ["Text.", "Args:"]
    long = tmp_path / "long.md"
    long.write_text("word " * 30 + "word.\n")
    assert [found[0] for found in long_sentences(tmp_path)[0]] == [31]
