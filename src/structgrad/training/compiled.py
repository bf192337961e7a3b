"""The training step as one program of torch's compiler: forward and backward, on a GPU as two
captured graphs.

The step must be one program. Code that reads values asks ``values_can_be_read`` first, and
estimators assign new state instead of writing into the old. The program is no part of a run's
identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from structgrad.common.private import compiler_errors, compiling_whole_steps, reason_of_break, with_captured_graphs
from structgrad.common.text import first_line
from structgrad.data import Batch
from structgrad.tasks.base import StepOutput, Task
from structgrad.training.errors import RunError


def compiled_step(task: Task, mode: str) -> Callable[[Batch], StepOutput]:
    """The task's training step. The compiler traces it as a whole at its first call, and again for
    every new shape.

    Random numbers are those of the uncompiled step, so losses are the same up to rounding.

    Args:
        task: a task on its device, in training mode whenever the step is called.
        mode: ``reduce-overhead`` (CUDA graphs), or a backend of ``torch.compile``.

    Returns:
        the function that replaces ``task.step`` in training. It raises :class:`RunError` if the
        step cannot be one program. This happens if it reads values on the host, has more shapes
        than torch keeps programs for (8), or there is no compiler.
    """
    captured = mode == "reduce-overhead"
    program: Callable[[Batch], StepOutput] = torch.compile(
        task.step, backend=_captured if captured else mode, fullgraph=True, dynamic=False
    )
    # State that a captured graph assigns lies in the graph's own memory and is the input of the
    # next call. So it is copied back to its first place, from which the graph reads it. The copy
    # must not come earlier, because the backward pass may read the old state.
    places: list[tuple[nn.Module, str, Tensor]] = []

    def step(batch: Batch) -> StepOutput:
        if captured:
            if not places:  # only now, when the task is on its device
                places.extend(
                    (m, name, state) for m in task.modules() for name, state in m.named_buffers(recurse=False)
                )
            for module, name, place in places:
                if (state := module.get_buffer(name)) is not place:
                    setattr(module, name, place.copy_(state))
        try:
            with compiling_whole_steps():
                out = program(batch)
        except compiler_errors() as error:
            reason = _reason(error)
            raise RunError(
                f"trainer.compile={mode}: this training step cannot be a single program: {reason}{_where(error)}; "
                "the same command without it continues this run"
            ) from error
        # The next call overwrites the results of a captured graph. The loss is used before.
        if not captured:
            return out
        calls = None if out.calls is None else out.calls.clone()
        return replace(out, metrics={n: _copied(v) for n, v in out.metrics.items()}, calls=calls)

    return step


def _captured(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Backend of ``torch.compile``: inductor with CUDA graphs, for a program whose shapes do not depend on values."""
    for node in graph.graph.nodes:
        if free_unbacked_symbols(node.meta.get("example_value")):
            raise ValueError(f"what {node.name} returns depends on values, and a captured graph has fixed shapes")
    return with_captured_graphs(graph, inputs)


def _reason(error: Exception) -> str:
    """Our own words if our code breaks the graph, otherwise the first line of torch's message."""
    return reason_of_break(error) or first_line(getattr(error, "inner_exception", error))


def _where(error: Exception) -> str:
    """The line of code that cannot be part of the program, if torch knows it."""
    stack = getattr(error, "real_stack", None)
    return f" ({Path(stack[-1].filename).name}, line {stack[-1].lineno})" if stack else ""


def _copied(value: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    return (value[0].clone(), value[1].clone()) if isinstance(value, tuple) else value.clone()
