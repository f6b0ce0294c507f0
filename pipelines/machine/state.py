"""What a run must remember across a crash, and the phases it goes through. Plain data; a driver keeps it.

What dies with the processes anyway (who runs, what is in flight, how many restarts are left) is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Dict, List, Mapping

from pipelines.machine.records import RoundRecord
from pipelines.wake.report import Mark

STATE_FILE = "checkpoints/coordinator.json"
"""Where a driver keeps it, in the run directory."""


@dataclass(frozen=True, order=True)
class Trial:
    """One control: a strategy at a step size."""

    strategy: str
    learning_rate: float

    @property
    def name(self) -> str:
        """As the run's state has it: replay@0.002."""
        return f"{self.strategy}@{self.learning_rate!r}"

    @classmethod
    def of(cls, name: str) -> Trial:
        """The trial of a name."""
        strategy, _, rate = name.partition("@")
        return cls(strategy, float(rate))


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
    """Saved whole after every change that a resume must see."""

    phase: Phase = Phase.BASE
    live: int = 0
    """Number of the live release."""
    next_round: int = 1
    consolidated_key: int = -1
    """Last stream key that the live release has been trained on."""
    last_mark: int = 0
    """Stream position of the newest mark that was queued, in tokens."""
    tokens: int = 0
    """Stream position of the learner."""
    queue: List[Mark] = field(default_factory=list)
    """Marks that wait for a decision (the first may be with the pool)."""
    rounds: List[RoundRecord] = field(default_factory=list)
    """Decided rounds."""
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
    """Wall seconds by phase, over all attempts. The driver's: the machine has no clock."""
    rollbacks: List[Dict[str, Any]] = field(default_factory=list)
    """Releases that were made live again: release, restores, replaces, fingerprint."""
    audit: Dict[str, Any] = field(default_factory=dict)
    """End of the audit log (pipelines/report/audit.py): length, head, entries that may not be in the file yet. The
    driver's: it chains the entries that the machine gives it, and saves both in one write."""
    control: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    """Rows and FLOPs of finished controls by name (`Trial.name`): replay@0.002."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunState:
        """What `to_json` gave."""
        queue = [Mark(**mark) for mark in plain.get("queue", [])]
        rounds = [RoundRecord.from_json(record) for record in plain.get("rounds", [])]
        return cls(**{**plain, "phase": Phase(plain["phase"]), "queue": queue, "rounds": rounds})

    def to_json(self) -> Dict[str, Any]:
        """As a JSON-able mapping."""
        queue, rounds = [dict(vars(mark)) for mark in self.queue], [record.to_json() for record in self.rounds]
        return {**vars(self), "phase": self.phase.value, "queue": queue, "rounds": rounds}

    def copy(self) -> RunState:
        """The state as it is now, untouched by what comes. Entries are never changed, only the containers are."""
        return RunState(**{name: _copied(value) for name, value in vars(self).items()})

    def enter(self, phase: Phase) -> None:
        """Move on; phases follow one another, never back."""
        assert NEXT[self.phase] == phase, f"no way from {self.phase.value} to {phase.value}"
        self.phase = phase

    def seen_at(self, tokens: int) -> List[str]:
        """Streamed sources of which something lies before a stream position."""
        return [source for source, start in self.starts.items() if start < tokens]


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value
