"""Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter tuning").

Trials run to a rung, a number of steps at which they pause. Of those that have got there, the best 1 / ``reduction``
go on to the next one; the rest rests. Nobody waits for others: who goes on is decided among those that are there.

All trials of a sweep are known from its start. A free worker therefore begins new ones first, and lets one go on only
if there is none to begin (the paper, whose trials never end, does it the other way round). Nobody waits in either
order, and here fewer trials go on that would not have, had all been known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def rungs(max_steps: int, every: int, trials: int, reduction: int) -> tuple[int, ...]:
    """Steps at which trials pause, ascending; the end of a run is no rung.

    They are ``max_steps / reduction^k``, rounded up to a validation, for as many k as leave a trial for the end.

    Args:
        max_steps: of a whole run.
        every: steps between validations.
        trials: how many there are.
        reduction: one in so many goes on.

    Returns:
        Empty if there are too few trials or validations.
    """
    depth = 0
    while reduction ** (depth + 1) <= trials:
        depth += 1
    steps: list[int] = []
    for k in range(depth, 0, -1):
        step = _up(_up(max_steps, reduction**k) // reduction**k, every)
        if step < max_steps and step not in steps:
            steps.append(step)
    return tuple(steps)


def _up(number: int, unit: int) -> int:
    """To the next multiple."""
    return -(-number // unit) * unit


def promoted(
    reached: Sequence[Mapping[int, float]], resting: Mapping[int, int], reduction: int, idle: bool
) -> list[tuple[int, int]]:
    """Trials that go on now, each with the rung that it is at; those at the highest rung first.

    Args:
        reached: for each rung the trials that have got there, and further, with their value there (greater is better);
            the last one is of those that are finished.
        resting: trial -> rung (its place in ``reached``) of those that rest.
        reduction: one in so many goes on.
        idle: whether no other trial may still come to a rung. Then one goes on even where there are fewer than
            ``reduction``, so that a sweep does not end without a finished run.
    """
    chosen = []
    for rung in reversed(range(len(reached) - 1)):
        values = reached[rung]
        quota = len(values) // reduction
        if idle and not reached[rung + 1]:
            quota = max(quota, 1)
        best = sorted(values, key=lambda trial: (-values[trial], trial))[:quota]
        chosen += [(trial, rung) for trial in best if resting.get(trial) == rung]
    return chosen
