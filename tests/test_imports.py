"""Imports run one way, and a private name stays in its folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import structgrad

PACKAGE = Path(structgrad.__file__).parent
#: What a user's own model may be made of: room -> the rooms that it may import from, beside itself.
LIBRARY = {
    "version": [],
    "common": [],
    "algorithms": ["common"],
    "structures": ["common", "algorithms"],
    "estimators": ["common", "algorithms", "structures"],
    "losses": ["common", "algorithms", "structures", "estimators"],
    "diagnose": ["common", "algorithms", "structures", "estimators"],
    "testing": ["common", "algorithms", "structures", "estimators", "losses", "diagnose"],
}
#: Experiments with it: these may import from the library and from the rooms named here.
LABORATORY = {
    "data": [],
    "tasks": ["data"],
    "training": ["data", "tasks"],
    "experiments": ["training"],
    "commands": ["data", "tasks", "training", "experiments"],
}
#: What the laboratory is made with and the library does without.
TOOLS = {"pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "optuna", "datasets", "matplotlib", "rich"}

#: What structures use at the earliest when an oracle is called: to import them takes about as long as all structures.
SLOW = {"numba", "llvmlite", "scipy", "yaml", "torch._dynamo", "torch._inductor", "sympy"}


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
    """Whether a name starts with one underscore; special names with two at both ends are none."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    inside = path.relative_to(PACKAGE).parts
    own = inside[0].removesuffix(".py")
    if own == "__init__":
        return
    allowed = LIBRARY[own] if own in LIBRARY else [*LIBRARY, *LABORATORY[own]]
    for module, name in imports(path):
        other = room(module, name)
        assert other in (own, "version", *allowed), f"{own} imports {module}"
        if own == "experiments" and other == "training":  # two modules that need no torch
            assert module.split(".")[2] in ("contract", "errors"), (
                f"{own} imports {module}, but runs are processes to it"
            )
        if own == "tasks" and other == "tasks":
            task = module.split(".")[2:3] or [name]
            shared = [path.stem for path in (PACKAGE / "tasks").glob("*.py")]
            assert task[0] in (inside[1].removesuffix(".py"), *shared), f"task {inside[1]} imports {module}"


def test_the_library_needs_no_tool_of_the_laboratory() -> None:
    """Neither do the modules of other packages that it imports; what imports it need not have them installed."""
    code = (
        "import sys\n"
        "import structgrad\n"
        "assert 'torch' not in sys.modules\n"
        "from structgrad.structures import Arborescence\n"
        f"slow = {SLOW} & sys.modules.keys()\n"
        "assert not slow, slow\n"
        f"for tool in {sorted(TOOLS)}: sys.modules[tool] = None\n"  # any import of it fails
        "import importlib, pkgutil\n"
        f"for name in {sorted(LIBRARY)}:\n"
        "    module = importlib.import_module(f'structgrad.{name}')\n"
        "    for m in pkgutil.iter_modules(getattr(module, '__path__', [])):\n"
        "        importlib.import_module(f'{module.__name__}.{m.name}')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
