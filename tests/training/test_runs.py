"""Guarantees of runs: identity, resume, named damage, and errors of one line that lose nothing.

The task is the one of ``examples/own_package``; runs share this process where they can.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from structgrad.commands.train import with_quoted_path
from structgrad.data import MissingDataError, cache
from structgrad.estimators import Estimator, Reinforce
from structgrad.structures import OneHot, SpanningTree
from structgrad.training import fit
from structgrad.training.callbacks import StopOnNonFiniteLoss
from structgrad.training.errors import ConfigurationError, NonFiniteLossError, RunError
from structgrad.training.folder import checkpoint_to_resume, held, is_sealed, seal
from structgrad.training.loggers import MetricsFile, WandbSteps
from structgrad.training.processes import is_first
from structgrad.training.run import Run, assemble, run
from tests.training.in_process import OWN, SHORT, composed, go, metrics, run_folder, summary

FAULTY = "task._target_=tests.training.faulty.Faulty"
SMOKE = ("task=listops", "budget=smoke", "trainer=cpu", "logger=csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    go(folder, "logger=default")
    return folder


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """A run of which only the summary is missing, elsewhere than where it was trained."""
    shutil.copytree(finished, tmp_path / "copy")
    (run_folder(tmp_path / "copy") / "summary.json").unlink()
    return tmp_path / "copy"


def test_the_commands_of_the_example_package_train(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "examples" / "own_package" / "README.md").read_text()
    commands = [line.split("#")[0] for line in readme.splitlines() if line.startswith("    python train.py")]
    assert len(commands) == 4
    for index, command in enumerate(commands):
        overrides = shlex.split(command)[2:]
        made = run(*composed(*overrides, "trainer=cpu", *SHORT, f"paths.runs={tmp_path / str(index)}"))
        assert made["metrics"]["test/overlap"] > 0


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    folder = run_folder(finished)
    assert folder.name.startswith("window-exact_sum-paper-s0-")
    for name in ("config.yaml", "environment.json", "metrics.csv", "summary.json", "tensorboard"):
        assert (folder / name).exists(), name
    for name in ("best", "last"):
        torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)  # without our help
        assert is_sealed(folder / "checkpoints" / f"{name}.ckpt")
    content = summary(finished)
    assert content["metrics"]["test/overlap"] > 0.4
    assert content["config"]["task"]["length"] == 10
    assert content["training_s"] > 0
    steps = [int(row[0]) for row in metrics(finished)[1:] if row[1] == "val/loss"]
    assert len(steps) == 3


def test_a_finished_run_says_so_and_is_not_repeated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(finished)
    # Where a run is kept and how it is logged do not decide its result.
    assert go(finished, "trainer=auto", f"paths.data={finished}") == summary(finished)
    assert str(run_folder(finished)) in capsys.readouterr().out
    assert metrics(finished) == before


def test_a_finished_run_leaves_its_summary_in_another_folder_of_results(finished: Path, tmp_path: Path) -> None:
    go(finished, f"paths.results={tmp_path / 'results'}")
    (copy,) = (tmp_path / "results").iterdir()
    assert json.loads(copy.read_text()) == summary(finished)


@pytest.mark.parametrize(
    ("override", "words"),
    [("trainer.devices=0", "devices"), ("seed=-1", "seed"), ("paths.cache=null", "paths.cache"), ("+foo=1", "foo")],
)
def test_a_finished_run_refuses_options_that_cannot_work(finished: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        go(finished, override)


def test_a_best_score_of_zero_is_a_number(tmp_path: Path) -> None:
    """With two nodes, one is the root and the other its child: the toy objective is 0 from the beginning."""
    overrides = ("task=toy", "budget=smoke", "trainer=cpu", "logger=csv", "task.size=2", f"paths.runs={tmp_path}")
    found = run(*composed(*overrides))["metrics"]
    assert found["val/objective"] == found["test/objective"] == 0


def test_whatever_decides_the_result_makes_another_run(finished: Path) -> None:
    """The name has the identity of the configuration in it."""
    this = Run.compose(*composed(*OWN, *SHORT, f"paths.runs={finished}", "task.hidden=17"))
    assert this.folder.parent == run_folder(finished).parent
    assert this.folder != run_folder(finished)


# --- moved, damaged, foreign -------------------------------------------------------------------------------------


def test_a_moved_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its checkpoint in the middle, whose best model and its score are then the same as without a move."""
    from structgrad.training.errors import Interrupted
    from tests.training.in_process import At
    from tests.training.test_stopping import send, signal

    At(monkeypatch, 5, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    go(tmp_path / "there")
    assert not (tmp_path / "here").exists()
    assert metrics(tmp_path / "there") == metrics(finished)
    assert summary(tmp_path / "there")["metrics"] == summary(finished)["metrics"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other_owner(file: Path) -> None:
    from structgrad.training.checkpoints import CheckedFiles

    content = torch.load(file, weights_only=True) | {"run": "another-run"}
    CheckedFiles().save_checkpoint(content, file)


def foreign(file: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, file)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, other_owner, foreign])
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_damaged_or_foreign_checkpoint_is_named(unfinished: Path, name: str, damage: Callable[[Path], None]) -> None:
    file = run_folder(unfinished) / "checkpoints" / f"{name}.ckpt"
    damage(file)
    words = "another run, another-run" if damage is other_owner else "is damaged"
    with pytest.raises(RunError, match=f"checkpoint {re.escape(str(file))} .*{words}.*; delete") as caught:
        go(unfinished)
    advice = str(caught.value).split("; delete ")[1].removeprefix("the folder ").split(" to ")[0]
    assert "\n" not in str(caught.value)
    if Path(advice).is_dir():
        shutil.rmtree(advice)
    else:
        Path(advice).unlink()
    go(unfinished)  # what it says helps


