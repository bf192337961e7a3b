"""Writes docs/estimators/table.md: which estimator goes with which structure, found by constructing
every pair.

python scripts/estimator_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

import hydra
from omegaconf import DictConfig

from structgrad.structures import Structure, UnsupportedError

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "estimators" / "table.md"
HEAD = """# Estimator x structure

Made by `python scripts/estimator_table.py`, which constructs every pair of configurations; do not
edit. `x`: the pair works. A number refers to the reasons below: the pair is refused when the
configuration is composed, and the message says what would work.

"""
RELAXATIONS = """
## Relaxations

The possible values of `estimator.relaxation` for `sst`, `sst_st` and their relatives.

"""


def choices(group: str) -> list[str]:
    """The names of a configuration group."""
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


def structures() -> dict[str, Structure]:
    """Configuration name -> structure, those that have a latent variable."""
    built = {name: hydra.utils.instantiate(compose(f"+structure={name}").structure) for name in choices("structure")}
    return {name: structure for name, structure in built.items() if structure.is_latent}


def compose(*overrides: str) -> DictConfig:
    """These groups and nothing else."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(overrides=list(overrides))


def refusal(estimator: DictConfig, structure: Structure) -> str | None:
    """The reason why the pair is impossible, or None."""
    try:
        hydra.utils.instantiate(estimator, structure=structure)
    except hydra.errors.InstantiationException as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        return reason(error.__cause__, structure)
    return None


def reason(error: ValueError, structure: Structure) -> str:
    """The missing oracles: the message without the asker and the alternatives."""
    message = re.sub(rf"\b{structure.name}\b", "the structure", str(error))
    if isinstance(error, UnsupportedError):
        message = re.split(r"; (?:it has|usable)", message)[0]
    return re.sub(r"^estimator \w+ (?:\([^)]*\) )?", "", message)


def row(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |\n"


def table() -> str:
    """The page."""
    columns = structures()
    reasons: dict[str, int] = {}
    out = HEAD + row(["", *columns]) + row(["---", *[":-:"] * len(columns)])
    for estimator in choices("estimator"):
        if estimator == "none":
            continue
        # A size that tasks set, for estimators with a network of the context.
        config = compose(f"+estimator={estimator}", "+context_size=8").estimator
        why = [refusal(config, structure) for structure in columns.values()]
        cells = ["x" if w is None else str(reasons.setdefault(w, len(reasons) + 1)) for w in why]
        out += row([f"`{estimator}`", *cells])
    out += "\n" + "".join(f"{number}. {text}\n" for text, number in reasons.items())
    names = sorted({r for structure in columns.values() for r in structure.relaxations})
    out += RELAXATIONS + row(["", *columns]) + row(["---", *[":-:"] * len(columns)])
    for name in names:
        out += row([f"`{name}`", *["x" if name in s.relaxations else "" for s in columns.values()]])
    return out


if __name__ == "__main__":
    TABLE.write_text(table())
    print(f"wrote {TABLE.relative_to(ROOT)}")
