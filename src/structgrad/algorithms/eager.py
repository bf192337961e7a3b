"""What code may do in eager mode on the CPU only: look at values, raise about them, hand them to compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from structgrad.common.private import is_functorch_tensor

#: Types of devices whose tensors compiled (numba) code takes and whose values may be looked at. Tests take the CPU
#: away, see :func:`structgrad.testing.computing`.
HOSTS = {"cpu"}


def on_host(tensor: Tensor) -> bool:
    """Whether ``tensor`` is where compiled (numba) code can take it."""
    return tensor.device.type in HOSTS


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether looking at the values of ``tensor`` is free: eager CPU code, outside ``vmap`` and ``torch.compile``."""
    if torch.compiler.is_compiling() or not on_host(tensor):
        return False
    return not is_functorch_tensor(tensor)


def refuse(bad: Tensor, what: str) -> None:
    """Raise ``ValueError`` naming the first example for which ``bad`` ``[*batch]`` holds, where looking is free."""
    if values_can_be_read(bad) and bool(bad.any()):
        raise ValueError(f"example {bad.nonzero()[0].tolist()} {what}")


def refuse_transforms(scores: Tensor, name: str) -> None:
    """Compiled code cannot look into the tensors of ``torch.func``.

    Raises:
        NotImplementedError: for a tensor on the CPU under ``torch.func.vmap``, ``grad`` and so on.
    """
    if torch.compiler.is_compiling() or not on_host(scores):
        return
    if is_functorch_tensor(scores):
        raise NotImplementedError(
            f"{name} does not run under torch.func transforms (vmap, grad) on the CPU; it takes leading batch "
            "dimensions, and torch.autograd gives its gradients"
        )
