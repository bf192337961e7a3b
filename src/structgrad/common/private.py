"""All our uses of private parts of other libraries, one function each.

Each has a test with its name in ``tests/common/test_private.py``. If a new version of a library
breaks one, that test says which. Public parts of libraries are used where they are needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:  # each function imports what it needs, so nobody waits for a library that is not used
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch import Tensor, fx

P = ParamSpec("P")
R = TypeVar("R")

# --- torch ------------------------------------------------------------------------------------------------------------


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is wrapped by ``torch.func`` (``vmap``, ``grad``, ...), so that its values cannot be read."""
    import torch

    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether a tensor belongs to ``torch.autograd.grad(..., is_grads_batched=True)``, which
    vectorises Jacobians.
    """
    import torch

    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Like ``torch.compiler.assume_constant_result``, but without its import of the compiler, which
    takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def break_graph(reason: str) -> None:
    """While ``torch.compile`` traces: end this graph. A caller who requires one graph gets the
    reason as an error.
    """
    import torch

    torch._dynamo.graph_break(msg=reason)


def reason_of_break(error: Exception) -> str | None:
    """The reason given to :func:`break_graph`, if the error comes from there."""
    found = re.search(r"User-inserted graph break\. Message: (.+)", str(error))
    return found[1] if found else None


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Like ``torch.compiler.disable``, but calls outside the compiler cost nothing, and its import,
    which takes a second, waits for a call inside.
    """
    import torch
    from torch._compile import _disable_dynamo

    def call(*positional: P.args, **named: P.kwargs) -> R:
        return function(*positional, **named)

    disabled = _disable_dynamo(call)

    @functools.wraps(function)
    def dispatch(*positional: P.args, **named: P.kwargs) -> R:
        return (disabled if torch.compiler.is_compiling() else function)(*positional, **named)

    return dispatch


def standard_gamma(concentration: Tensor) -> Tensor:
    """Draw from gamma distributions of rate 1, differentiably.

    ``torch.distributions.Gamma`` also moves its samples away from zero.
    """
    import torch

    return torch._standard_gamma(concentration)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this x86 processor has instructions for products of bfloat16 numbers (AVX-512 BF16 or AMX)."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compiler_errors() -> tuple[type[Exception], ...]:
    """The errors of ``torch.compile`` for a function that it cannot compile as a whole."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError

    return BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError


@contextmanager
def compiling_whole_steps() -> Iterator[None]:
    """A context in which ``torch.compile`` traces recurrent networks and draws the random numbers
    of eager code.
    """
    import torch

    with torch._dynamo.config.patch(allow_rnn=True), torch._inductor.config.patch(fallback_random=True):
        yield


def with_captured_graphs(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """A traced program, compiled for CUDA graphs like ``torch.compile(mode="reduce-overhead")``."""
    import torch
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=torch._inductor.list_mode_options("reduce-overhead"))


# --- Lightning --------------------------------------------------------------------------------------------------------


def log_the_test_at_the_last_step(trainer: pl.Trainer) -> None:
    """Let loggers get ``trainer.global_step`` as the step of the test.

    Lightning counts the batches of this process instead. A run that was resumed after its last step
    would log its test one step too low.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def skip_idle_callbacks(trainer: pl.Trainer) -> None:
    """Let the trainer pass over callbacks in those parts of a training step in which they do nothing.

    Lightning calls every hook of every callback, within a section of its profiler that it names
    anew. It passes over a hook that cannot be called.
    """
    from pytorch_lightning import Callback

    hooks = (
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in hooks:
            # A hook may also be set on the instance, as Lightning's LambdaCallback does.
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)


def save_last(checkpoint: ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Save the last state now, unless it has been saved at this step."""
    if not checkpoint._should_skip_saving_checkpoint(trainer):
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
