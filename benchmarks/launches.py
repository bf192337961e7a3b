"""The kernels that a training step launches, and its waits for the device, counted without a GPU.

    python -m benchmarks.launches            # prints the table
    RECORD=1 python -m benchmarks.launches   # and writes docs/launches.md

On the ``meta`` device tensors have shapes but no values, and the code takes the path of every
device except the CPU. Each operator that is neither a view nor an allocation is one launch. An
LSTM, which a GPU's library runs as one call, counts as one. An operator is a wait if the host needs
the shape or value of its result. For a shape, the largest possible one is assumed. The optimiser's
step is not counted: it is one fused kernel or a few (``foreach``).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structgrad.data import MissingDataError
from structgrad.tasks.base import Task
from structgrad.training.run import assemble

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "launches.md"

#: Title -> overrides of a training step at the paper's sizes. Data are few: only their shapes count.
ROWS: dict[str, list[str]] = {
    f"{task}: {title}": [f"task={task}", *sizes, *overrides]
    for task, sizes, rows in (
        (
            "listops",
            ["task.data.train=200", "task.data.val=20", "task.data.test=20"],
            {
                "LSTM": ["structure=none"],
                "true edges": ["structure=ground_truth"],
                "independent edges, SST": ["structure=independent_directed"],
                "arborescence, SST": ["structure=arborescence"],
            },
        ),
        (
            "graph_layout",
            ["task.data.train=200", "task.data.val=20", "task.data.test=20"],
            {
                "independent edges, SST": ["structure=independent_directed"],
                "top edges, SST": ["structure=top_edges"],
                "spanning tree, SST": ["structure=spanning_tree"],
                "spanning tree, T-REINFORCE": ["structure=spanning_tree", "estimator=t_reinforce_plus"],
            },
        ),
        (
            "bit_vector_vae",
            ["task.data.source=MNIST/parquet"],
            {
                name: [f"estimator={name}"]
                for name in ("sfe", "sfe_plus", "nvil", "gumbel_softmax", "topk_sparsemax", "sparsemap")
            },
        ),
        (
            "ssvae",
            ["task.data.source=MNIST/parquet", "task.warm_start.epochs=0"],
            {
                name: [f"estimator={name}"]
                for name in (
                    *("dense", "sparsemax", "sfe", "sfe_plus", "nvil"),
                    *("sum_and_sample", "gumbel_softmax", "st_gumbel"),
                )
            },
        ),
        (
            "communication_game",
            ["data=omniglot"],
            {name: [f"estimator={name}"] for name in ("dense", "sparsemax", "sfe", "gumbel_softmax")},
        ),
        (
            "l2x",
            ["data=planted_reviews", "task.data.train=200", "task.data.val=20", "task.data.test=20"],
            {
                "k-subset, SST": ["structure=k_subset"],
                "correlated k-subset, SST": ["structure=correlated_k_subset"],
                "k-subset, T-REINFORCE+": ["structure=k_subset", "estimator=t_reinforce_plus"],
            },
        ),
        (
            "parentheses",
            ["task.data.train=200", "task.data.val=20", "task.data.test=20"],
            {"left to right": ["structure=none"], "learnt order, RELAX": []},
        ),
    )
    for title, overrides in rows.items()
}

#: Operators that allocate or relabel memory and launch nothing.
_FREE = ("empty", "new_empty", "lift_fresh", "_unsafe_view", "_reshape_alias", "detach", "alias", "set_")


class Launches(TorchDispatchMode):
    """Counts the launches and waits of code that runs within it, on the ``meta`` device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count ``func``, and replace it if it needs values."""
        name = func._schema.name.removeprefix("aten::")
        if name in ("nonzero", "_local_scalar_dense", "bincount"):
            self.waits[name] += 1
            return self._without_values(name, args, kwargs or {})
        if name in ("index", "index_put", "_unsafe_index_put") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        ):
            self.waits[f"{name} by a mask"] += 1
            indices = [
                column
                for i in args[1]
                for column in (
                    torch.empty(i.dim(), i.numel(), dtype=torch.int64, device=i.device).unbind(0)
                    if isinstance(i, Tensor) and i.dtype == torch.bool
                    else [i]
                )
            ]
            args = (args[0], indices, *args[2:])
        if not (name.startswith(_FREE) or _is_view(func)):
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _without_values(name: str, args: Any, kwargs: Any) -> Any:
        x: Tensor = args[0]
        if name == "nonzero":
            return torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=x.device)
        if name == "bincount":
            length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return torch.empty(max(1, length), dtype=torch.int64, device=x.device)
        return x.dtype == torch.bool or (1.0 if x.is_floating_point() else 1)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class _FusedLSTM(torch.autograd.Function):
    """One launch forward, one backward, results of the right shapes."""

    @staticmethod
    def forward(ctx: Any, counter: Counter[str], shapes: list[torch.Size], *inputs: Tensor) -> tuple[Tensor, ...]:
        counter["lstm"] += 1
        ctx.counter = counter
        ctx.save_for_backward(*inputs)
        return tuple(inputs[0].new_empty(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.counter["lstm backward"] += 1
        return None, None, *(torch.empty_like(t) for t in ctx.saved_tensors)


class LSTMs(TorchFunctionMode):
    """Runs every LSTM as one call."""

    def __init__(self, counter: Counter[str]) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the LSTM and nothing else."""
        if getattr(func, "__name__", "") != "lstm":
            return func(*args, **(kwargs or {}))
        packed = not isinstance(args[1], tuple | list)
        data, (h, c), weights = (args[0], *args[2:4]) if packed else args[:3]
        *_, bidirectional = args if packed else args[:-1]
        shape = torch.Size([*data.shape[:-1], h.shape[-1] * (2 if bidirectional else 1)])
        return _FusedLSTM.apply(self.counter, [shape, h.shape, c.shape], data, h, c, *weights)


