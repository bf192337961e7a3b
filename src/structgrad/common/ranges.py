"""Ranges of options, checked by the constructors that read them."""

from __future__ import annotations


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
        name: of the option.
        value: of the option.
        least: smallest value.
        above: what it must exceed.
        most: largest value.
        below: what it must stay below.

    Raises:
        ValueError: naming the range.
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
