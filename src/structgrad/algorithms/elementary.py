"""Elementary functions of float32 numbers for compiled (numba) kernels on a CPU.

They call no library, so that loops over them are vectorised, which makes them some ten times as
fast. The constants of the hyperbolic tangent are those of the Cephes library (Moshier 1989).
Kernels that divide are compiled with ``error_model="numpy"``, because a loop that may raise an
error is not vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from structgrad.algorithms.compiled import FAST, njit

_0, _1, _2 = np.float32(0), np.float32(1), np.float32(2)
_T0, _T1, _T2 = np.float32(-3.33332819422e-1), np.float32(1.33314422036e-1), np.float32(-5.37397155531e-2)
_T3, _T4 = np.float32(2.06390887954e-2), np.float32(-5.70498872745e-3)
_SMALL = np.float32(0.625)


# --- CPU kernels ------------------------------------------------------------------------------------------------------


@njit(inline="always")
def exp(x: np.float32) -> np.float32:
    """``exp(x)``; constant below -87 and above 87, arbitrary for NaN.

    ``2^k exp(r)`` with ``|r| <= ln(2) / 2`` and the Taylor polynomial of degree 7, whose remainder
    is below 6e-9.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(87.0))
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - k * np.float32(0.693145752)) - k * np.float32(1.42860677e-6)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    result: np.float32 = p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return result


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``; at least 1e-38."""
    return _1 / (_1 + exp(-x)) if x == x else x


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    square = x * x
    near = ((((_T4 * square + _T3) * square + _T2) * square + _T1) * square + _T0) * square * x + x
    size = abs(x)
    far = _1 - _2 / (exp(_2 * size) + _1)
    value = near if size < _SMALL else (far if x > _0 else -far)
    return value if x == x else x
