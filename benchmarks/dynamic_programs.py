"""The structures of dynamic programs against torch-struct:
``python -m benchmarks.dynamic_programs [--plot FILE]``.

Ours and theirs are measured in the same run with the same threads; numbers are medians. Bounds are
fractions of their processor time. A chain's log-partition with its gradient may take an eighth, its
sample and 3 best a twentieth, trees a third. A projection may take at most twenty times our own
marginals. With ``--plot`` it draws cost against length.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import Row, measure, report, settings
from torch import Tensor

from structgrad.common import pictures
from structgrad.structures import Alignment, Constituency, DagPath, LinearChain, ProjectiveTree, SemiMarkov

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_struct

Call = Callable[[], Any]


def gradient(function: Callable[[Tensor], Tensor], scores: Tensor) -> Call:
    """The value with its gradient."""
    leaf = scores.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf).sum(), leaf)


def chain(n: int, batch: int = 32, labels: int = 10) -> tuple[LinearChain, Tensor]:
    """A structure and scores."""
    return LinearChain(labels), torch.randn(batch, n - 1, labels, labels)


def trees(n: int, batch: int = 16) -> tuple[ProjectiveTree, Tensor, Tensor]:
    """A structure, its scores of n nodes under a root, and their scores, where the root is no node."""
    return ProjectiveTree(), torch.randn(batch, n + 1, n + 1), torch.randn(batch, n, n)


def spans(n: int, batch: int = 16, labels: int = 5) -> tuple[Constituency, Tensor]:
    """A structure and scores."""
    return Constituency(labels), torch.randn(batch, n, n, labels)


def their_trees(scores: Tensor) -> Call:
    """Marginals; theirs come through the graph of the scores."""
    leaf = scores.clone().requires_grad_()
    return lambda: torch_struct.DependencyCRF(leaf * 1).marginals


def against(what: str, size: str, share: float, ours: Call, theirs: Call) -> Row:
    """One line."""
    their_time = measure(theirs, repeats=7, warmup=2)
    return Row(what, size, measure(ours), "torch-struct", their_time, bound=their_time.processor / share)


def rows() -> list[Row]:
    """The measurements with targets."""
    line, scores = chain(50)
    tree, ours, theirs = trees(24)
    constituency, labelled = spans(24)
    crf = torch_struct.LinearChainCRF
    return [
        against(
            "chain log-partition with gradient",
            "B 32, N 50, C 10",
            8,
            gradient(line.log_partition, scores),
            gradient(lambda s: crf(s).partition, scores),
        ),
        against("chain sample", "B 32, N 50, C 10", 20, lambda: line.sample(scores), lambda: crf(scores).sample((1,))),
        against("chain 3 best", "B 32, N 50, C 10", 20, lambda: line.top_k(scores, 3), lambda: crf(scores).topk(3)),
        against("Eisner marginals", "B 16, n 24", 3, lambda: tree.marginals(ours), their_trees(theirs)),
        against(
            "CKY marginals",
            "B 16, n 24, C 5",
            3,
            lambda: constituency.marginals(labelled),
            lambda: torch_struct.TreeCRF(labelled.clone()).marginals,
        ),
        *projections(),
    ]


def projections() -> list[Row]:
    """The Euclidean projection beside the marginals; it may take twenty times as long."""
    structure, scores = chain(20, 64, 4)
    leaf = scores.clone().requires_grad_()
    found = []
    for what, call in (
        ("projection", lambda f: lambda: f(scores)),
        ("projection with gradient", squared_gradient(leaf)),
    ):
        marginals = measure(call(structure.marginals))
        ours = measure(call(structure.project))
        found.append(
            Row(f"chain {what}", "B 64, N 20, C 4", ours, "our marginals", marginals, bound=20 * marginals.processor)
        )
    return found


def squared_gradient(leaf: Tensor) -> Callable[[Callable[[Tensor], Tensor]], Call]:
    """The gradient of the squared norm of what a function returns."""
    return lambda function: lambda: torch.autograd.grad(function(leaf).square().sum(), leaf)


def plot(out: Path) -> None:
    """Marginals against length: every structure, batch 16, and torch-struct where it has it."""
    from matplotlib.figure import Figure

    lengths = [8, 16, 32, 64, 128]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    batch, labels, longest = 16, 5, 4

    def path(n: int) -> DagPath:
        return DagPath([[i, j] for i in range(n) for j in range(i + 1, min(i + 6, n))])

    ours: dict[str, Callable[[int], tuple[Any, Tensor]]] = {
        "LinearChain(5)": lambda n: chain(n, batch, labels),
        "SemiMarkov(5, 4)": lambda n: (SemiMarkov(labels, longest), torch.randn(batch, n - 1, longest, labels, labels)),
        "Alignment": lambda n: (Alignment(), torch.randn(batch, n, n)),
        "DagPath, 5 edges a node": lambda n: (path(n), torch.randn(batch, *path(n).shape(n))),
        "ProjectiveTree": lambda n: trees(n, batch)[:2],
        "Constituency(5)": lambda n: spans(n, batch, labels),
    }

    def marginals_of(kind: Any, scores: Tensor) -> Call:
        return lambda: kind(scores.clone()).marginals

    theirs: dict[str, Callable[[int], Call]] = {
        "LinearChain(5)": lambda n: marginals_of(torch_struct.LinearChainCRF, chain(n, batch, labels)[1]),
        "ProjectiveTree": lambda n: their_trees(trees(n, batch)[2]),
        "Constituency(5)": lambda n: marginals_of(torch_struct.TreeCRF, spans(n, batch, labels)[1]),
    }
    for number, (name, make) in enumerate(ours.items()):
        times = []
        for n in lengths:
            structure, scores = make(n)
            times.append(measure(lambda x=structure, s=scores: x.marginals(s), repeats=3, warmup=1).processor)
        axes.plot(lengths, times, label=name, **pictures.mark(number) | {"linestyle": "-"})
        print(name, [round(t, 2) for t in times], flush=True)
        if name in theirs:
            times = [measure(theirs[name](n), repeats=3, warmup=1).processor for n in lengths]
            axes.plot(lengths, times, ":", label=f"{name}, torch-struct", **pictures.mark(number))
            print(name, "torch-struct", [round(t, 2) for t in times], flush=True)
    axes.set(xscale="log", yscale="log", xlabel="length n", ylabel="milliseconds of the processor", xticks=lengths)
    axes.set_xticklabels([str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_title(f"Marginals, batch {batch}", fontsize="medium")
    pictures.legend(figure, columns=2)
    pictures.grid(axes)
    pictures.save(figure, out)
    print(f"plot: {out}")


def main() -> None:
    """Measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw cost against length to this file, instead of the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*arg_constraints.*")
    if options.plot:
        plot(options.plot)
    else:
        report("dynamic_programs", [row for _ in settings() for row in rows()])


if __name__ == "__main__":
    main()
