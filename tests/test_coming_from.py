"""The page for users of other libraries: every block runs, and pairs of blocks agree."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "coming_from.md").read_text()
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n## ")[1:]}


def result(block: str) -> list[torch.Tensor]:
    """The value of ``result`` after a block."""
    names: dict[str, list[torch.Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other library
        exec(block, names)
    return names["result"]


@pytest.mark.parametrize("section", SECTIONS)
def test_what_you_write_now(section: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    ours = result(blocks[-1])
    assert "you write now" in blocks[-1]
    assert all(value.isfinite().all() for value in ours)
    compared = re.search(r"<!-- compare: (\w+) -->", SECTIONS[section])
    if compared:
        pytest.importorskip(compared[1], reason=f"needs {compared[1]} (make .venv/installed-bench)")
        theirs = result(blocks[0])
        assert len(theirs) == len(ours)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_structure_and_estimator_of_the_page_exists() -> None:
    import structgrad.estimators as estimators
    import structgrad.structures as structures

    ours = re.findall(r"^\|[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    names = {name for cell in ours for name in re.findall(r"\b([A-Z]\w+)\(", cell)}
    assert len(names) > 10
    assert not {name for name in names if not (hasattr(structures, name) or hasattr(estimators, name))}
