"""An estimate of the papers' runs on a GPU that is not here, from the launches, bytes and
operations of a step.

    python -m benchmarks.estimate            # prints the table
    RECORD=1 python -m benchmarks.estimate   # and writes docs/gpu_estimate.md
    RECORD=1 python -m benchmarks.estimate --only l2x    # and replaces these tables there

A step is counted on the ``meta`` device (see ``benchmarks/launches.py``): launches, the bytes that
each reads and writes, the floating-point operations of products and convolutions. Time on the
device is the sum over launches of the longest of three: the least time of a kernel, bytes over
bandwidth, operations over peak. Time on the host is that of the launches and of the loop around the
step. The longer of the two is the step's.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launches import Launches, LSTMs, built
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from structgrad.commands import CONFIGS
from structgrad.data import MissingDataError
from structgrad.experiments import tables
from structgrad.experiments.tables import Row, Table
from structgrad.training.errors import ConfigurationError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu_estimate.md"

#: NVIDIA H100 SXM5 data sheet: float32 without tensor cores (torch's default for float32 products), TF32 with tensor
#: cores and without sparsity (``trainer.matmul_precision=medium``), HBM3 bandwidth.
FLOPS, TF32, BANDWIDTH = 67e12, 494e12, 3.35e12
#: Seconds, assumed: a launch by eager PyTorch with autograd; the shortest kernel; a step of cuDNN's LSTM, or of a
#: recursion within one kernel; a wait of the host; Lightning's loop, the batch and its copy to the device, the update.
LAUNCH, KERNEL, SEQUENTIAL, WAIT, LOOP = 7e-6, 2.5e-6, 3e-6, 20e-6, 500e-6
#: A step that waits more often than this repeats something until a value says that it is done.
WAITS = 50
#: Runs side by side.
TOGETHER = 16

#: Of the sizes of a training step, the number of examples is not one: few are generated.
FEW = {
    task: [f"task.data.{split}={n}" for split, n in (("train", 200), ("val", 20), ("test", 20))]
    for task in ("listops", "graph_layout", "parentheses", "l2x")
}
#: Stand-ins of the papers' shapes for data that are not here.
STAND_INS = {
    "l2x": ["data=planted_reviews"],
    "bit_vector_vae": ["task.data.source=MNIST/parquet"],
    "ssvae": ["task.data.source=MNIST/parquet", "task.warm_start.epochs=0"],
    "communication_game": ["data=omniglot"],
}


class Cost(Launches):
    """Also counts bytes, operations and seconds on the device, with float32 and with TF32 products.

    Raises:
        NotImplementedError: after more than :data:`WAITS` waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0
        self.seconds = self.medium = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count ``func``."""
        before = self.launches.total()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.waits.total() > WAITS:
            raise NotImplementedError(f"the step waits more than {WAITS} times")
        if self.launches.total() > before:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            # One program an example; its recursion takes one part after another.
            recursion = (
                SEQUENTIAL * tensors[0].shape[-1] if func.namespace == "structgrad" and tensors[0].dim() else 0.0
            )
            self.add(moved, flops, recursion)
        return out

    def add(self, moved: int, flops: int, least: float = 0.0) -> None:
        """A kernel."""
        self.bytes += moved
        self.flops += flops
        others = max(KERNEL, least, moved / BANDWIDTH)
        self.seconds += max(others, flops / FLOPS)
        self.medium += max(others, flops / TF32)


class _CostOfLSTMs(LSTMs):
    """Counts LSTMs, forward and backward, as sequential steps."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(cost.launches)
        self.cost = cost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the LSTM."""
        if getattr(func, "__name__", "") == "lstm":
            data, weights = args[0], next(a for a in args[1:] if isinstance(a, list | tuple) and len(a) > 2)
            steps = data.shape[1] if args[-1] is True else data.shape[0]
            rows, size = data.numel() // data.shape[-1], sum(w.numel() for w in weights if w.dim() == 2)
            for times in (1, 2):  # forward, backward
                self.cost.add(
                    times * 4 * (8 * data.numel() + size), times * 2 * rows * size, times * steps * SEQUENTIAL
                )
        return super().__torch_function__(func, types, args, kwargs)


@dataclass
class Estimate:
    """A run: its steps, and what one of them costs, in seconds on host and device (``medium``: with
    TF32 products).
    """

    steps: int
    launches: int
    waits: int
    gflop: float
    megabytes: float
    device: float
    medium: float

    @property
    def host(self) -> float:
        """Seconds of a step on the host, operation by operation."""
        return LOOP + self.launches * LAUNCH + self.waits * WAIT

    @property
    def step(self) -> float:
        """Seconds of a step of one run."""
        return max(self.host, self.device)

    @property
    def captured(self) -> float | None:
        """Seconds of a step with CUDA graphs, if it can be one; fused kernels would make it shorter."""
        return None if self.waits else max(LOOP, self.device)

    @property
    def together(self) -> float:
        """Seconds of a step of each of :data:`TOGETHER` runs: a core each, one device."""
        return max(self.host, TOGETHER * self.device)


def estimate(overrides: list[str]) -> Estimate:
    """The estimate of a run at the paper's budget.

    Raises:
        MissingDataError: if its data are missing.
        NotImplementedError: if the step reads values.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", overrides)
    name = next(o.removeprefix("task=") for o in overrides if o.startswith("task="))
    stand_in = STAND_INS.get(name, [])
    if name == "l2x":  # the reviews are as long; the other options are those of the data that are replaced
        overrides = [override for override in overrides if not override.startswith("task.data.")]
        stand_in = [*stand_in, f"task.data.words={config.task.data.words}"]
    task = built([*overrides, *stand_in, *FEW.get(name, [])])
    batch = {key: tensor.to("meta") for key, tensor in next(iter(task.batches("train"))).items()}
    task.to("meta").train()
    cost = Cost()
    with cost, _CostOfLSTMs(cost):
        loss = task.step(batch).loss
    with cost:
        loss.backward()  # type: ignore[no-untyped-call]
    return Estimate(
        int(config.trainer.max_steps),
        cost.launches.total(),
        cost.waits.total(),
        cost.flops / 1e9,
        cost.bytes / 1e6,
        cost.seconds,
        cost.medium,
    )


