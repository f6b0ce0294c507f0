"""The coordinator's state on disk: one JSON file, replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

from nl_model.weights import write_durably
from pipelines.machine.state import STATE_FILE, RunState
from pipelines.report.status import read_state


def load_state(run_dir: Path) -> RunState:
    """The state of a run, or a new one."""
    plain = read_state(run_dir)
    return RunState.from_json(plain) if plain else RunState()


def save_state(run_dir: Path, state: RunState) -> None:
    """Replace the state on disk, durably and at once."""
    write_durably(run_dir / STATE_FILE, json.dumps(state.to_json()).encode())
