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

Written by `scripts/structure_table.py` from the code; do not edit.
`src/structgrad/structures/base.py` defines every oracle. Each structure links to its page.
[Sparse projections](sparsemap.md) compares the active-set method with the closed forms.
[Dynamic programs](dynamic_programs.md) describes the common code of ten structures.
"""


READINGS = """\
## Vertices as integers

`structure.read(vertex)` describes a vertex by int64 numbers, its reading. `structure.write(reading)` is
its exact inverse, and refuses readings of no vertex. -1 means none: it fills up the shorter examples of
a batch and marks absent items. If a reading does not determine the shape of the parts, pass it to
`write(reading, shape)` (`scores.shape[-2:]`, `structure.shape(n)`). `write(reading, mask=mask)` checks
that the vertex is one under that mask. Without a mask, items that are not in the reading are absent.

```python
tree, segments = Arborescence(), SemiMarkov(labels=3, longest=2)
vertices = tree.write([[-1, 0, 1], [-1, 0, -1]])  # heads; the second example has two nodes
print(tree.read(vertices))  # tensor([[-1,  0,  1], [-1,  0, -1]])
vertex = segments.write([[0, 0, 2], [1, 2, 0]], segments.shape(3))
print(segments.read(vertex).tolist())  # [[0, 0, 2], [1, 2, 0]]: first, last position, label
```

For grammars and constituency trees, `structgrad.structures.brackets(tree.read(vertex))` is the tree in brackets.
"""


def first_sentence(structure: type[Structure]) -> str:
    """The result of ``read`` for this structure."""
    text = " ".join((structure.read.__doc__ or "").split("\n\n")[0].split())
    return text.replace("``", "`").replace(":meth:", "").replace(":func:", "")


def configured() -> dict[type[Structure], Structure]:
    """Class -> the object of its first configuration, for all with a latent variable, by name."""
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
    lines += ["", READINGS, "| structure | `read(vertex)` |", "|---|---|"]
    lines += [f"| {c.__name__} | {first_sentence(c)} |" for c in classes]
    lines += [
        "",
        "## Relaxations",
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
