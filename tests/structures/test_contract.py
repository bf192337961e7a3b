"""The contract of structures over the registry of cases: a new structure is tested as soon as it has a case.

A structure with more to test has a file here, which runs the contract itself, over sizes of its own.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from torch import Tensor

from structgrad.diagnose import Problem
from structgrad.structures import Labelled, Structure
from structgrad.testing import Case, StructureContract
from tests.cases import CASES, MORE


def elsewhere() -> set[type[Structure]]:
    """The structures over which a contract in another file of this folder runs."""
    found: set[type[Structure]] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        if path.name == Path(__file__).name:
            continue
        for contract in vars(importlib.import_module(f"tests.structures.{path.stem}")).values():
            if isinstance(contract, type) and issubclass(contract, StructureContract):
                found |= {type(case.plain) for case in getattr(contract, "cases", [])}
    return found


class RegisteredContract(StructureContract):
    __test__ = False

    @pytest.fixture(autouse=True)
    def _with_what_is_labelled(self) -> None:
        """Labels add no kernel: those are tested with the structure that is labelled, in a hundredth of the time."""
        if self.path == "kernels" and isinstance(self.cases[0].plain, Labelled):
            pytest.skip("kernels are tested with the structure that is labelled")

    def vertices(self, case: Case, mask: Tensor) -> Tensor:
        """Those that the structure lists or finds under the mask; as many as its log-partition counts."""
        return Problem.make(case.plain, case.shape, 1, mask[None]).vertices(0)


ELSEWHERE = elsewhere()
for name, case in CASES.items():
    if type(case.plain) not in ELSEWHERE:
        contract = {"cases": [case, *MORE.get(name, [])], "__test__": True}
        globals()[f"Test_{name}"] = type(f"Test_{name}", (RegisteredContract,), contract)
