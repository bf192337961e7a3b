"""Imports run one way, and a private name stays in its folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import structgrad

PACKAGE = Path(structgrad.__file__).parent
#: Each may import from those before it (and itself); files beside them from whatever their line here says.
FOLDERS = ("algorithms", "structures", "estimators", "tasks", "training", "commands")
#: What knows nothing of structures.
TOOLS = ("cache", "data", "images", "irrelevant", "runtime", "version")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a file imports from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "structgrad")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "structgrad":
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module, a.name) for a in node.names)


def room(module: str, name: str = "") -> str:
    """The folder, or the file beside the folders, that an import leads to."""
    parts = [*module.split("."), name]
    return parts[1]


def is_private(name: str) -> bool:
    """Whether a name starts with one underscore, of the special ones with two at both ends none."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    inside = path.relative_to(PACKAGE).parts
    own = inside[0].removesuffix(".py")
    for module, name in imports(path):
        other = room(module, name)
        if own in FOLDERS and other in FOLDERS:
            assert FOLDERS.index(other) <= FOLDERS.index(own), f"{own} imports {module}"
        if own in TOOLS:
            assert other in TOOLS, f"{own} imports {module}"
        if own == "experiments":  # `training.errors` is words and exit codes, and needs no torch
            allowed = other in (own, *TOOLS) or module == "structgrad.training.errors"
            assert allowed, f"{own} imports {module}, but reads run folders only"
        if own == "tasks" and other == "tasks":
            task = module.split(".")[2:3] or [name]
            shared = [path.stem for path in (PACKAGE / "tasks").glob("*.py")]
            assert task[0] in (inside[1].removesuffix(".py"), *shared), f"task {inside[1]} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_name_crosses_a_folder(path: Path) -> None:
    folder = ".".join(("structgrad", *path.relative_to(PACKAGE).parent.parts))
    modules = {}
    for module, name in imports(path):
        if f"{module}.".startswith(f"{folder}.") and folder != "structgrad":
            continue
        assert not any(is_private(part) for part in (*module.split("."), name)), f"{module}.{name} is private"
        modules[name] = module
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert not is_private(node.attr), f"{modules[node.value.id]}.{node.value.id}.{node.attr} is private"
