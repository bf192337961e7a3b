"""Settings of the process for the speed of a CPU training step, and for what the user is told about
it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_GIB = 1 << 30


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel after every tensor.

    By default glibc serves every block over 128 KiB (growing to 32 MiB) by a fresh ``mmap``, and
    unmaps it on ``free``. A training step allocates and frees the same few hundred tensors again
    and again, so it spends its time in page faults. This function forbids ``mmap`` for blocks, of
    any size, and sets the trim threshold to 1 GiB for the whole process. Resident memory stays near
    the peak. A program that only makes and frees one large tensor takes eight times its memory: the
    first eight do not fit where the others were. The commands call it first; library users may.

    Returns:
        True if it took effect; False with a C library without ``mallopt`` (macOS, musl), where
            nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    took = libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _GIB)
    return bool(took)


@functools.cache  # one listener a process, however often a command is called in it
def announce_compilation() -> None:
    """Print once, on the error output, that kernels are being compiled, at the first time on a
    machine.

    Numba's cache keeps them on disk, so the next process does not wait.
    """
    from numba.core import event

    class Announcer(event.Listener):  # type: ignore[misc, unused-ignore]
        said = False

        def on_start(self, event: event.Event) -> None:
            if not self.said:
                print("compiling kernels for this machine, once; this takes some seconds", file=sys.stderr, flush=True)
            self.said = True

        def on_end(self, event: event.Event) -> None:
            """Prints nothing."""

    event.register("numba:compile", Announcer())
