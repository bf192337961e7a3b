"""What TensorBoard and Weights & Biases get of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.training.in_process import go, run_folder, summary


def test_tensorboard_sets_the_configuration_against_the_final_metrics(tmp_path: Path) -> None:
    go(tmp_path, "logger=default")
    hparams, scalars, sessions = {}, {}, 0
    for file in run_folder(tmp_path).glob("**/events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        content = events.summary_metadata.get("_hparams_/session_start_info")
        if content is not None:
            sessions += 1
            hparams |= dict(HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams)
    assert sessions == 1
    assert hparams["task/optimizer/lr"].number_value > 0
    assert hparams["budget/name"].string_value
    assert "hp_metric" not in scalars
    for name, value in summary(tmp_path)["metrics"].items():
        assert scalars[name] == pytest.approx(value, rel=1e-5), name


def test_a_sweep_groups_its_runs_on_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_GROUP", "paulus_2_quick/arborescence")  # as workers of a sweep do
    go(tmp_path, "logger=wandb", "logger.wandb.offline=true")
    assert wandb.run is not None
    assert wandb.run.group == "paulus_2_quick/arborescence"
    wandb.finish()
    with caplog.at_level("INFO", logger="structgrad"):
        go(tmp_path, "logger=wandb")
    (offline,) = run_folder(tmp_path).glob("wandb/offline-run-*")
    assert f"nothing is logged to wandb now; wandb sync {offline}" in caplog.text


def test_a_finished_run_that_never_was_on_a_dashboard_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(tmp_path, "logger=csv")
    with caplog.at_level("INFO", logger="structgrad"):
        go(tmp_path, "logger=wandb")
    assert "nothing is logged to wandb now; paths.runs=<another folder> makes it again" in caplog.text
