"""The ledger and rollback: history only grows, a crash doubles nothing, an earlier release comes back bit by bit."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor

from cluster.driver.history import rollback, verify_audit
from cluster.driver.ledger import Ledger, fact_of
from cluster.driver.state import load_state, save_state
from cluster.storage.releases import Release, Releases, load_release, shards_fingerprint, write_shard
from pipelines.config.load import to_yaml
from pipelines.config.schema import Config, RunSection
from pipelines.machine import events as on
from pipelines.machine.actions import Commit
from pipelines.machine.decisions import enter_mark, enter_round, enter_row
from pipelines.machine.machine import Machine
from pipelines.machine.records import RoundRecord
from pipelines.machine.rounds import current_adjustment
from pipelines.machine.rules import Rules
from pipelines.machine.state import Phase
from pipelines.report.audit import FILE, read_audit
from pipelines.report.events import read_events
from pipelines.wake.report import Mark

SOURCES = ["a", "b"]


def tensors(number: int) -> Dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(3, 2, generator=generator) for name in ("weight/x", "weight/y", "offset/x")}


def record(number: int, release: int | None, live: int) -> Dict[str, Any]:
    scores = {source: 3.0 - 0.1 * number for source in SOURCES}
    figures = {
        "candidate": scores, "anchor": scores, "awake": scores, "mean_change": 0.0, "recent": [], "checks": [],
        "worst": {"source": "a", "loss": 0.0},
    }  # fmt: skip
    return {
        "id": number, "tokens": 64 * number, "anchor": live, "release": release, "steps": 1, "seconds": 0.1,
        "decision": "rejected" if release is None else "promoted", "reason": "", "figures": figures, "loss": {},
        "flops": 1.0, "fingerprint": f"candidate of round {number}", "recent_scale": 1.0, "lr_scale": 1.0,
    }  # fmt: skip


class Story:
    """A run directory whose rounds are written by hand."""

    def __init__(self, run_dir: Path, cfg: Config) -> None:
        (run_dir / "checkpoints").mkdir(parents=True)
        self.run_dir, self.cfg = run_dir, replace(cfg, run=RunSection(name=run_dir.name, root=str(run_dir.parent)))
        (run_dir / "config.yaml").write_text(to_yaml(self.cfg))
        self.rules = Rules.of(self.cfg, tuple(SOURCES))
        self.events: List[Tuple[str, Dict[str, Any]]] = []
        self.releases = Releases(run_dir / "releases")
        self.publish(0, None, {})
        ledger = self.ledger()
        self.state.phase = Phase.STREAM
        row = enter_row(self.state, self.rules, 0, 0, {source: 3.0 for source in SOURCES})
        ledger.carry_out([row, Commit(self.state.copy())])

    def ledger(self) -> Ledger:
        """A ledger as a driver that just started would have it."""
        self.state = load_state(self.run_dir)
        return Ledger(self.run_dir, self.state, lambda event, **fields: self.events.append((event, fields)))

    def recover(self) -> None:
        """Start a driver, as far as settling goes."""
        ledger = self.ledger()
        newest = fact_of(self.releases.read(self.releases.numbers()[-1]))
        machine = Machine(self.state, self.rules)
        ledger.carry_out(machine.handle(on.Started(newest, ledger.recover())))
        ledger.carry_out(machine.handle(on.ServiceReady(1)))

    def publish(self, number: int, parent: int | None, told: Dict[str, Any], audit: Any = None) -> None:
        directory = self.releases.prepare(number)
        names = sorted(tensors(number))
        shards = [write_shard(directory, r, 2, {n: tensors(number)[n] for n in names[r::2]}, "me") for r in range(2)]
        told = {**told, "fingerprint": shards_fingerprint(shards)} if told else {}
        place = (number, parent, told.get("id", 0), 5, 10 * number, 64 * number)
        self.releases.publish(Release(*place, shards_fingerprint(shards), shards, told, audit=audit or {}))

    def round(self, promoted: bool) -> None:
        """Decide a round and enter it."""
        ledger = self.ledger()
        live, number = self.state.live, self.state.next_round
        told = record(number, live + 1 if promoted else None, live)
        last_key = 0
        if promoted:
            self.publish(live + 1, live, told, ledger.audit_end())
            release = self.releases.read(live + 1)
            told, last_key = release.record, release.last_key
        ledger.carry_out(enter_round(self.state, self.rules, RoundRecord.from_json(told), last_key))

    def pin(self, tokens: int, queued: bool) -> Path:
        """Fast weights that a mark pins, with or without a round in the queue that is to read them."""
        path = self.run_dir / "checkpoints" / f"fast-{tokens:015d}-0.safetensors"
        path.write_bytes(b"weights")
        if queued:
            state = load_state(self.run_dir)
            state.queue.append(Mark(tokens, 1, 1, f"checkpoints/{path.name}"))
            save_state(self.run_dir, state)
        return path

    def kinds(self) -> List[str]:
        return [entry["kind"] for entry in read_audit(self.run_dir / FILE)]


@pytest.fixture
def story(tmp_path: Path, make_config: Callable[..., Config]) -> Story:
    """A run with releases 0, 1 and 2."""
    story = Story(tmp_path / "told", make_config())
    for promoted in (True, False, True):
        story.round(promoted)
    return story


def test_rollback_brings_weights_back_bit_by_bit(story: Story) -> None:
    done = rollback(story.run_dir, 1)
    assert (done.release.number, done.replaced, done.release.restores, done.release.parent) == (3, 2, 1, 2)
    assert done.seconds < 10.0
    old, new = (story.releases.read(number) for number in (1, 3))
    assert new.fingerprint == old.fingerprint and new.weights == old.weights
    again = load_release(story.releases.directory(3))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors(1).items())
    assert story.releases.numbers() == [0, 1, 2, 3], "history only grows"
    state = load_state(story.run_dir)
    assert (state.live, state.consolidated_key) == (3, old.last_key)
    assert state.rows[-1] == {**state.rows[1], "release": 3}
    assert story.kinds() == ["promotion", "rejection", "promotion", "rollback"]
    (event,) = [e for e in read_events(story.run_dir / "events.jsonl") if e["event"] == "rollback"]
    assert (event["release"], event["restores"], event["replaces"]) == (3, 1, 2)
    assert verify_audit(story.run_dir).ok


def test_the_run_goes_on_after_a_rollback(story: Story) -> None:
    rollback(story.run_dir, 0)
    story.recover()
    assert story.state.live == 3, "nothing is left to recover"
    story.round(True)
    assert story.releases.read(4).parent == 3 and story.state.live == 4
    rollback(story.run_dir, 3)
    assert story.releases.read(5).weights == story.releases.read(0).weights
    assert verify_audit(story.run_dir).ok


def test_rollback_refuses_what_it_cannot_do(story: Story, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--to 7 is no release of this run; there are 0, 1, 2"):
        rollback(story.run_dir, 7)
    with pytest.raises(ValueError, match="--to 2 is live already"):
        rollback(story.run_dir, 2)
    with pytest.raises(ValueError, match="is no run directory"):
        rollback(tmp_path, 0)
    with open(story.run_dir / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being run by another process"):
            rollback(story.run_dir, 1)
    shard = story.releases.directory(1) / story.releases.read(1).shards[1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        rollback(story.run_dir, 1)
    assert story.releases.numbers() == [0, 1, 2] and load_state(story.run_dir).live == 2
    assert rollback(story.run_dir, 0).release.number == 3, "another one can still be had"


def test_a_rollback_that_was_cut_short_is_finished(story: Story) -> None:
    before = (story.run_dir / "checkpoints/coordinator.json").read_bytes(), (story.run_dir / FILE).read_bytes()
    rollback(story.run_dir, 1)
    (story.run_dir / "checkpoints/coordinator.json").write_bytes(before[0])  # as if the crash came before the state
    (story.run_dir / FILE).write_bytes(before[1])
    copy = story.run_dir.parent / "copy"
    shutil.copytree(story.run_dir, copy)
    story.recover()
    assert story.state.live == 3 and story.kinds()[-1] == "rollback" and verify_audit(story.run_dir).ok
    assert rollback(copy, 1).release.number == 3, "the same command finishes it as well"
    assert verify_audit(copy).ok


@pytest.mark.parametrize("lost", ["log", "state"])
def test_a_crash_while_a_decision_is_entered_doubles_nothing(story: Story, lost: str) -> None:
    files = {"log": story.run_dir / FILE, "state": story.run_dir / "checkpoints/coordinator.json"}
    before = {name: path.read_bytes() for name, path in files.items()}
    story.round(True)
    files["log"].write_bytes(before["log"])
    if lost == "state":
        files["state"].write_bytes(before["state"])
    for _ in range(2):
        story.recover()
    assert story.state.live == 3 and len(story.state.rounds) == 4
    assert story.kinds() == ["promotion", "rejection", "promotion", "promotion"]
    assert verify_audit(story.run_dir).ok


def test_the_audit_sees_what_was_done_to_log_state_and_releases(story: Story) -> None:
    log, state = story.run_dir / FILE, story.run_dir / "checkpoints/coordinator.json"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    for broken in (lines[:-1], lines[1:], [lines[1], lines[0], lines[2]], [], [lines[0], lines[2]]):
        log.write_bytes(b"".join(broken))
        assert not verify_audit(story.run_dir).ok
    log.write_bytes(whole)
    plain = json.loads(state.read_text())
    first = json.loads(lines[0])
    log.write_bytes(lines[0])  # shortened, and the state made to agree: the newest release still remembers two entries
    state.write_text(json.dumps({**plain, "audit": {"length": 1, "head": first["hash"], "unwritten": []}}))
    assert any("a release remembers 2 entries" in error for error in verify_audit(story.run_dir).errors)
    log.write_bytes(whole)
    state.write_text(json.dumps(plain))
    (story.releases.directory(2) / "STABLE").unlink()
    story.publish(2, 1, {"id": 3})
    assert verify_audit(story.run_dir).ok, "the same weights again are the same release"
    story.publish(3, 2, {"id": 4})
    assert any("release 3 is there, but the log knows of no decision" in e for e in verify_audit(story.run_dir).errors)


def test_two_rejections_change_the_plan_and_a_promotion_undoes_it(story: Story) -> None:
    for _ in range(2):
        story.round(False)
    (changed,) = [fields for event, fields in story.events if event == "plan_changed"]
    sleep = story.cfg.sleep
    assert changed["recent"] == sleep.recent / 2 and changed["lr"] == sleep.optimizer.lr / 2
    assert changed["reason"] == "2 rejections in a row"
    assert current_adjustment(load_state(story.run_dir), story.rules).recent_scale == 0.5, "the decisions say it all"
    story.round(True)
    assert story.kinds()[-5:] == ["rejection", "rejection", "plan_change", "promotion", "plan_change"]
    assert current_adjustment(load_state(story.run_dir), story.rules).lr_scale == 1.0
    assert verify_audit(story.run_dir).ok


def test_a_mark_is_saved_with_its_entry(story: Story) -> None:
    ledger, mark = story.ledger(), Mark(640, 7, 9, "checkpoints/fast-640", {"policy": "tokens"})
    ledger.carry_out(enter_mark(story.state, story.rules, mark))
    assert load_state(story.run_dir).queue == [mark] and story.kinds()[-1] == "sleep_trigger"
    assert verify_audit(story.run_dir).ok


@pytest.mark.parametrize("promoted", (True, False))
def test_pinned_weights_go_when_their_round_is_decided(story: Story, promoted: bool) -> None:
    decided, merged, crashed = story.pin(64 * 4, True), story.pin(64 * 3 + 32, False), story.pin(64 * 2, False)
    waiting, not_queued_yet = story.pin(64 * 5, True), story.pin(64 * 6, False)
    learner = story.run_dir / "checkpoints" / f"learner-{64:015d}.safetensors"
    learner.write_bytes(b"a checkpoint")
    story.round(promoted)
    assert [path.exists() for path in (decided, merged, crashed)] == [False, False, False]
    assert [path.exists() for path in (waiting, not_queued_yet, learner)] == [True, True, True]
    story.round(promoted)
    assert (waiting.exists(), not_queued_yet.exists()) == (False, True)
