"""The ``repr`` of structures and estimators."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from pathlib import Path

import hydra
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from structgrad.common.text import Configured, options
from structgrad.estimators import SST, Marginalize, SumAndSample
from structgrad.estimators.base import Estimator
from structgrad.estimators.utilities import Gumbel
from structgrad.structures import Arborescence, BinaryTree, KSubset, Matching, OneHot, Structure, Subset


def test_options_are_shown() -> None:
    assert repr(Arborescence(root=1)) == "Arborescence(root=1, single_root=False)"
    assert repr(Matching(max_iterations=7)) == "Matching(tolerance=1e-06, max_iterations=7)"
    assert repr(KSubset(3)).startswith("KSubset(k=3")
    assert repr(Gumbel()) == "Gumbel()"
    assert repr(Marginalize(OneHot(), distribution="sparsemax")).startswith(
        "Marginalize(OneHot(), distribution='sparsemax'"
    )
    text = repr(SST(Arborescence(), temperature=0.5))
    assert text.startswith("SST(Arborescence(root=0, single_root=False), ")
    assert "utility=Gumbel()" in text
    assert "temperature=0.5" in text
    assert "(running): RunningMean()" in repr(SumAndSample(OneHot(), k=2))  # beside its modules
    assert "k=2" in repr(SumAndSample(OneHot(), k=2))


def test_an_option_has_its_present_value_or_the_given_one() -> None:
    class Thing(Configured):
        def __init__(self, kept: int, renamed: int, *rest: int, default: str = "a", **more: int) -> None:
            self.kept = kept + 1
            self.other = str(renamed)

    class Plain(Configured):
        pass

    assert options(Thing(1, 2)) == "kept=2, renamed=2, default='a'"
    assert options(Thing(1, 2, 3, default="b", more=4), without=["kept"]) == "renamed=2, default='b'"
    assert options(copy.deepcopy(Thing(1, renamed=2))) == "kept=2, renamed=2, default='a'"
    assert "renamed=..." in options(copy.deepcopy(Thing(1, (c for c in "ab"))))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="renamed"):
        Thing(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Plain\(\) takes no arguments"):
        Plain(3)


PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("file", [f for f in PRESETS if f.parent.name == "structure"], ids=lambda f: f.stem)
def test_every_structure_shows_the_options_of_its_preset(file: Path) -> None:
    config = OmegaConf.load(file).structure
    if config is None:
        return
    text = repr(instantiate(config))
    if "FactorGraph" in config._target_:  # made from other numbers; it counts what came of them
        assert all(f"{name}=" in text for name in ("max_iterations", "max_nodes", "listed"))
        return
    if "DagPath" in config._target_:
        assert text == "DagPath(5 edges, source=0, target=3)"
        return
    assert text.startswith(config._target_.rpartition(".")[2] + "(")
    for name in set(config) - {"_target_"}:
        assert f"{name}=" in text


def structure_for(config: DictConfig) -> tuple[Structure, Estimator]:
    """The first structure that an estimator takes, and both."""
    for structure in (OneHot(), Subset(), Arborescence(), BinaryTree(), KSubset(2)):
        with suppress(InstantiationException):
            return structure, instantiate(config, structure=structure)
    raise AssertionError("no structure is taken")


@pytest.mark.parametrize(
    "file", [f for f in PRESETS if f.parent.name == "estimator" and f.stem != "none"], ids=lambda f: f.stem
)
def test_every_estimator_shows_all_options(file: Path) -> None:
    with hydra.initialize_config_dir(str(file.parent.parent), version_base="1.3"):
        overrides = [f"+estimator={file.stem}", "+context_size=3", "+task.size=4"]
        config = hydra.compose(overrides=overrides).estimator
    structure, estimator = structure_for(config)
    text = repr(estimator)
    assert repr(structure) in text
    wanted = set(config) - {"_target_", "structure"} | set(inspect.signature(type(estimator)).parameters) - {
        "structure"
    }
    children = {name for name, _ in estimator.named_children()}
    assert not [name for name in sorted(wanted) if f"{name}=" not in text and name not in children]
