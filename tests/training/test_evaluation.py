"""``structgrad-evaluate``: a finished run on other data, what is written of it, and what a foreign folder may not do.

Every task is evaluated in ``test_devices.py``, where each has a run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from structgrad.commands.evaluate import main
from structgrad.experiments import comparison, overview
from structgrad.experiments.html import comparison_page
from structgrad.experiments.runs import load
from structgrad.structures import Alignment, Arborescence, BudgetSubset, Structure, Subset
from structgrad.tasks.base import Predictions
from structgrad.training.checkpoints import CheckedFiles
from structgrad.training.evaluation import Recorded, evaluate
from structgrad.training.run import run
from tests.training.in_process import composed, go, run_folder

#: Short enough for the model, and as the generator writes them.
PUBLISHED = "5\t( ( ( [MAX 2 ) 5 ) ] )\n7\t[MIN 9 [MAX 7 1 ] 8 ]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ListOps, also tested on the published file."""
    place = tmp_path_factory.mktemp("run")
    (place / "published-é.tsv").write_text(PUBLISHED)
    where = [f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"]
    given = ["task=listops", "budget=smoke", "trainer=cpu", "logger=csv", *where]
    run(*composed(*given, f"paths.test_file='{place / 'published-é.tsv'}'"))
    (found,) = (place / "runs" / "listops").iterdir()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Of the run, without its evaluations."""
    files = (file for file in folder.rglob("*") if file.is_file() and "evaluations" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_published_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, of a copy of the folder; metrics are those of ``train.py paths.test_file=...``."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = contents(copy)
    out = tmp_path / "said" / "published.jsonl"
    published = folder.parents[2] / "published-é.tsv"
    assert main([str(copy), f"paths.test_file='{published}'", f"out={out}", "trainer=cpu"]) == 0
    assert contents(copy) == before
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["example"] for row in rows] == [0, 1]
    assert [row["text"] for row in rows] == ["[MAX 2 5 ]", "[MIN 9 [MAX 7 1 ] 8 ]"]
    assert [row["target"] for row in rows] == [5, 7]
    for row in rows:
        tokens = row["text"].split()
        assert list(row) == ["example", "text", "prediction", "target", "vertex"]
        assert row["prediction"] in range(10)
        heads = torch.tensor(row["vertex"])  # without the padding of the batch
        assert heads.shape == (len(tokens),)
        assert heads.tolist() == Arborescence().read(Arborescence().write(heads)).tolist()
    stored = json.loads(out.with_suffix(".json").read_text())
    (trained,) = folder.glob("test-published-*.json")
    assert stored["metrics"] == json.loads(trained.read_text())["metrics"]
    accuracy = sum(row["prediction"] == row["target"] for row in rows) / 2
    assert stored["metrics"]["test/accuracy"] == accuracy
    assert (stored["split"], stored["examples"], stored["predictions"]) == ("test", 2, "published.jsonl")
    assert stored["run"] == json.loads((folder / "summary.json").read_text())["name"]
    assert f"predictions:  {out} (2 examples)" in capsys.readouterr().out


def test_own_files_and_the_validation_set(folder: Path, tmp_path: Path) -> None:
    for name, lines in {"train": PUBLISHED, "val": PUBLISHED * 2, "test": PUBLISHED}.items():
        (tmp_path / f"{name}.tsv").write_text(lines)
    sizes = {f"task.data.{name}": size for name, size in {"train": 2, "val": 4, "test": 2}.items()}
    ranges = {"task.data.length": [1, 50], "task.data.depth": [1, 5]}
    found = evaluate(folder, {"task.data.files": str(tmp_path), **sizes, **ranges}, split="val")
    assert found.examples == 4
    assert found.metrics.keys() >= {"val/accuracy", "val/precision"}
    assert found.predictions is not None
    assert found.predictions.parent == folder / "evaluations"
    table = pq.read_table(found.predictions).to_pydict()
    assert table["target"] == [5, 7, 5, 7]
    other = evaluate(folder)  # beside it
    assert other.predictions not in (None, found.predictions)
    assert (
        other.metrics["test/accuracy"] == json.loads((folder / "summary.json").read_text())["metrics"]["test/accuracy"]
    )


def test_another_option_of_the_model_is_recorded_beside_the_run_s_own(folder: Path) -> None:
    found = evaluate(folder, {"task.test_dropout": True})
    plain = evaluate(folder)
    assert found.file != plain.file
    assert found.file.name.startswith("test-")
    assert json.loads(found.file.read_text())["options"] == {"task.test_dropout": True}
    assert json.loads(plain.file.read_text())["options"] == {}


def test_another_precision_is_a_file_of_its_own(folder: Path) -> None:
    exact, plain = evaluate(folder, {"trainer.precision": "64-true"}), evaluate(folder)
    assert exact.file != plain.file
    assert json.loads(exact.file.read_text())["options"] == {"trainer.precision": "64-true"}
    assert evaluate(folder, {"trainer.accelerator": "cpu"}).file == plain.file


@pytest.mark.parametrize("structure", [Subset(), BudgetSubset(2), Alignment()])
def test_a_relaxed_vertex_is_read_as_the_nearest_one(structure: Structure) -> None:
    torch.manual_seed(0)
    every = structure.enumerate(*structure.shape(3)).float()
    recorded = Recorded(structure, required=False, task="any")
    for _ in range(20):
        vertex = torch.rand(every.shape[1:])
        nearest = every[(every - vertex).square().flatten(1).sum(1).argmin()]
        assert recorded._read(vertex) == structure.read(nearest).tolist()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_predictions_of_several_batches_are_written_in_their_order(form: str, tmp_path: Path) -> None:
    """Numbers go on, arrays keep their shape, and NaN is no value."""
    first = torch.arange(12, dtype=torch.bfloat16).reshape(2, 2, 3)
    batches = [
        Predictions(first, torch.tensor([0.5, torch.nan]), torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])),
        Predictions(first[:1] + 12, torch.tensor([0.25]), torch.tensor([[0.1, 0.9, 0.2, 0.4]])),
    ]
    recorded = Recorded(Subset(), required=True, task="any")
    for batch in batches:
        recorded(lambda batch=batch: batch)  # type: ignore[misc]
    file = tmp_path / "predictions"
    file.write_bytes(recorded.as_parquet() if form == "parquet" else recorded.as_lines())
    rows = pq.read_table(file).to_pylist() if form == "parquet" else list(map(json.loads, file.open()))
    assert [row["example"] for row in rows] == [0, 1, 2]
    assert [row["prediction"] for row in rows] == [[[k, k + 1, k + 2], [k + 3, k + 4, k + 5]] for k in (0, 6, 12)]
    assert [row["target"] for row in rows] == [0.5, None, 0.25]
    assert [row["vertex"] for row in rows] == [[0, 3], [2], [1]]


def test_other_reviews_are_read_with_the_words_of_the_training(tmp_path: Path) -> None:
    where = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", f"paths.data={tmp_path}"]
    (tmp_path / "reviews").mkdir()
    (tmp_path / "other").mkdir()
    trained = [{"text": f"the beer is {word}", "rating": rating} for word, rating in (("good", 0.9), ("bad", 0.1))]
    others = [{"text": "bad", "rating": 0.0, "spans": [[0, 1]]}, {"text": "good gose", "rating": 1.0}]
    for part in ("train", "dev", "test"):
        (tmp_path / "reviews" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, trained * 20)))
        (tmp_path / "other" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, others)))
    sizes = ["task.data.train=40", "task.data.val=40", "task.data.test=40", "task.data.words=8"]
    run(*composed("task=l2x", "data=json_reviews", "budget=smoke", "trainer=cpu", "logger=csv", *where, *sizes))
    (folder,) = (tmp_path / "runs" / "l2x").iterdir()
    out = tmp_path / "other.jsonl"
    assert main([str(folder), "data=json_reviews", "task.data.folder=other", "task.data.words=8", f"out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["bad", "good <unk>"]
    assert [row["target"] for row in rows] == [0, 1]
    assert all(len(row["vertex"]) == 3 for row in rows)


# --- what is refused -----------------------------------------------------------------------------------------------

#: Arguments, of which RUN is the run's folder, and words of the line.
WRONG: list[tuple[str, str]] = [
    ("split=test", "type the folder of one run; got 0"),
    ("RUN RUN", "type the folder of one run; got 2"),
    ("nowhere", "no such folder; type the folder of a finished run"),
    ("RUN/..", "has 1 finished runs; type the folder of one, e.g."),
    ("RUN/checkpoints", "is no folder of a run; type the folder of a finished run"),
    ("RUN split=train", "type split=val or split=test"),
    ("RUN split=", "type split=val or split=test"),
    ("RUN out=predictions.csv", "type a name that ends in .parquet or .jsonl"),
    ("RUN out=/proc/nowhere/x.jsonl", "type out=<file> elsewhere"),
    ("RUN spilt=val", "nearest: split"),
    ("RUN estimator.temperature=2", "an evaluation cannot set it"),
    ("RUN seed=3", "an evaluation cannot set it"),
    ("RUN trainer=cpuu", "nearest: cpu"),
    ("RUN trainer.max_steps=3", "an evaluation cannot set it"),
    ("RUN data=omniglot", "task.data must be a ListOpsData"),
    ("RUN data=omniglott", "no such choice; nearest: omniglot"),
    ("RUN task.data.lenght=[1,5]", "no such option; nearest: length"),
    ("RUN task.data.test=0", "data.train, val, test must be positive"),
    ("RUN task.data.files=/nowhere", "There is no /nowhere/train.tsv"),
    ("RUN task.hidden=7", "do not fit: size mismatch"),
    ("RUN task.hiden=7", "no such option; nearest: hidden"),
    ("RUN paths.test_file=/nowhere.tsv", "no file /nowhere.tsv"),
    ("RUN paths.tets_file=x", "no such path; nearest: test_file"),
    ("RUN split=val split=test", "is given twice; type it once"),
    ("RUN split=val,test", "type key=value"),
    ("RUN ~task.data", "type the folder of one run"),
    ("RUN task.hidden=(", "needs quotes within quotes"),
    ("RUN 'hydra.searchpath=[pkg://nowhere.configs]' data=omniglot", "no package nowhere"),
]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=[given for given, _ in WRONG])
def test_wrong_lines(folder: Path, capsys: pytest.CaptureFixture[str], given: str, words: str) -> None:
    before = contents(folder)
    arguments = [part.replace("RUN", str(folder)).strip("'") for part in given.split()]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert contents(folder) == before


def test_an_unfinished_run_says_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "environment.json").write_text('{"command": "python train.py task=toy"}')
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("this run is not finished; type python train.py task=toy\n")


def test_a_task_without_predictions_has_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The task of the example package; its classes are built because the user names the package."""
    go(tmp_path)
    found = run_folder(tmp_path)
    assert main([str(found)]) == 1
    line = capsys.readouterr().err
    assert "_target_=mylab." in line
    assert line.endswith("type 'hydra.searchpath=[pkg://mylab]', which allows the classes of the package mylab\n")
    own = "hydra.searchpath=[pkg://mylab]"
    assert main([str(found), own]) == 0
    assert "this task makes none" in capsys.readouterr().out
    assert main([str(found), own, f"out={tmp_path / 'x.jsonl'}"]) == 1
    assert "makes no predictions; leave out= out" in capsys.readouterr().err
    (stored,) = (found / "evaluations").iterdir()
    summary = json.loads((found / "summary.json").read_text())
    assert json.loads(stored.read_text())["metrics"]["test/loss"] == summary["metrics"]["test/loss"]


# --- folders of somebody else -----------------------------------------------------------------------------------------

#: What a stored configuration might name, and where.
FOREIGN: list[Any] = [
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "torch.load",
    "torch.optim.adam.torch.load",
    "structgrad.commands.train.os.system",
    "structgrad.common.files.write_bytes",
    "structgrad.training.fit.pl.Trainer",
    "structgrad_evil.Task",
    ["os.system"],
    3,
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of ``os.system``."""
    called: list[Any] = []
    monkeypatch.setattr(os, "system", called.append)
    return called


@pytest.mark.parametrize("target", FOREIGN, ids=str)
@pytest.mark.parametrize(
    "where", [("task",), ("task", "data"), ("task", "extra"), ("structure",), ("estimator",)], ids=str
)
def test_a_foreign_class_is_not_built(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    calls: list[Any],
    target: Any,
    where: tuple[str, ...],
) -> None:
    for name in ("config.yaml", "summary.json"):
        shutil.copy(folder / name, tmp_path / name)
    summary = json.loads((tmp_path / "summary.json").read_text())
    node = summary["config"]
    for key in where[:-1]:
        node = node[key]
    node.setdefault(where[-1], {})
    node[where[-1]] |= {"_target_": target, "command": "touch evil"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{'.'.join(where)}._target_={target} is no class of structgrad, torch.optim" in error or (
        f"{'.'.join(where)}._target_: cannot import {target}" in error
    )
    assert not calls


def test_references_in_a_stored_configuration_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "summary.json"):
        shutil.copy(folder / name, tmp_path / name)
    text = (tmp_path / "summary.json").read_text()
    (tmp_path / "summary.json").write_text(text.replace('"<cache>"', '"${oc.env:HOME}"'))
    assert main([str(tmp_path)]) == 1
    assert "a stored configuration has no references" in capsys.readouterr().err


def test_a_run_goes_on_without_reading_its_stored_configuration(tmp_path: Path, calls: list[Any]) -> None:
    """It is composed anew, from the command."""
    go(tmp_path)
    found = run_folder(tmp_path)
    (found / "summary.json").unlink()
    (found / "config.yaml").write_text("task: {_target_: os.system, command: touch evil}\n")
    go(tmp_path)
    assert "os.system" not in (found / "config.yaml").read_text()
    assert not calls


def test_a_report_builds_nothing_and_its_pages_escape(folder: Path, tmp_path: Path, calls: list[Any]) -> None:
    """Names and hyper-parameters are text, whatever they are."""
    summary = json.loads((folder / "summary.json").read_text())
    evil = "<script>alert(1)</script>"
    for name, command in (("a", evil), ("b", f"{evil}{evil}")):
        summary |= {"name": f"listops-{name}{evil}", "estimator": f"<b>{name}", "seed": 0}
        summary["config"]["task"] = {"_target_": "os.system", "command": command}
        place = tmp_path / "listops" / name
        place.mkdir(parents=True)
        shutil.copy(folder / "config.yaml", place)
        (place / "summary.json").write_text(json.dumps(summary))
    blocks = comparison.compare(load(tmp_path), ["task._target_", "task.command", "estimator"], [], {})
    assert evil in comparison.text(blocks)
    for page in (comparison_page(blocks, [tmp_path]), overview.page(overview.states(tmp_path), tmp_path)):
        assert evil not in page
        assert "<b>a" not in page
    assert not calls


class Evil:
    """Pickled as a call."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil",)


def test_checkpoints_are_weights_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that calls something is refused where it is tested and where it is continued; its checksum is right."""
    from structgrad.training.errors import RunError

    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    best = copy / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    CheckedFiles().save_checkpoint(content | {"extra": Evil()}, best)
    assert main([str(copy)]) == 1
    assert "holds more than weights (UnpicklingError)" in capsys.readouterr().err
    go(tmp_path / "own")
    own = run_folder(tmp_path / "own")
    (own / "summary.json").unlink()
    last = own / "checkpoints" / "last.ckpt"
    CheckedFiles().save_checkpoint(torch.load(last, weights_only=True) | {"extra": Evil()}, last)
    with pytest.raises(RunError, match="holds more than weights"):
        go(tmp_path / "own")
    assert not (tmp_path / "evil").exists()
