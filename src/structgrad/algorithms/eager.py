"""Helpers for eager mode on the CPU, where code may read values, raise errors about them and call
compiled kernels.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from structgrad.common.private import is_batched_gradient, is_functorch_tensor

#: Types of devices whose tensors compiled (numba) code accepts and whose values may be read. Tests
#: remove the CPU from it, see :func:`structgrad.testing.computing`.
HOSTS = {"cpu"}


def on_host(tensor: Tensor) -> bool:
    """Whether compiled (numba) code can read ``tensor``."""
    return tensor.device.type in HOSTS


def transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to ``torch.func`` or ``is_grads_batched``, so that its memory does
    not hold its values.
    """
    if torch.compiler.is_compiling():
        return False
    return is_functorch_tensor(tensor) or is_batched_gradient(tensor)


def values_can_be_read(*tensors: Tensor | None) -> bool:
    """Whether it is free to read the values of all these tensors.

    It is free in eager CPU code, outside ``torch.func`` transforms and ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return False
    return all(t is None or (on_host(t) and not transformed(t)) for t in tensors)


def magnitude(values: Tensor) -> float:
    """The largest absolute value, 0 of an empty tensor and NaN if one is NaN; reading it must be free.

    One pass, some ten times as fast as ``isfinite``.
    """
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())
    return max(-float(low), float(high))


def refuse(bad: Tensor, what: str) -> None:
    """Raise ``ValueError`` with the first example where ``bad`` ``[*batch]`` holds, if reading
    values is free.
    """
    if values_can_be_read(bad) and bool(bad.any()):
        raise ValueError(f"example {bad.nonzero()[0].tolist()} {what}")


class StoppedEarly(UserWarning):
    """An iterative oracle stopped before its solution. A process reports this once for each oracle."""


#: Oracles that have reported it.
_STOPPED: set[str] = set()


def has_warned(oracle: str) -> bool:
    """Whether :func:`warn_stopped` has already warned about this oracle."""
    return oracle in _STOPPED


def warn_stopped(error: Tensor, tolerance: float, oracle: str, what: str) -> None:
    """Warn, if reading values is free, that a result is further from the solution than its
    tolerance.

    Args:
        error: the distance, any shape; NaN counts as far.
        tolerance: the largest distance that is allowed.
        oracle: the oracle's name; there is one warning for each name.
        what: the name of the figure, for the message "<oracle> stopped early: <what> <error>".
    """
    if has_warned(oracle) or not error.numel() or not values_can_be_read(error):
        return
    worst = float(error.detach().max())
    if not worst <= tolerance:
        _STOPPED.add(oracle)
        warnings.warn(
            f"{oracle} stopped early: {what} {worst:.2g}, instead of {tolerance:.2g}; raise max_iterations or "
            "the temperature (this warning is shown once)",
            StoppedEarly,
            stacklevel=4,
        )
