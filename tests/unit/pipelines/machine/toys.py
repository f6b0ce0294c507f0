"""Toy parts for the simulated driver: a learner, a store, a pool and releases made of integers. What they keep on disk
survives; the rest is lost when a part dies. They check what they are asked, and raise where it must never happen."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from pipelines.machine import actions as do
from pipelines.machine.events import POOL, SERVICES, ControlTrained
from pipelines.machine.reactions import LAST
from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.wake.report import Adoption, LearnerReport, Mark, StepReport

STEP, BOUNDARY, PERIOD = 4, 8, 32
"""Tokens of a step; where the learner may adopt; period of the pool."""
SOURCES = ("base", "one", "two")
KEPT = 4
"""Marks that a checkpoint remembers."""


class Violation(AssertionError):
    """Something that must never happen."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def noise(*place: Any) -> float:
    """A number in [0, 1) that is a function of a place."""
    return zlib.crc32(repr(place).encode()) / 2**32


@dataclass(frozen=True)
class World:
    """What is given: the stream, and what the gate will say."""

    seed: int = 0
    length: int = 256
    """Tokens of the stream."""
    extra: float = 0.0
    """Share of steps after which a round is due besides the period's."""
    reject: float = 0.3
    dreams: float = 0.5
    every: int = 5
    """Steps between checkpoints."""
    flops: float = 100.0
    """Of a round."""
    idle: bool = False
    """Rounds train nothing."""

    def due(self, tokens: int) -> bool:
        return tokens % PERIOD == 0 or noise(self.seed, "mark", tokens) < self.extra


@dataclass(frozen=True)
class Memory:
    """A learner: what a checkpoint holds of it."""

    tokens: int = 0
    release: int = 0
    marks: Tuple[Mark, ...] = ()


@dataclass
class Disk:
    """What survives."""

    stored: List[int] = field(default_factory=list)
    """Keys of the store, in order; key k is the k-th step."""
    base_stored: bool = False
    dreams: Dict[Tuple[int, int], int] = field(default_factory=dict)
    """(release, number): how often it was taken in."""
    pinned: Set[str] = field(default_factory=set)
    checkpoint: Memory = Memory()
    releases: Dict[int, ReleaseFact] = field(default_factory=dict)
    candidates: Dict[int, Tuple[int, int]] = field(default_factory=dict)
    """Candidates by number: (attempt, round)."""


