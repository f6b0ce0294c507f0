"""What must hold for every schedule, checked while it runs and when it is over."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Type
from typing import Counter as Counts

from pipelines.config.schema import FailureConfig
from pipelines.config.sleep import SleepConfig
from pipelines.machine import actions as do
from pipelines.machine.actions import Action
from pipelines.machine.faults import Faults
from pipelines.machine.machine import Machine
from pipelines.machine.rules import Rules
from pipelines.machine.simulated import Simulation, Speeds
from pipelines.machine.state import Phase, RunState
from tests.unit.pipelines.machine.toys import PERIOD, SOURCES, STEP, ToyParts, World, require

EVENTS = 20_000
"""Most events of a schedule; a long one has some hundreds."""
SECONDS = 100_000.0
"""Most simulated seconds of a schedule; a slow one takes some thousands."""


class Watch:
    """Sees every action before it is carried out, and what is saved."""

    def __init__(self, parts: ToyParts, rules: Rules) -> None:
        self.parts, self.rules, self.saved = parts, rules, RunState()
        self.queued: Dict[int, int] = {}
        """Marks that were ever queued, by position: round that decided them; 0 for none yet, -1 for merged."""
        self.begin()

    def begin(self) -> None:
        """A new attempt: what was in flight is gone."""
        self.told: Optional[int] = None
        """Newest release that the running learner has been told of; None: no learner is up."""
        self.round: Optional[do.StartRound] = None
        self.retries = 0
        self.stopping = False

    def __call__(self, action: Action) -> None:
        if self.stopping:
            kinds = (do.Commit, do.Record, do.End, do.GiveUp)
            told = isinstance(action, do.Record) and action.kind == "failure"
            require(isinstance(action, kinds) and not told, f"{type(action).__name__} after the learner was stopped")
        if isinstance(action, do.Commit):
            self._commit(action)
        elif isinstance(action, do.StopLearner):
            self.stopping = True
        elif isinstance(action, do.StartLearner):
            self.told = self.parts.disk.checkpoint.release
        elif isinstance(action, do.Adopt):
            assert self.told is not None
            require(action.release <= self.saved.live, "a release is adopted before its decision is saved")
            require(action.release > self.told or action.at_once, "an adoption is told after a newer one")
            self.told = action.release
        elif isinstance(action, do.Advance):
            require(
                self.told is not None and self.told >= self.saved.live, "the learner goes on, a live release unheard"
            )
        elif isinstance(action, do.StartRound):
            self._start(action)
        elif isinstance(action, do.Unpin):
            waiting = {mark.fast for mark in self.saved.queue}
            require(waiting <= set(action.keep), "weights go that a waiting round reads")

    def _start(self, action: do.StartRound) -> None:
        if action.retry:
            self.retries += 1
            require(self.round is not None and action.plan == self.round.plan, "a round is repeated with another plan")
            require(self.retries <= self.rules.failures.pool, "a round is retried beyond its budget")
        else:
            require(self.round is None, "a round starts while another is under way")
            self.retries = 0
        require(bool(self.saved.queue) and self.saved.queue[0].tokens == action.plan.tokens, "a round without a mark")
        require(action.plan.round == len(self.saved.rounds) + 1, "a round has the wrong number")
        self.round = action

    def _commit(self, action: do.Commit) -> None:
        old, new = self.saved, action.state
        require(new.live >= old.live and new.live in {*self.parts.disk.releases, 0}, "live goes back, or is not there")
        require(new.rounds[: len(old.rounds)] == old.rounds, "a decided round is changed")
        require(len(new.rounds) <= len(old.rounds) + 1, "two rounds are decided at once")
        queue, merged = {mark.tokens for mark in new.queue}, 0
        for mark in new.queue:
            require(self.queued.get(mark.tokens, 0) == 0, f"the mark at {mark.tokens} is queued again")
            self.queued[mark.tokens] = 0
        for record in new.rounds[len(old.rounds) :]:
            require(self.queued.get(record.tokens) == 0, f"round {record.id} decides what is decided or was never due")
            self.queued[record.tokens] = record.id
            self.round = None
            kind = "promotion" if record.promoted else "rejection"
            require([entry.kind for entry in action.entries][:1] == [kind], "a decision is saved without its entry")
            require(record.release is None or not record.dreams or self._dreamt(record.release), "dreams are missing")
        for mark in old.queue:
            if mark.tokens not in queue and self.queued[mark.tokens] == 0:
                self.queued[mark.tokens], merged = -1, merged + 1
        require(not merged or len(new.queue) >= self.rules.sleep.max_queued, "a mark is merged without need")
        self.saved = new

    def _dreamt(self, release: int) -> bool:
        return (release, 0) in self.parts.disk.dreams

    def finished(self) -> None:
        """The run is through."""
        state, disk = self.saved, self.parts.disk
        require(state.phase == Phase.FINISHED and not state.queue, "the run is finished with rounds that wait")
        require(disk.stored == list(range(self.parts.world.length // STEP)), "experience is lost or doubled")
        require(all(times == 1 for times in disk.dreams.values()), "dreams are doubled")
        dreamt = {number for number, fact in disk.releases.items() if fact.record is not None and fact.record.dreams}
        require({number for number, _ in disk.dreams} == dreamt, "dreams are lost")
        require(state.live == max(disk.releases) == disk.checkpoint.release, "the last release is not adopted")
        require(0 not in self.queued.values(), "a mark was queued and never decided")
        least = PERIOD // 10
        due = [tokens for tokens in range(STEP, self.parts.world.length + 1, STEP) if self.parts.world.due(tokens)]
        if self.parts.world.length - max(due, default=0) >= least:
            due.append(self.parts.world.length)
        missing = [tokens for tokens in due if tokens not in self.queued]
        require(not missing, f"marks at {missing} were due and never queued")
        require([record.id for record in state.rounds] == list(range(1, len(state.rounds) + 1)), "rounds have gaps")
        live = [record.release for record in state.rounds if record.release is not None]
        require(live == list(range(1, state.live + 1)), "releases have gaps")
        require([row["release"] for row in state.rows] == [0, *live], "rows have gaps")
        require(len(state.control) == 2 if self.rules.control else not state.control, "controls are missing")
        ends = {"one": self.parts.world.length // 2, "two": self.parts.world.length}
        require(state.ends == ends and state.starts == {"one": 0, "two": ends["one"]}, "spans are wrong")


@dataclass
class Counted:
    """What schedules went through."""

    schedules: int = 0
    attempts: int = 0
    events: int = 0
    ends: Counts[str] = field(default_factory=Counter)
    """Attempts by their end."""
    faults: Counts[str] = field(default_factory=Counter)
    rounds: int = 0
    merged: int = 0

    def line(self, seconds: float) -> str:
        """All in one line."""
        ends = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.ends.items()))
        faults = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.faults.items()))
        return (
            f"{self.schedules:,} schedules in {seconds:.1f} s: {self.events:,} events, {self.attempts:,} attempts "
            f"({ends}), faults ({faults}), {self.rounds:,} rounds decided, {self.merged:,} marks merged, 0 violations"
        )


@dataclass(frozen=True)
class Schedule:
    """One random schedule: world, rules, speeds and faults, all functions of a seed."""

    world: World
    rules: Rules
    speeds: Speeds
    faults: Faults

    @classmethod
    def of(cls, seed: int) -> Schedule:
        """The schedule of a seed."""
        draw = random.Random(seed)
        pick: Any = draw.choice
        world = World(
            seed, length=pick((64, 96, 132, 200, 203 - 203 % STEP + 8)), extra=pick((0.0, 0.0, 0.05, 0.15)),
            reject=pick((0.0, 0.3, 0.7)), dreams=pick((0.0, 0.5, 1.0)), every=pick((1, 3, 5, 50)),
            idle=draw.random() < 0.1,
        )  # fmt: skip
        rules = Rules(
            PERIOD, STEP, SOURCES, ("base",), 2.0, seed, deterministic=draw.random() < 0.4,
            sleep=SleepConfig(max_queued=pick((1, 2, 4))), release_after_round=draw.random() < 0.3,
            failures=FailureConfig(pick((0, 1, 3)), pick((0, 1, 3)), pick((0, 1, 3))), control=draw.random() < 0.3,
        )  # fmt: skip
        speeds = Speeds(pick((1.0, 4.0)), pick((0.3, 3.0, 30.0)), start=pick((0.0, 2.0)), answer=pick((0.0, 0.1, 7.0)))
        return cls(world, rules, speeds, _faults(seed, draw))


def _faults(seed: int, draw: random.Random) -> Faults:
    if draw.random() < 0.1:
        return Faults(seed)
    pick: Any = draw.choice
    often = pick((0.02, 0.1, 0.3))
    kinds = ("learner", "pool", "publish", "services")
    chances = {kind: often if draw.random() < 0.6 else 0.0 for kind in kinds}
    return Faults(
        seed, **chances, users=pick((0.0, 0.1)), late=pick((0.0, 0.5, 1.0)), stop=pick((0.0, 0.01, 0.1)),
        crash=pick((0.0, 0.01, 0.05)), most=pick((1, 3, 10, 25)),
    )  # fmt: skip


def check_schedule(
    schedule: Schedule,
    counted: Optional[Counted] = None,
    make: Type[Machine] = Machine,
    kind: Type[Simulation] = Simulation,
) -> Simulation:
    """Give the same command again and again until the run is finished. Violation where a property does not hold."""
    parts = ToyParts(schedule.world)
    watch = Watch(parts, schedule.rules)
    run = kind(schedule.rules, parts, schedule.speeds, schedule.faults, make, watch)
    counted = counted or Counted()
    ends: List[str] = []
    while not ends or ends[-1] != "finished":
        watch.begin()
        watch.saved = run.saved
        ended = run.attempt(EVENTS)
        ends.append("crashed" if ended is None else ended.kind if isinstance(ended, do.End) else "gave up")
        require(run.now < SECONDS, "no end within the time")
        if run.asked_at is not None and ends[-1] != "crashed":
            require(run.now - run.asked_at <= schedule.speeds.grace + 1e-6, "a stop takes longer than it may")
    watch.finished()
    counted.schedules += 1
    counted.attempts += run.attempts
    counted.events += run.events
    counted.ends.update(ends)
    counted.faults.update(run.dice.struck)
    counted.rounds += len(run.saved.rounds)
    counted.merged += sum(decided == -1 for decided in watch.queued.values())
    return run
