"""Ranges of options, checked by the constructors that read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is not among the choices.

    Args:
        name: name of the option.
        value: value of the option.
        choices: all possible values, for instance ``get_args`` of a ``Literal``.

    Raises:
        ValueError: with the choices.
    """
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Refuse a value that is not a positive, finite number.

    Args:
        name: name of the option.
        value: value of the option.

    Raises:
        TypeError: if it is not a number, for instance a tensor.
        ValueError: for 0, negative numbers, infinity and NaN.
    """
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")


def check_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse a number outside of its range, and NaN.

    Args:
        name: name of the option.
        value: value of the option.
        least: the smallest allowed value.
        above: the value must exceed this.
        most: the largest allowed value.
        below: the value must stay below this.

    Raises:
        ValueError: with the range.
    """
    bounds = [
        (least, "at least", lambda bound: value >= bound),
        (above, "greater than", lambda bound: value > bound),
        (most, "at most", lambda bound: value <= bound),
        (below, "less than", lambda bound: value < bound),
    ]
    if not all(holds(bound) for bound, _, holds in bounds if bound is not None):
        wanted = " and ".join(f"{words} {bound:g}" for bound, words, _ in bounds if bound is not None)
        raise ValueError(f"{name} must be {wanted}; got {value}")


def check_count(name: str, value: int, *, least: int = 1, most: int | None = None) -> None:
    """Refuse a value that is not a whole number within a range.

    Args:
        name: name of the option.
        value: value of the option; NumPy's integers are whole numbers, True and 2.0 are not.
        least: the smallest allowed value.
        most: the largest allowed value.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: with the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number; got {value!r}")
    check_range(name, value, least=least, most=most)
