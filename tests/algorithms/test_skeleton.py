"""Files with compiled code are in one order, and kernels name things in one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "structgrad"
#: What a decorator says about the place of a function.
SECTIONS = {"njit": "CPU kernels", "gpu.jit": "GPU kernels", "custom_op": "operators", "register_": "operators"}
ORDER = ["public", "plain torch", "CPU kernels", "GPU kernels", "operators"]
#: Names that masks had by file; of lanes within the data it is ``within``, of parts ``exists``.
OLD_MASKS = {"there", "known", "inside"}


def decorators(node: ast.stmt) -> str:
    """The decorators of a function or class."""
    return " ".join(ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))


def with_kernels() -> list[Path]:
    """The files that have compiled functions; what makes data has an order of its own."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem != "data" and any(
            re.match(r"njit|gpu\.jit", decorators(node)) for node in ast.parse(path.read_text()).body
        ):
            found.append(path)
    return found


FILES = with_kernels()
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def placed(path: Path) -> list[tuple[str, ast.stmt]]:
    """The definitions of a file with the section that each is in."""
    text = path.read_text()
    headings = {i: m[1] for i, line in enumerate(text.split("\n"), 1) if (m := re.match(r"# --- ([\w ]+?) -+$", line))}
    assert list(headings.values()) == [name for name in ORDER if name in headings.values()], "sections in another order"
    out = []
    for node in ast.parse(text).body:
        above = [name for line, name in headings.items() if line < node.lineno]
        out.append((above[-1] if above else "public", node))
    return out


@each_file
def test_the_order(path: Path) -> None:
    """Header with its source, public functions, plain torch, CPU kernels, GPU kernels, operators."""
    for section, node in placed(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            expected = next((where for mark, where in SECTIONS.items() if mark in decorators(node)), None)
            if expected is None and re.search(r"^torch_|_in_torch$", node.name):
                expected = "plain torch"
            assert expected is None or section == expected, f"{node.name} is under {section}, not {expected}"
            assert section != "public" or not node.name.startswith("_"), f"{node.name} is before the sections"


def test_every_algorithm_has_its_source() -> None:
    for path in FILES:
        if path.parent.name == "algorithms":
            header = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert re.search(r"\b(19|20)\d\d\b", header), f"{path.stem}: the header names no source"


@each_file
def test_kernels(path: Path) -> None:
    """Pointers are called so, and come first; then sizes, then constants; a mask has one name."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or "gpu.jit" not in decorators(node):
            continue
        names = [argument.arg for argument in node.args.args]
        kinds = [2 if name.isupper() else 0 if name.endswith("_ptr") else 1 for name in names]
        assert kinds == sorted(kinds), f"{node.name}: {names}"
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.load", "tl.store"):
                pointer = re.match(r"\w+", ast.unparse(call.args[0]).lstrip("("))
                assert pointer, ast.unparse(call)
                assert pointer[0].endswith("_ptr"), f"{node.name}: {ast.unparse(call)}"
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        assert not used & OLD_MASKS, f"{node.name}: {used & OLD_MASKS}"
        assert not re.match(r"_(row|column)$", node.name), "gpu.row and gpu.column do that"


def test_one_way_to_import_numba() -> None:
    """Through ``algorithms.compiled``, which imports it when the first function is called."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # of the module; a function may need a type of it
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "numba" not in ast.unparse(node), path
