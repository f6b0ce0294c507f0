"""The run's journal: one JSON object per line, appended by the driver, read by the live view, the plots and people."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

Event = dict[str, Any]
_BLOCK = 1 << 16


class EventLog:
    """Append-only journal. Opening it cuts off a last line that a crash tore.

    Not safe for two writers; the driver is the only one.
    """

    def __init__(self, path: Path) -> None:
        """Open path for appending, making it and its folder where absent. Raises OSError if that is impossible."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one emit is one write(), so a reader never meets half a line of a living writer.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        _cut_torn_line(self.path)

    def emit(self, event: str, **fields: Any) -> Event:
        """Append one event and return it as written, with `t` (unix seconds) and `event` first.

        Numbers of numpy and torch become plain numbers, paths become strings, NaN and infinities become null.
        Raises OSError if the line did not fit on the disk; the journal then ends before it.
        """
        assert "t" not in fields, "t is set by the journal"
        record: Event = {"t": round(time.time(), 3), "event": event, **{key: _plain(v) for key, v in fields.items()}}
        line = to_line(record).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - (written or 0))
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes of an event fitted; is the disk full?")
        return record

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a journal in order; a last line without its newline is left out.

    Raises FileNotFoundError, and ValueError for any other line that is no JSON object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield parse_event(line, f"{path}, line {number}")


