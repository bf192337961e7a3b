"""The same command gives the same numbers: every configuration against the values that are stored beside this file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("estimator_values", ROOT / "scripts" / "estimator_values.py")
assert _SPEC is not None
assert _SPEC.loader is not None
values = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(values)
STORED = json.loads(values.STORED.read_text())


def test_every_configuration_is_stored() -> None:
    assert sorted(STORED) == values.presets(), "run: python scripts/estimator_values.py"


@pytest.mark.parametrize("preset", sorted(STORED))
def test_values_are_what_they_were(preset: str) -> None:
    """To rounding: other samples or seeds change the first digits."""
    found = values.compute(preset)
    assert found.keys() >= STORED[preset].keys(), f"refused now: {sorted(STORED[preset].keys() - found.keys())}"
    for structure, steps in STORED[preset].items():
        now, before = (torch.tensor(v, dtype=torch.float64) for v in (found[structure], steps))
        torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-6, msg=f"{preset}, {structure}: {now} != {before}")
