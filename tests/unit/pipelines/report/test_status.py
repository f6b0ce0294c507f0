"""Where a run is, read from its directory at every moment of its life."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest

from cluster.driver.history import hold_lock
from cluster.watch import status_lines
from pipelines.machine.records import RoundRecord
from pipelines.machine.state import STATE_FILE, Phase, RunState
from pipelines.report.events import Event, tail_events
from pipelines.report.status import Controls, Rounds, build_status, is_held, read_status
from pipelines.wake.report import Mark

START: Event = {"t": 100.0, "event": "run_started", "run": "night", "stream_tokens": 4096, "process": 7, "host": "here"}
WAKE: Event = {"t": 103.0, "event": "wake", "tokens": 1024, "tokens_per_second": 512.0, "steps": [{"bpb": {"b": 3.5}}]}
BASE: Event = {"t": 101.0, "event": "base_progress", "tokens": 512, "of": 2048, "tokens_per_second": 256.0}
STOPPED: Event = {"t": 109.0, "event": "stopped", "tokens": 1024, "reason": "asked to stop"}


def state(**changes: Any) -> Dict[str, Any]:
    rounds = [
        RoundRecord(1, 64, 0, 1, 5, "promoted"),
        RoundRecord(2, 128, 1, None, 5, "rejected", reason="forgets a by 1.604"),
    ]
    rows = [{"release": 1, "tokens": 64, "bpb": {"a": 2.0, "b": 4.0}}]
    queue = [Mark(tokens, 1, 1, "fast") for tokens in (512, 1024)]
    full = RunState(phase=Phase.STREAM, live=1, tokens=768, rounds=rounds, rows=rows, queue=queue)
    return replace(full, **changes).to_json()


@pytest.mark.parametrize(
    ("events", "alive", "word"),
    [
        ([], False, "not started"),
        ([], True, "running"),
        ([START], True, "running"),
        ([START, WAKE], False, "died"),
        ([START, WAKE, STOPPED], False, "stopped"),
        ([START, {**STOPPED, "reason": "interrupted"}], False, "interrupted"),
        ([START, STOPPED, {**START, "t": 110.0}], True, "running"),
        ([START, {"t": 104.0, "event": "failed", "error": "disk full"}], False, "failed"),
        ([START, {"t": 104.0, "event": "finished"}], False, "finished"),
        ([START, {"t": 104.0, "event": "finished"}, {"t": 105.0, "event": "rollback"}], False, "finished"),
    ],
)
def test_what_a_run_is_doing(events: List[Event], alive: bool, word: str) -> None:
    assert build_status("x", {}, events[0] if events else None, events, alive).state == word


def test_a_run_under_way() -> None:
    progress = {"t": 104.0, "event": "round_progress", "round": 3, "step": 4, "steps": 8}
    trial = {"t": 90.0, "event": "control_started", "trial": 2, "trials": 6}
    control = {"replay@0.1": {"rows": [], "flops": 1.0}}
    found = build_status("x", state(control=control), START, [trial, WAKE, progress], alive=True)
    assert (found.run, found.process, found.host, found.phase) == ("night", 7, "here", "stream")
    assert (found.tokens, found.stream_tokens, found.tokens_per_second) == (1024, 4096, 512.0)
    assert (found.release, found.bpb, found.mean_bpb, found.online_bpb) == (1, {"a": 2.0, "b": 4.0}, 3.0, {"b": 3.5})
    assert found.rounds == Rounds(1, 1, 1, 3, 4, 8, "forgets a by 1.604")
    assert found.controls == Controls(1, 6) and found.written == 104.0
    ended = build_status("x", state(), START, [progress, STOPPED], alive=False).rounds
    assert (ended.running, ended.queued) == (None, 2), "a round that was cut short waits again"


def test_the_base_shows_its_own_progress() -> None:
    found = build_status("x", {}, START, [START, BASE], alive=True)
    assert (found.phase, found.base_tokens, found.base_of, found.tokens_per_second) == ("base", 512, 2048, 256.0)
    assert ("phase", "base, 512 of 2,048 tokens, 256 tokens/s") in status_lines(found, 102.0)


def test_lines_leave_out_what_is_not_known_and_fit_a_terminal() -> None:
    empty = dict(status_lines(build_status("x", {}, None, [], alive=False), 0.0))
    assert empty == {"x": "not started, no process is alive", "phase": "base", "release": "0 is live"}
    full = status_lines(build_status("x", state(), START, [WAKE, STOPPED], alive=False), 111.0)
    lines = dict(full)
    assert lines["night"] == "stopped (asked to stop), no process is alive; the same command continues it"
    assert lines["last written"].startswith("2.0 s ago, 1970-01-01T")
    assert lines["bits per byte"] == "mean 3.000: a 2.000, b 4.000"
    assert all(16 + len(text) <= 100 for _, text in full)


def make_run(folder: Path, events: List[Event]) -> Path:
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text("")
    (folder / STATE_FILE).write_text(json.dumps(state()))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_status_is_read_from_the_ends_of_a_long_journal(tmp_path: Path) -> None:
    wakes = [{**WAKE, "t": 103.0 + i, "tokens": 64 * i, "padding": "x" * 500} for i in range(40_000)]
    run_dir = make_run(tmp_path, [START, *wakes])
    begin = time.perf_counter()
    found = read_status(run_dir)
    spent = time.perf_counter() - begin
    assert (found.tokens, found.stream_tokens, found.process, found.state) == (64 * 39_999, 4096, 7, "died")
    assert spent < 0.5, f"{spent:.2f} s for a journal of {(run_dir / 'events.jsonl').stat().st_size >> 20} MiB"


def test_a_tail_holds_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps({"t": i, "event": "e"}) + "\n" for i in range(10)) + '{"t": 10')
    whole = [event["t"] for event in tail_events(path)]
    assert whole == list(range(10))
    size = path.stat().st_size
    for end in range(1, size):
        found = [event["t"] for event in tail_events(path, end)]
        assert found == whole[len(whole) - len(found) :]
    path.write_text("broken\n")
    with pytest.raises(ValueError, match=r"near its end is no event: b'broken'; delete the line"):
        tail_events(path)


def test_a_look_neither_sees_nobody_nor_keeps_anybody_out(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with hold_lock(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(ValueError, match="is being run by another process"):
            hold_lock(tmp_path)
    assert not is_held(tmp_path)
    with open(tmp_path / ".lock", "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match="is being run"):
            hold_lock(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: it has no config\.yaml; name a directory like"):
        read_status(tmp_path)