def built(overrides: list[str], cache: str | None = None) -> Task:
    """The task of a row of :data:`ROWS`, with its data.

    Raises:
        MissingDataError: if data are missing.
    """
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", [*overrides, *([f"paths.cache={cache}"] if cache else [])])
    torch.manual_seed(0)
    task = assemble(config)
    task.prepare_data()
    task.configure_model()
    return task


def count(overrides: list[str], cache: str | None = None) -> tuple[Launches, Launches]:
    """Launches and waits of a training step.

    Args:
        overrides: overrides of the configuration.
        cache: folder of generated data; None for the usual one.

    Returns:
        the counts of the forward and of the backward pass.

    Raises:
        MissingDataError: if the task's data are not here.
    """
    task = built(overrides, cache)
    batch = {name: tensor.to("meta") for name, tensor in next(iter(task.batches("train"))).items()}
    task.to("meta").train()
    forward, backward = Launches(), Launches()
    with forward, LSTMs(forward.launches):
        loss = task.step(batch).loss
    with backward:
        loss.backward()
    # An LSTM's backward pass is counted where its forward pass was.
    backward.launches["lstm backward"] += forward.launches.pop("lstm backward", 0)
    return forward, backward


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose title contains this")
    parser.add_argument("--detail", action="store_true", help="also the most frequent operators")
    options = parser.parse_args()
    lines = ["| training step | launches forward | backward | waits | of these |", "|---|--:|--:|--:|---|"]
    for title, overrides in ROWS.items():
        if options.only and options.only not in title:
            continue
        try:
            forward, backward = count(overrides)
        except MissingDataError as error:
            print(f"{title}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        waits = forward.waits + backward.waits
        what = ", ".join(f"{n} {name}" for name, n in waits.items()) or "-"
        lines.append(
            f"| {title} | {forward.launches.total():,} | {backward.launches.total():,} | {waits.total()} | {what} |"
        )
        print(lines[-1], flush=True)
        if options.detail:
            print("   forward ", forward.launches.most_common(8))
            print("   backward", backward.launches.most_common(8))
    if os.environ.get("RECORD", "") not in ("", "0") and not options.only:
        PAGE.write_text(
            "# Launches\n\n"
            "Made by `RECORD=1 python -m benchmarks.launches`; do not edit. The table counts the kernels that a\n"
            "training step at the paper's sizes launches on a device other than the CPU, and its waits for that\n"
            "device. Both are counted on the `meta` device, without the optimiser's step. An LSTM is one launch;\n"
            "views and allocations are none. A launch costs a GPU's host about 5 to 10 microseconds, whatever\n"
            "its arithmetic.\n\n" + "\n".join(lines) + "\n"
        )
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
