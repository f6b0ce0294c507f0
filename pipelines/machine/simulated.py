"""The driver in simulated time: one process, one heap of events in simulated seconds, no waiting.

It carries out the actions of a machine on `Parts`, which may compute for real (torch) or count (tests). What takes time
in a run takes simulated time here: learner and pool have speeds, rounds end when their time is over, releases arrive
late. A crash loses all but what `Commit` saved and what the parts keep on disk.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, List, Optional, Protocol, Sequence, Tuple, Type, Union

from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.actions import Action
from pipelines.machine.events import Event
from pipelines.machine.faults import Dice, Faults
from pipelines.machine.machine import Machine
from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.machine.rules import Rules
from pipelines.machine.state import Phase, RunState
from pipelines.wake.report import LearnerReport

LearnerCall = Union[do.StartLearner, do.Advance, do.Finish, do.Adopt]


class Parts(Protocol):
    """What does the work. Every method returns when it is done; how long it took is the driver's to say."""

    def newest(self) -> Optional[ReleaseFact]:
        """The newest published release."""

    def start_service(self) -> None:
        """Start the experience service; what was durable is there."""

    def store_base(self) -> None:
        """Store the base mixture."""

    def store_dreams(self, release: int) -> None:
        """Store a release's dreams, each once."""

    def prepare_base(self) -> Tuple[int, float]:
        """Make sure that release 0 is there; sequences of the base mixture, and FLOPs spent."""

    def score_base(self) -> Dict[str, float]:
        """Bits per byte of release 0 by source."""

    def restore(self) -> LearnerReport:
        """A new learner at its newest checkpoint."""

    def advance(self, steps: int, until: Optional[int]) -> LearnerReport:
        """Let the learner take steps."""

    def finish(self) -> LearnerReport:
        """Pin what came since the last mark, and checkpoint."""

    def adopt(self, release: int, not_before: int, at_once: bool) -> LearnerReport:
        """Tell the learner of a release."""

    def stop(self) -> LearnerReport:
        """Have the learner checkpoint and end."""

    def run_round(self, start: do.StartRound) -> RoundRecord:
        """Train and judge a candidate; its record says no release yet."""

    def publish(self, attempt: int, record: RoundRecord) -> None:
        """Make a candidate the release that its record names."""

    def discard(self, attempt: int, release: int) -> None:
        """Remove a candidate."""

    def unpin(self, tokens: int, keep: Sequence[str]) -> None:
        """Remove pinned weights."""

    def train_controls(self, flops_per_token: float) -> List[on.ControlTrained]:
        """Train the controls (their attempt is filled in)."""

    def lose(self, part: str) -> None:
        """A part died: learner, pool or services. What it had in memory is gone."""


@dataclass(frozen=True)
class Speeds:
    """How fast simulated parts are."""

    learner: float = 1.0
    """Tokens per second of the learner, or FLOPs per second (`unit`)."""
    pool: float = 1.0
    """FLOPs per second of the pool."""
    unit: str = "tokens"
    """What the learner's speed counts: tokens or flops."""
    start: float = 0.0
    """Seconds until a part that is started is up."""
    answer: float = 0.0
    """Seconds of every other answer: storing, publishing, adopting."""
    grace: float = 1.5
    """Seconds that a learner has to stop."""


class Crash(Exception):
    """The simulated driver's process died."""


