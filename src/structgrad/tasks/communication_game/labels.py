"""Pickled lists of labels, read without executing anything."""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

# A pickle acts through the functions and classes that it names. The names for a NumPy array get the
# stand-ins below, which only record their arguments. Every other name ends the reading.


class _Dtype:
    """Records the type of an array's elements."""

    def __init__(self, code: str = "", *others: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def list(self, content: Any, shape: Any) -> list[Any]:
        """The elements of an array of this type, from their form in the pickle."""
        if len(shape) != 1:
            raise pickle.UnpicklingError(f"it holds an array of shape {list(shape)}")
        if self.code in ("O", "O8") and isinstance(content, list):
            return content
        if not re.fullmatch(r"[SU][0-9]{1,5}|[iu][1248]", str(self.code)) or self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"it holds an array of type {self.code!r}")
        if isinstance(content, str):
            content = content.encode("latin1")
        dtype = np.dtype(f"{self.order}{self.code}")
        if not isinstance(content, bytes | bytearray) or len(content) != dtype.itemsize * math.prod(shape):
            raise pickle.UnpicklingError("it holds an array that is damaged")
        elements: list[Any] = np.frombuffer(content, dtype).tolist()
        return elements


class _Array:
    """Records the contents of an array."""

    content: list[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        self.content = dtype.list(content, shape)


def _from_buffer(content: Any, dtype: _Dtype, shape: Any, order: str) -> _Array:
    array = _Array()
    array.content = dtype.list(content, shape)
    return array


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return dtype.list(content, (1,))[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


_STAND_INS: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "multiarray._reconstruct": lambda kind, shape, code: _Array(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = re.sub(r"^numpy\._?core\.", "", module)
        if f"{known}.{name}" not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only lists, strings and numbers are read")
        return _STAND_INS[f"{known}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_labels(file: Path) -> list[str | int]:
    """A pickled list, tuple or NumPy array of strings or whole numbers, e.g.
    ``ours_images_single_sm0.objects``.

    Args:
        file: path of the file.

    Raises:
        ValueError: one line, if it is damaged or holds anything else. Nothing that it names is
            called.
    """
    try:
        content = _Plain(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no pickled list of labels: {reason}") from error
    except (OverflowError, MemoryError, SystemError) as error:  # impossible sizes and characters
        raise ValueError(f"{file} is no pickled list of labels: it is damaged ({type(error).__name__})") from error
    if isinstance(content, _Array):
        content = content.content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{file} is no list of labels: it holds one {type(content).__name__}")
    labels = [label.decode("latin1") if isinstance(label, bytes) else label for label in content]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"{file} is no list of labels: it holds a {type(label).__name__}")
    return labels
