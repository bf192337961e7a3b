"""Run compiled (numba, CPU) kernels on several threads, which share the examples of a batch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from structgrad.common.private import untraced

#: A kernel with fewer elementary operations ends before a second thread has started.
_WORTH_A_THREAD = 200_000

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked child inherits the pool but not its threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


@untraced
def run(kernel: Any, operations: int, *tensors: Any) -> None:
    """Call ``kernel(first, stride, *arrays)`` on as many threads as torch uses, each with its share
    of the examples.

    Kernels release the interpreter lock. The threads are plain threads, not numba's own. They share
    no state with torch's OpenMP, and they work from any thread and after a fork.

    Args:
        kernel: compiled with ``nogil``; does the examples ``first``, ``first + stride`` and so on,
            where ``first < stride <= torch.get_num_threads()``.
        operations: the approximate number of elementary operations in all.
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
