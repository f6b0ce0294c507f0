"""The coordinator's state on disk: there and back, replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.driver.state import load_state, save_state
from pipelines.machine.state import STATE_FILE, Phase, RunState
from tests.unit.pipelines.machine.test_run_state import filled


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / STATE_FILE).parent.mkdir()
    return tmp_path


def test_a_new_run_begins_with_the_base(run_dir: Path) -> None:
    assert load_state(run_dir) == RunState()
    assert RunState().phase is Phase.BASE


def test_a_state_comes_back_as_it_was_saved(run_dir: Path) -> None:
    save_state(run_dir, filled())
    assert load_state(run_dir) == filled()


def test_saving_replaces_the_state_and_leaves_nothing_else(run_dir: Path) -> None:
    save_state(run_dir, filled())
    state = load_state(run_dir)
    state.enter(Phase.REPORT)
    state.tokens += 1
    save_state(run_dir, state)
    assert load_state(run_dir) == state
    assert [path.name for path in (run_dir / STATE_FILE).parent.iterdir()] == [Path(STATE_FILE).name]
    assert json.loads((run_dir / STATE_FILE).read_text())["phase"] == "report"
