"""The coordinator: carries out on Ray what the run's machine (pipelines/machine) decides.

It sees keys, versions and small reports only; tokens and weights never pass through it. Nothing here waits for an
actor: calls of learner and service are references that are looked at, rounds and controls run in threads, and all that
they say comes back as events. So the loop can always hear that it is to stop.
"""

from __future__ import annotations

import os
import queue
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple, Union

from cluster.actors.tracking_client import TrackingClient
from cluster.driver.calls import Calls
from cluster.driver.failures import RunFailed, Stopped, cause_of, describe, is_users
from cluster.driver.ledger import Ledger, fact_of
from cluster.driver.parts import LearnerPart, PoolPart, ServicePart, train_in_thread
from cluster.driver.state import load_state
from cluster.driver.summary import build_summary
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine import trace
from pipelines.machine.actions import Action
from pipelines.machine.events import Event
from pipelines.machine.machine import Machine
from pipelines.machine.rules import Rules
from pipelines.machine.state import RunState
from pipelines.wake.writes import wake_flops, with_budget

GRACE = 1.5
"""Seconds that the learner has to finish its step and checkpoint, once it was asked to stop."""
TRACE = "CIRCADIAN_TRACE"
"""Environment variable: set, the driver writes down what it told the machine and was told to do, for check_trace."""
SLICE = 0.05
"""Seconds that the loop waits for something to happen before it looks whether it is to stop."""


