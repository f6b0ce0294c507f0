"""What there is to show about a run: follows the journal's events and knows nothing of terminals."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Optional

from pipelines.report.events import Event
from pipelines.report.lines import OFTEN, describe, describe_ending

MESSAGES = 40


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
    reason: str = ""


@dataclass
class TrialView:
    """One trial of a control: which of how many, how far along the stream in tokens, and what it ended at."""

    strategy: str
    learning_rate: float
    number: int = 0
    planned: int = 0
    tokens: int = 0
    ending: str = ""


@dataclass
class ViewState:
    """What there is to show about a run. Tokens are stream positions, scores bits per byte, times unix seconds."""

    phase: str = "starting"
    now: float = 0.0
    tokens: int = 0
    stream_tokens: int = 0
    tokens_per_second: float = 0.0
    base_tokens: int = 0
    base_of: int = 0
    """Tokens that the base's training takes; 0 where it has nothing to train."""
    release: int = 0
    sources: list[str] = field(default_factory=list)
    online: dict[str, float] = field(default_factory=dict)
    recalled: dict[str, float] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)
    levels: dict[str, LevelView] = field(default_factory=dict)
    rounds: dict[int, RoundView] = field(default_factory=dict)
    trials: dict[tuple[str, float], TrialView] = field(default_factory=dict)
    """Trials of controls by strategy and step size."""
    messages: deque[str] = field(default_factory=lambda: deque(maxlen=MESSAGES))

    @property
    def trials_done(self) -> int:
        """Trials that have ended."""
        return sum(bool(view.ending) for view in self.trials.values())

    @property
    def trials_planned(self) -> int:
        """Trials that are known to be needed so far."""
        return max((view.planned for view in self.trials.values()), default=0)

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
        elif kind in ("control_started", "control", "control_finished"):
            self._trial(event)
        elif kind in ("base_started", "base_progress", "base_finished"):
            self._base(event)
        elif "round" in event:
            self._round(event)
        if kind not in OFTEN and (text := describe(event)):
            self.messages.append(text)

    def _start(self, event: Event) -> None:
        """A resumed run is where its journal says that it was: waking, if it ever woke, else at its base."""
        self.phase = "control" if self.trials else "wake" if self.tokens else "base"
        self.tokens_per_second, self.final = 0.0, {}
        for one in self.rounds.values():
            one.state = "waiting" if one.state in ("running", "finished") else one.state
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

    def _base(self, event: Event) -> None:
        self.phase = "base"
        if event["event"] != "base_finished":
            self.base_of = int(event.get("of") or event.get("tokens") or 0)
        if event["event"] == "base_progress":
            self.base_tokens = int(event.get("tokens") or 0)
            self.tokens_per_second = float(event.get("tokens_per_second") or 0.0)
        elif event["event"] == "base_finished":
            self.base_tokens, self.tokens_per_second = self.base_of, 0.0

    def _trial(self, event: Event) -> None:
        self.phase = "control"
        key = (str(event["strategy"]), float(event["learning_rate"]))
        view = self.trials.setdefault(key, TrialView(*key))
        if event["event"] == "control_started":
            view.number, view.planned, view.tokens = int(event["trial"]), int(event["trials"]), 0
        elif event["event"] == "control":
            view.tokens = int(event.get("tokens") or 0)
        else:
            view.ending = describe_ending(event)

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
            view.reason = str(event.get("reason") or "")
