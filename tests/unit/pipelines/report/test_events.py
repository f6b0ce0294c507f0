"""The journal: what is written is read back, a torn end is repaired, anything else is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipelines.report.events import EventLog, build_timeline, read_events


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog(path) as log:
        first = log.emit("wake", tokens=np.int64(2048), steps=[{"bpb": {"cpp": np.float32(2.5)}}], release=0)
        log.emit("stopped", reason="Zeit für Schlaf", tokens=2048)
    events = list(read_events(path))
    assert events[0] == first
    assert [event["event"] for event in events] == ["wake", "stopped"]
    assert events[0]["steps"][0]["bpb"]["cpp"] == 2.5
    assert events[1]["reason"] == "Zeit für Schlaf"
    assert events[0]["t"] <= events[1]["t"]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.emit(
            "round_finished", loss={"total": math.nan, "truth": np.float32("inf")}, path=tmp_path, kinds={"b", "a"}
        )
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] == {"total": None, "truth": None}
    assert record["kinds"] == ["a", "b"]


@pytest.mark.parametrize("torn", [b'{"t": 3, "ev', b'{"t": 3, "event": "wake"}', b"\0" * 200_000])
def test_a_torn_end_is_ignored_and_cut_on_open(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.emit("wake", tokens=1)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [event["tokens"] for event in read_events(path)] == [1]
    with EventLog(path) as log:
        assert path.read_bytes() == whole
        log.emit("wake", tokens=2)
    assert [event["tokens"] for event in read_events(path)] == [1, 2]


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"t": 1')
    EventLog(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1, 2]\n", b'{"t": 1}\n', b"\xff\xfe\n"])
def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"t": 1, "event": "wake"}\n' + line + b'{"t": 2, "event": "wake"}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(read_events(path))


def test_a_value_json_cannot_hold_is_refused_and_leaves_the_journal_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        with pytest.raises(TypeError):
            log.emit("wake", tokens=object())
        log.emit("wake", tokens=1)
    assert [event["tokens"] for event in read_events(path)] == [1]


def test_timeline_counts_replayed_steps_once_and_leaves_out_pauses() -> None:
    def step(tokens: int, bpb: float) -> dict[str, object]:
        return {"tokens": tokens, "bpb": {"cpp": bpb}, "surprise": {"cpp": bpb}, "written": ["fast"]}

    start = {"event": "run_started", "sources": ["cpp"], "levels": {"fast": {"period": 10}}, "stream_tokens": 40}
    events = [
        {"t": 100.0, **start, "resumed": False},
        {"t": 101.0, "event": "round_queued", "round": 1},
        {"t": 102.0, "event": "round_started", "round": 1},
        {"t": 110.0, "event": "wake", "tokens": 20, "steps": [step(10, 4.0), step(20, 3.0)]},
        {"t": 5000.0, **start, "resumed": True},
        {"t": 5001.0, "event": "round_started", "round": 1},
        {"t": 5002.0, "event": "wake", "tokens": 30, "steps": [step(20, 3.5), step(30, 2.0)]},
        {"t": 5003.0, "event": "round_finished", "round": 1},
        {"t": 5004.0, "event": "gate", "round": 1, "decision": "promoted", "figures": {"mean_change": -0.1}},
        {"t": 5005.0, "event": "adopted", "release": 1, "tokens": 30},
    ]
    timeline = build_timeline(events)
    assert timeline.bpb["cpp"] == [(10, 4.0), (20, 3.5), (30, 2.0)]
    assert timeline.writes["fast"] == [10, 20, 30]
    assert timeline.resumes == [10.0]
    assert timeline.seconds == 15.0
    assert timeline.adoptions == [(30, 1)]
    (span,) = timeline.rounds
    assert (span.queued, span.started, span.finished, span.decision) == (1.0, 11.0, 13.0, "promoted")


def test_timeline_of_nothing_is_empty() -> None:
    timeline = build_timeline([])
    assert timeline.bpb == {} and timeline.rounds == [] and timeline.seconds == 0.0


def step(tokens: int, bpb: dict[str, float], size: dict[str, int], recalled: dict[str, float]) -> dict[str, object]:
    return {"tokens": tokens, "bpb": bpb, "bytes": size, "recalled": recalled, "surprise": {}, "written": []}


def journal(*steps: dict[str, object]) -> list[dict[str, object]]:
    return [{"t": float(i), "event": "wake", "tokens": one["tokens"], "steps": [one]} for i, one in enumerate(steps)]


def test_online_loss_is_bits_over_bytes() -> None:
    one = step(10, {"a": 2.0, "b": 6.0}, {"a": 700, "b": 100}, {"a": 1.0, "b": 5.0})
    found = build_timeline(journal(one, step(20, {"a": 4.0}, {"a": 800}, {"a": 1.0}))).read
    assert found.bpb == pytest.approx((1400 + 600 + 3200) / 1600)
    assert found.recalled_bpb == pytest.approx((700 + 500 + 800) / 1600)
    again = build_timeline(journal(one, one)).read  # replayed after a restart
    assert again.bytes == 800


def test_online_loss_with_and_without_recall_is_of_the_same_text() -> None:
    before = step(10, {"a": 5.0}, {"a": 100}, {})
    both = build_timeline(journal(before, step(20, {"a": 3.0}, {"a": 100}, {"a": 2.0}))).read
    assert (both.bpb, both.recalled_bpb, both.bytes) == (3.0, 2.0, 100)
    off = build_timeline(journal(step(20, {"a": 3.0}, {"a": 100}, {"a": 2.0}), step(30, {"a": 9.0}, {"a": 9}, {}))).read
    assert (off.bpb, off.recalled_bpb) == (3.0, 2.0)
    alone = build_timeline(journal(before)).read
    assert (alone.bpb, alone.recalled_bpb) == (5.0, None)
    old = {key: value for key, value in before.items() if key != "bytes"}  # of a version that did not count bytes
    assert build_timeline(journal(old)).read.bpb is None and build_timeline([]).read.recalled_bpb is None