class ToyParts:
    """Parts of a run (pipelines/machine/simulated.py)."""

    def __init__(self, world: World) -> None:
        self.world, self.disk = world, Disk()
        self.memory: Optional[Memory] = None
        self.pending: List[Tuple[int, int]] = []
        self.since = 0
        self.service = False
        self.told: Dict[int, Mark] = {}
        """Marks by position that a checkpoint has held, or a report told."""

    def newest(self) -> Optional[ReleaseFact]:
        return self.disk.releases[max(self.disk.releases)] if self.disk.releases else None

    def lose(self, part: str) -> None:
        if part == POOL:
            self.disk.candidates.clear()
        elif part == SERVICES:
            self.service = False
        else:
            self.memory, self.pending = None, []

    # Service.

    def start_service(self) -> None:
        self.service = True

    def store_base(self) -> None:
        require(self.service, "the base is stored without a service")
        self.disk.base_stored = True

    def store_dreams(self, release: int) -> None:
        require(self.service, "dreams are stored without a service")
        record = self.disk.releases[release].record
        require(record is not None and bool(record.dreams), f"release {release} has no dreams")
        assert record is not None and record.dreams is not None
        for number in range(record.dreams["kept"]):
            self.disk.dreams.setdefault((release, number), 1)

    def _append(self, key: int) -> None:
        require(self.service, "a step is logged without a service")
        require(key <= len(self.disk.stored), f"key {key} leaves a gap behind {len(self.disk.stored)}")
        if key == len(self.disk.stored):
            self.disk.stored.append(key)

    # Learner.

    def restore(self) -> LearnerReport:
        self.memory, self.pending, self.since = self.disk.checkpoint, [], 0
        return self._report(marks=self.memory.marks)

    def advance(self, steps: int, until: Optional[int]) -> LearnerReport:
        taken: List[StepReport] = []
        marks: Tuple[Mark, ...] = ()
        adopted: Tuple[Adoption, ...] = ()
        ended = False
        while len(taken) < steps and not marks:
            if until is not None and self._me.tokens >= until:
                break
            adopted += self._adopt_pending(False)
            if self._me.tokens >= self.world.length:
                ended = True
                break
            self._append(self._me.tokens // STEP)
            self.memory = replace(self._me, tokens=self._me.tokens + STEP)
            taken.append(StepReport(self._me.tokens, 0.1, 0.0, {}, {}, {}, {}, (), ()))
            self.since += 1
            if self.world.due(self._me.tokens):
                marks = (self._mark({"text": "due"}),)
            if self.since >= self.world.every:
                self._checkpoint()
        return replace(self._report(marks, ended), steps=tuple(taken), adopted=adopted, seconds=0.1)

    def finish(self) -> LearnerReport:
        marks = (self._mark({"text": LAST}),)
        self._checkpoint()
        return self._report(marks, True)

    def adopt(self, release: int, not_before: int, at_once: bool) -> LearnerReport:
        require(release in self.disk.releases, f"release {release} is to be adopted and not published")
        require(all(release > other for other, _ in self.pending) or at_once, "an adoption comes after a newer one")
        self.pending.append((release, not_before))
        return replace(self._report(), adopted=self._adopt_pending(at_once))

    def stop(self) -> LearnerReport:
        self._checkpoint()
        return replace(self._report(), stopped=True)

    @property
    def _me(self) -> Memory:
        require(self.memory is not None, "a dead learner is called")
        assert self.memory is not None
        return self.memory

    def _mark(self, why: Dict[str, Any]) -> Mark:
        tokens = self._me.tokens
        mark = Mark(tokens, len(self.disk.stored), tokens // STEP - 1, f"fast-{tokens}-{self._me.release}", why)
        self.disk.pinned.add(mark.fast)
        known = {one.tokens: one for one in (*self._me.marks, mark)}
        self.memory = replace(self._me, marks=tuple(known[place] for place in sorted(known)[-KEPT:]))
        return mark

    def _checkpoint(self) -> None:
        self.disk.checkpoint, self.since = self._me, 0
        self.told.update({mark.tokens: mark for mark in self._me.marks})

    def _adopt_pending(self, at_once: bool) -> Tuple[Adoption, ...]:
        tokens = self._me.tokens
        ready = [release for release, not_before in self.pending if at_once or tokens >= not_before]
        if not ready or not (at_once or tokens % BOUNDARY == 0):
            return ()
        newest = max(ready)
        self.pending = [(release, at) for release, at in self.pending if release > newest]
        if newest <= self._me.release:
            return ()
        self.memory = replace(self._me, release=newest)
        self._checkpoint()
        return (Adoption(newest, tokens, 0.0),)

    def _report(self, marks: Tuple[Mark, ...] = (), ended: bool = False) -> LearnerReport:
        tokens, half = self._me.tokens, self.world.length // 2
        spans = {"one": (0, min(tokens, half))} if tokens else {}
        if tokens > half:
            spans["two"] = (half, tokens)
        return LearnerReport(tokens, self._me.release, {"key": tokens}, marks=marks, spans=spans, ended=ended)

    # Pool.

    def prepare_base(self) -> Tuple[int, float]:
        self.disk.releases.setdefault(0, ReleaseFact(0, -1, 0))
        return 3, 1.0

    def score_base(self) -> Dict[str, float]:
        require(0 in self.disk.releases and self.disk.base_stored, "the base is scored before it is there")
        return {source: 3.0 for source in SOURCES}

    def run_round(self, start: do.StartRound) -> RoundRecord:
        plan, disk = start.plan, self.disk
        require(plan.anchor == max(disk.releases), f"round {plan.round} starts from {plan.anchor}, which is not newest")
        require(plan.snapshot <= len(disk.stored) and plan.last_key < plan.snapshot, "a round reads what is not stored")
        require(plan.fast in disk.pinned, f"round {plan.round} reads {plan.fast}, which is gone")
        disk.candidates = {plan.anchor + 1: (start.attempt, plan.round)}
        fate = noise(self.world.seed, "gate", plan.round, plan.tokens, plan.anchor)
        promoted = fate >= self.world.reject
        scores = {source: 3.0 - 0.01 * plan.round for source in SOURCES}
        figures = {side: scores for side in ("candidate", "anchor", "awake")}
        figures.update(mean_change=0.0, worst={}, recent=[], checks=[])  # type: ignore[call-overload]
        dreams = {"kept": 2, "stored": plan.dreams_stored + 2} if fate % 0.1 < 0.1 * self.world.dreams else None
        steps = 0 if self.world.idle else plan.steps
        return RoundRecord(
            plan.round, plan.tokens, plan.anchor, None, steps, "promoted" if promoted else "rejected", plan.snapshot,
            figures=figures, row=figures["candidate"], flops=self.world.flops * (0.5 + fate), dreams=dreams,
        )  # fmt: skip

    def publish(self, attempt: int, record: RoundRecord) -> None:
        number = record.release
        assert number is not None
        require(self.disk.candidates.get(number) == (attempt, record.id), "what is published is no whole candidate")
        require(number == max(self.disk.releases) + 1, f"release {number} is published twice or out of order")
        del self.disk.candidates[number]
        last_key = record.tokens // STEP - 1
        self.disk.releases[number] = ReleaseFact(number, last_key, record.tokens, "", record)

    def discard(self, attempt: int, release: int) -> None:
        require(release not in self.disk.releases, "a release is discarded")
        require(self.disk.candidates.pop(release, (0, 0))[0] == attempt, "what is discarded is another's candidate")

    def unpin(self, tokens: int, keep: Sequence[str]) -> None:
        gone = {name for name in self.disk.pinned if name not in keep and int(name.split("-")[1]) <= tokens}
        self.disk.pinned -= gone

    def train_controls(self, flops_per_token: float) -> List[ControlTrained]:
        return [ControlTrained(0, rate, ({"bpb": 1.0},), 5.0) for rate in ("0.1", "0.2")]
