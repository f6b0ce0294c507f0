"""What a coordinator remembers: there and back, replaced whole, and phases in their order only."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest

from cluster.driver.state import FILE, Phase, RunState
from pipelines.gate.probe import Row

ORDER = [Phase.BASE, Phase.STREAM, Phase.CONTROL, Phase.REPORT, Phase.FINISHED]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / FILE).parent.mkdir()
    return tmp_path


def filled() -> RunState:
    """A state in which no field has its default."""
    return RunState(
        phase=Phase.CONTROL,
        live=3,
        next_round=5,
        consolidated_key=99,
        last_mark=2048,
        tokens=4096,
        queue=[{"tokens": 2048, "snapshot": 7, "last_key": 127, "fast": "checkpoints/fast-1.safetensors"}],
        rounds=[{"id": 1, "decision": "promoted", "figures": {"worst": {"source": "ä", "loss": 0.1}}}],
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
        control={"0.0005": [{"release": 0, "tokens": 0, "bpb": {"a": 2.0}}]},
    )


def test_a_new_run_begins_with_the_base(run_dir: Path) -> None:
    assert RunState.load(run_dir) == RunState()
    assert RunState().phase is Phase.BASE


def test_a_state_comes_back_as_it_was_saved(run_dir: Path) -> None:
    state, default = filled(), RunState()
    for field in fields(RunState):
        assert getattr(state, field.name) != getattr(default, field.name), f"{field.name} is tested with its default"
    state.save(run_dir)
    loaded = RunState.load(run_dir)
    assert loaded == state
    assert loaded.phase is Phase.CONTROL
    assert loaded.matrix_rows() == [Row(0, 0, {"a": 1.25, "b": 0.1 + 0.2})]


def test_saving_replaces_the_state_and_leaves_nothing_else(run_dir: Path) -> None:
    filled().save(run_dir)
    state = RunState.load(run_dir)
    state.enter(Phase.REPORT)
    state.tokens += 1
    state.save(run_dir)
    assert RunState.load(run_dir) == state
    assert [path.name for path in (run_dir / FILE).parent.iterdir()] == [Path(FILE).name]
    assert json.loads((run_dir / FILE).read_text())["phase"] == "report"


def test_states_do_not_share_their_lists() -> None:
    RunState().queue.append({})
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
