"""Matrix products of bfloat16 numbers on a CPU, and these numbers in compiled (numba) kernels.

numba does not know bfloat16, so kernels see the 16 bits as a whole number. An entry that was read
goes through :func:`widen`, which makes it a float32. A number to be written goes through
:func:`narrow`, which makes it the array's type. Arrays of other types pass through both unchanged,
so one kernel serves all types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.algorithms.compiled import overload
from structgrad.common.private import has_bfloat16_units


def products_in(tensor: Tensor) -> torch.dtype:
    """The type of the factors of matrix products in our own kernels.

    It is the type of ``tensor``, with one exception. On a CPU with bfloat16 units, float32 becomes
    bfloat16 if torch's precision of matrix products is ``medium``. In a program that torch compiles,
    torch alone decides.
    """
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor.dtype
    lower = torch.get_float32_matmul_precision() == "medium" and has_bfloat16_units()
    return torch.bfloat16 if lower else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` ``[..., out]``, whose product has the type of :func:`products_in`.

    If that is bfloat16, the factors and the result of the product are rounded, forward and
    backward. The bias is added in the type of ``x``. Torch multiplies float32 numbers of a layer in
    bfloat16 only on processors with AMX.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
    """
    dtype = products_in(x)
    if dtype == x.dtype:
        return F.linear(x, weight, bias)
    rounded = F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
    return rounded if bias is None else rounded + bias


def as_array(tensor: Tensor) -> Any:
    """The tensor as an array for a kernel, in the same memory."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def widen(entry: Any) -> Any:
    """An entry of an array, as a number to compute with; in kernels only."""
    raise NotImplementedError


def narrow(value: Any, array: Any) -> Any:
    """A number as an entry of ``array``, rounded to the nearest, ties to even; in kernels only."""
    raise NotImplementedError


@overload(widen, strict=False)
def _widen(entry: Any) -> Callable[[Any], Any]:
    from numba import types  # there when this is called

    if entry == types.uint16:
        return lambda entry: np.uint32(np.uint32(entry) << np.uint32(16)).view(np.float32)
    return lambda entry: entry


@overload(narrow, strict=False)
def _narrow(value: Any, array: Any) -> Callable[[Any, Any], Any]:
    from numba import types

    if array.dtype != types.uint16:
        return lambda value, array: value

    def rounded(value: Any, array: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        nearest = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(0x7FC0) if value != value else nearest

    return rounded
