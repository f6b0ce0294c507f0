"""MLflow on a real SQLite database: what was logged is asked back from MLflow itself."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.report import tracking
from pipelines.report.tracking import ALIAS, Tracking
from pipelines.report.tracking_uri import default_uri

NAME = "night-1"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module; its first use makes the tables, which takes seconds."""
    return default_uri(tmp_path_factory.mktemp("root"))


def make_run_dir(tmp_path: Path, name: str = NAME) -> Path:
    run_dir = tmp_path / name
    (run_dir / "store").mkdir(parents=True)
    (run_dir / "releases" / "000001").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"run: {{name: {name}, seed: 0}}\n")
    return run_dir


def open_tracking(uri: str, run_dir: Path, **changes: Any) -> Tracking:
    settings: dict[str, Any] = {
        "uri": uri,
        "experiment": "circadian-test",
        "model_name": "circadian-test",
        "run_name": run_dir.name,
        "artifact_root": run_dir.parent / "mlartifacts",
        "params": {"levels.fast.lr": 1e-3, "text": "x" * 7000},
        "config_path": run_dir / "config.yaml",
    }
    return Tracking(**{**settings, **changes})


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def children_of(uri: str, tracker: Tracking) -> list[Any]:
    client = client_of(uri)
    experiment = client.get_experiment_by_name("circadian-test")
    return client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")


def live_one_night(uri: str, run_dir: Path) -> Tracking:
    tracker = open_tracking(uri, run_dir)
    for step in range(1, 4):
        tracker.log_metrics({"online_bpb/cpp": 4.0 - step, "online_bpb/c++": 2.0}, step=step * 2048)
    tracker.start_round(1, 42, run_dir / "store", {"steps": 8})
    tracker.log_metrics({"loss/total": 1.5}, step=4, round_id=1)
    tracker.finish_round(1, {"mean_change": -0.25}, "promoted")
    tracker.register_release(run_dir / "releases" / "000001", 1, 1, "sha256:abc")
    (run_dir / "report.html").write_text("<html></html>")
    tracker.log_artifact(run_dir / "report.html")
    assert tracker.finish("FINISHED")
    return tracker


def test_a_root_with_characters_of_uris_holds_its_database_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path / "x" / "a?b 50%25#c")
    uri = default_uri(run_dir.parent)
    tracker = open_tracking(uri, run_dir)
    assert tracker.finish("FINISHED")
    assert client_of(uri).get_run(tracker.run_id).info.status == "FINISHED"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a?b 50%25#c"]
    assert {path.name for path in run_dir.parent.iterdir()} == {NAME, "mlflow.db", "mlartifacts"}


