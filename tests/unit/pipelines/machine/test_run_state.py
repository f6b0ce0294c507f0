"""What a run remembers: there and back as JSON, copies that stay as they are, and phases in their order only."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import product

import pytest

from pipelines.machine.records import RoundRecord
from pipelines.machine.state import Phase, RunState
from pipelines.wake.report import Mark

ORDER = [Phase.BASE, Phase.STREAM, Phase.CONTROL, Phase.REPORT, Phase.FINISHED]


def filled() -> RunState:
    """A state in which no field has its default."""
    return RunState(
        phase=Phase.CONTROL,
        live=3,
        next_round=5,
        consolidated_key=99,
        last_mark=2048,
        tokens=4096,
        queue=[Mark(2048, 7, 127, "checkpoints/fast-1.safetensors", {"text": "due"})],
        rounds=[RoundRecord(1, 64, 0, 1, 5, "promoted", figures={"worst": {"source": "ä"}}, optimizer_bytes=(3, 4))],
        rows=[{"release": 0, "tokens": 0, "bpb": {"a": 1.25, "b": 0.1 + 0.2}}],
        starts={"b": 0, "c": 1024},
        ends={"b": 1024, "c": 2048},
        cursor={"key": 128, "positions": {"b": [64, 3, 17, 1024]}},
        quarantined=[["b", "b.txt#3", "not UTF-8"]],
        base_rows=12,
        wake={"steps": 3.0, "tokens": 96.0, "inside": 0.5, "wall": 0.75},
        flops={"wake": 1e15, "sleep": 2.0, "control": 3.0, "base": 4.0},
        seconds={"base": 1.5},
        rollbacks=[{"release": 3, "restores": 1, "replaces": 2, "fingerprint": "ab"}],
        audit={"length": 1, "head": "cd", "unwritten": [{"sequence": 0}]},
        control={"replay@0.0005": {"rows": [{"release": 0, "tokens": 0, "bpb": {"a": 2.0}}], "flops": 5.0}},
    )


def test_a_state_comes_back_from_json_as_it_was() -> None:
    state, default = filled(), RunState()
    for field in fields(RunState):
        assert getattr(state, field.name) != getattr(default, field.name), f"{field.name} is tested with its default"
    loaded = RunState.from_json(json.loads(json.dumps(state.to_json())))
    assert loaded == state
    assert loaded.phase is Phase.CONTROL and loaded.rounds[0].optimizer_bytes == (3, 4)


def test_a_copy_stays_as_it_is() -> None:
    state = filled()
    copy = state.copy()
    state.queue.clear()
    state.wake["steps"] += 1
    state.rounds.append(state.rounds[0])
    assert copy == filled()


def test_a_record_keeps_its_json() -> None:
    record = RoundRecord(1, 64, 0, None, 5, "rejected", dreams={"kept": 2})
    assert RoundRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert "dreams" not in RoundRecord(1, 64, 0, None, 5, "rejected").to_json()
    old = {"id": 1, "tokens": 64, "anchor": 0, "release": None, "steps": 5, "decision": "rejected"}
    assert RoundRecord.from_json(old).trainer == "cold", "records of older runs lack what came later"


def test_states_do_not_share_their_lists() -> None:
    RunState().queue.append(Mark(1, 1, 1, ""))
    RunState().wake["steps"] += 1
    assert RunState().queue == [] and RunState().wake["steps"] == 0.0


def test_phases_follow_one_another() -> None:
    state = RunState()
    for phase in ORDER[1:]:
        state.enter(phase)
    assert state.phase is Phase.FINISHED


@pytest.mark.parametrize(
    ("at", "to"), [(a, b) for (i, a), (j, b) in product(enumerate(ORDER), enumerate(ORDER)) if j != i + 1]
)
def test_no_phase_is_skipped_or_entered_again(at: Phase, to: Phase) -> None:
    state = RunState(phase=at)
    with pytest.raises((AssertionError, KeyError)):
        state.enter(to)
    assert state.phase is at


def test_sources_seen_at_a_position() -> None:
    state = RunState(starts={"b": 0, "c": 1024})
    assert state.seen_at(0) == []
    assert state.seen_at(1) == state.seen_at(1024) == ["b"]
    assert state.seen_at(1025) == ["b", "c"]
