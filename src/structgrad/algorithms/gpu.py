"""GPU kernels: which tensors take them, and how they are launched.

A kernel is written in Triton, in the file of its algorithm, beside the compiled CPU code and the
plain torch version. It is called through a ``torch.library`` operator with a fake implementation.
So ``torch.compile`` passes through it, and the ``meta`` device counts it as one launch. A function
of ``algorithms`` chooses by the device of its tensor:

- on CUDA, with Triton (CUDA builds of torch bring it along): the operator, for problems that fit
  into one program;
- on ``meta``: the operator's fake implementation, for the same problems;
- on the CPU: compiled (numba) code or torch; under ``torch.compile`` the operator, which calls that
  code;
- otherwise: plain torch.

The backward pass is an operator as well; behind it is a twin in plain torch for second derivatives.
Plain torch is also taken for larger problems, without Triton, and under ``torch.func``.

| file | results of one launch | largest problem |
|---|---|---|
| ``matrix_tree``, ``kruskal``, ``chu_liu_edmonds`` | log-partition, marginals, samples, trees, traces | 128 nodes |
| ``counted_bits`` | log-partition and marginals, their derivative, samples, maxima | 2,047 ones |
| ``assignment`` | best matching with its dual variables; greedy matching | 1,024 rows; 128 rows |
| ``capped_simplex`` | projections and their Jacobian; the multiplier of binary entropy | 16,384 parts |
| ``sinkhorn`` | all iterations of an example until it has converged; shortest paths for the start | 64 rows |
| ``plackett_luce`` | total rates that are left at every step of a trace, their derivative | 16,384 parts |
| ``tasks/bit_vector_vae/likelihood`` | losses of all pixels; all gradients of logits' map and features | 1,024 levels |

Sequential steps remain in plain torch on every device but the CPU for the active set and for the
dynamic programs of ``hypergraph``; chains are a ``scan``.

Triton is looked for where torch is built for a GPU or ``TRITON_INTERPRET`` is set, because it takes
long to import. With ``TRITON_INTERPRET=1`` its interpreter runs the kernels on CPU tensors. The
tests do that, and they also compile the kernels for compute capability 9.0 (``tests/kernels.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from structgrad.algorithms.eager import on_host, transformed

__all__ = [
    "DEVICES",
    "block",
    "column",
    "constant",
    "entry",
    "jit",
    "launch",
    "launches",
    "like_first",
    "log_sum_exp",
    "row",
    "save_all",
    "save_inputs",
    "takes",
    "tl",
    "triton",
    "warps",
]

triton: Any = None
if TYPE_CHECKING:
    import triton.language as tl
elif torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        tl = None
else:
    tl = None

#: Types of devices whose tensors go to the operators.
DEVICES = {"cuda", "meta"}

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """``triton.jit``. Without Triton it returns the function as it is, and nobody calls it."""
    return function if triton is None else triton.jit(function)  # type: ignore[no-any-return]


def constant(value: float) -> Any:
    """A number that kernels may read from their module."""
    return value if triton is None else tl.constexpr(value)


def takes(tensor: Tensor, size: int, largest: int, *, on_cpu: bool = False) -> bool:
    """Whether ``tensor`` should go to the operator.

    Args:
        tensor: any of the operands.
        size: the size of each example's problem.
        largest: the largest size for one program.
        on_cpu: whether the operator also has the CPU's compiled code, which ``torch.compile``
            cannot call in another way.
    """
    if torch.compiler.is_compiling():
        if on_cpu and on_host(tensor):
            return True
    elif transformed(tensor):
        return False  # operators have no rules for torch.func, plain torch does
    kind = tensor.device.type
    return kind in DEVICES and (triton is not None or kind == "meta") and size <= largest


def launches(tensor: Tensor) -> bool:
    """For an operator: whether its kernel is launched. If not, the CPU's compiled code is called."""
    return tensor.device.type in DEVICES


def block(size: int) -> int:
    """The least power of two that is at least ``size`` and at least 16: the length of a block."""
    return 1 << max(size - 1, 15).bit_length()


def warps(elements: int) -> int:
    """The number of warps of a program that works on blocks of so many elements (a power of two)."""
    return min(16, max(1, elements // 512))


def launch(kernel: Any, programs: int, *arguments: Tensor | float, warps: int, **constants: int) -> None:
    """Run ``kernel`` on the device of its first argument.

    Args:
        kernel: decorated by :func:`jit`.
        programs: the number of programs; with 0 nothing is done.
        arguments: outputs must be contiguous; inputs are made contiguous.
        warps: the number of warps (of 32 threads) of each program.
        constants: values known when the kernel is compiled.
    """
    if not programs:
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):
        contiguous = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        kernel[(programs,)](*contiguous, num_warps=warps, **constants)


# --- operators --------------------------------------------------------------------------------------------------------


def like_first(first: Tensor, *others: Any) -> Tensor:
    """The fake implementation of an operator whose result has the shape and type of its first
    operand.
    """
    return first.new_empty(first.shape)


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    """The ``setup_context`` of an operator of tensors: save its inputs."""
    ctx.save_for_backward(*inputs)


def save_all(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """The same, but save the inputs and the result."""
    ctx.save_for_backward(*inputs, output)


# --- within kernels ---------------------------------------------------------------------------------------------------


@jit
def row(x: tl.tensor, i: tl.tensor) -> tl.tensor:
    """``x[i]`` of a block ``[rows, columns]``."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == i, x, 0), 0)


@jit
def column(x: tl.tensor, i: tl.tensor) -> tl.tensor:
    """``x[:, i]`` of a block ``[rows, columns]``."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == i, x, 0), 1)


@jit
def entry(x: tl.tensor, i: tl.tensor) -> tl.tensor:
    """``x[i]`` of a vector."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == i, x, 0), 0)


@jit
def log_sum_exp(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Log-sum-exp over one axis of finite numbers."""
    top = tl.max(x, axis)
    return top + tl.log(tl.sum(tl.exp(x - tl.expand_dims(top, axis)), axis))