def test_mlflow_knows_the_whole_run(uri: str, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    tracker = live_one_night(uri, run_dir)
    client = client_of(uri)

    parent = client.get_run(tracker.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["circadian.run"] == NAME
    assert parent.data.params["levels.fast.lr"] == "0.001"
    assert len(parent.data.params["text"]) == 6000
    history = client.get_metric_history(tracker.run_id, "online_bpb/cpp")
    assert [(point.step, point.value) for point in history] == [(2048, 3.0), (4096, 2.0), (6144, 1.0)]
    assert parent.data.metrics["online_bpb/cplusplus"] == 2.0
    assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["config", "report.html"]
    assert Path(client.download_artifacts(tracker.run_id, "config/config.yaml")).read_text().startswith("run:")

    (child,) = children_of(uri, tracker)
    assert child.info.status == "FINISHED"
    assert child.data.tags["circadian.round"] == "1"
    assert child.data.tags["circadian.decision"] == "promoted"
    assert child.data.metrics == {"loss/total": 1.5, "mean_change": -0.25}
    assert child.data.params == {"steps": "8"}
    (dataset,) = child.inputs.dataset_inputs
    assert dataset.dataset.digest.startswith("42-")
    assert json.loads(dataset.dataset.source)["uri"] == (run_dir / "store").as_uri()
    assert {tag.key: tag.value for tag in dataset.tags}["mlflow.data.context"] == "consolidation"

    version = client.get_model_version_by_alias("circadian-test", ALIAS)
    assert version.source == (run_dir / "releases" / "000001").as_uri()
    assert version.tags["circadian.release"] == "1" and version.tags["circadian.digest"] == "sha256:abc"
    assert version.run_id == child.info.run_id


def test_reopening_continues_without_doubles(uri: str, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    first = live_one_night(uri, run_dir)
    second = open_tracking(uri, run_dir, params={"levels.fast.lr": 1e-3, "new": 1}, run_id=first.run_id)
    client = client_of(uri)
    assert second.run_id == first.run_id
    assert client.get_run(second.run_id).info.status == "RUNNING"

    # The learner replays from its checkpoint, and the round that a crash cut short runs again.
    second.log_metrics({"online_bpb/cpp": 2.0}, step=4096)
    second.log_metrics({"online_bpb/cpp": 1.0}, step=6144)
    second.log_metrics({"online_bpb/cpp": 0.5}, step=8192)
    assert second.start_round(1, 42, run_dir / "store", {"steps": 9}) is not None
    second.finish_round(1, {"mean_change": -0.25}, "promoted")
    second.register_release(run_dir / "releases" / "000001", 1, 1, "sha256:abc")
    assert second.finish("FINISHED")

    steps = [point.step for point in client.get_metric_history(second.run_id, "online_bpb/cpp")]
    assert steps == [2048, 4096, 6144, 8192]
    (child,) = children_of(uri, second)
    assert child.data.params == {"steps": "8"}
    assert len(child.inputs.dataset_inputs) == 1
    assert len(client.get_metric_history(child.info.run_id, "mean_change")) == 1
    versions = client.search_model_versions(f"tags.`circadian.parent` = '{first.run_id}'")
    assert len(versions) == 1


def test_another_configuration_or_folder_is_another_run(uri: str, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    first = open_tracking(uri, run_dir)
    assert open_tracking(uri, run_dir).run_id == first.run_id
    (run_dir / "config.yaml").write_text("run: {seed: 1}\n")
    assert open_tracking(uri, run_dir).run_id != first.run_id
    elsewhere = make_run_dir(tmp_path / "other")
    assert open_tracking(uri, elsewhere).run_id != first.run_id


def test_the_alias_follows_promotions_and_rollbacks(uri: str, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    tracker = open_tracking(uri, run_dir)
    client = client_of(uri)
    live = []
    for number in (1, 2, 1):
        tracker.register_release(run_dir / "releases" / f"{number:06d}", number, None, f"digest-{number}")
        live.append(client.get_model_version_by_alias("circadian-test", ALIAS).tags["circadian.release"])
    assert live == ["1", "2", "1"]
    assert len(client.search_model_versions(f"tags.`circadian.parent` = '{tracker.run_id}'")) == 2


def test_many_points_arrive_in_batches(uri: str, tmp_path: Path) -> None:
    tracker = open_tracking(uri, make_run_dir(tmp_path))
    for step in range(1300):
        tracker.log_metrics({"a": float(step), "b": math.nan}, step=step)
    assert tracker.pending == 2600
    assert tracker.flush()
    client = client_of(uri)
    values = [point.value for point in client.get_metric_history(tracker.run_id, "a")]
    assert values == [float(step) for step in range(1300)]
    assert len(client.get_metric_history(tracker.run_id, "b")) == 1300


def test_an_unfinished_round_ends_with_the_run(uri: str, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    tracker = open_tracking(uri, run_dir)
    tracker.start_round(7, 1, run_dir / "store", {})
    assert tracker.finish("FAILED")
    (child,) = children_of(uri, tracker)
    assert child.info.status == "KILLED"
    assert client_of(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_mlflow_away_holds_up_nobody_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file lies where the database's folder should be: opening fails until somebody moves it."""
    run_dir = make_run_dir(tmp_path)
    blocked = tmp_path / "root"
    blocked.write_text("in the way")
    uri = default_uri(blocked)
    with caplog.at_level(logging.WARNING, logger="pipelines.report.tracking"):
        tracker = open_tracking(uri, run_dir)
        tracker.log_metrics({"online_bpb/cpp": 3.0}, step=1)
        assert tracker.start_round(1, 1, run_dir / "store", {}) is None
        tracker.finish_round(1, {"mean_change": 0.5}, "rejected")
        assert not tracker.flush() and not tracker.flush()
    assert tracker.run_id is None
    assert tracker.pending == 4 and tracker.dropped == 0
    assert len([record for record in caplog.records if "cannot be reached" in record.message]) == 1

    blocked.unlink()
    assert tracker.flush()
    client = client_of(uri)
    assert client.get_run(tracker.run_id).data.metrics == {"online_bpb/cpp": 3.0}
    (child,) = children_of(uri, tracker)
    assert child.data.metrics == {"mean_change": 0.5}
    assert child.data.tags["circadian.decision"] == "rejected"


def test_a_full_buffer_gives_up_its_oldest_points(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_POINTS", 3)
    tracker = open_tracking(uri, make_run_dir(tmp_path))
    for step in range(5):
        tracker.log_metrics({"a": float(step)}, step=step)
    assert (tracker.pending, tracker.dropped) == (3, 2)
    assert tracker.flush()
    steps = [point.step for point in client_of(uri).get_metric_history(tracker.run_id, "a")]
    assert steps == [2, 3, 4]


def test_what_mlflow_refuses_is_left_out_and_the_rest_goes_on(uri: str, tmp_path: Path) -> None:
    tracker = open_tracking(uri, make_run_dir(tmp_path))
    client = client_of(uri)
    client.delete_run(tracker.run_id)
    tracker.log_metrics({"a": 1.0}, step=1)
    assert tracker.flush()
    assert tracker.dropped == 1
    client.restore_run(tracker.run_id)
    tracker.log_metrics({"a": 2.0}, step=2)
    assert tracker.flush()
    assert client.get_run(tracker.run_id).data.metrics == {"a": 2.0}


def test_settings_mlflow_cannot_use_are_said_at_once(uri: str, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path)
    with pytest.raises(ValueError, match=r"config_path=.*gone\.yaml"):
        open_tracking(uri, run_dir, config_path=run_dir / "gone.yaml")
    with pytest.raises(ValueError, match=r"tracking\.uri='nonsense://there'"):
        open_tracking("nonsense://there", run_dir)
    tracker = open_tracking(uri, run_dir)
    with pytest.raises(ValueError, match="status='DONE'"):
        tracker.finish("DONE")
    with pytest.raises(ValueError, match="is not a file"):
        tracker.log_artifact(run_dir / "gone.png")
