"""Compiled (numba, CPU) kernels on several threads: the examples of a batch are dealt out to them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from structgrad.common.private import untraced

#: Fewer elementary operations than this are done before a second thread has started.
_WORTH_A_THREAD = 200_000

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked child has the pool, but not its threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


@untraced
def run(kernel: Any, operations: int, *tensors: Any) -> None:
    """Call ``kernel(first, stride, *arrays)`` on as many threads as torch uses, one share of the examples each.

    Kernels release the interpreter lock. Plain threads, not numba's own: they share no state with torch's OpenMP and
    may be used from any thread and after a fork.

    Args:
        kernel: compiled with ``nogil``; does the examples ``first``, ``first + stride`` and so on, where
            ``first < stride <= torch.get_num_threads()``.
        operations: roughly how many elementary operations there are altogether.
        tensors: the other arguments, tensors on the CPU (contiguous) or numbers.
    """
    global _pool
    arguments = [t.detach().numpy() if isinstance(t, torch.Tensor) else t for t in tensors]
    shares = min(torch.get_num_threads(), 1 + operations // _WORTH_A_THREAD)
    if shares == 1:
        kernel(0, 1, *arguments)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="structgrad")
    others = [_pool.submit(kernel, share, shares, *arguments) for share in range(1, shares)]
    kernel(0, shares, *arguments)
    for other in others:
        other.result()
