"""The table of structures under torch.func, torch.compile and modes: a sample of its cells is tried again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from structgrad.structures import LinearChain


@pytest.fixture(scope="module")
def module(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("transform_table", root / "scripts" / "transform_table.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def written(module: ModuleType) -> dict[str, dict[str, str]]:
    """The cells of the page: structure -> mode -> text."""
    rows = [line.strip("| ").split(" | ") for line in module.TARGET.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}


def test_every_structure_and_mode_is_there(module: ModuleType) -> None:
    cells = written(module)
    assert list(cells) == list(module.CASES)
    assert all(list(row) == list(module.MODES) for row in cells.values())


#: One of each kind of algorithm; compilation takes a second an oracle, so few of those.
CHEAP = ("vmap", "vmap of grad", "jacrev", "jacfwd", "jacobian", "autocast", "inference mode")
SAMPLE = [(name, mode) for name in ("Arborescence", "LinearChain", "Matching", "KSubset") for mode in CHEAP]


@pytest.mark.parametrize(("name", "mode"), SAMPLE)
def test_a_cell(module: ModuleType, name: str, mode: str) -> None:
    assert module.cell(name, mode) == written(module)[name][mode]


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("LinearChain", "marginals"),
        ("SpanningTree", "marginals"),
        ("Arborescence", "trace_log_prob"),
        ("Matching", "sinkhorn"),
    ],
)
def test_a_compiled_cell(module: ModuleType, name: str, oracle: str) -> None:
    assert f"`{oracle}`" not in written(module)[name]["compile, fullgraph"]
    assert module.attempt(name, oracle, "compile, fullgraph") == ""


def test_what_cannot_be_one_graph_says_so(module: ModuleType) -> None:
    assert "looks at values" in module.attempt("LinearChain", "project", "compile, fullgraph")


def test_a_ragged_distribution_is_refused_under_vmap() -> None:
    with pytest.raises(NotImplementedError, match="leading batch dimensions"):
        torch.func.vmap(lambda s: LinearChain(2).sparsemap(s).weights)(torch.randn(2, 3, 2, 2))


def test_masks_are_mapped_over_too() -> None:
    structure, scores = LinearChain(2), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    mask = (torch.arange(3) < torch.tensor([[3], [1]]))[:, :, None, None].expand(2, 3, 2, 2)
    for oracle in (structure.marginals, structure.argmax, structure.project):
        torch.testing.assert_close(torch.func.vmap(oracle)(scores, mask), oracle(scores, mask))
        one = scores[0]
        torch.testing.assert_close(
            torch.func.vmap(oracle, in_dims=(None, 0))(one, mask), oracle(one.expand(2, 3, 2, 2), mask)
        )