def test_every_bit_of_a_checkpoint_counts(unfinished: Path) -> None:
    file = run_folder(unfinished) / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    for place in [0, 30, *range(100, len(whole), len(whole) // 50), len(whole) - 33, len(whole) - 1]:
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        assert not is_sealed(file), place


def test_a_best_checkpoint_that_is_gone_is_not_passed_over(unfinished: Path) -> None:
    (run_folder(unfinished) / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(RunError, match=r"best.ckpt is missing; delete .*last.ckpt to start again"):
        go(unfinished)


def test_the_last_state_is_kept_though_it_is_not_the_best(tmp_path: Path) -> None:
    """A killed run does not go back to its best validation, which may be hours ago."""
    go(tmp_path, "task.optimizer.lr=0.0")
    steps = {
        name: torch.load(run_folder(tmp_path) / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    validated = [int(row[0]) for row in metrics(tmp_path)[1:] if row[1] == "val/loss"]
    assert steps["best"] == min(validated) + 1
    assert steps["last"] == max(validated) + 1


@pytest.mark.parametrize(("last", "best", "expected"), [(8, 4, "last"), (8, 8, "last"), (4, 8, "best")])
def test_a_run_continues_from_its_newest_checkpoint(tmp_path: Path, last: int, best: int, expected: str) -> None:
    """The best one is newer if the run was killed before the last one was written as well."""
    (tmp_path / "checkpoints").mkdir()
    for name, step in (("last", last), ("best", best)):
        stream = io.BytesIO()
        torch.save({"run": "r", "global_step": step}, stream)
        (tmp_path / "checkpoints" / f"{name}.ckpt").write_bytes(seal(stream.getvalue()))
    found = checkpoint_to_resume(tmp_path, "r")
    assert found is not None
    assert found.stem == expected


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(RunError, match=r"cannot write to .*; set paths.runs to another folder"), held(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}', '{"name": "another", "metrics": {}}', "\0"])
def test_a_damaged_or_foreign_summary_is_named(finished: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    file = run_folder(tmp_path / "copy") / "summary.json"
    file.write_text(content)
    with pytest.raises(RunError, match=f"; delete {re.escape(str(file))}: the same command then tests") as caught:
        go(tmp_path / "copy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", "step,metric,value\nx,y,z\n", "\0\1\2", "step,metric,value\n1,a,b\n"]
)
def test_a_damaged_or_foreign_metrics_file_is_named(unfinished: Path, content: str) -> None:
    file = run_folder(unfinished) / "metrics.csv"
    file.write_text(content)
    with pytest.raises(RunError, match=f"metrics file {re.escape(str(file))} is damaged or not of a run .*; delete it"):
        go(unfinished)
    file.unlink()
    go(unfinished)


def test_a_half_written_line_is_no_damage(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"a": 1.0, "epoch": 0.0}, 0)
    file.log_metrics({"a": 2.0}, 1)
    with file.file.open("a") as stream:
        stream.write("2,a")
    file.rewind(1)
    assert file.file.read_text().split() == ["step,metric,value", "0,a,1.0"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"sha256": 5}', '{"sha256": {}}', '{"sha256": {}, "configuration": {}}']
)
def test_a_damaged_or_foreign_manifest_is_noticed(tmp_path: Path, content: str) -> None:
    import pyarrow as pa

    made = []

    def make() -> dict[str, pa.Table]:
        made.append(1)
        return {"train": pa.table({"x": [1, 2]})}

    folder = cache.folder_of(tmp_path, "t", {"a": 1})
    cache.ensure(folder, {"a": 1}, make)
    cache.ensure(folder, {"a": 1}, make)
    assert len(made) == 1
    (folder / "manifest.json").write_text(content)
    cache.ensure(folder, {"a": 1}, make)
    assert len(made) == 2
    assert cache.load(folder, "train")["x"].to_pylist() == [1, 2]


def test_a_default_that_is_not_neutral_is_another_run() -> None:
    """The class has 1,000 samples by default, so the neutral value, 1, is not left out of the identity."""
    base = ("task=toy", "budget=smoke", "structure=one_hot", "estimator=sst")
    names = {
        option: Run.compose(*composed(*base, option)[:2]).name
        for option in ("~task.eval_samples", "task.eval_samples=1000", "task.eval_samples=1")
    }
    assert len(set(names.values())) == 3


def test_a_file_that_has_changed_is_not_the_same_run(tmp_path: Path) -> None:
    """Finished or not: results of the old content are not those of the new."""
    costs = tmp_path / "costs.npz"
    np.savez(costs, linear=np.arange(5.0))
    command = ("task=toy", "budget=smoke", "structure=one_hot", "estimator=sst", "trainer=cpu", "logger=csv")
    own = (f"paths.runs={tmp_path}", "task.objective=quadratic", f"task.coefficients={costs}")
    first = run(*composed(*command, *own))
    assert run(*composed(*command, *own))["metrics"] == first["metrics"]
    np.savez(costs, linear=np.arange(5.0) * 100)
    with pytest.raises(RunError, match="the file has changed since this run began"):
        run(*composed(*command, *own))


# --- divergence --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_best(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loss or the scores are not finite at step 7") as caught:
        go(tmp_path, FAULTY, "++task.break_at=7")
    best = run_folder(tmp_path) / "checkpoints" / "best.ckpt"
    assert str(best) in str(caught.value)
    state = torch.load(best, weights_only=True)
    assert state["global_step"] == 4
    assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.parametrize("options", [(), ("estimator=reinforce",), ("estimator=sparsemap",), ("structure=none",)])
def test_divergence_is_one_line(tmp_path: Path, shared_cache: str, options: tuple[str, ...]) -> None:
    overrides = (*SMOKE, f"paths.runs={tmp_path}", shared_cache, "task.optimizer.lr=1e30", *options)
    with pytest.raises(RunError, match=r"training diverged: .*; try a smaller learning rate") as caught:
        run(*composed(*overrides))
    assert "\n" not in str(caught.value)
    (line,) = tmp_path.glob("*/*/error.txt")  # for the page of all runs
    assert line.read_text() == f"{caught.value}\n"


def test_scores_that_are_no_parts_may_have_any_value() -> None:
    """Padding by a mask or by lengths, and a diagonal; scores by position or by name."""
    calls: list[tuple[Estimator, dict[str, Tensor]]] = [
        (Reinforce(OneHot()), {"lengths": torch.tensor([2])}),
        (Reinforce(OneHot()), {"mask": torch.tensor([True, True, False])}),
        (Reinforce(SpanningTree()), {}),
    ]
    for estimator, options in calls:
        callback = StopOnNonFiniteLoss("val/loss")
        trainer, task = SimpleNamespace(global_step=0), SimpleNamespace(estimator=estimator)
        callback.on_fit_start(trainer, task)  # type: ignore[arg-type]
        scores = torch.zeros(1, 3) if options else torch.zeros(1, 3, 3)
        scores[..., -1, -1] = torch.nan
        for _ in range(2):
            estimator(scores, lambda vertices, rows: vertices.flatten(1).sum(1), **options)
            estimator(scores=scores, objective=lambda vertices, rows: vertices.flatten(1).sum(1), **options)
        scores[0, 0] = torch.inf
        with pytest.raises(NonFiniteLossError, match="not finite at step 0"):
            estimator(scores, lambda vertices, rows: vertices.flatten(1).sum(1), **options)


# --- folders and files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"paths.cache={tmp_path_factory.mktemp('cache')}"


def test_the_folder_at_fault_is_named(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(RunError, match=f"cannot write to {file}.*set paths.runs"):
        go(file)
    with pytest.raises(RunError, match=f"cannot write to {file}.*set paths.results"):
        go(finished, f"paths.results={file}")
    with pytest.raises(RunError, match=f"to the cache {file}.*set paths.cache"):
        run(*composed(*SMOKE, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={file}"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(MissingDataError, match=f"to the cache {file}"):
        cache.ensure(file / "x", {}, dict)


def test_a_disk_that_fills_up_is_reported(unfinished: Path) -> None:
    """Metrics go to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    folder = run_folder(unfinished)
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.csv").unlink()
    (folder / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"No space left on device; free space or set paths.runs"):
        go(unfinished)


def test_a_published_file_is_read_before_anything_is_trained(tmp_path: Path, shared_cache: str) -> None:
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("5\t[MAX 2 5 ]\n4\t[MAX 2 5 ]\n")
    with pytest.raises(ConfigurationError, match=r"paths.test_file: .*wrong.tsv, line 2"):
        run(*composed(*SMOKE, f"paths.runs={tmp_path / 'runs'}", shared_cache, f"paths.test_file={wrong}"))
    assert not (tmp_path / "runs").exists()


def test_published_files_of_one_name_do_not_overwrite_each_other(tmp_path: Path, shared_cache: str) -> None:
    lines = "5\t( ( ( [MAX 2 ) 5 ) ] )\n7\t[MIN 9 [MAX 7 1 ] ]\n"
    contents = {"plain": lines, "other": "9\t[MAX 9 5 ]\n", "headed": f"\ufefflabel\tsentence\n{lines}"}
    for folder, content in contents.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "published.tsv").write_text(content)
        file = tmp_path / folder / "published.tsv"
        run(*composed(*SMOKE, f"paths.runs={tmp_path / 'runs'}", shared_cache, f"paths.test_file={file}"))
    tested = list((tmp_path / "runs").glob("listops/*/test-published-*.json"))
    found = {Path(c["test_file"]).parent.name: c["metrics"] for c in (json.loads(t.read_text()) for t in tested)}
    assert found.keys() == contents.keys()
    assert found["headed"] == found["plain"]
    assert found["plain"].keys() >= {"test/accuracy", "test/precision"}


def test_columns_of_a_published_file_may_be_the_other_way_round(tmp_path: Path) -> None:
    from structgrad.tasks.listops.data import read_tsv

    file = tmp_path / "lra.tsv"
    file.write_text("Source\tTarget\n[MAX 2 5 ]\t5\n")
    assert read_tsv(file).values.tolist() == [5]


# --- loggers -----------------------------------------------------------------------------------------------------


def test_wandb_counts_the_steps_of_the_training(tmp_path: Path) -> None:
    """Also when the client of a resumed run, working offline, starts at 0."""

    class Client:
        logged: list[tuple[dict[str, Any], int | None]] = []  # noqa: RUF012

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            self.logged.append((metrics, step))

    logger = WandbSteps(offline=True, save_dir=tmp_path)
    logger._experiment = Client()  # type: ignore[assignment]
    logger.log_metrics({"train/loss": 1.0}, 51)
    assert Client.logged == [({"train/loss": 1.0, "trainer/global_step": 51}, 51)]


def test_the_tested_checkpoint_is_checked(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    best = run_folder(tmp_path / "copy") / "checkpoints" / "best.ckpt"
    this = Run.compose(*composed(*OWN, *SHORT))
    found = fit.test(assemble(this.config), this.config.trainer, 0, best)
    assert found["test/loss"] == summary(finished)["metrics"]["test/loss"]
    flip_a_bit(best)
    with pytest.raises(RunError, match=r"best.ckpt is damaged .*; delete the folder"):
        fit.test(assemble(this.config), this.config.trainer, 0, best)


# --- ranks in the environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"LOCAL_RANK": "3"}, {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_on_one_device_ignores_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], strategy: str
) -> None:
    """Each task of a Slurm job, and each process of a launcher of somebody else's, may have a run of its own."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "seeds")
    # What Lightning does when it is imported in such an environment.
    monkeypatch.setattr(rank_zero_only, "rank", int(next(iter(variables.values()))))
    go(tmp_path, f"trainer.strategy={strategy}", "logger=default")
    folder = run_folder(tmp_path)
    for name in ("config.yaml", "environment.json", "metrics.csv", "summary.json", "tensorboard", "checkpoints"):
        assert (folder / name).exists(), name


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "1"}, True),  # somebody else's: Lightning starts the processes itself, and numbers them by LOCAL_RANK
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "bash"}, True),
    ],
)
def test_which_process_of_several_writes(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first(OmegaConf.create({"devices": 2, "accelerator": "cpu"})) is first
    assert is_first(OmegaConf.create({"devices": 1, "accelerator": "cpu"}))
    assert is_first(OmegaConf.create({"devices": [1], "accelerator": "gpu"}))


# --- early stopping and paths ------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    """Nothing is learnt: the first of eight validations is the best one, and the third is the last."""
    long = ("trainer.max_steps=32", "task.optimizer.lr=0.0", "trainer.patience=2")
    assert go(tmp_path, *long)["steps"] == 12
    content = summary(tmp_path)
    assert content["best_step"] == 4
    (run_folder(tmp_path) / "summary.json").unlink()
    assert go(tmp_path, *long)["steps"] == 12  # killed before its test, it does not train on
    plain, patient = (Run.compose(*composed(*OWN, *SHORT, *more)) for more in ([], ["trainer.patience=2"]))
    assert "patience" not in plain.deciding["trainer"]
    assert plain.name != patient.name


def test_paths_know_the_folder_of_the_user_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORK", "here")
    quoted = with_quoted_path("paths.runs=~/$WORK/runs")
    assert Run.compose(*composed(*OWN, *SHORT, quoted)).folder.is_relative_to(tmp_path / "here" / "runs")
    assert with_quoted_path("task.hidden=~3") == "task.hidden=~3"


def test_an_interruption_while_data_are_made_says_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mylab.find_window import FindWindow

    from structgrad.training.errors import Interrupted
    from tests.training.test_stopping import send, signal

    monkeypatch.setattr(FindWindow, "prepare_data", lambda self: send(signal.SIGINT)())
    with pytest.raises(Interrupted, match="stopped by Ctrl-C; nothing is kept yet; the same command starts again"):
        go(tmp_path)
