"""Elementary functions of float32 numbers for compiled (numba) kernels on a CPU.

They call no library, so that loops over them are vectorised, which makes them some ten times as
fast. The constants are those of Moshier's Cephes library. A kernel that uses them is compiled with
``error_model="numpy"``, because a loop that may raise an error is not vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from structgrad.algorithms.compiled import FAST, njit

_0, _HALF, _1, _2 = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_E0, _E1, _E2 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_E3, _E4, _E5 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_T0, _T1, _T2 = np.float32(-3.33332819422e-1), np.float32(1.33314422036e-1), np.float32(-5.37397155531e-2)
_T3, _T4 = np.float32(2.06390887954e-2), np.float32(-5.70498872745e-3)
_LARGE, _SMALL, _BIAS = np.float32(87), np.float32(0.625), np.int32(127)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _exp(x: Any) -> Any:
    """The exponential, to a few units in the last place.

    Beyond +-87 it is that of +-87, so it is finite and not 0; that of NaN is arbitrary.
    """
    x = x if x > -_LARGE else -_LARGE  # or if it is NaN: a whole number is made of it
    x = x if x < _LARGE else _LARGE
    scaled = x * _LOG2_E
    power = np.int32(scaled + (_HALF if scaled > _0 else -_HALF))
    rest = np.float32(power)
    x = x - rest * _LN_2_HIGH - rest * _LN_2_LOW
    series = ((((_E5 * x + _E4) * x + _E3) * x + _E2) * x + _E1) * x + _E0
    return (series * x * x + x + _1) * np.int32((power + _BIAS) << 23).view(np.float32)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``; at least 1e-38."""
    return _1 / (_1 + _exp(-x)) if x == x else x


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    square = x * x
    near = ((((_T4 * square + _T3) * square + _T2) * square + _T1) * square + _T0) * square * x + x
    size = abs(x)
    far = _1 - _2 / (_exp(_2 * size) + _1)
    value = near if size < _SMALL else (far if x > _0 else -far)
    return value if x == x else x
