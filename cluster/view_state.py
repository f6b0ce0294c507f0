"""What there is to show about a run: follows the journal's events and knows nothing of terminals."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Optional

from pipelines.report.events import Event
from pipelines.report.lines import describe

MESSAGES = 5


@dataclass
class LevelView:
    """One level: its period in tokens, its owner, its writes so far and the unix time of the last one."""

    period: int = 0
    owner: str = "learner"
    writes: int = 0
    last: float = float("-inf")


@dataclass
class RoundView:
    """One round: its state (waiting, running, finished, promoted, rejected), progress in steps and gate figures."""

    id: int
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: Optional[float] = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class ViewState:
    """What there is to show about a run. Tokens are stream positions, scores bits per byte, times unix seconds."""

    phase: str = "starting"
    now: float = 0.0
    tokens: int = 0
    stream_tokens: int = 0
    tokens_per_second: float = 0.0
    release: int = 0
    sources: list[str] = field(default_factory=list)
    online: dict[str, float] = field(default_factory=dict)
    recalled: dict[str, float] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)
    levels: dict[str, LevelView] = field(default_factory=dict)
    rounds: dict[int, RoundView] = field(default_factory=dict)
    messages: deque[str] = field(default_factory=lambda: deque(maxlen=MESSAGES))

    def update(self, event: Event) -> None:
        """Take in one event of the journal. Kinds this view does not know change only its clock."""
        kind = event["event"]
        self.now = float(event.get("t", self.now))
        if kind == "run_started":
            self._start(event)
        elif kind == "wake":
            self._wake(event)
        elif kind == "adopted":
            self.release = int(event.get("release", self.release))
            for level in (level for level in self.levels.values() if level.owner == "pool"):
                level.writes, level.last = level.writes + 1, self.now
        elif kind == "matrix_row":
            self._probe(event)
        elif kind in ("stopped", "finished"):
            self.phase = kind
            self.final = dict(self.probe) if kind == "finished" else {}
        elif kind in ("control", "control_finished"):
            self.phase = "control"
        elif "round" in event:
            self._round(event)
        if kind not in ("wake", "round_progress") and (text := describe(event)):
            self.messages.append(text)

    def _start(self, event: Event) -> None:
        self.phase = "base"
        self.stream_tokens = int(event.get("stream_tokens") or 0)
        named = [*event.get("base_sources", ()), *event.get("sources", ())]
        self.sources = list(dict.fromkeys(named))
        for name, level in event.get("levels", {}).items():
            view = self.levels.setdefault(name, LevelView())
            view.period, view.owner = int(level.get("period", 0)), str(level.get("owner", "learner"))

    def _wake(self, event: Event) -> None:
        self.phase = "wake"
        self.tokens = int(event["tokens"])
        self.tokens_per_second = float(event.get("tokens_per_second") or 0.0)
        self.release = int(event.get("release", self.release))
        for step in event.get("steps", ()):
            scores = {source: float(bpb) for source, bpb in (step.get("bpb") or {}).items() if bpb is not None}
            self.online.update(scores)
            self.recalled.update({s: float(bpb) for s, bpb in (step.get("recalled") or {}).items() if bpb is not None})
            self.current = list(scores)
            for name in step.get("written") or ():
                level = self.levels.setdefault(name, LevelView())
                level.writes, level.last = level.writes + 1, self.now
        self.sources += [source for source in self.online if source not in self.sources]

    def _probe(self, event: Event) -> None:
        row = event.get("row") or {}
        self.probe.update({source: float(bpb) for source, bpb in row.items() if bpb is not None})
        self.sources += [source for source in row if source not in self.sources]

    def _round(self, event: Event) -> None:
        kind, number = event["event"], int(event["round"])
        view = self.rounds.setdefault(number, RoundView(number))
        if kind == "round_started":
            view.state, view.step, view.loss = "running", 0, None
            view.steps = int(event.get("steps") or 0)
        elif kind == "round_progress":
            view.step, view.steps = int(event.get("step") or 0), int(event.get("steps") or view.steps)
            view.loss = event.get("loss")
        elif kind == "round_finished":
            view.state, view.step = "finished", view.steps
        elif kind == "gate":
            view.state, view.figures = str(event.get("decision")), event.get("figures") or {}
