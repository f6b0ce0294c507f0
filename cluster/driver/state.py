"""The coordinator's state on disk: one JSON file, replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

from nl_model.weights import write_durably
from pipelines.machine.state import STATE_FILE, RunState


def load_state(run_dir: Path) -> RunState:
    """The state of a run, or a new one."""
    path = run_dir / STATE_FILE
    return RunState.from_json(json.loads(path.read_text())) if path.exists() else RunState()


def save_state(run_dir: Path, state: RunState) -> None:
    """Replace the state on disk, durably and at once."""
    write_durably(run_dir / STATE_FILE, json.dumps(state.to_json()).encode())
