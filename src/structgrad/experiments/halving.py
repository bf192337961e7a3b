"""Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter
tuning").

Trials run to a rung, a number of steps at which they pause. Of the trials that have reached a rung,
the best 1 / ``reduction`` continue to the next one, and the others stop. No trial waits for others:
the decision is among those that have reached the rung.

All trials of a sweep are known from its start. So a free worker begins a new trial first, and
continues one only if there is none to begin. In the paper trials never end, and the order is the
reverse. Nobody waits in either order. In ours fewer trials continue that would have stopped had all
results been known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def rungs(max_steps: int, every: int, trials: int, reduction: int) -> tuple[int, ...]:
    """Steps at which trials pause, ascending. The end of a run is no rung.

    They are ``max_steps / reduction^k``, rounded up to a validation, for all k that leave a trial
    for the end.

    Args:
        max_steps: number of steps of a whole run.
        every: steps between validations.
        trials: number of trials.
        reduction: one in this many trials continues.

    Returns:
        The steps; empty if there are too few trials or validations.
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
    """Round up to the next multiple."""
    return -(-number // unit) * unit


def promoted(
    reached: Sequence[Mapping[int, float]], resting: Mapping[int, int], reduction: int, idle: bool
) -> list[tuple[int, int]]:
    """Trials that continue now, each with the rung where it is; those at the highest rung come
    first.

    Args:
        reached: for each rung the trials that have reached it or gone further, with their value
            there (greater is better). The last entry is for finished trials.
        resting: trial -> rung (its index in ``reached``) of the trials that pause.
        reduction: one in this many trials continues.
        idle: whether no other trial can still reach a rung. Then one trial continues even if there
            are fewer than ``reduction``, so that a sweep does not end without a finished run.
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
