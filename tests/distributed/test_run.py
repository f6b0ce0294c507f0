"""One real run of the shipped smoke configuration from end to end, with its controls, looked at from all sides."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List

import numpy as np
import pytest
import torch

from cluster.driver.finished import FINISHED
from cluster.storage.releases import Releases, load_release, read_release
from nl_model.model import NestedLM
from nl_model.weights import load_into, split
from pipelines.config.load import load_config
from pipelines.data.module import open_data
from pipelines.experience import Snapshot
from pipelines.machine import trace
from pipelines.report.events import build_timeline
from tests.harness import TIMEOUT, Run, circadian, environment

pytestmark = pytest.mark.timeout(400)
PLOTS = {"online_loss.png", "awake.png", "matrix.png", "level_writes.png", "rounds.png", "surprise.png"}
# Dreams, so that all parts of a run are in it. Its 24 steps asleep would nearly all lie within the default warm-up.
KEYS = ("dreams.share=0.0625", "sleep.warmup=4")
# What `ray list actors` shows, from the cluster's own tables: the cluster of a run has no dashboard to ask.
LIST_ACTORS = """
import json, sys
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
address = sys.stdin.readline().strip()
state = GlobalState()
options = GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
state._initialize_global_state(options)
print(json.dumps([(a["ActorClassName"], a["State"], a["Pid"]) for a in state.actor_table(None, None, None).values()]))
"""


@dataclass(frozen=True)
class Finished(Run):
    """A finished run."""

    actors: tuple[tuple[str, str, int], ...] = ()
    """(class, state, process id) of the actors while it streamed."""


@contextlib.contextmanager
def actor_lister() -> Iterator[subprocess.Popen[str]]:
    """A client that has Ray loaded before the run starts: a short stream may end while a slow machine imports it."""
    # The cluster of a run authenticates with the token in this user's home; a client has to be told to use it.
    env = {**environment(), "RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-c", LIST_ACTORS]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def list_actors(run: Run, lister: subprocess.Popen[str]) -> List[List[Any]]:
    (raylet,) = [p for p in run.processes() if Path(p.cmdline()[0]).name == "raylet"]
    address = next(a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--gcs-address="))
    output, _ = lister.communicate(f"{address}\n", timeout=60)
    found: List[List[Any]] = json.loads(output.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def run(runs: Path) -> Finished:
    run = Run(runs, "whole", ("tracking.experiment=whole", "tracking.model_name=whole", *KEYS))
    with actor_lister() as lister, run.attempt() as process:
        assert run.wait_until(process, run.reached), run.tail()
        actors = tuple((kind, state, pid) for kind, state, pid in list_actors(run, lister))
        assert process.wait(TIMEOUT) == 0, run.tail()
    return Finished(run.root, run.name, run.overrides, run.config, actors)


def test_the_parts_are_actors_in_processes_of_their_own(run: Finished) -> None:
    alive = [(kind, pid) for kind, state, pid in run.actors if state == "ALIVE"]
    kinds = sorted(kind for kind, _ in alive)
    assert kinds == ["ConsolidationWorker", "ConsolidationWorker", "ExperienceService", "OnlineLearner", "Tracker"]
    assert len({pid for _, pid in alive}) == len(alive)


def test_the_run_directory_is_complete(run: Run) -> None:
    for name in ("config.yaml", "events.jsonl", "summary.json", "report.html", "store", "checkpoints"):
        assert (run.directory / name).exists(), name
    assert (run.directory / "releases/000000/STABLE").is_file()
    assert {path.name for path in run.directory.glob("*.png")} == PLOTS
    assert load_config(str(run.directory / "config.yaml")) == load_config("smoke", run.arguments()[2:])


def test_the_report_opens_offline(run: Run) -> None:
    page = (run.directory / "report.html").read_text()
    places = r"""(?:\bsrc|\bhref|\bdata)\s*=\s*["']?([^"'\s>]*)|url\(["']?([^"')]*)|@import\s+["']?([^"';\s]+)"""
    targets = ["".join(found) for found in re.findall(places, page)]
    assert sum(target.startswith("data:image/png") for target in targets) == len(PLOTS)
    assert not [target for target in targets if re.match(r"(https?:)?//", target)]


def test_the_summary_has_its_figures(run: Run) -> None:
    summary = run.summary()
    assert summary["sources"] == ["docs", "python", "unicode", "fonts"]
    controls = summary["controls"]
    assert list(controls) == ["replay", "naive"]
    for side in (summary, *controls.values()):
        assert all(len(row) == 4 and all(math.isfinite(v) for v in row) for row in side["matrix"])
        assert side["mean_final_bpb"] == pytest.approx(np.mean(side["matrix"][-1]))
        assert math.isfinite(side["forgetting"]) and math.isfinite(side["learning"])
    for side in controls.values():
        assert side["matrix"][0] == pytest.approx(summary["matrix"][0]), "all begin with the same base"
        assert (side["learning_rate"], side["edge"], len(side["tried"])) == (2e-3, True, 1)
    stronger = min(controls, key=lambda name: controls[name]["mean_final_bpb"])
    assert summary["control"] == {"strategy": stronger, **controls[stronger]}
    assert summary["matrix"][-1][3] < summary["matrix"][0][3] - 0.2, "what was streamed has not been learned"
    assert summary["wake_tokens_per_second"] > 0 and 0 <= summary["system_overhead"] < 1
    assert {"torch", "ray", "deepspeed", "circadian"} <= set(summary["versions"])
    flops = summary["flops"]
    assert flops["wake"] > 0 and flops["sleep"] > 0
    for side in controls.values():
        assert side["flops"] == pytest.approx(flops["total"], rel=1e-6), "equal FLOPs, the gate's included"
    assert flops["control"] == pytest.approx(2 * flops["total"], rel=1e-6)


def test_the_table_and_the_page_have_both_controls_and_what_was_served(run: Run) -> None:
    looks = run.events("look")
    assert [look["tokens"] for look in looks][:3] == [8192, 16384, 24576]
    assert set(looks[-1]["served"]) == set(looks[-1]["rested"]) == set(run.summary()["sources"])
    table, page = run.tail(), (run.directory / "report.html").read_text()
    assert re.search(r"Circadian +.? +replay +.? +naive", table), table
    assert "best at the edge of what was tried" in table and "best at the edge of what was tried" in page
    assert page.count('<th class="number">naive</th>') == 2 and "awake against release" in page
    ended = {(event["strategy"], event["learning_rate"]) for event in run.events("control_finished")}
    assert ended == {("replay", 2e-3), ("naive", 2e-3)}


def test_the_summary_tells_of_every_round(run: Run) -> None:
    summary = run.summary()
    rounds = summary["rounds"]
    assert [entry["id"] for entry in rounds] == list(range(1, len(rounds) + 1)) and len(rounds) >= 2
    for entry in rounds:
        assert (entry["decision"], entry["release"] is None) in (("promoted", False), ("rejected", True))
        assert entry["steps"] > 0 and entry["seconds"] > 0 and entry["snapshot"] > 0
        assert set(entry["figures"]["candidate"]) == set(summary["sources"])
        assert entry["backend"] == "gloo"
    live = [0, *(entry["release"] for entry in rounds if entry["release"] is not None)]
    assert live == list(range(len(live))) and len(live) > 1
    assert [row["release"] for row in summary["rows"]] == live
    positions = [row["tokens"] for row in summary["rows"]]
    assert positions == sorted(positions) and positions[0] == 0


def test_nothing_of_the_stream_is_lost_or_doubled(run: Run) -> None:
    summary = run.summary()
    found = summary["experiences"]
    assert summary["tokens_streamed"] == 24576
    assert found["committed"] == summary["tokens_streamed"] // 64
    assert (found["lost"], found["duplicates"], found["quarantined"]) == (0, 0, 0)
    snapshot = Snapshot.open(run.directory / "store")
    keys = snapshot.keys[snapshot.rows_between(0, snapshot.last_key)]
    assert keys.tolist() == list(range(found["committed"]))
    assert len(snapshot) == len(keys) + found["base"] + found["dreams"]
    assert found["dreams"] == sum(entry["dreams"]["kept"] for entry in summary["rounds"] if entry["release"]) > 0
    assert snapshot.cursor == summary["stream_cursor"] and summary["stream_cursor"]["key"] == found["committed"]


def test_the_learner_goes_on_learning_while_the_pool_sleeps(run: Run) -> None:
    events = run.events()
    first = events[0]["t"]
    wakes = [event["t"] - first for event in events if event["event"] == "wake"]
    spans = [(span.started, span.finished) for span in build_timeline(events).rounds]
    assert all(start is not None and end is not None for start, end in spans)
    inside = [wake for wake in wakes for start, end in spans if start and end and start < wake < end]
    assert inside, "no wake step between the start and the end of any round"


def test_what_the_driver_did_is_what_the_machine_allows(run: Run) -> None:
    path = run.directory / trace.FILE
    assert len(path.read_text().splitlines()) > 20 and trace.check_trace(path) == []


def test_the_first_wake_step_equals_the_base(run: Run) -> None:
    cfg = load_config(str(run.directory / "config.yaml"))
    setting = open_data(cfg)
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size)
    weights = split(load_release(Releases(run.directory / "releases").directory(0)), "weight")
    load_into(model, weights)
    neutral = [name for name in model.owned_by("learner") if name.endswith("down.weight")]
    assert neutral and not any(weights[name].any() for name in neutral), "fast levels start neutral"
    batch = setting.stream().next_batch(cfg.wake.batch)
    with torch.no_grad():
        nll = model.nll(torch.from_numpy(np.stack([s.tokens for s in batch]).astype(np.int64)))
    first = run.events("wake")[0]["steps"][0]
    assert first["tokens"] == cfg.wake.batch * cfg.model.context
    assert first["surprise"] == {"unicode": pytest.approx(float(nll.mean()), rel=1e-5)}


def test_every_release_says_where_it_comes_from(run: Run) -> None:
    releases = Releases(run.directory / "releases")
    for number in releases.numbers()[1:]:
        release = read_release(releases.directory(number))
        assert release.parent == number - 1 and len(release.shards) == 2
        assert json.dumps(release.record["figures"]) and release.snapshot > 0


def test_the_journal_is_in_order(run: Run) -> None:
    times = [event["t"] for event in run.events()]
    assert times == sorted(times) and times[-1] <= time.time()


def test_the_other_commands_work_on_it(run: Run, tmp_path: Path) -> None:
    store = str(run.directory / "store")
    verified = circadian("store", "verify", store, cwd=tmp_path)
    assert verified.returncode == 0 and "duplicates 0" in verified.stdout
    listed = circadian("store", "ls", store, cwd=tmp_path)
    assert listed.returncode == 0 and "unicode" in listed.stdout and "fonts" in listed.stdout
    (run.directory / "report.html").unlink()
    told = circadian("report", str(run.directory), cwd=tmp_path)
    assert told.returncode == 0 and "Forgetting" in told.stdout
    assert (run.directory / "report.html").exists()
    assert "deepspeed 0.19.8" in circadian("version", cwd=tmp_path).stdout


def test_a_run_directory_in_use_is_refused(run: Run, tmp_path: Path) -> None:
    (run.directory / FINISHED).rename(tmp_path / "kept")  # a run that has ended needs no lock to say so
    with (run.directory / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = circadian(*run.arguments(), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    (tmp_path / "kept").rename(run.directory / FINISHED)
    assert f"{os.fspath(run.directory)} is being run by another process" in done.stderr


def test_mlflow_knows_the_run_its_rounds_and_the_champion(run: Run) -> None:
    check_mlflow(run)


def test_a_finished_run_is_not_done_again(run: Run) -> None:
    kinds = (
        "wake",
        "base_finished",
        "round_started",
        "round_finished",
        "gate",
        "matrix_row",
        "control",
        "control_finished",
    )
    before = {kind: len(run.events(kind)) for kind in kinds}
    summary = run.summary()
    store = {path: path.read_bytes() for path in (run.directory / "store").rglob("*") if path.is_file()}
    start = time.monotonic()
    assert run.finish() == 0, run.tail()
    print(f"the command on a finished run took {time.monotonic() - start:.1f} s")
    assert {kind: len(run.events(kind)) for kind in kinds} == before
    assert {**run.summary(), "seconds": 0} == {**summary, "seconds": 0}
    assert {path: path.read_bytes() for path in (run.directory / "store").rglob("*") if path.is_file()} == store
    check_mlflow(run)  # nothing is there twice
    assert not run.wait_until_gone()


def check_mlflow(run: Run) -> None:
    from mlflow import MlflowClient

    uri, summary = f"sqlite:///{run.root / 'mlflow.db'}", run.summary()
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("whole")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    children = {int(one.data.tags["circadian.round"]): one for one in found if one is not parent}
    assert len(found) == 1 + len(summary["rounds"]) == 1 + len(children)
    check_parent(client, parent, summary)
    for entry in summary["rounds"]:
        child = children[entry["id"]]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id and child.info.status == "FINISHED"
        assert child.data.tags["circadian.decision"] == entry["decision"]
        assert child.data.metrics["candidate_bpb/fonts"] == pytest.approx(entry["figures"]["candidate"]["fonts"])
        (dataset,) = child.inputs.dataset_inputs
        assert dataset.dataset.digest.startswith(f"{entry['snapshot']}-")
    promoted = [entry["release"] for entry in summary["rounds"] if entry["release"] is not None]
    versions = client.search_model_versions("name = 'whole'")
    assert sorted(int(version.tags["circadian.release"]) for version in versions) == promoted
    champion = client.get_model_version_by_alias("whole", "champion")
    assert champion.tags["circadian.release"] == str(promoted[-1])


def check_parent(client: Any, parent: Any, summary: Dict[str, Any]) -> None:
    assert parent.info.status == "FINISHED"
    assert parent.data.params["levels.slow.period"] == "8192"
    for place, source in enumerate(summary["sources"]):
        points = client.get_metric_history(parent.info.run_id, f"probe_bpb/{source}")
        logged = [(point.step, point.value) for point in points]
        rows = zip(summary["rows"], summary["matrix"], strict=True)
        assert logged == [(row["tokens"], pytest.approx(scores[place])) for row, scores in rows]
    online = {"online_bpb/unicode", "online_bpb/fonts", "mean_final_bpb", "control_naive/mean_final_bpb"}
    assert online <= set(parent.data.metrics)
    artifacts = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert {"config", "config.yaml", "report.html", "summary.json", *PLOTS} <= artifacts


def test_an_earlier_release_can_be_made_live_again(run: Run, tmp_path: Path) -> None:
    """Last in this file: it changes the run."""
    releases, before = Releases(run.directory / "releases"), run.summary()
    live = releases.numbers()[-1]
    start = time.monotonic()
    done = circadian("rollback", str(run.directory), "--to", "0", cwd=tmp_path)
    print(f"the rollback took {time.monotonic() - start:.1f} s: {done.stdout}")
    assert done.returncode == 0, done.stderr
    assert releases.read(live + 1).weights == releases.read(0).weights
    from mlflow import MlflowClient

    uri = f"sqlite:///{run.root / 'mlflow.db'}"
    champion = MlflowClient(tracking_uri=uri, registry_uri=uri).get_model_version_by_alias("whole", "champion")
    assert champion.tags["circadian.release"] == str(live + 1)
    assert champion.tags["circadian.digest"] == releases.read(0).fingerprint
    assert run.finish() == 0, run.tail()
    assert run.summary()["matrix"] == [*before["matrix"], before["matrix"][0]]
    verified = circadian("audit", "verify", str(run.directory), cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    log = run.directory / "audit.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert circadian("audit", "verify", str(run.directory), cwd=tmp_path).returncode == 1
