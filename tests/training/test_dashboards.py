"""The data of a run that dashboards get, read back from their files."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from matplotlib import image
from mylab.find_window import FindWindow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from structgrad.training.errors import ConfigurationError
from structgrad.training.loggers import hyperparameters, key_of
from structgrad.training.run import Run
from tests.training.in_process import OWN, SHORT, At, composed, go, run_folder, summary

FIRST = {"task": "find_window", "structure": "window", "estimator": "exact_sum", "budget": "paper", "seed": 0}


class KilledError(BaseException):
    """Stands for a SIGKILL."""


def kill() -> None:
    raise KilledError


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example task draws nothing."""

    def pictures(task: FindWindow, folder: Path) -> list[Path]:
        image.imsave(folder / "window.png", [[0.0, 1.0]])
        return [folder / "window.png"]

    monkeypatch.setattr(FindWindow, "pictures", pictures)


def interrupted_and_continued(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    """The summary of a run that was killed after its first checkpoint."""
    At(monkeypatch, 6, kill)
    with pytest.raises(KilledError):
        go(folder, *overrides)
    go(folder, *overrides)
    return summary(folder)


def test_choices_are_columns_and_folders_are_not() -> None:
    """Dashboards sort by name: what was chosen comes before ``with/...``."""
    found = hyperparameters(Run.compose(*composed(*OWN, *SHORT, "logger=wandb", "+search={seed: {low: 1}}")))
    assert list(found.items())[: len(FIRST)] == list(FIRST.items())
    assert found["with/trainer/max_steps"] == 12
    assert sorted(found)[: len(FIRST)] == sorted(FIRST)
    assert {name.split("/")[1] for name in found if "/" in name} == {"task", "structure", "estimator", "trainer"}
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


@pytest.mark.usefixtures("drawing")
def test_tensorboard_sets_the_configuration_against_the_final_metrics(tmp_path: Path) -> None:
    go(tmp_path, "logger=default")
    hparams, scalars, images, sessions = {}, {}, set(), 0
    for file in run_folder(tmp_path).glob("**/events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        images |= set(events.Tags()["images"])
        # The columns are those of all runs, as no run says which there are.
        assert "_hparams_/experiment" not in events.summary_metadata
        content = events.summary_metadata.get("_hparams_/session_start_info")
        if content is not None:
            sessions += 1
            hparams |= dict(HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams)
    assert sessions == 1
    assert images == {"window"}
    assert hparams["with/task/optimizer/lr"].number_value > 0
    assert {name: hparams[name].string_value or hparams[name].number_value for name in FIRST} == FIRST
    assert not {"hp_metric", "epoch"} & scalars.keys()
    for name, value in summary(tmp_path)["metrics"].items():
        assert scalars[name] == pytest.approx(value, rel=1e-5), name


def wandb_records(file: Path) -> list[Any]:
    """The data of an offline run: protocol buffers in the records of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, part = file.read_bytes(), [], b""
    at = 7  # the mark at the start
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # no record starts at the very end of a block
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):
            break  # it is still being written
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            found.append(Record.FromString(part))
            part = b""
    return found


def finished_wandb_records(file: Path) -> list[Any]:
    """The same as :func:`wandb_records`, when wandb has written all: its own process does that after
    the run has ended.
    """
    for _ in range(300):
        found = wandb_records(file)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


@pytest.mark.usefixtures("drawing")
def test_weights_and_biases_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_GROUP", "paulus_2_quick/arborescence")  # as workers of a sweep do
    found = interrupted_and_continued(tmp_path, monkeypatch, "logger=wandb", "logger.wandb.offline=true")
    assert wandb.run is None, "the next job of this process would log into this run"
    offline = sorted(run_folder(tmp_path).glob("wandb/offline-run-*"))
    parts = [finished_wandb_records(file) for folder in offline for file in folder.glob("*.wandb")]
    assert len(parts) == 2
    runs = [record.run for records in parts for record in records if record.HasField("run")]
    assert {(run.run_id, run.run_group) for run in runs} == {(found["name"], "paulus_2_quick/arborescence")}
    config = {update.key: json.loads(update.value_json) for run in runs for update in run.config.update}
    for records in parts:
        for record in records:
            config |= {update.key: json.loads(update.value_json) for update in record.config.update}
    assert config.items() >= FIRST.items()
    assert config["with/trainer/max_steps"] == 12
    logged: dict[str, list[Any]] = {}
    for record in parts[1]:
        for item in record.history.item:
            logged.setdefault(".".join(item.nested_key), []).append(json.loads(item.value_json))
    assert logged["test/loss"] == [pytest.approx(found["metrics"]["test/loss"])]
    assert logged["window._type"] == ["images/separated"]
    assert "epoch" not in logged
    with caplog.at_level("INFO", logger="structgrad"):
        go(tmp_path, "logger=wandb")
    assert f"nothing is logged to wandb now; wandb sync {offline[-1]}" in caplog.text


@pytest.mark.usefixtures("drawing")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = interrupted_and_continued(tmp_path, monkeypatch, "logger=mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("structgrad")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (found["name"], "FINISHED")
    assert run.data.params.items() >= {name: str(value) for name, value in FIRST.items()}.items()
    assert run.data.params["with/trainer/max_steps"] == "12"
    assert run.data.metrics["test/loss"] == pytest.approx(found["metrics"]["test/loss"])
    assert "epoch" not in run.data.metrics
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/loss")] == [3, 7, 11]
    (picture,) = client.list_artifacts(run.info.run_id, "pictures")
    assert picture.path == "pictures/window.png"


@pytest.mark.usefixtures("drawing")
def test_aim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aim = pytest.importorskip("aim")
    from aim.storage.context import Context

    found = interrupted_and_continued(tmp_path, monkeypatch, "logger=aim")
    repo = aim.Repo.from_path(str(tmp_path))
    (key,) = repo.list_all_runs()
    run = aim.Run(key, repo=repo, force_resume=True)  # what only reads needs the index that `aim up` makes
    assert (run.name, run.experiment) == (found["name"], "structgrad")
    assert run["hparams"].items() >= FIRST.items()
    losses = {m.context.to_dict()["subset"]: m.values.values_list()[-1] for m in run.metrics() if m.name == "loss"}
    assert losses["test"] == pytest.approx(found["metrics"]["test/loss"])
    assert run.get_image_sequence("window", Context({})) is not None
    run.close()


@pytest.mark.usefixtures("drawing")
def test_comet_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start leaves an archive; those of one run have one key, and are put together when they are sent."""
    pytest.importorskip("comet_ml")
    found = interrupted_and_continued(tmp_path, monkeypatch, "logger=comet", "logger.comet.offline=true")
    archives = sorted(run_folder(tmp_path).glob("comet/*/*.zip"))
    keys, payloads = set(), []
    for file in archives:
        with ZipFile(file) as archive:
            keys.add(json.loads(archive.read("experiment.json"))["offline_id"])
            payloads += [json.loads(line)["payload"] for line in archive.read("messages.json").splitlines()]
    assert len(archives) == 2
    assert keys == {key_of(found["name"])}
    logged = {p["param"]["paramName"]: p["param"]["paramValue"] for p in payloads if "param" in p}
    assert logged.items() >= FIRST.items()
    metrics = [p["metric"] for p in payloads if "metric" in p]
    losses = [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == "test/loss"]
    assert losses[0] == (12, pytest.approx(found["metrics"]["test/loss"]))
    assert sum(m["metricName"] == "train/loss" for m in metrics) == 6 + 8
    assert "window" in {p.get("additional_params", {}).get("figName") for p in payloads}


@pytest.mark.usefixtures("drawing")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read once in a process
    trackio = pytest.importorskip("trackio")
    found = interrupted_and_continued(tmp_path, monkeypatch, "logger=trackio")
    (run,) = trackio.Api().runs("structgrad")
    assert run.name == found["name"]
    assert run.config.items() >= FIRST.items()
    (database,) = (tmp_path / "trackio").glob("structgrad*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics WHERE step = 12")]
    logged = {name: value for row in rows for name, value in row.items()}
    assert logged["test/loss"] == pytest.approx(found["metrics"]["test/loss"])
    assert logged["window"]["_type"] == "trackio.image"


@pytest.mark.parametrize(
    ("logger", "package"), [("aim", "aim"), ("comet", "comet_ml"), ("mlflow", "mlflow"), ("trackio", "trackio")]
)
def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str, package: str
) -> None:
    monkeypatch.setattr("structgrad.training.options.find_spec", lambda name: None)
    wanted = rf"logger={logger}: the package {package} is missing; pip install '\.\[{logger}\]'"
    with pytest.raises(ConfigurationError, match=wanted):
        go(tmp_path, f"logger={logger}")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_that_never_was_on_a_dashboard_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(tmp_path, "logger=csv")
    with caplog.at_level("INFO", logger="structgrad"):
        go(tmp_path, "logger=wandb")
    assert "nothing is logged to wandb now; paths.runs=<another folder> makes it again" in caplog.text
