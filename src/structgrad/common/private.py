"""Parts of other libraries that these keep to themselves: all of our uses, one function each.

Each has a test of its name in ``tests/common/test_private.py``; when a new version of a library breaks one, that test
says which. What is not private stands where it is used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:  # each function imports what it needs: nobody waits for a library that is not used
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
    """Whether a tensor is one of ``torch.autograd.grad(..., is_grads_batched=True)``, which vectorises Jacobians."""
    import torch

    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.assume_constant_result``, which imports the compiler at once for a second; this does not."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def break_graph(reason: str) -> None:
    """While ``torch.compile`` traces: end this graph; whoever asked for one graph is told the reason."""
    import torch

    torch._dynamo.graph_break(msg=reason)


def reason_of_break(error: Exception) -> str | None:
    """The reason that :func:`break_graph` was given, if it was that."""
    found = re.search(r"User-inserted graph break\. Message: (.+)", str(error))
    return found[1] if found else None


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, which imports the compiler at once for a second; this does when called."""
    from torch._compile import _disable_dynamo

    def call(*positional: P.args, **named: P.kwargs) -> R:
        return function(*positional, **named)

    return functools.wraps(function)(_disable_dynamo(call))


def standard_gamma(concentration: Tensor) -> Tensor:
    """Draw from gamma distributions of rate 1, differentiably.

    ``torch.distributions.Gamma`` also moves what it draws away from zero.
    """
    import torch

    return torch._standard_gamma(concentration)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this x86 processor has instructions for products of bfloat16 numbers (AVX-512 BF16 or AMX)."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compiler_errors() -> tuple[type[Exception], ...]:
    """What ``torch.compile`` raises for a function that it cannot compile as a whole."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError

    return BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError


@contextmanager
def compiling_whole_steps() -> Iterator[None]:
    """Within, ``torch.compile`` traces recurrent networks and draws the random numbers of code that is not compiled."""
    import torch

    with torch._dynamo.config.patch(allow_rnn=True), torch._inductor.config.patch(fallback_random=True):
        yield


def with_captured_graphs(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """A traced program, compiled for CUDA graphs, as ``torch.compile(mode="reduce-overhead")`` does."""
    import torch
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=torch._inductor.list_mode_options("reduce-overhead"))


# --- Lightning --------------------------------------------------------------------------------------------------------


def log_the_test_at_the_last_step(trainer: pl.Trainer) -> None:
    """Let loggers get ``trainer.global_step`` as the step of the test.

    Lightning counts the steps of this process's batches instead: a run that was resumed after its last step would log
    its test one step too low.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def save_last(checkpoint: ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Save the last state now, unless this step's has been saved."""
    if not checkpoint._should_skip_saving_checkpoint(trainer):
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
