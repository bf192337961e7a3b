"""Write ``docs/structures/README.md``, the table structure x oracle, from the code."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import OmegaConf

from structgrad.structures.base import ORACLES, Structure

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TARGET = ROOT / "docs" / "structures" / "README.md"

INTRODUCTION = """\
# Structures

Written by `scripts/structure_table.py` from the code; do not edit. What every oracle means is said in
`src/structgrad/structures/base.py`; one page a structure is linked below. [Sparse projections](sparsemap.md) compares
the active-set method with the closed forms, [dynamic programs](dynamic_programs.md) says what six structures share.
"""


def configured() -> dict[type[Structure], Structure]:
    """Class -> what the first of its configurations builds, of all that have a latent variable, by name."""
    out: dict[type[Structure], Structure] = {}
    for path in sorted((CONFIGS / "structure").glob("*.yaml")):
        structure = hydra.utils.instantiate(OmegaConf.load(path).structure)
        if structure.is_latent:
            out.setdefault(type(structure), structure)
    return dict(sorted(out.items(), key=lambda item: item[0].__name__))


def page(structure: type[Structure]) -> str:
    """File name of a structure's page: ``KSubset`` -> ``k_subset.md``."""
    return structure.__module__.rsplit(".", 1)[-1] + ".md"


def table() -> str:
    """The whole file."""
    built = configured()
    classes = list(built)
    heads = [f"[{c.__name__}]({page(c)})" if (TARGET.parent / page(c)).exists() else c.__name__ for c in classes]
    lines = [INTRODUCTION, "| oracle | " + " | ".join(heads) + " |", "|---|" + ":-:|" * len(classes)]
    for oracle in ORACLES:
        has = ["x" if oracle in built[c].oracles else "" for c in classes]
        lines.append(f"| `{oracle}` | " + " | ".join(has) + " |")
    lines += [
        "",
        "Relaxations, by the name that `relaxation=` takes, and the method behind each:",
        "",
        "| structure | relaxations |",
        "|---|---|",
    ]
    for c in classes:
        names = [f"`{name}` ({relaxation.method})" for name, relaxation in built[c].relaxations.items()]
        lines.append(f"| {c.__name__} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(table())
