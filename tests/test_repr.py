"""The ``repr`` of structures and estimators."""

from __future__ import annotations

from structgrad.common.text import options
from structgrad.estimators import SST, Marginalize, SumAndSample
from structgrad.estimators.utilities import Gumbel
from structgrad.structures import Arborescence, KSubset, Matching, OneHot


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


def test_only_what_is_kept_under_its_name_is_an_option() -> None:
    class Thing:
        def __init__(self, kept: int, renamed: int, *rest: int, **more: int) -> None:
            self.kept = kept
            self.other = renamed

    assert options(Thing(1, 2)) == "kept=1"
    assert options(Thing(1, 2), without=["kept"]) == ""
