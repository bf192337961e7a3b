"""Write ``docs/structures/README.md``, the table structure x oracle, from the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from structgrad.structures.base import ORACLES, Structure

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TARGET = ROOT / "docs" / "structures" / "README.md"

INTRODUCTION = """\
# Structures

A structure is a finite set of 0/1 vertices. Its oracles are computations on this set: the best
vertex, the probability of every part, an exact sample. Take the structure whose vertices are the
values of your latent variable, and give it one score for each part. [Choose your
structure](../choose_structure.md) helps to find it.

```python
import torch
from structgrad.structures import Arborescence

torch.manual_seed(0)
tree = Arborescence()  # node 0 is the root
scores = torch.randn(5, 5)  # of the edges i -> j
print(tree.read(tree.argmax(scores)))  # heads: tensor([-1,  4,  3,  1,  0])
print(tree.marginals(scores).sum())  # edges: tensor(4.0000)
```

[Sparse projections](sparsemap.md) compares the active-set method with the closed forms, and
[dynamic programs](dynamic_programs.md) has the common code of ten structures.
"""

#: Groups of oracles, as columns. A structure usually has all oracles of a group or none.
GROUPS = {
    "best": ("argmax", "top_k"),
    "Gibbs": ("log_partition", "marginals", "entropy"),
    "samples": ("sample", "log_prob"),
    "sparse": ("project", "sparsemap"),
    "trace": ("trace", "conditional"),
}


ARGUMENTS = """\
Every oracle takes `mask=`, True where a part exists. In its place it takes `lengths=`, how many items (positions,
nodes, entries of a vector) each example has: `chain.argmax(scores, lengths=torch.tensor([6, 4]))`. Alignments take
`[*batch, 2]`, rows and columns. `structure.length_mask(lengths, scores)` is the mask; `Ctc` and `DagPath` say why they
need one. `structure.sample(scores, n=100)` gives a hundred samples of each example, `[100, *batch, *parts]`.
"""

READINGS = """\
## Vertices as integers

`structure.read(vertex)` describes a vertex by int64 numbers, its reading.
`structure.write(reading)` is its exact inverse, and refuses readings of no vertex. -1 means none:
it fills up the shorter examples of a batch and marks absent items. If a reading does not determine
the shape of the parts, pass it to `write(reading, shape)` (`scores.shape[-2:]`,
`structure.shape(n)`). `write(reading, mask=mask)` checks that the vertex is one under that mask.
Without a mask, items that are not in the reading are absent.

```python
from structgrad.structures import SemiMarkov

tree, segments = Arborescence(), SemiMarkov(labels=3, longest=2)
vertices = tree.write([[-1, 0, 1], [-1, 0, -1]])  # heads; the second example has two nodes
print(tree.read(vertices))  # tensor([[-1,  0,  1], [-1,  0, -1]])
vertex = segments.write([[0, 0, 2], [1, 2, 0]], segments.shape(3))
print(segments.read(vertex).tolist())  # [[0, 0, 2], [1, 2, 0]]: first, last position, label
```

For grammars and constituency trees, `structgrad.structures.brackets(tree.read(vertex))` is the tree
in brackets.
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


def summary(structure: type[Structure]) -> str:
    """The first sentence of its docstring, without the source in parentheses."""
    text = " ".join(inspect.getdoc(structure).split("\n\n")[0].split())  # type: ignore[union-attr]
    text = re.sub(r" \([^()]*(?:\([^()]*\))?[^()]*\d{4}[^()]*\)", "", text)
    return re.split(r"(?<=[a-z)`])\.(?: |$)", text)[0].replace("``", "`").rstrip(".") + "."


def costs(structure: type[Structure]) -> str:
    """The first orders of growth in its docstring, or if there are none, in its page."""
    own = TARGET.parent / page(structure)
    for text in (inspect.getdoc(structure) or "", own.read_text() if own.exists() else ""):
        if found := list(dict.fromkeys(re.findall(r"O\((?:[^()`|,]|log )+\)", text))):
            return ", ".join(found[:3])  # no code, which would not break its line
    return ""


def shape(structure: Structure) -> str:
    """The shape of the scores, with the names of the dimensions."""
    return f"`[{', '.join(structure.layout.dimensions)}]`"


def picture(structure: type[Structure]) -> str:
    """The structure's thumbnail."""
    file = f"../images/structures/{page(structure).removesuffix('.md')}.png"
    return f"![A vertex of {structure.__name__}]({file})" if (TARGET.parent / file).exists() else ""


def table() -> str:
    """The whole file."""
    built = configured()
    classes = list(built)
    heads = [f"[{c.__name__}]({page(c)})" if (TARGET.parent / page(c)).exists() else c.__name__ for c in classes]
    lines = [INTRODUCTION, "| structure | | what it is | scores | cost | " + " | ".join(GROUPS) + " |"]
    lines.append("|---|---|---|---|---|" + ":-:|" * len(GROUPS))
    for c, head in zip(classes, heads, strict=True):
        has = ["x" if set(group) <= built[c].oracles else "" for group in GROUPS.values()]
        lines.append(" | ".join([f"| {head}", picture(c), summary(c), shape(built[c]), costs(c), *has]) + " |")
    names = "; ".join(f"*{title}*: {', '.join(f'`{o}`' for o in group)}" for title, group in GROUPS.items())
    lines += [
        "",
        f"Oracles: {names}. An `x`: the structure has all of them. The [table below](#every-oracle) has every oracle.",
    ]
    lines += ["Costs are for one example, the cheapest oracles first; the structure's page explains them."]
    lines += ["", ARGUMENTS, READINGS, "| structure | `read(vertex)` |", "|---|---|"]
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
    lines += ["", "## Every oracle", "", "| oracle | " + " | ".join(heads) + " |", "|---|" + ":-:|" * len(classes)]
    for oracle in ORACLES:
        has = ["x" if oracle in built[c].oracles else "" for c in classes]
        lines.append(f"| `{oracle}` | " + " | ".join(has) + " |")
    lines += ["", "This page is made by `scripts/structure_table.py` from the code."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(table())
