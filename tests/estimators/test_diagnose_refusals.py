"""Command lines for ``diagnose`` that cannot work: one line each, before anything is measured."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from structgrad.commands import diagnose

T = "structure=spanning_tree estimator=sst"

#: Arguments, and the end of the line that refuses them, or what it says on the way there.
WRONG: list[tuple[str, str]] = [
    # --- which ---
    ("structure=spanning_tree", "type e.g. estimator=sst\n"),
    ("estimator=sst", "type e.g. structure=spanning_tree\n"),
    ("n=4", "type e.g. structure=spanning_tree\n"),
    ("structure=spaning_tree estimator=sst", "nearest: spanning_tree, "),
    ("structure=spanning_tree estimator=ssst", "nearest: sst, "),
    ("structure= estimator=sst", "type e.g. structure=spanning_tree\n"),
    ("structure=spanning_tree,arborescence estimator=sst", "one at a time; type e.g. structure=spanning_tree\n"),
    ("structure=spanning_tree estimator=sst,imle", "one at a time; type e.g. estimator=sst\n"),
    ("structure=spanning_tree estimator=straight_through", "is now called identity_st\n"),
    ("structure=none estimator=sst", "type e.g. structure=spanning_tree estimator=sst\n"),
    ("structure=ground_truth estimator=sst", "type e.g. structure=spanning_tree estimator=sst\n"),
    ("structure=spanning_tree estimator=none", "type e.g. structure=spanning_tree estimator=sst\n"),
    ("structure=spanning_tree estimator=disarm", "needs independent bits (Subset); got SpanningTree\n"),
    (f"{T} estimator.relaxation=sinkhorn", "it has exp_family, euclidean\n"),
    ("structure._target_=os.system estimator=sst", "structure.command is missing\n"),
    ("structure._target_=nowhere.X estimator=sst", "No module named 'nowhere'"),
    ("structure._target_=structgrad.estimators.SST estimator=sst", "structure"),
    ("structure=spanning_tree estimator._target_=structgrad.estimators.Relax", "structgrad.estimators.RELAX"),
    (
        "structure=spanning_tree estimator._target_=structgrad.structures.OneHot",
        "takes no structure; see --help for the choices\n",
    ),
    # --- options of the two ---
    (f"{T} estimator.temprature=3", "nearest: temperature, "),
    (f"{T} +estimator.temprature=3", "nearest: temperature, "),
    (f"{T} estimator.temperature=-3", "must be positive and finite; got -3"),
    (f"{T} estimator.temperature=hot", "must be a finite number or "),
    (f"{T} estimator.utility=gumbl", "gumbel"),
    ("structure=k_subset estimator=sst structure.k=x", "must be a whole number; got 'x'"),
    ("structure=k_subset estimator=sst structure.k=100", "have fewer"),
    ("structure=k_subset estimator=sst structure.kk=2", "nearest: k, "),
    ("structure=spanning_tree estimator=marginal estimator.k=3", "nearest: "),
    # --- options of the command ---
    *(
        (f"{T} {key}={value}", f"got {shown}; type e.g. {key}={default}\n")
        for key, value, shown, default in (
            ("n", "0", "0", 4),
            ("n", "x", "x", 4),
            ("n", "2.5", "2.5", 4),
            ("n", "", "None", 4),
            ("batch", "0", "0", 2),
            ("batch", "true", "True", 2),
            ("samples", "3", "3", 2000),
            ("samples", "1e4", "10000.0", 2000),
            ("seed", "-1", "-1", 0),
            ("scale", "-1", "-1", 1),
            ("scale", "big", "big", 1),
            ("scale", ".inf", "inf", 1),
            ("out", "x.txt", "x.txt", "diagnosis.png"),
            ("out", "", "None", "diagnosis.png"),
        )
    ),
    (f"{T} out=/nowhere/x.png", "cannot be written; type e.g. out=diagnosis.png\n"),
    (f"{T} values=3", "type e.g. values=[0.1,1]\n"),
    (f"{T} values=[a]", "type e.g. values=[0.1,1]\n"),
    (f"{T} values=[]", "type e.g. values=[0.1,1]\n"),
    (f"{T} values=[0.1,1", "a bracket or a quote is not closed; type e.g. values=[0.1,1]\n"),
    (f"{T} values=[1,-1]", "must be positive and finite; got -1"),
    (f"{T} over=temprature", "nearest: temperature, "),
    (f"{T} over=temprature values=[1]", "nearest: temperature, "),
    (f"{T} over=", "type e.g. over=temperature, or over=none\n"),
    (f"{T} over=n_samples values=[a]", "type e.g. values=[0.1,1]\n"),
    (f"{T} truth=gibs", "type truth=auto, gibbs, trace or one of these\n"),
    (f"{T} task=listops", "no such option; nearest: "),
    (f"{T} sample=50", "no such option; nearest: samples, "),
    (f"{T} N=4", "no such option; nearest: n, "),
    (f"{T} n=4 n=5", "n is given twice; type it once\n"),
    (f"{T} estimator=nvil", "estimator is given twice; type it once\n"),
    (f"{T} foo", "expected key=value; type --help for the options\n"),
    (f"{T} --cfg", "expected key=value; type --help for the options\n"),
    (f"{T} hydra.searchpath=[pkg://nowhere]", "no package nowhere for pkg://nowhere; is it on PYTHONPATH?\n"),
    ("structure=k_subset estimator=sst n=40", "type a smaller n, e.g. n=4\n"),
]


@pytest.mark.parametrize(("given", "end"), WRONG, ids=[given for given, _ in WRONG])
def test_it_is_refused_in_one_line(
    given: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    assert diagnose.main(shlex.split(given)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(end) if end.endswith("\n") else end in printed.err
    assert not list(tmp_path.iterdir())
