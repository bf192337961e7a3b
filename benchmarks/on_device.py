"""Primitives and training steps on a GPU, at the papers' sizes, each beside the CPU in the same
run.

    python -m benchmarks.on_device                    # the GPU of this machine
    python -m benchmarks.on_device --device cpu       # the CPU against itself: that it runs
    python -m benchmarks.on_device --only listops     # lines whose title contains this

Training steps (those of ``benchmarks/launches.py``) are forward, backward and update. Batches are
already on the device. With ``--compile`` steps are also compiled by that choice of
``trainer.compile``, without counting the first steps. With ``RECORD=1`` the result goes to
``results/benchmarks/gpu/<device>.json``.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.harness import Row, Time, machine, measure, report
from benchmarks.launches import ROWS, built
from torch import Tensor

from structgrad.data import MissingDataError
from structgrad.structures import (
    Arborescence,
    BinaryTree,
    CorrelatedKSubset,
    KSubset,
    Matching,
    OneHot,
    Permutation,
    SpanningTree,
    Structure,
    Subset,
)
from structgrad.training.compiled import compiled_step
from structgrad.training.errors import RunError

#: Structure, shape of the scores of a batch, oracles.
PRIMITIVES: list[tuple[Structure, tuple[int, ...], tuple[str, ...]]] = [
    (Arborescence(), (100, 50, 50), ("argmax", "log_partition", "marginals", "sample", "trace")),
    (SpanningTree(), (128, 10, 10), ("argmax", "log_partition", "marginals", "sample", "trace")),
    (KSubset(10), (100, 350), ("argmax", "log_partition", "marginals", "sample", "trace")),
    (CorrelatedKSubset(10), (100, 699), ("argmax", "log_partition", "marginals")),
    (Subset(), (64, 32), ("log_partition", "marginals", "sample", "top_k")),
    (OneHot(), (64, 256), ("project", "sparsemap", "sample")),
    (Matching(), (128, 10, 10), ("argmax",)),
    (Permutation(), (128, 20), ("argmax", "trace")),
    (BinaryTree(), (64, 20), ("argmax", "trace")),
]
#: Of these the derivative is measured as well.
_SMOOTH = ("log_partition", "marginals", "project")


def primitives(device: torch.device) -> Iterator[tuple[str, str, Callable[[torch.device], Time]]]:
    """Title, size, and a function that measures the primitive on a device."""
    for structure, shape, oracles in PRIMITIVES:
        for oracle in oracles:

            def measured(where: torch.device, s: Structure = structure, o: str = oracle, n: Any = shape) -> Time:
                torch.manual_seed(0)
                scores = torch.randn(n).to(where)
                function = getattr(s, o)
                if o == "trace":
                    scores = scores.exp()
                arguments = (8,) if o == "top_k" else ()
                if o not in _SMOOTH:
                    return measure(lambda: function(scores, *arguments))
                scores.requires_grad_()
                upstream = torch.randn_like(function(scores))

                def both_ways() -> Tensor:
                    return torch.autograd.grad(function(scores), scores, upstream)[0]

                return measure(both_ways)

            yield f"{structure.name}.{oracle}", "x".join(map(str, shape)), measured


def training_step(overrides: list[str], where: torch.device, compiler: str | None = None) -> Time:
    """The time of a training step."""
    task = built(overrides)
    task.to(where).train()
    if compiler is not None:
        task.compiled_step = compiled_step(task, compiler)
    batches = [{n: t.to(where) for n, t in b.items()} for b in itertools.islice(iter(task.batches("train")), 2)]
    optimizer, next_batch = task.configure_optimizers(), itertools.cycle(batches)
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer

    def step() -> None:
        optimizer.zero_grad()
        (task.compiled_step or task.step)(next(next_batch)).loss.backward()
        optimizer.step()

    return measure(step, warmup=6, repeats=21 if where.type != "cpu" else 5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="lines whose title contains this")
    parser.add_argument("--compile", nargs="*", default=[], help="inductor, reduce-overhead")
    options = parser.parse_args()
    device, cpu = torch.device(options.device), torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: this machine has no CUDA device; --device cpu shows that the benchmark runs\n")
    rows = []
    for title, size, measured in primitives(device):
        if options.only in title:
            ours, theirs = measured(device), measured(cpu)
            rows.append(Row(title, size, ours, "the CPU", theirs))
            print(f"{title} {size}: {ours.wall:.3f} ms, CPU {theirs.wall:.3f} ms", flush=True)
    for title, overrides in ROWS.items():
        if options.only not in title:
            continue
        try:
            ours = training_step(overrides, device)
        except MissingDataError as error:
            print(f"{title}: {str(error).splitlines()[0]}")
            continue
        theirs = training_step(overrides, cpu)
        rows.append(Row(title, "training step", ours, "the CPU", theirs))
        print(f"{title}: {ours.wall:.2f} ms, CPU {theirs.wall:.2f} ms", flush=True)
        for compiler in options.compile:
            torch._dynamo.reset()
            try:
                rows.append(Row(title, compiler, training_step(overrides, device, compiler), "as it is", ours))
            except RunError as error:
                print(error)
    name = re.sub(r"\W+", "_", str(machine()["device"])).strip("_").lower()
    report(f"gpu/{name}", rows, of_wall=True)


if __name__ == "__main__":
    main()
