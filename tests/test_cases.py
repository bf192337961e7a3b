"""The registry of cases has every structure that a configuration builds."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import OmegaConf

from tests.cases import CASES


def test_every_structure_has_a_case(root: Path) -> None:
    files = sorted((root / "configs" / "structure").glob("*.yaml"))
    structures = [hydra.utils.instantiate(OmegaConf.load(file).structure) for file in files]
    kinds = {type(structure) for structure in structures if structure.is_latent}
    assert all(len(case.mask) == 2 for case in CASES.values()), "a case has one mask, that of its second example"
    assert kinds <= {type(case.plain) for case in CASES.values()}