def tail_events(path: Path, size: int = 1 << 18) -> list[Event]:
    """The last events of a journal: those that lie whole within its last `size` bytes. Raises as `read_events` does."""
    with open(path, "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - size)
        file.seek(start)
        lines = file.read().split(b"\n")
    # The last piece is empty, or a line that is being written; the first may have lost its beginning.
    return [parse_event(line, f"{path}, near its end") for line in lines[1 if start else 0 : -1]]


def parse_event(line: bytes, where: str) -> Event:
    """The event of a line. ValueError, which names `where`, if it is no JSON object with a kind."""
    try:
        record = json.loads(line)
    except ValueError:  # JSON and UTF-8 errors alike
        record = None
    if not isinstance(record, dict) or "event" not in record:
        raise ValueError(f"{where} is no event: {line[:80]!r}; delete the line and try again")
    return record


def to_line(event: Event) -> str:
    """An event as its line of the journal, without the line's end."""
    return json.dumps(event, ensure_ascii=False, allow_nan=False)


def follow_events(path: Path, go_on: Callable[[], bool], pause: float = 0.3) -> Iterator[Event]:
    """Yield the events of a journal in order, those that are still to come as well.

    Args:
        go_on: whether more may come; asked whenever there is nothing new. What is written until it says no is yielded.
        pause: seconds between two looks.
    """
    with open(path, "rb") as file:
        rest, last = b"", False
        while True:
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                yield parse_event(line, str(path))
            if last:
                return
            if not lines:
                last = not go_on()
                time.sleep(0.0 if last else pause)


def stamp(t: float) -> str:
    """Unix seconds as people and programs read them: local time with its offset, ISO 8601, to the second."""
    return datetime.fromtimestamp(t).astimezone().isoformat(timespec="seconds")


def _cut_torn_line(path: Path) -> None:
    size = path.stat().st_size
    keep = size
    with open(path, "rb") as file:
        while keep > 0:
            start = max(0, keep - _BLOCK)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
    if keep < size:
        os.truncate(path, keep)


def _plain(value: Any) -> Any:
    """The same value in types that strict JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if not isinstance(value, float):
        # numpy and torch scalars; anything else is a caller's mistake and fails in json.dumps
        value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


Point = tuple[int, float]


@dataclass
class RoundSpan:
    """One consolidation round as the journal tells it. Times in running seconds, None where it did not happen (yet)."""

    id: int
    queued: Optional[float] = None
    started: Optional[float] = None
    finished: Optional[float] = None
    decision: Optional[str] = None
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass
class OnlineLoss:
    """Bits and bytes of what was read awake: of steps with recall, or of all where no step has it."""

    bits: float = 0.0
    recalled: Optional[float] = None
    bytes: int = 0

    def add(self, step: Event) -> None:
        """Take in a wake step; one without a count of bytes, or without recall beside others with it, is left out."""
        with_recall, sizes = step.get("recalled") or {}, step.get("bytes") or {}
        if with_recall and self.recalled is None:
            self.bits, self.recalled, self.bytes = 0.0, 0.0, 0
        for source, size in sizes.items():
            alone, recalled = (step.get("bpb") or {}).get(source), with_recall.get(source)
            if alone is None or (recalled is None) != (self.recalled is None):
                continue
            self.bits, self.bytes = self.bits + alone * size, self.bytes + size
            if recalled is not None and self.recalled is not None:
                self.recalled += recalled * size

    @property
    def bpb(self) -> Optional[float]:
        """Bits per byte of the weights alone."""
        return self.bits / self.bytes if self.bytes else None

    @property
    def recalled_bpb(self) -> Optional[float]:
        """Bits per byte of the same text read together with recall."""
        return self.recalled / self.bytes if self.bytes and self.recalled is not None else None


@dataclass
class Timeline:
    """A journal as series to draw.

    Stream positions are in tokens, scores in bits per byte, surprise in nats per token. Running seconds start at the
    first event and leave out the time between a stop and the next start of the run.
    """

    sources: list[str] = field(default_factory=list)
    levels: dict[str, dict[str, Any]] = field(default_factory=dict)
    bpb: dict[str, list[Point]] = field(default_factory=dict)
    surprise: dict[str, list[Point]] = field(default_factory=dict)
    recalled: dict[str, list[Point]] = field(default_factory=dict)
    """Online loss with recall; empty where there is none."""
    read: OnlineLoss = field(default_factory=OnlineLoss)
    writes: dict[str, list[int]] = field(default_factory=dict)
    adoptions: list[tuple[int, int]] = field(default_factory=list)
    """(stream position, release)"""
    positions: list[tuple[float, int]] = field(default_factory=list)
    """(running seconds, stream position)"""
    resumes: list[float] = field(default_factory=list)
    rounds: list[RoundSpan] = field(default_factory=list)
    looks: list[Event] = field(default_factory=list)
    """The served model beside the release alone, in stream order."""
    quarantined: list[Event] = field(default_factory=list)
    failures: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    stream_tokens: int = 0


def build_timeline(events: Iterable[Event]) -> Timeline:
    """Digest a journal. Steps that a resumed run replayed count once, with their latest figures."""
    timeline = Timeline()
    steps: dict[int, Event] = {}
    adoptions: dict[int, int] = {}
    rounds: dict[int, RoundSpan] = {}
    looks: dict[tuple[int, int], Event] = {}
    first = last = None
    paused = 0.0
    for event in events:
        kind, t = event["event"], float(event["t"])
        if kind == "run_started" and last is not None:
            paused += max(0.0, t - last)
        first = t if first is None else first
        last = t
        now = t - first - paused
        timeline.seconds = max(timeline.seconds, now)
        if kind == "run_started":
            _start(timeline, event, now)
        elif kind == "wake":
            timeline.positions.append((now, int(event["tokens"])))
            steps.update({int(step["tokens"]): step for step in event.get("steps", ())})
        elif kind == "adopted":
            adoptions[int(event["release"])] = int(event["tokens"])
        elif kind == "look":
            looks[int(event["tokens"]), int(event.get("release") or 0)] = event
        elif kind == "quarantined":
            timeline.quarantined.append(event)
        elif kind == "failure":
            timeline.failures.append(event)
        elif "round" in event:
            _follow(rounds.setdefault(int(event["round"]), RoundSpan(int(event["round"]))), event, now)
    timeline.adoptions = sorted((tokens, release) for release, tokens in adoptions.items())
    timeline.looks = [looks[key] for key in sorted(looks)]
    timeline.rounds = [rounds[key] for key in sorted(rounds)]
    _spread(timeline, steps)
    return timeline


def _start(timeline: Timeline, event: Event, now: float) -> None:
    timeline.sources = list(event.get("sources", ()))
    timeline.levels = dict(event.get("levels", {}))
    timeline.stream_tokens = int(event.get("stream_tokens") or 0)
    if event.get("resumed"):
        timeline.resumes.append(now)


def _follow(span: RoundSpan, event: Event, now: float) -> None:
    kind = event["event"]
    if kind == "round_queued":
        span.queued = now
    elif kind == "round_started":
        # A round that a crash cut short runs again; its last run is the one that counts.
        span.started, span.finished = now, None
    elif kind == "round_finished":
        span.finished = now
    elif kind == "gate":
        span.decision, span.reason = event.get("decision"), event.get("reason") or ""
        span.figures = event.get("figures") or {}


def _spread(timeline: Timeline, steps: dict[int, Event]) -> None:
    for tokens in sorted(steps):
        step = steps[tokens]
        timeline.read.add(step)
        for series, key in (
            (timeline.bpb, "bpb"),
            (timeline.surprise, "surprise"),
            (timeline.recalled, "recalled"),
        ):
            for source, value in (step.get(key) or {}).items():
                if value is not None:
                    series.setdefault(source, []).append((tokens, float(value)))
        for level in step.get("written") or ():
            timeline.writes.setdefault(level, []).append(tokens)
    timeline.sources = list(dict.fromkeys([*timeline.sources, *timeline.bpb, *timeline.surprise]))


# Words that the plots, the report and the live view share.


def short_number(value: float) -> str:
    """1234567 as 1.23M: three figures and a suffix up to E (10^18); beyond, scientific."""
    for suffix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}" if abs(value) < 1000 * size else f"{value:.3g}"
    return f"{value:.3g}"


def describe_round(decision: Optional[str], figures: Mapping[str, Any]) -> str:
    """`promoted: mean -0.31 bpb, worst python +0.04`; empty without a decision."""
    if not decision:
        return ""
    parts = []
    if figures.get("mean_change") is not None:
        parts.append(f"mean {figures['mean_change']:+.2f} bpb")
    worst = figures.get("worst") or {}
    if worst.get("source") and worst.get("loss") is not None:
        parts.append(f"worst {worst['source']} {worst['loss']:+.2f}")
    return f"{decision}: {', '.join(parts)}" if parts else decision
