"""Draws a vertex of every kind of structure into docs/images/structures, and what an estimator does
into docs/images/overview.png.

python scripts/structure_pictures.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from structgrad import structures as s
from structgrad.common.pictures import BLUE, COLOURS, INK, ORANGE, line, save

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
GREY = "#d5d8dd"


def cells(axes: Axes, vertex: Tensor) -> None:
    """A vector with its chosen parts filled."""
    grid(axes, vertex[None])


def grid(axes: Axes, vertex: Tensor) -> None:
    """A matrix with its chosen parts filled."""
    rows, columns = vertex.shape
    for i in range(rows):
        for j in range(columns):
            colour = BLUE if vertex[i, j] else "white"
            axes.add_patch(Rectangle((j, -i), 0.86, 0.86, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.set(xlim=(-0.3, columns + 0.2), ylim=(-rows + 0.7, 1.2))


def pairs(axes: Axes, columns: list[int]) -> None:
    """Rows on the left, columns on the right, a line for every pair."""
    n = len(columns)
    for i, j in enumerate(columns):
        axes.plot([0, 2.2], [-i, -j], color=BLUE, linewidth=2, zorder=1)
    nodes(axes, [(x, -i) for x in (0, 2.2) for i in range(n)])
    axes.set(xlim=(-0.5, 2.7), ylim=(-n + 0.5, 0.5))


def graph(axes: Axes, edges: list[list[int]], directed: bool) -> None:
    """The nodes of a tree on a circle, its edges drawn; the root of a directed one is node 0."""
    n = len(edges) + 1
    angle = torch.arange(n) * 2 * torch.pi / n + torch.pi / 2
    places = torch.stack([angle.cos(), angle.sin()], -1).tolist()
    for i, j in edges:
        if directed:
            arrow(axes, places[i], places[j])
        else:
            axes.plot(*zip(places[i], places[j], strict=True), color=BLUE, linewidth=2, zorder=1)
    nodes(axes, places, first=ORANGE if directed else GREY)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))


def arcs(axes: Axes, edges: list[list[int]], labels: int = 1) -> None:
    """Positions in a line, an arc for every edge, in the colour and the dashes of its label."""
    n = len(edges) + 1
    for k, (i, j) in enumerate(edges):
        width, look = abs(i - j), line(k % labels) | {"linewidth": 1.6}
        axes.add_patch(Arc(((i + j) / 2, 0), width, width * 0.9, theta1=0, theta2=180, **look))
    nodes(axes, [(i, 0.0) for i in range(n)], first=ORANGE)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(-0.5, n / 2))


def trellis(axes: Axes, path: list[int], states: int) -> None:
    """A state for every position."""
    nodes(axes, [(t, c) for t in range(len(path)) for c in range(states)], colour="white")
    axes.plot(range(len(path)), path, color=BLUE, linewidth=2, zorder=3)
    nodes(axes, list(enumerate(path)), colour=BLUE)
    axes.set(xlim=(-0.5, len(path) - 0.5), ylim=(-0.5, states - 0.5))


def segments(axes: Axes, found: list[list[int]]) -> None:
    """Bars, a colour for every label."""
    for first, last, label in found:
        width = last - first + 1
        look = {"facecolor": COLOURS[label], "hatch": ("", "//", "..")[label], "edgecolor": "white", "linewidth": 0}
        axes.add_patch(Rectangle((first + 0.06, 0), width - 0.12, 1, **look))
    axes.set(xlim=(-0.2, found[-1][1] + 1.2), ylim=(-0.6, 1.6))


def factors(axes: Axes, vertex: list[int]) -> None:
    """Parts as circles, the chosen ones filled; factors as squares with a line to each of their parts."""
    for k, members in enumerate([(0, 1, 2), (1, 3), (2, 3, 4)]):
        x = sum(members) / len(members)
        for part in members:
            axes.plot([part, x], [0, -1.3], color=INK, linewidth=0.8, zorder=1)
        axes.add_patch(
            Rectangle((x - 0.16, -1.46), 0.32, 0.32, facecolor="white", edgecolor=INK, linewidth=0.8, zorder=k + 4)
        )
    nodes(axes, [(part, 0.0) for part in range(5)], colour="white")
    nodes(axes, [(part, 0.0) for part in vertex], colour=BLUE)
    axes.set(xlim=(-0.5, 4.5), ylim=(-1.7, 0.5))


def brackets(axes: Axes, spans: list[list[int]]) -> None:
    """A line over every span, wider ones higher."""
    n = spans[0][1] + 1
    for i, j, _ in spans:
        if i < j:
            axes.plot([i - 0.3, j + 0.3], [j - i, j - i], color=BLUE, linewidth=2)
    nodes(axes, [(i, 0.0) for i in range(n)])
    axes.set(xlim=(-0.6, n - 0.4), ylim=(-0.5, n - 0.4))


def depths(axes: Axes, parents: list[int]) -> None:
    """Tokens from left to right, their depth downwards, an edge to each parent."""
    depth = [0] * len(parents)
    for _ in parents:
        depth = [depth[parent] + 1 if parent >= 0 else 0 for parent in parents]
    for token, parent in enumerate(parents):
        if parent >= 0:
            axes.plot([token, parent], [-depth[token], -depth[parent]], color=BLUE, linewidth=2, zorder=1)
    nodes(axes, [(token, -d) for token, d in enumerate(depth)])
    axes.set(xlim=(-0.5, len(parents) - 0.5), ylim=(-max(depth) - 0.5, 0.5))


def way(axes: Axes) -> None:
    """A path through a small graph."""
    places = [(0.0, 0.0), (1.2, 0.7), (1.2, -0.7), (2.4, 0.7), (2.4, -0.7), (3.6, 0.0)]
    for i, j in [(0, 1), (0, 2), (1, 3), (1, 4), (2, 4), (3, 5), (4, 5)]:
        taken = (i, j) in [(0, 1), (1, 4), (4, 5)]
        axes.plot(
            *zip(places[i], places[j], strict=True), color=BLUE if taken else GREY, linewidth=2.4 if taken else 1.2
        )
    nodes(axes, places)
    axes.set(xlim=(-0.4, 4.0), ylim=(-1.1, 1.1))


def nodes(
    axes: Axes, places: list[tuple[float, float]] | list[list[float]], colour: str = GREY, first: str = ""
) -> None:
    """Circles, the first of them in a colour of its own."""
    for k, (x, y) in enumerate(places):
        axes.scatter(
            [x], [y], s=70, color=first if first and not k else colour, edgecolors=INK, linewidths=0.8, zorder=4
        )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An edge."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=BLUE, shrinkA=5, shrinkB=5))


def drawings() -> dict[str, Callable[[Axes], None]]:
    """Name of the picture -> a function that draws a vertex, sampled or best for fixed random scores."""
    torch.manual_seed(3)

    def best(structure: s.Structure, *shape: int) -> Tensor:
        return structure.argmax(torch.randn(shape))

    chain, segmentation = s.LinearChain(3), s.SemiMarkov(3, 3)
    tags = chain.read(best(chain, 6, 3, 3)).tolist()

    def edges(heads: Tensor) -> list[list[int]]:
        return sorted([int(head), node] for node, head in enumerate(heads) if head >= 0)

    vectors = {"subset": best(s.Subset(), 8), "k_subset": best(s.KSubset(3), 8), "one_hot": best(s.OneHot(), 8)}
    matrices = {"permutation": best(s.Permutation(), 5), "alignment": best(s.Alignment(), 5, 7)}
    found: dict[str, Callable[[Axes], None]] = {}
    found |= {name: lambda axes, v=v: cells(axes, v) for name, v in vectors.items()}
    found |= {name: lambda axes, v=v: grid(axes, v) for name, v in matrices.items()}
    tree = s.SpanningTree().read(best(s.SpanningTree(), 7, 7)).tolist()
    directed = edges(s.Arborescence().read(best(s.Arborescence(), 7, 7)))
    matching = s.Matching().read(best(s.Matching(), 4, 4)).tolist()
    projective = edges(s.ProjectiveTree().read(best(s.ProjectiveTree(), 7, 7)))
    parts = segmentation.read(best(segmentation, 9, 3, 3, 3)).tolist()
    spans = s.Constituency().read(best(s.Constituency(), 6, 6, 1)).tolist()
    budget, clustered = best(s.BudgetSubset(4), 8), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    found |= {
        name: lambda axes, v=v: cells(axes, v)
        for name, v in {"budget_subset": budget, "correlated_k_subset": clustered}.items()
    }
    hidden = s.HiddenMarkov(3)
    states = hidden.read(best(hidden, *hidden.shape(6))).tolist()
    frames = torch.zeros(5, 8)
    for frame, state in enumerate([0, 1, 1, 2, 2, 3, 4, 4]):  # blank, a, a, blank, blank, b, blank, blank
        frames[state, frame] = 1
    parents = s.BinaryTree().read(best(s.BinaryTree(), 7)).tolist()
    phrases = [[0, 5, 0], [0, 1, 0], [2, 5, 0], [3, 5, 0], [3, 4, 0]]
    found |= {
        "hidden_markov": lambda axes: trellis(axes, states, 3),
        "ctc": lambda axes: grid(axes, frames),
        "binary_tree": lambda axes: depths(axes, parents),
        "dag_path": way,
        "grammar": lambda axes: brackets(axes, phrases),
        "low_rank_grammar": lambda axes: brackets(axes, phrases),
    }
    return found | {
        "spanning_tree": lambda axes: graph(axes, tree, directed=False),
        "arborescence": lambda axes: graph(axes, directed, directed=True),
        "matching": lambda axes: pairs(axes, matching),
        "projective_tree": lambda axes: arcs(axes, projective),
        "labelled": lambda axes: arcs(axes, projective, labels=2),
        "factor_graph": lambda axes: factors(axes, [0, 3]),
        "linear_chain": lambda axes: trellis(axes, tags, 3),
        "semi_markov": lambda axes: segments(axes, parts),
        "constituency": lambda axes: brackets(axes, spans),
    }


def overview() -> Figure:
    """From scores to a gradient."""
    figure = Figure(figsize=(9.5, 2.5), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 19), ylim=(0, 5))
    axes.axis("off")
    boxes = [
        (0.3, "your encoder", "scores $\\theta$\n[batch, parts]", GREY),
        (5.0, "structure", "trees, subsets,\nmatchings, ...", BLUE),
        (9.7, "vertex $x$", "0/1, a number\na part", BLUE),
        (14.4, "your decoder", "loss of $x$\n[number of vertices]", GREY),
    ]
    for x, title, text, colour in boxes:
        axes.add_patch(
            FancyBboxPatch((x, 1.9), 4.0, 2.5, boxstyle="round,pad=0.1", facecolor="white", edgecolor=colour, lw=2)
        )
        axes.text(x + 2, 3.85, title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
        axes.text(x + 2, 2.75, text, ha="center", va="center", fontsize=9.5, color=INK)
    for x in (4.4, 9.1, 13.8):
        axes.add_patch(FancyArrowPatch((x, 3.15), (x + 0.55, 3.15), arrowstyle="-|>", mutation_scale=14, color=INK))
    axes.add_patch(
        FancyArrowPatch(
            (16.4, 1.75),
            (2.3, 1.75),
            arrowstyle="-|>",
            mutation_scale=14,
            color=ORANGE,
            lw=2,
            linestyle="--",
            connectionstyle="arc3,rad=-0.09",
        )
    )
    axes.text(9.35, 0.35, "the estimator's gradient, for encoder and decoder", ha="center", fontsize=11, color=INK)
    return figure


def main() -> None:
    """Write all of them."""
    folder = IMAGES / "structures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings().items():
        figure = Figure(figsize=(1.6, 0.9), dpi=120)
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        draw(axes)
        axes.set_aspect("equal")
        axes.axis("off")
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", pad_inches=0.02)
    save(overview(), IMAGES / "overview.png")


if __name__ == "__main__":
    main()