def line(table: Table, row: Row) -> str:
    """The line of the page for a row."""
    title = f"{row.group}: {row.title}" if row.group else row.title
    title = title.replace("|", r"\|")
    try:
        found = estimate([*table.overrides, *row.overrides])
    except MissingDataError:
        return f"| {title} | no data to count by |"
    except NotImplementedError:
        return f"| {title} | looks at values, so that it cannot be counted |"
    hours = found.steps / 3600
    captured = found.captured
    cells = [
        title,
        f"{found.steps:,}",
        f"{found.launches:,}",
        str(found.waits or "-"),
        f"{found.gflop:.2f}",
        f"{found.megabytes:,.0f}",
        f"{1e3 * found.device:.2f}",
        f"{1e3 * found.medium:.2f}",
        f"{1e3 * found.step:.2f}",
        "-" if captured is None else f"{1e3 * captured:.2f}",
        f"{hours * found.step:.2f}",
        "-" if captured is None else f"{hours * captured:.2f}",
        f"{hours * found.together:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tables whose name contains this")
    options = parser.parse_args()
    recorded = _sections(PAGE.read_text()) if options.only else {}
    sections = []
    every = [tables.load(name, CONFIGS / "table") for name in tables.names(CONFIGS / "table")]
    for table in every:
        if table.budget != "paper" or table.name in _ALIKE:
            continue
        title = f"{table.title} (`{table.name}`)"
        if options.only and options.only not in table.name:
            sections += [recorded[title]] if title in recorded else []
            continue
        lines = [f"{title}\n\n{_COLUMNS}"]
        for row in table.rows:
            try:
                lines.append(line(table, row))
            except ConfigurationError as error:
                raise SystemExit(f"error: {table.name}, {row.name}: {error}") from error
            print(f"{table.name} {lines[-1]}", flush=True)
        sections.append("\n".join(lines))
    if os.environ.get("RECORD", "") not in ("", "0"):
        PAGE.write_text("\n\n## ".join([_HEAD.strip(), *sections]) + "\n")
        print(f"wrote {PAGE}")


def _sections(page: str) -> dict[str, str]:
    """Title of a table -> what a page has of it, title first."""
    _, *sections = page.split("\n## ")
    return {section.partition("\n")[0]: section.strip() for section in sections}


#: Tables of the same steps as another one.
_ALIKE = ("paulus_4", "paulus_5", "paulus_6", "bit_vector_vae_mnist")

_COLUMNS = (
    "| row | steps | launches | waits | GFLOP | MB | device ms | medium ms | step ms | captured ms | alone h "
    f"| captured h | {TOGETHER} together h |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)

_K, _S, _L, _W = (f"{1e6 * seconds:g} µs" for seconds in (KERNEL, SEQUENTIAL, LAUNCH, WAIT))
_O = f"{1e3 * LOOP:g} ms"
_HEAD = f"""# Estimate for an H100

Made by `RECORD=1 python -m benchmarks.estimate`; do not edit. Nothing here is measured. The training
steps of every row at the paper's budget are counted on the `meta` device. Times follow from the data
sheet of an NVIDIA H100 SXM5: {FLOPS / 1e12:g} TFLOP/s in float32 without tensor cores, {TF32 / 1e12:g} in TF32
with them, {BANDWIDTH / 1e12:g} TB/s.
`make bench-gpu` measures some of them.

- *device*: a sum over launches. A launch takes the longest of {_K}, bytes over bandwidth, and operations
  over peak. Every step of an LSTM, or of a recursion within a kernel, adds {_S}.
- *medium*: the same with products in TF32 (`trainer.matmul_precision=medium`, see `precision.md`).
- *step*: the longer of *device* and the host's time: {_L} a launch, {_W} a wait, {_O} for the loop around the
  step.
- *captured*: with CUDA graphs (`trainer.compile=reduce-overhead`), if no step waits.
- *alone*, *captured*, *{TOGETHER} together*: hours of a run of all steps. The last is for {TOGETHER} runs on one
  GPU, with a CPU core each.

The times {_K}, {_S}, {_L}, {_W} and {_O} are assumed. Validations, the test, and the arithmetic within our
own kernels are left out. Missing data are replaced by others of the same shapes (images of the
communication game have fewer features, 784 instead of 4,096). RELAX cannot be captured (see
`gpu.md`). Tables 4 to 6 of Paulus et al. are Table 3 with other data.
"""

if __name__ == "__main__":
    main()