class Coordinator:
    """Drives one run from where its state says it is to the end.

    Args:
        cfg: configuration.
        run_dir: absolute path of the run directory.
        setting: the data side, opened by the driver.
        emit: writes an event to the journal and the live view.
        tracking: asynchronous client of the tracker.
    """

    def __init__(
        self, cfg: Config, run_dir: Path, setting: DataModule, emit: Callable[..., Any], tracking: TrackingClient
    ) -> None:
        cfg = with_budget(cfg, setting.tokenizer.vocab_size)
        self.cfg, self.run_dir, self.setting, self.emit = cfg, run_dir, setting, emit
        self.tracking = tracking
        awake = wake_flops(cfg, setting.tokenizer.vocab_size)
        rules = Rules.of(cfg, tuple(setting.sources), tuple(setting.base_sources), awake)
        self.machine = Machine(load_state(run_dir), rules)
        self.ledger = Ledger(run_dir, self.machine.state, emit, tracking)
        self.trace = trace.Trace(run_dir / trace.FILE, self.machine) if os.environ.get(TRACE) else None
        self.calls = Calls()
        self.inbox: queue.SimpleQueue[Union[Event, Exception]] = queue.SimpleQueue()
        self.service = ServicePart(cfg, run_dir, setting, self.calls, self._service_failed)
        self.learner = LearnerPart(cfg, run_dir, setting, self.calls, self._learner_failed)
        self.pool = PoolPart(cfg, run_dir, setting, self.calls, emit)
        self.stop_requested = self.stopping = False
        self.deferring = False
        """Whether a signal may leave the stop to the loop (elsewhere it raises Stopped at once)."""
        self.deadline = float("inf")
        self.users_error: Optional[BaseException] = None
        """The last error that no restart helps against."""
        self.summary: Dict[str, Any] = {}
        self.outcome: Optional[Action] = None
        self.carry_out = self._carriers()

    @property
    def state(self) -> RunState:
        """Where the run is."""
        return self.machine.state

    def run(self) -> Dict[str, Any]:
        """Go on to the end; returns the summary. Stopped, RunFailed or the user's error where that cannot be."""
        self.deferring = True
        missing = self.ledger.recover()
        numbers = self.pool.releases.numbers()
        newest = fact_of(self.pool.releases.read(numbers[-1])) if numbers else None
        self._tell(on.Started(newest, missing))
        while self.outcome is None:
            for event in self._events():
                self._tell(event)
        self.deferring = False
        if isinstance(self.outcome, do.GiveUp):
            if self.outcome.users and self.users_error is not None:
                raise self.users_error
            raise RunFailed(self.outcome.message)
        if self.outcome == do.End("stopped"):
            raise Stopped
        return self.summary or self._build_summary()

    def shut_down(self) -> None:
        """End every actor of the run."""
        self.stopping = True
        self.pool.stop()
        self.learner.kill()
        self.service.kill()

    def _events(self) -> Iterator[Event]:
        """What has happened since, as long as nothing has ended the run."""
        if self.stop_requested:
            self.stop_requested = False
            yield on.StopRequested()
        if time.monotonic() > self.deadline:
            self.deadline = float("inf")
            yield on.StopDeadline()
        self.pool.show_progress(self.state.next_round)
        for event in self.calls.collect(SLICE if self.inbox.empty() else 0.0):
            if event is not None:
                yield event
        while not self.inbox.empty():
            message = self.inbox.get()
            if isinstance(message, Exception):
                raise message
            yield message

    def _tell(self, event: Event) -> None:
        """Let the machine hear an event, and do what it says, in order."""
        if self.outcome is not None:
            return
        actions = self.machine.handle(event)
        if self.trace is not None:
            self.trace.add(event, actions)
        for action in actions:
            self.carry_out[type(action)](action)

    def _carriers(self) -> Dict[type, Callable[[Any], None]]:
        learner, service, pool, ledger = self.learner, self.service, self.pool, self.ledger
        return {
            do.StartService: service.start,
            do.StoreBase: lambda a: service.store_base(a, pool.base),
            do.StoreDreams: service.store_dreams,
            do.StartLearner: lambda a: learner.start(a, service.actor),
            do.Advance: learner.advance,
            do.Finish: learner.finish,
            do.Adopt: learner.adopt,
            do.StopLearner: self._stop_learner,
            do.ReleaseLearner: lambda a: learner.kill(),
            do.PrepareBase: lambda a: self._later(a, pool.prepare_base),
            do.ScoreBase: lambda a: self._later(a, pool.score_base),
            do.WarmPool: lambda a: self._later(a, pool.warm),
            do.ReleasePool: lambda a: pool.release(),
            do.AbandonPool: lambda a: pool.stop(),
            do.StartRound: self._start_round,
            do.Publish: self._publish,
            do.Discard: lambda a: pool.releases.discard(a.release),
            do.Commit: ledger.commit,
            do.Record: ledger.record,
            do.Unpin: ledger.unpin,
            do.TrackRound: lambda a: ledger.carry_out([a]),
            do.TrackRelease: lambda a: ledger.carry_out([a]),
            do.TrainControls: self._train_controls,
            do.BuildSummary: lambda a: self._summarise(),
            do.GiveUp: self._end,
            do.End: self._end,
        }

    def _end(self, action: Action) -> None:
        self.outcome = action

    # Failures: what kind, and whose.

    def _why(self, error: BaseException) -> Tuple[str, bool]:
        """(cause, whether a restart cannot help); keeps the user's own error to be raised as it is."""
        users = is_users(error)
        if users:
            self.users_error = cause_of(error)
        return describe(error), users

    def _service_failed(self, attempt: int, error: BaseException) -> Event:
        return on.PartFailed(on.SERVICES, attempt, *self._why(error))

    def _learner_failed(self, attempt: int, error: BaseException) -> Optional[Event]:
        """Whose failure it is shows when the service is asked: the learner dies of a service that does not answer."""
        cause, users = self._why(error)

        def told(alive: bool) -> Event:
            return on.PartFailed(on.LEARNER, attempt, cause, users, alive)

        if users:
            return told(True)
        self.service.probe(told)
        return None

    # The learner and the pool, as far as the loop has a part in it.

    def _stop_learner(self, action: do.StopLearner) -> None:
        self.learner.stop()
        self.deadline = time.monotonic() + GRACE

    def _later(self, action: Any, job: Callable[[int], Event]) -> None:
        """Have the pool's thread do something; its event, or its failure, comes through the inbox."""

        def done(future: Future[Event]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self.inbox.put(future.result())
            elif self.pool.is_failure(error):
                cause, users = str(cause_of(error)), self._why(error)[1]
                failed = on.RoundFailed if isinstance(action, do.StartRound) else _pool_failed
                self.inbox.put(failed(action.attempt, cause, users))
            elif isinstance(error, Exception):  # a mistake of ours: it ends the loop as it would have ended a call
                self.inbox.put(error)

        self.pool.runner.submit(lambda: job(action.attempt)).add_done_callback(done)

    def _start_round(self, action: do.StartRound) -> None:
        plan = action.plan
        if not action.retry:
            self.tracking.start_round(plan.round, plan.snapshot, str(self.run_dir / "store"), plan.to_json())
        self._later(action, lambda attempt: self.pool.run_round(action))

    def _publish(self, action: do.Publish) -> None:
        try:
            self.pool.publish(action, self.ledger.audit_end())
        except OSError as error:
            self.inbox.put(on.PublishFailed(action.attempt, *self._why(error)))
        else:
            self.inbox.put(on.Published(action.attempt))

    def _train_controls(self, action: do.TrainControls) -> None:
        self.pool.release()
        base = str(self.pool.releases.directory(0))
        done, tokenizer = dict(self.state.control), self.setting.tokenizer.state()
        train_in_thread(action, self.cfg, tokenizer, base, done, self.emit, self.inbox.put, lambda: self.stopping)

    def _summarise(self) -> None:
        self.summary = self._build_summary()
        self.inbox.put(on.SummaryBuilt())

    def _build_summary(self) -> Dict[str, Any]:
        self.ledger.tick()
        state = replace(self.state, seconds=self.ledger.seconds, audit=self.ledger.audit)
        return build_summary(self.cfg, self.run_dir, self.setting, state)


def _pool_failed(attempt: int, cause: str, users: bool) -> Event:
    return on.PartFailed(on.POOL, attempt, cause, users)
