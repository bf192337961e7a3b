"""The results that the repository keeps."""

from __future__ import annotations

import re
from pathlib import Path


def test_results_name_no_place_of_a_machine(root: Path) -> None:
    """Absolute paths of Unix and Windows, quoted as JSON does."""
    place = re.compile(r'"(?:/|~|file:|[A-Za-z]:\\)[^"]*"')
    found = {str(file): place.findall(file.read_text()) for file in sorted((root / "results").glob("**/*.json"))}
    assert found
    assert not {name: places for name, places in found.items() if places}
