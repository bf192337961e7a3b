"""Draw the growth of cost with size and batch, from ``results/benchmarks/scaling.json``, for
``docs/scaling.md``.

    python scripts/scaling_figure.py

There is a picture for each family of structures, one of the ratios to other code, and the table of
these ratios.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from structgrad.common.pictures import grid as grid_lines
from structgrad.common.pictures import line as line_look
from structgrad.common.pictures import mark, save
from structgrad.experiments.markdown import insert

ROOT = Path(__file__).resolve().parent.parent
#: Picture -> title of a row of panels -> structures in it.
FAMILIES = {
    "trees": {"Spanning trees": ["SpanningTree"], "Arborescences": ["Arborescence"]},
    "orders": {"Matchings": ["Matching"], "Orderings and binary trees": ["Permutation", "BinaryTree"]},
    "subsets": {"Subsets and one-hot vectors": ["KSubset", "CorrelatedKSubset", "BudgetSubset", "Subset", "OneHot"]},
}
AXES = {"n": "size n", "batch": "examples in the batch"}

Point = dict[str, Any]


def structure(point: Point) -> str:
    """``KSubset`` of the line ``KSubset(5) marginals f+b``."""
    return str(point["line"]).split()[0].split("(")[0]


def label(line: str) -> str:
    """A line's name in words."""
    return line.replace(" f+b", ", with gradient")


def ratio(point: Point) -> float | None:
    """The opponent's time divided by ours."""
    return point["theirs"] / point["ours"] if point["theirs"] and point["ours"] else None


def panel(axes: Axes, axis: str, points: Sequence[Point], value: Callable[[Point], float | None]) -> None:
    """One line for each oracle, against one axis, with the other axis fixed."""
    along = [p for p in points if p["axis"] == axis]
    ticks = sorted({p[axis] for p in along})
    for index, line in enumerate(dict.fromkeys(p["line"] for p in points)):
        seen = [(p[axis], y) for p in along if p["line"] == line and (y := value(p)) is not None]
        axes.loglog(*zip(*seen, strict=True), label=label(line), **line_look(index) | mark(index))
    other = "batch" if axis == "n" else "n"
    (held,) = {p[other] for p in along}
    axes.set_xlabel(f"{AXES[axis]} ({AXES[other].split()[-1]} {held})")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    grid_lines(axes)


def picture(
    rows: dict[str, Sequence[Point]], unit: str, value: Callable[[Point], float | None], even: bool = False
) -> Figure:
    """Rows of panels: against the size, against the batch, and the meaning of colours."""
    figure = Figure(figsize=(11, 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
    for (title, points), panels in zip(rows.items(), grid, strict=True):
        for axes, axis in zip(panels, AXES, strict=True):
            panel(axes, axis, points, value)
            if even:
                axes.axhline(1.0, color="black", linewidth=0.8)
        panels[0].set_title(title, loc="left", fontweight="bold")
        panels[0].set_ylabel(unit)
        panels[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def table(points: Sequence[Point]) -> str:
    """The ratios against the size, in Markdown."""
    sizes = sorted({p["n"] for p in points if p["axis"] == "n"})
    heads = ["Oracle", "Opponent", *(f"n = {n}" for n in sizes)]
    rows = [heads, ["---", "---", *["--:"] * len(sizes)]]
    for line in dict.fromkeys(p["line"] for p in points):
        along = {p["n"]: p for p in points if p["line"] == line and p["axis"] == "n"}
        ratios = [ratio(along[n]) if n in along else None for n in sizes]
        cells = ["-" if r is None else f"{r:.3g}" for r in ratios]
        rows.append([label(line), next(p["opponent"] for p in along.values()), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Draw everything."""
    content = json.loads((ROOT / "results" / "benchmarks" / "scaling.json").read_text())
    points: list[Point] = content["points"]
    machine = content["machine"]
    families = dict(FAMILIES)
    named = {name for family in FAMILIES.values() for names in family.values() for name in names}
    if rest := sorted({structure(p) for p in points} - named):
        families["others"] = {"Others": rest}
    pictures = {
        name: picture(
            {title: [p for p in points if structure(p) in names] for title, names in rows.items()},
            "milliseconds of processor time a call",
            lambda p: p["ours"],
        )
        for name, rows in families.items()
    }
    opposed = [p for p in points if p["opponent"]]
    rows = {"Their time / our time": opposed}
    pictures["ratios"] = picture(rows, "times as fast", ratio, even=True)
    for name, figure in pictures.items():
        save(figure, ROOT / "docs" / "images" / f"scaling_{name}.png")
    held = next(p["batch"] for p in opposed if p["axis"] == "n")
    caption = (
        f"Their time / ours, {held} examples; medians of processor time of one thread on {machine['device']}, "
        f"torch {machine['torch']}. `-`: a call of one of the two would take too long to be measured."
    )
    insert(ROOT / "docs" / "scaling.md", "scaling", f"{table(opposed)}\n\n{caption}")


if __name__ == "__main__":
    main()