class Simulation:
    """One run directory, so to say: several attempts may work on it one after the other.

    Args:
        make: the machine's class.
        watch: sees every action just before it is carried out.
        note: takes the journal's lines.
    """

    def __init__(
        self,
        rules: Rules,
        parts: Parts,
        speeds: Speeds = Speeds(),
        faults: Faults = Faults(),  # noqa: B008 (frozen)
        make: Type[Machine] = Machine,
        watch: Callable[[Action], None] = lambda action: None,
        note: Callable[[str, Dict[str, Any]], None] = lambda kind, fields: None,
    ) -> None:
        self.rules, self.parts, self.speeds, self.make = rules, parts, speeds, make
        self.watch, self.note, self.dice = watch, note, Dice(faults)
        self.saved, self.entries = RunState(), 0
        self.now, self.events, self.attempts = 0.0, 0, 0
        self._clear()

    def _clear(self) -> None:
        self.heap: List[Tuple[float, int, Event]] = []
        self.pushed = 0
        self.calls: Deque[LearnerCall] = deque()
        """Calls that wait for the learner, in order."""
        self.busy = self.stopping = self.serving = False
        self.ended: Optional[Action] = None
        self.asked_at: Optional[float] = None
        """When the run was asked to stop."""
        self.machine = self.make(RunState.from_json(json.loads(json.dumps(self.saved.to_json()))), self.rules)

    def attempt(self, limit: int = 1_000_000) -> Optional[Action]:
        """Run until the machine ends: End, GiveUp, or None for a crash. RuntimeError where it comes to no end.

        Args:
            limit: most events.
        """
        self.attempts += 1
        self._clear()
        try:
            self._push(0.0, on.Started(self.parts.newest()))
            while self.ended is None:
                if not self.heap:
                    raise RuntimeError("nothing is under way, and the run is not over")
                if self.events >= limit:
                    raise RuntimeError(f"no end after {limit} events")
                self._step()
        except Crash:
            return None
        finally:
            for part in (on.LEARNER, on.POOL, on.SERVICES):
                self.parts.lose(part)
        return self.ended

    def finish(self) -> RunState:
        """Run to the end of the stream, where no fault is scheduled; returns the last state. RuntimeError otherwise."""
        ended = self.attempt()
        if self.saved.phase != Phase.FINISHED:
            raise RuntimeError(f"the run came to no end: {ended}")
        return self.saved

    def _step(self) -> None:
        self.now, _, event = heapq.heappop(self.heap)
        self.events += 1
        if isinstance(event, _LearnerFree):
            self.busy = False
            self._next_call()
            return
        if isinstance(event, on.StopRequested) and self.asked_at is None:
            self.asked_at = self.now
        for action in self._handle(event):
            if self.dice.strikes("crash"):
                raise Crash
            self.watch(action)
            self._carry_out(action)
        if self.ended is None and self.dice.strikes("stop"):
            self._push(0.0, on.StopRequested())

    def _handle(self, event: Event) -> Sequence[Action]:
        return self.machine.handle(event)

    def _push(self, seconds: float, event: Any) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (self.now + seconds, self.pushed, event))

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, (do.StartLearner, do.Advance, do.Finish, do.Adopt)):
            self._call(action)
            return
        name = re.sub(r"(?=[A-Z])", "_", type(action).__name__).lower()  # StopLearner: _stop_learner
        if hasattr(self, name):
            getattr(self, name)(action)

    # The learner: one call after the other.

    def _call(self, action: LearnerCall) -> None:
        if isinstance(action, do.StartLearner):
            self._end_learner()
        self.calls.append(action)
        if not self.busy:
            self._next_call()

    def _end_learner(self) -> None:
        self.parts.lose(on.LEARNER)
        self.calls.clear()
        self.busy = self.stopping = False
        self.heap = [item for item in self.heap if not isinstance(item[2], _LearnerFree)]
        heapq.heapify(self.heap)

    def _next_call(self) -> None:
        if not self.calls:
            return
        call, self.busy = self.calls.popleft(), True
        steps = isinstance(call, do.Advance)
        if steps and not self.serving and not self.stopping:  # it cannot log, and dies of that
            self._push(self.speeds.answer, on.PartFailed(on.LEARNER, call.attempt, "could not log", False, False))
            return
        fails, kills = self.dice.strikes("learner"), False
        if not fails and steps:
            fails = kills = self.dice.strikes("services")
        if not fails:
            report = self._ask_learner(call)
            seconds = self._seconds(report)
            self._push(seconds, self._answer(call, report))
            self._push(seconds, _LearnerFree())
            return
        self._lose_learner(call, kills)

    def _lose_learner(self, call: LearnerCall, service_too: bool) -> None:
        """It dies before its work, in the middle of it, or when it is done and not yet told."""
        share, report = self.dice.share("where"), None
        if share > 0.3:
            if isinstance(call, do.Advance):
                call = do.Advance(call.attempt, max(1, int(call.steps * min(1.0, 1.5 * share - 0.4))), call.until)
            report = self._ask_learner(call)
        seconds = self.speeds.answer + (self._seconds(report) * share if report is not None else 0.0)
        self.parts.lose(on.LEARNER)
        if service_too:
            self._lose_service()
        self.calls.clear()
        users = self.dice.among("users")
        self._push(seconds, on.PartFailed(on.LEARNER, call.attempt, "died", users, not service_too))
        if report is not None and self.dice.among("late"):
            self._push(2 * seconds + 1.0, self._answer(call, report))

    def _ask_learner(self, call: LearnerCall) -> LearnerReport:
        if self.stopping:
            return self.parts.stop()
        if isinstance(call, do.StartLearner):
            return self.parts.restore()
        if isinstance(call, do.Advance):
            return self.parts.advance(call.steps, call.until)
        if isinstance(call, do.Finish):
            return self.parts.finish()
        return self.parts.adopt(call.release, call.not_before, call.at_once)

    def _answer(self, call: LearnerCall, report: LearnerReport) -> Event:
        if isinstance(call, do.StartLearner):
            return on.LearnerReady(call.attempt, report)
        kinds = {do.Advance: on.ADVANCE, do.Finish: on.FINISH, do.Adopt: on.ADOPT}
        return on.Advanced(call.attempt, report, kinds[type(call)])

    def _seconds(self, report: LearnerReport) -> float:
        if self.speeds.unit == "flops":
            return self.speeds.answer + sum(step.flops for step in report.steps) / self.speeds.learner
        return self.speeds.answer + len(report.steps) * self.rules.step_tokens / self.speeds.learner

    def _stop_learner(self, action: do.StopLearner) -> None:
        self.stopping = True
        self._push(self.speeds.grace, on.StopDeadline())

    def _release_learner(self, action: do.ReleaseLearner) -> None:
        self._end_learner()

    # The pool: what was started goes on by itself, even if nobody waits for it any more.

    def _start_round(self, action: do.StartRound) -> None:
        record = self.parts.run_round(action)
        seconds = self.speeds.answer + record.flops / self.speeds.pool
        if not self.dice.strikes("pool"):
            self._push(seconds, on.RoundJudged(action.attempt, record))
            return
        self.parts.lose(on.POOL)
        share, users = self.dice.share("where"), self.dice.among("users")
        self._push(seconds * share, on.RoundFailed(action.attempt, "a rank died", users))
        if self.dice.among("late"):
            self._push(seconds, on.RoundJudged(action.attempt, record))

    def _publish(self, action: do.Publish) -> None:
        if self.dice.strikes("publish"):
            users = self.dice.among("users")
            self._push(self.speeds.answer, on.PublishFailed(action.attempt, "no answer", users))
            return
        self.parts.publish(action.attempt, action.record)
        self._push(self.speeds.answer, on.Published(action.attempt))

    def _discard(self, action: do.Discard) -> None:
        self.parts.discard(action.attempt, action.release)

    def _warm_pool(self, action: do.WarmPool) -> None:
        self._pool_job(action.attempt, lambda: on.PoolReady(action.attempt))

    def _prepare_base(self, action: do.PrepareBase) -> None:
        self._pool_job(action.attempt, lambda: on.BaseReady(action.attempt, *self.parts.prepare_base()))

    def _score_base(self, action: do.ScoreBase) -> None:
        self._pool_job(action.attempt, lambda: on.BaseScored(action.attempt, self.parts.score_base()))

    def _pool_job(self, attempt: int, work: Callable[[], Event]) -> None:
        fails = self.dice.strikes("pool")
        failure = on.PartFailed(on.POOL, attempt, "a rank died", fails and self.dice.among("users"))
        self._push(self.speeds.start, failure if fails else work())

    # The service, and what is told to nobody in particular.

    def _start_service(self, action: do.StartService) -> None:
        self._end_learner()  # it holds the old service
        self.serving = True
        self._service_job(self.parts.start_service, self.speeds.start, on.ServiceReady(action.attempt))

    def _store_base(self, action: do.StoreBase) -> None:
        self._service_job(self.parts.store_base, self.speeds.answer, on.BaseStored(action.attempt))

    def _store_dreams(self, action: do.StoreDreams) -> None:
        answer = on.DreamsStored(action.attempt, action.release)
        self._service_job(lambda: self.parts.store_dreams(action.release), self.speeds.answer, answer)

    def _service_job(
        self, work: Callable[[], None], seconds: float, answer: Union[on.ServiceReady, on.BaseStored, on.DreamsStored]
    ) -> None:
        """It may be dead already, die before its answer, or answer when it was given up."""
        dead = not self.serving
        if not dead:
            work()
        if not dead and not self.dice.strikes("services"):
            self._push(seconds, answer)
            return
        self._lose_service()
        self._push(seconds, on.PartFailed(on.SERVICES, answer.attempt, "died", self.dice.among("users")))
        if not dead and self.dice.among("late"):
            self._push(seconds + 1.0, answer)

    def _lose_service(self) -> None:
        self.serving = False
        self.parts.lose(on.SERVICES)

    def _commit(self, action: do.Commit) -> None:
        self.saved = action.state
        self.entries += len(action.entries)

    def _record(self, action: do.Record) -> None:
        self.note(action.kind, action.fields)

    def _unpin(self, action: do.Unpin) -> None:
        self.parts.unpin(action.tokens, action.keep)

    def _train_controls(self, action: do.TrainControls) -> None:
        for found in self.parts.train_controls(action.flops_per_token):
            self._push(0.0, on.ControlTrained(action.attempt, found.trial, found.rows, found.flops))
        self._push(self.speeds.answer, on.ControlDone(action.attempt))

    def _build_summary(self, action: do.BuildSummary) -> None:
        self._push(0.0, on.SummaryBuilt())

    def _end(self, action: do.End) -> None:
        self.ended = action

    def _give_up(self, action: do.GiveUp) -> None:
        self.ended = action


@dataclass(frozen=True)
class _LearnerFree:
    """The learner has ended a call: it may begin the next. Inside the driver only."""
