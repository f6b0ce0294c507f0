"""The logic of a run as a pure state machine: events in, actions out. No clock, no file, no actor, no random number.

What it decides: when a round starts and what it pins, what the learner adopts and where, what is started again, when
the run gives up, how it stops. Two drivers carry its actions out: cluster/driver (Ray) and simulated.py beside this.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.actions import Action
from pipelines.machine.events import Event
from pipelines.machine.reactions import Reactions
from pipelines.machine.rounds import best_scores, plan_round, seen_sources
from pipelines.machine.rules import CHUNK, Rules
from pipelines.machine.state import NEXT, Phase, RunState
from pipelines.machine.views import Pool


class Machine(Reactions):
    """One run, from where its state says it is.

    Args:
        state: changed in place; a driver only reads it.
        rules: constants of the run.
    """

    def __init__(self, state: RunState, rules: Rules) -> None:
        super().__init__(state, rules)
        self.reactions = self._reactions()

    def handle(self, event: Event) -> List[Action]:
        """Take an event in; what is to be done, in order."""
        if self.over or self._is_stale(event):
            return []
        self.actions = []
        self.reactions[type(event)](event)
        if self.verdict is not None:
            self._wind_up()
        elif self.started:
            self._go_on()
        return self.actions

    def _is_stale(self, event: Event) -> bool:
        """Whether a part answers that was given up since."""
        part = getattr(event, "part", None)
        return part is not None and event.attempt != self.attempts[part]  # type: ignore[union-attr]

    def _reactions(self) -> Dict[type, Callable[[Any], None]]:
        return {
            on.Started: self._on_started,
            on.ServiceReady: self._on_service_ready,
            on.BaseStored: self._on_base_stored,
            on.DreamsStored: self._on_dreams_stored,
            on.LearnerReady: self._on_learner_ready,
            on.Advanced: self._on_advanced,
            on.BaseReady: self._on_base_ready,
            on.BaseScored: self._on_base_scored,
            on.PoolReady: self._on_pool_ready,
            on.RoundJudged: self._on_round_judged,
            on.RoundFailed: self._on_round_failed,
            on.Published: self._on_published,
            on.PublishFailed: self._on_publish_failed,
            on.PartFailed: self._on_part_failed,
            on.ControlTrained: self._on_control_trained,
            on.ControlDone: lambda _: self._enter(Phase.REPORT),
            on.SummaryBuilt: lambda _: self._enter(Phase.FINISHED),
            on.StopRequested: lambda _: self._end_with(do.End("stopped")),
            on.StopDeadline: self._on_stop_deadline,
        }

    # The phases.

    def _go_on(self) -> None:
        """Ask for all that is due now. Phases without work are left at once."""
        phase = None
        while phase != self.state.phase and self.verdict is None:
            phase = self.state.phase
            if phase in (Phase.BASE, Phase.STREAM) and not self.service.up:
                if not self.service.started:
                    self._start_service()
            elif phase == Phase.BASE:
                self._base()
            elif phase == Phase.STREAM:
                self._stream()
            elif phase == Phase.CONTROL and not self.rules.control:
                self._enter(NEXT[phase])
            elif phase == Phase.CONTROL:
                self._once(phase, self._train_controls)
            elif phase == Phase.REPORT:
                self._once(phase, lambda: self._do(do.BuildSummary()))
            else:
                self.over = True
                self._do(do.End("finished"))

    def _once(self, phase: Phase, ask: Callable[[], None]) -> None:
        if phase not in self.asked:
            self.asked.add(phase)
            ask()

    def _train_controls(self) -> None:
        flops = self.state.flops
        per_token = (flops["wake"] + flops["sleep"]) / max(1, self.state.tokens)
        self._do(do.TrainControls(self._attempt(on.CONTROL), per_token, self.state.tokens))

    def _base(self) -> None:
        state, pool = self.state, self.pool
        if pool.job:
            return
        if self.base_due is None:
            pool.job = "base"
            self._do(do.PrepareBase(self._attempt(on.POOL)))
        elif state.base_rows < self.base_due:
            if not self.service.asked:
                self.service.asked = "base"
                self._do(do.StoreBase(self.attempts[on.SERVICES]))
        elif not state.rows:
            pool.job = "score"
            self._do(do.ScoreBase(self._attempt(on.POOL)))
        else:
            pool.warm = True
            self._enter(Phase.STREAM)

    def _stream(self) -> None:
        if self.dreams_due is not None:
            self._ask_for_dreams(self.dreams_due)
            return
        self._settle_newest()
        if not self.pool.warm and not self.rules.release_after_round:
            if not self.pool.job:
                self.pool.job = "warm"
                self._do(do.WarmPool(self._attempt(on.POOL)))
            return
        if not self.learner.started:
            self._start_learner()
        self._feed_pool()
        self._feed_learner()
        self._close()

    def _ask_for_dreams(self, release: int) -> None:
        if not self.service.asked:
            self.service.asked = "dreams"
            self._do(do.StoreDreams(self.attempts[on.SERVICES], release))

    def _feed_pool(self) -> None:
        """A round starts as soon as there is a mark and nothing else under way; it pins what is live now."""
        state, rules = self.state, self.rules
        if self.pool.job == "dreams" and self.pool.record is not None and self.pool.record.release is not None:
            self._ask_for_dreams(self.pool.record.release)
        if self.pool.job or not state.queue:
            return
        plan = plan_round(state, rules)
        seen, best = seen_sources(state, rules, plan.tokens), best_scores(state, rules)
        start = do.StartRound(self._attempt(on.POOL), plan, seen, best)
        self.pool.job, self.pool.start, self.pool.warm = "round", start, True
        told = {"snapshot": plan.snapshot, "anchor": plan.anchor, "steps": plan.steps}
        told.update(ranks=rules.ranks, zero_stage=rules.zero_stage)
        self._do(do.Record("round_started", {"round": plan.round, **told}), start)

    def _feed_learner(self) -> None:
        learner = self.learner
        if not learner.up:
            return
        if learner.ended:
            if not learner.calls and not learner.finished:
                learner.finished = True
                self._call(do.Finish(self.attempts[on.LEARNER]))
            return
        until = self._until()
        while learner.calls < self.rules.depth and (until is None or self.state.tokens < until):
            self._call(do.Advance(self.attempts[on.LEARNER], CHUNK, until))

    def _until(self) -> Optional[int]:
        """Where deterministic, the learner waits at a fixed distance behind a mark until its round is decided."""
        if not self.rules.deterministic or not self.state.queue:
            return None
        return min(mark.tokens for mark in self.state.queue) + self.rules.lag

    def _close(self) -> None:
        """The stream has ended and every round is decided: the learner takes the last release over, and that was it."""
        learner, state = self.learner, self.state
        if not learner.finished or learner.calls or self.pool.job or state.queue:
            return
        if learner.released < state.live:
            self._call(do.Adopt(self.attempts[on.LEARNER], state.live, 0, at_once=True))
            return
        self._enter(Phase.CONTROL)
        for part in (on.LEARNER, on.POOL, on.SERVICES):  # nothing they say matters from here on
            self._attempt(part)
        self._do(do.Unpin(state.tokens), do.ReleaseLearner(), do.ReleasePool())

    def _wind_up(self) -> None:
        """End in order: the pool's work is given up (its plan is in the state), the learner finishes its step."""
        if not self.winding:
            self.winding = True
            if self.pool.job:
                self._do(do.AbandonPool(self.attempts[on.POOL]))
            self.pool = Pool()
            self._attempt(on.POOL)
            if self.learner.calls:
                self._do(do.StopLearner(self.attempts[on.LEARNER]))
        if not self.learner.calls:
            self.over = True
            assert self.verdict is not None
            self._do(do.Commit(self.state.copy()), self.verdict)
