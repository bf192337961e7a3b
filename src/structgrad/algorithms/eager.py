"""What code may do in eager mode on the CPU only: look at values, raise about them, hand them to compiled kernels."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from structgrad.common.private import is_batched_gradient, is_functorch_tensor

#: Types of devices whose tensors compiled (numba) code takes and whose values may be looked at. Tests take the CPU
#: away, see :func:`structgrad.testing.computing`.
HOSTS = {"cpu"}


def on_host(tensor: Tensor) -> bool:
    """Whether ``tensor`` is where compiled (numba) code can take it."""
    return tensor.device.type in HOSTS


def transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one of ``torch.func`` or of ``is_grads_batched``: its values are not in its memory."""
    if torch.compiler.is_compiling():
        return False
    return is_functorch_tensor(tensor) or is_batched_gradient(tensor)


def values_can_be_read(*tensors: Tensor | None) -> bool:
    """Whether looking at the values of all these is free: eager CPU code, outside ``torch.func`` transforms and
    ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return False
    return all(t is None or (on_host(t) and not transformed(t)) for t in tensors)


def refuse(bad: Tensor, what: str) -> None:
    """Raise ``ValueError`` naming the first example for which ``bad`` ``[*batch]`` holds, where looking is free."""
    if values_can_be_read(bad) and bool(bad.any()):
        raise ValueError(f"example {bad.nonzero()[0].tolist()} {what}")


class StoppedEarly(UserWarning):
    """An iterative oracle stopped before its solution; said once for each oracle of a process."""


#: Oracles that have said so.
_STOPPED: set[str] = set()


def has_warned(oracle: str) -> bool:
    """Whether :func:`warn_stopped` has nothing more to say of this one."""
    return oracle in _STOPPED


def warn_stopped(error: Tensor, tolerance: float, oracle: str, what: str) -> None:
    """Warn where looking is free, if a result is further from the solution than its tolerance.

    Args:
        error: how far, any shape; NaN is far.
        tolerance: how far it may be.
        oracle: its name; it warns once.
        what: the figure, for the message "<oracle> stopped early: <what> <error>".
    """
    if has_warned(oracle) or not error.numel() or not values_can_be_read(error):
        return
    worst = float(error.detach().max())
    if not worst <= tolerance:
        _STOPPED.add(oracle)
        warnings.warn(
            f"{oracle} stopped early: {what} {worst:.2g}, where {tolerance:.2g} was asked for; raise max_iterations or "
            "the temperature (this is said once)",
            StoppedEarly,
            stacklevel=4,
        )
