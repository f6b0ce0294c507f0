"""Where a run is, whoever asks and whenever: read from what lies in its directory, of the journal only the ends."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from pipelines.machine.state import STATE_FILE
from pipelines.report.events import Event, read_events, stamp, tail_events

LIFE = ("run_started", "stopped", "failed", "finished")
"""Kinds that say whether the run goes on."""
INTERRUPTED = "interrupted"
"""Reason of a stop that Ctrl-C asked for."""
DIED = "died"
NOT_STARTED = "not started"


@dataclass(frozen=True)
class Rounds:
    """The rounds of sleep so far."""

    promoted: int = 0
    rejected: int = 0
    queued: int = 0
    running: Optional[int] = None
    """Number of the round that the pool is in."""
    step: int = 0
    steps: int = 0
    """Of the running one."""
    last_rejection: str = ""
    """What the gate said when it last rejected one."""


@dataclass(frozen=True)
class Controls:
    """The controls so far."""

    done: int = 0
    trials: int = 0
    """How many are known to be needed; a search that widens needs more. 0 before the first has begun."""


@dataclass(frozen=True)
class Status:
    """A run at a moment. Tokens are stream positions, scores bits per byte, times unix seconds."""

    run: str
    state: str
    """running, finished, stopped (in order), interrupted (by Ctrl-C), failed, died (without a word), not started."""
    alive: bool
    """Whether a process holds the run directory."""
    phase: str
    """base, stream, control, report or finished."""
    tokens: int = 0
    stream_tokens: int = 0
    """About how many the stream has."""
    base_tokens: int = 0
    base_of: int = 0
    """Tokens of the base's training so far, and in all; 0 where it was not trained here, or long ago."""
    tokens_per_second: Optional[float] = None
    """Of what the run reads now, or read last."""
    release: int = 0
    rounds: Rounds = field(default_factory=Rounds)
    controls: Controls = field(default_factory=Controls)
    bpb: Mapping[str, float] = field(default_factory=dict)
    """Of the newest release, by source, on held-out text."""
    online_bpb: Mapping[str, float] = field(default_factory=dict)
    """Of what was read last, by source."""
    written: Optional[float] = None
    """When the journal was last written."""
    process: Optional[int] = None
    host: str = ""
    """Which process wrote it last, and where."""
    reason: str = ""
    """Why it stopped or failed."""

    @property
    def mean_bpb(self) -> Optional[float]:
        """Mean over all sources."""
        return sum(self.bpb.values()) / len(self.bpb) if self.bpb else None

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able mapping."""
        written = None if self.written is None else stamp(self.written)
        return {**asdict(self), "mean_bpb": self.mean_bpb, "written_at": written}


def read_status(run_dir: Path) -> Status:
    """Where a run is now. ValueError where the directory is none of a run; OSError where it cannot be read."""
    run_dir = Path(run_dir)
    check_run_dir(run_dir)
    journal = run_dir / "events.jsonl"
    alive = is_held(run_dir)  # before the journal: what ends in between has said so there
    first = next(read_events(journal), None) if journal.exists() else None
    tail = tail_events(journal) if journal.exists() else []
    return build_status(run_dir.resolve().name, read_state(run_dir), first, tail, alive)


def check_run_dir(run_dir: Path) -> None:
    """ValueError unless a run was started there."""
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no config.yaml; name a directory like runs/NAME")


def read_state(run_dir: Path) -> dict[str, Any]:
    """The coordinator's state as it lies on disk; empty before its first decision."""
    path = run_dir / STATE_FILE
    if not path.exists():
        return {}
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def is_held(run_dir: Path) -> bool:
    """Whether a process holds the lock of a run directory, on this machine or, where the file system has locks, on
    another. Takes the lock for a moment, which `hold_lock` waits out."""
    try:
        with open(run_dir / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def build_status(
    run: str, state: Mapping[str, Any], first: Optional[Event], tail: Sequence[Event], alive: bool
) -> Status:
    """Put a status together.

    Args:
        state: the coordinator's, as JSON; empty where there is none yet.
        first: first event of the journal.
        tail: its last events, in order. Enough of them where they hold everything since the last `wake`.
        alive: whether a process holds the run directory.
    """
    events = [*([] if first is None else [first]), *(event for event in tail if event != first)]
    last = {str(event["event"]): event for event in events}
    life = next((event for event in reversed(events) if event["event"] in LIFE), None)
    begun = last.get("run_started", {})
    wake, base, row = last.get("wake", {}), last.get("base_progress", {}), last.get("matrix_row", {})
    trial, rows = last.get("control_started", {}), state.get("rows") or ()
    base_of = int(base.get("of") or 0)
    base_tokens = base_of if "base_finished" in last else int(base.get("tokens") or 0)
    fastest = wake or base
    return Status(
        run=str(begun.get("run") or run),
        state=_life(life, alive),
        alive=alive,
        phase=str(state.get("phase") or "base"),
        tokens=max(int(state.get("tokens") or 0), int(wake.get("tokens") or 0)),
        stream_tokens=int(begun.get("stream_tokens") or 0),
        base_tokens=base_tokens,
        base_of=base_of,
        tokens_per_second=fastest.get("tokens_per_second"),
        release=int(state.get("live") or 0),
        rounds=_rounds(state, events, alive),
        controls=Controls(len(state.get("control") or ()), int(trial.get("trials") or 0)),
        bpb=_finite(rows[-1]["bpb"] if rows else row.get("row") or {}),
        online_bpb=_finite({k: v for step in wake.get("steps") or () for k, v in (step.get("bpb") or {}).items()}),
        written=float(events[-1]["t"]) if events else None,
        process=begun.get("process"),
        host=str(begun.get("host") or ""),
        reason=str((life or {}).get("reason") or (life or {}).get("error") or ""),
    )


def _life(life: Optional[Event], alive: bool) -> str:
    if life is None:
        return "running" if alive else NOT_STARTED
    kind = str(life["event"])
    if kind == "run_started":
        return "running" if alive else DIED
    return INTERRUPTED if kind == "stopped" and life.get("reason") == INTERRUPTED else kind


def _rounds(state: Mapping[str, Any], events: Sequence[Event], alive: bool) -> Rounds:
    """Decided ones are in the state; which one runs, and how far it is, is in the journal."""
    decided = state.get("rounds") or ()
    rejected = [record for record in decided if record["decision"] != "promoted"]
    running, step, steps = None, 0, 0
    for event in events if alive else ():
        kind = event["event"]
        if kind in ("round_started", "round_progress"):
            running = int(event["round"])
            step, steps = int(event.get("step") or 0), int(event.get("steps") or 0)
        elif kind in ("gate", *LIFE):
            running, step, steps = None, 0, 0
    waiting = len(state.get("queue") or ())
    return Rounds(
        promoted=len(decided) - len(rejected),
        rejected=len(rejected),
        queued=max(0, waiting - (running is not None)),
        running=running,
        step=step,
        steps=steps,
        last_rejection=str(rejected[-1].get("reason") or "") if rejected else "",
    )


def _finite(scores: Mapping[str, Any]) -> dict[str, float]:
    return {str(source): float(bpb) for source, bpb in scores.items() if bpb is not None}
