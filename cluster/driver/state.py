"""What a coordinator must remember across a crash, and the phases it goes through."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Dict, List

from nl_model.weights import write_durably
from pipelines.gate.probe import Row

FILE = "checkpoints/coordinator.json"
PINNED = "fast-"
"""How files of fast weights begin that a mark pins; their stream position in tokens follows."""


class Phase(StrEnum):
    """Phases of a run."""

    BASE = "base"
    STREAM = "stream"
    CONTROL = "control"
    REPORT = "report"
    FINISHED = "finished"


NEXT = {
    Phase.BASE: Phase.STREAM,
    Phase.STREAM: Phase.CONTROL,
    Phase.CONTROL: Phase.REPORT,
    Phase.REPORT: Phase.FINISHED,
}


@dataclass
class RunState:
    """Written atomically after every change that a resume must see."""

    phase: Phase = Phase.BASE
    live: int = 0
    """Number of the live release."""
    next_round: int = 1
    consolidated_key: int = -1
    """Last stream key that the live release has been trained on."""
    last_mark: int = 0
    """Stream position of the newest boundary that was queued, in tokens."""
    tokens: int = 0
    """Stream position of the learner."""
    queue: List[Dict[str, Any]] = field(default_factory=list)
    """Marks that wait for the pool (the first may be running)."""
    rounds: List[Dict[str, Any]] = field(default_factory=list)
    """Records of finished rounds."""
    rows: List[Dict[str, Any]] = field(default_factory=list)
    """Rows of the matrix."""
    starts: Dict[str, int] = field(default_factory=dict)
    """Stream position at which each source was first seen, in tokens."""
    ends: Dict[str, int] = field(default_factory=dict)
    """Stream position of the last token of each source so far."""
    cursor: Dict[str, Any] = field(default_factory=dict)
    quarantined: List[List[str]] = field(default_factory=list)
    """[source, origin, reason], each once."""
    base_rows: int = 0
    wake: Dict[str, float] = field(default_factory=lambda: {"steps": 0.0, "tokens": 0.0, "inside": 0.0, "wall": 0.0})
    """Wake steps taken, tokens in them, seconds inside them, seconds of the learner's life."""
    flops: Dict[str, float] = field(default_factory=lambda: {"wake": 0.0, "sleep": 0.0, "control": 0.0, "base": 0.0})
    seconds: Dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase, over all attempts."""
    rollbacks: List[Dict[str, Any]] = field(default_factory=list)
    """Releases that were made live again: release, restores, replaces, fingerprint."""
    audit: Dict[str, Any] = field(default_factory=dict)
    """End of the audit log (pipelines/report/audit.py): length, head, entries that may not be in the file yet."""
    control: Dict[str, List[Dict[str, Any]]] = field(default_factory=dict)
    """Rows of finished controls by learning rate."""

    @classmethod
    def load(cls, run_dir: Path) -> RunState:
        """The state of a run, or a new one."""
        path = run_dir / FILE
        if not path.exists():
            return cls()
        plain = json.loads(path.read_text())
        return cls(**{**plain, "phase": Phase(plain["phase"])})

    def save(self, run_dir: Path) -> None:
        """Replace the state on disk."""
        write_durably(run_dir / FILE, json.dumps(asdict(self)).encode())

    def matrix_rows(self) -> List[Row]:
        """Rows of the matrix as value objects."""
        return [Row(**row) for row in self.rows]

    def enter(self, phase: Phase) -> None:
        """Move on; phases follow one another, never back."""
        assert NEXT[self.phase] == phase, f"no way from {self.phase.value} to {phase.value}"
        self.phase = phase

    def seen_at(self, tokens: int) -> List[str]:
        """Streamed sources of which something lies before a stream position."""
        return [source for source, start in self.starts.items() if start < tokens]
