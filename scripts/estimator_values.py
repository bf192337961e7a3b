"""Writes tests/estimators/values.json: the results of every estimator configuration from fixed
seeds.

A change that keeps behaviour must keep these numbers, and `tests/estimators/test_values.py`
compares them. Write them anew only if results are meant to change, and say so in the commit.

python scripts/estimator_values.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hydra
import torch

from structgrad.diagnose import Problem
from structgrad.structures import Structure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.cases import CASES  # noqa: E402

CONFIGS = ROOT / "configs"
STORED = ROOT / "tests" / "estimators" / "values.json"
STEPS = 2
FEATURES = 3


#: One case of every kind that some estimator treats in its own way, and its size here.
SIZES = {
    "one_hot": 4,
    "subset": 4,
    "undirected_edges": 3,
    "k_subset": 4,
    "spanning_tree": 4,
    "arborescence": 3,
    "matching": 3,
    "linear_chain": 3,
    "binary_tree": 3,
}


def structures() -> dict[str, tuple[Structure, tuple[int, ...]]]:
    """The structures of these cases, and the shapes of their scores."""
    found = {name: CASES[name].plain for name in SIZES}
    return {name: (structure, structure.shape(SIZES[name])) for name, structure in found.items()}


def presets() -> list[str]:
    """The names of the estimator configurations."""
    return sorted(path.stem for path in (CONFIGS / "estimator").glob("*.yaml") if path.stem != "none")


def compute(preset: str) -> dict[str, list[list[float]]]:
    """Structure -> two steps of training and an evaluation, for all structures that the preset
    accepts.

    Per step: the objective, the gradients for scores and decoder along a fixed direction, and the
    KL (0 for none).
    """
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = [f"+estimator={preset}", f"+context_size={FEATURES}", "+task.size=4"]
        config = hydra.compose(overrides=overrides).estimator
    out = {}
    for name, (structure, shape) in structures().items():
        torch.manual_seed(0)
        try:
            estimator = hydra.utils.instantiate(config, structure=structure).double()
        except hydra.errors.InstantiationException as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            continue
        problem = Problem.make(structure, shape, features=FEATURES)
        steps = []
        for step in range(STEPS + 1):
            estimator.train(step < STEPS)
            estimate = estimator(problem.scores, problem.decoder, mask=problem.mask, context=problem.context)
            gradient = problem.gradient(estimate.surrogate.sum())
            # Along a direction with a different weight for every coordinate.
            weighed = gradient * torch.arange(1, len(gradient) + 1).double().cos()
            to_scores, to_decoder = weighed[problem.is_score].sum(), weighed[~problem.is_score].sum()
            kl = 0.0 if estimate.divergence is None else estimate.kl.sum().item()
            steps.append([estimate.objective.sum().item(), to_scores.item(), to_decoder.item(), kl])
        out[name] = steps
    return out


def rounded(value: Any) -> Any:
    """Numbers to nine digits, so that the file does not change with the processor."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return value


if __name__ == "__main__":
    stored = {preset: rounded(compute(preset)) for preset in presets()}
    lines = [
        f"{json.dumps(preset)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(steps)}" for name, steps in found.items())
        + "\n}"
        for preset, found in stored.items()
    ]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {STORED.relative_to(ROOT)}")
