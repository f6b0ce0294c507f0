"""The view in the terminal: a living panel where somebody watches, plain lines where nobody does.

ViewState follows the journal's events and knows nothing of terminals; describe() and render() turn events and state
into text and panels.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Optional

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.report.events import Event, describe_round, short_number
from pipelines.report.looks import look_points

WAKE_SECONDS = 5.0  # least time between two plain lines about waking
LIT_SECONDS = 2.0  # how long a written level stays lit
MESSAGES = 5
ROUNDS = 8
DECISIONS = {"promoted": "green", "rejected": "red"}


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


class LiveView:
    """Shows a run while it happens. On a terminal a panel that redraws itself, elsewhere one line per event.

    Use as a context manager and give it every event: `with LiveView(name) as view: view.handle(event)`.
    """

    def __init__(self, run_name: str = "", console: Optional[Console] = None) -> None:
        """run_name: shown in the header. console: where to write; standard output if None."""
        self.state = ViewState()
        self._run_name = run_name
        self._console = console or Console()
        self._live: Optional[Live] = None
        self._last_wake = float("-inf")

    def __enter__(self) -> LiveView:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(render(self.state, self._run_name), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._live is not None:
            self._live.stop()  # draws the last state once more
            self._live = None

    def handle(self, event: Event) -> None:
        """Take in one event and show it: at once, or, for waking in plain lines, at most every five seconds."""
        self.state.update(event)
        if self._live is not None:
            # Built here, because the thread that redraws must not walk through a state that changes meanwhile.
            self._live.update(render(self.state, self._run_name))
            return
        if event["event"] == "wake":
            if self.state.now - self._last_wake < WAKE_SECONDS:
                return
            self._last_wake = self.state.now
        text = describe(event)
        if text:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(event: Event) -> str:
    """One line about an event; empty for kinds that say nothing to people."""
    kind, tokens = event["event"], f"{int(event.get('tokens') or 0):,}"
    number = f"round {event.get('round')}"
    if kind == "run_started":
        levels = ", ".join(f"{name} every {level['period']:,}" for name, level in event.get("levels", {}).items())
        verb = "resumed" if event.get("resumed") else "started"
        about = f"about {int(event.get('stream_tokens') or 0):,} tokens of {', '.join(event.get('sources', ()))}"
        return f"{verb} {about}" + (f"; levels: {levels} tokens" if levels else "")
    if kind == "wake":
        scores = _scores(dict(pair for step in event.get("steps", ()) for pair in (step.get("bpb") or {}).items()))
        return f"wake   {tokens} tokens  {short_number(event.get('tokens_per_second') or 0)} tok/s  {scores}".rstrip()
    if kind == "gate":
        figures = describe_round(event.get("decision"), event.get("figures") or {})
        reason = event.get("reason")
        return f"{number} {figures}" + (f" ({reason})" if reason and event.get("decision") != "promoted" else "")
    if kind == "round_progress":
        loss = event.get("loss")
        return f"{number} step {event.get('step')} of {event.get('steps')}" + (
            "" if loss is None else f", loss {loss:.3f}"
        )
    lines = {
        "base_finished": lambda: f"base   {event['origin']}, {tokens} tokens in {event.get('seconds') or 0:.1f} s",
        "round_queued": lambda: (
            f"{number} queued at {tokens} tokens, snapshot {event.get('snapshot')}"
            + (f": {event['why']['text']}" if event.get("why") else "")
        ),
        "plan_changed": lambda: (
            f"plan   {event.get('reason')}: share of recent experience {event.get('recent'):.3g}, "
            f"step size {event.get('lr'):.3g}"
        ),
        "rollback": lambda: f"release {event.get('release')} restores release {event.get('restores')}",
        "audit_damaged": lambda: f"audit log: {event.get('missing')} entries are missing; {event.get('remedy')}",
        "round_started": lambda: (
            f"{number} started: {event.get('steps')} steps on {event.get('ranks')} ranks, "
            f"ZeRO {event.get('zero_stage')}, from release {event.get('anchor')}"
        ),
        "round_finished": lambda: f"{number} trained: {event.get('steps')} steps in {event.get('seconds') or 0:.1f} s",
        "adopted": lambda: f"adopted release {event.get('release')} at {tokens} tokens",
        "matrix_row": lambda: f"probe  release {event.get('release')}: {_scores(event.get('row') or {})}",
        "quarantined": lambda: f"quarantined {event.get('source')} {event.get('origin')}: {event.get('reason')}",
        "failure": lambda: (
            f"failure in {event.get('part')}: {event.get('error')}; {event.get('restarts_left')} restarts left"
        ),
        "control": lambda: (
            f"control {event.get('strategy')} lr {event.get('learning_rate'):g} at {tokens} tokens: "
            f"{_scores(event.get('row') or {})}"
        ),
        "control_finished": lambda: (
            f"control {event.get('strategy')} lr {event.get('learning_rate'):g} ended: {_ending(event)}"
        ),
        "no_controls": lambda: f"no controls: {event.get('reason')}",
        "look": lambda: _describe_look(event),
        "stopped": lambda: f"stopped at {tokens} tokens: {event.get('reason')}",
        "finished": lambda: f"finished in {event.get('seconds') or 0:.1f} s",
    }
    return lines[kind]() if kind in lines else ""


def render(state: ViewState, run_name: str) -> RenderableType:
    """The panel of a state."""
    header = Text.assemble((run_name or "circadian", "bold"), "  ", (state.phase, "cyan"), f"  release {state.release}")
    total = max(1, state.stream_tokens, state.tokens)
    bar = Table.grid(padding=(0, 2))
    speed = f"{short_number(state.tokens_per_second)} tok/s"
    bar.add_row(ProgressBar(total=total, completed=state.tokens, width=40), f"{state.tokens:,} of {total:,}", speed)
    parts: list[RenderableType] = [bar, Text(), _render_levels(state), Text(), _render_sources(state)]
    if state.rounds:
        parts += [Text(), _render_rounds(state)]
    if state.messages:
        parts += [
            Text(),
            *(Text(message, style="dim", overflow="ellipsis", no_wrap=True) for message in state.messages),
        ]
    return Panel(Group(*parts), title=header, title_align="left", padding=(1, 2))


def _render_levels(state: ViewState) -> Text:
    text = Text()
    for name in sorted(state.levels, key=lambda name: state.levels[name].period):
        level = state.levels[name]
        style = "bold black on bright_yellow" if state.now - level.last < LIT_SECONDS else "dim"
        text.append(f" {name} ", style=style)
        text.append(f" {level.writes:,} writes    ")
    return text


def _render_sources(state: ViewState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("source")
    columns = {"online bpb": state.online, "last probe": state.probe, "final": state.final}
    if state.recalled:
        columns = {"online bpb": state.online, "with recall": state.recalled, **columns}
    for column in columns:
        table.add_column(column, justify="right")
    for source in state.sources:
        cells = [_score(scores.get(source)) for scores in columns.values()]
        table.add_row(Text(source), *cells, style="bold" if source in state.current else "")
    return table


def _render_rounds(state: ViewState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("round", "state", "progress", "gate"):
        table.add_column(column)
    for number in sorted(state.rounds)[-ROUNDS:]:
        view = state.rounds[number]
        progress: RenderableType = Text()
        if view.steps:
            loss = "" if view.loss is None else f"  loss {view.loss:.3f}"
            progress = Table.grid(padding=(0, 1))
            progress.add_row(
                ProgressBar(total=view.steps, completed=view.step, width=16), f"{view.step}/{view.steps}{loss}"
            )
        gate = describe_round(view.state, view.figures).partition(": ")[2] if view.state in DECISIONS else ""
        table.add_row(str(number), Text(view.state, style=DECISIONS.get(view.state, "")), progress, Text(gate))
    return table


def _ending(event: Event) -> str:
    return "it diverged" if event.get("mean") is None else f"mean {event['mean']:.2f} bpb"


def _describe_look(event: Event) -> str:
    points = look_points([event])
    if not points:
        return ""
    served, rested = points[0].served, points[0].rested
    return (
        f"look   served {served:.3f}, release {points[0].release} alone {rested:.3f} bpb on {points[0].sources} sources"
    )


def _score(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"


def _scores(row: dict[str, Any]) -> str:
    known = [f"{source} {value:.2f}" for source, value in row.items() if value is not None]
    return f"{', '.join(known)} bpb" if known else ""
