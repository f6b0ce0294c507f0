"""What each event changes. What is due then is asked for by the machine (machine.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import List, Tuple

from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.core import Core
from pipelines.machine.decisions import enter_mark, enter_release, enter_round, enter_row
from pipelines.machine.notes import note_report
from pipelines.machine.records import RoundRecord
from pipelines.machine.rules import least_rest
from pipelines.machine.state import Phase
from pipelines.machine.views import Learner, Pool, Service
from pipelines.wake.report import LearnerReport, Mark

LAST = "the stream has ended"
"""`why["text"]` of the mark at the end of the stream. A short rest is not worth a round, however the mark is told."""


class Reactions(Core):
    """One method for each event."""

    # The start, and the service.

    def _on_started(self, event: on.Started) -> None:
        self.started = True
        state, newest = self.state, event.newest
        if event.missing_audit:
            self._do(do.Record("audit_damaged", {"missing": event.missing_audit}))
        if state.phase == Phase.BASE or newest is None:
            return
        if newest.number > state.live:
            self.newest = newest
        if newest.number and newest.record is not None and newest.record.dreams:
            self.dreams_due = newest.number
        if state.phase != Phase.STREAM:  # a rollback of a run that is through; it brings no dreams
            self._settle_newest()
        if state.rollbacks and state.rollbacks[-1]["release"] == state.live:
            self._do(do.TrackRelease(state.live))

    def _settle_newest(self) -> None:
        """Enter the release that a crash left unentered, before any round starts from what is then no longer live."""
        if self.newest is not None:
            release, self.newest = self.newest, None
            self._do(*enter_release(self.state, self.rules, release))

    def _on_service_ready(self, event: on.ServiceReady) -> None:
        self.service.up = True

    def _on_base_stored(self, event: on.BaseStored) -> None:
        assert self.base_due is not None
        self.service.asked, self.state.base_rows = "", self.base_due

    def _on_dreams_stored(self, event: on.DreamsStored) -> None:
        """Dreams are durable before the decision counts: what the state calls settled is whole."""
        self.service.asked = ""
        if self.dreams_due == event.release:
            self.dreams_due = None
        elif self.pool.job == "dreams":
            assert self.pool.record is not None
            self._decide(self.pool.record)

    # The learner.

    def _on_learner_ready(self, event: on.LearnerReady) -> None:
        self.learner.up = True
        self._take(event.report, last=False)
        if self.verdict is None:
            self._catch_up()

    def _catch_up(self) -> None:
        """A learner that stands at its checkpoint knows nothing of what it was told since."""
        for release in range(self.learner.released + 1, self.state.live + 1):
            self._adopt(release)

    def _on_advanced(self, event: on.Advanced) -> None:
        self.learner.ended = self.learner.ended or event.report.ended
        self._take(event.report, last=event.call == on.FINISH)

    def _take(self, report: LearnerReport, last: bool) -> None:
        self.learner.calls -= 1
        self.learner.released = report.release
        self._do(*note_report(self.state, self.rules, report))
        for mark in self._new_marks(report.marks, last):
            self._do(*enter_mark(self.state, self.rules, mark))

    def _new_marks(self, marks: Tuple[Mark, ...], last: bool) -> List[Mark]:
        """Marks that are worth a round and were not told before. After a restart they come again, or come late: one
        that lies between the learner's checkpoint and the saved state is told by the checkpoint alone."""
        new, before = [], self.state.last_mark
        for mark in sorted(marks, key=lambda mark: mark.tokens):
            ends = last or mark.why.get("text") == LAST
            least = least_rest(self.rules.period) if ends else 1  # what little a stream ends with may wait
            if mark.tokens - before >= least:
                new.append(mark)
                before = mark.tokens
        return new

    # The pool.

    def _on_base_ready(self, event: on.BaseReady) -> None:
        self.pool.job, self.base_due = "", event.rows
        self.state.flops["base"] = self.state.flops["base"] or event.flops

    def _on_base_scored(self, event: on.BaseScored) -> None:
        self.pool.job = ""
        self._do(enter_row(self.state, self.rules, 0, 0, event.bpb))

    def _on_pool_ready(self, event: on.PoolReady) -> None:
        self.pool.job, self.pool.warm = "", True

    def _on_round_judged(self, event: on.RoundJudged) -> None:
        self.budgets.refill()
        if self.rules.release_after_round:
            self._do(do.ReleasePool())
        number = self.state.live + 1
        if event.record.promoted:
            self.pool.job, self.pool.record = "publish", replace(event.record, release=number)
            self._do(do.Publish(event.attempt, self.pool.record))
        else:
            self._do(do.Discard(event.attempt, number))
            self._decide(event.record)

    def _on_published(self, event: on.Published) -> None:
        record = self.pool.record
        assert record is not None and record.release is not None
        if record.dreams:
            self.pool.job = "dreams"  # asked for when the service is up, again where it is restarted
        else:
            self._decide(record)

    def _decide(self, record: RoundRecord) -> None:
        """The decision counts from its `Commit` on; only then does the learner hear of a release."""
        assert self.pool.start is not None
        self._do(*enter_round(self.state, self.rules, record, self.pool.start.plan.last_key))
        self.pool = Pool(warm=True)
        self._attempt(on.POOL)
        if record.release is not None and self.learner.up:
            self._adopt(record.release)

    def _on_round_failed(self, event: on.RoundFailed) -> None:
        """The same plan gives the same candidate: nothing of a failed attempt is needed."""
        if self._charge(on.POOL, event.cause, event.users):
            assert self.pool.start is not None
            self.pool.start = replace(self.pool.start, attempt=self._attempt(on.POOL), retry=True)
            self._do(self.pool.start)

    def _on_publish_failed(self, event: on.PublishFailed) -> None:
        if self._charge(on.POOL, event.cause, event.users):
            assert self.pool.record is not None
            self._do(do.Publish(event.attempt, self.pool.record))

    # Failures, and the end.

    def _on_part_failed(self, event: on.PartFailed) -> None:
        if event.part == on.CONTROL:
            self._end_with(do.GiveUp(event.part, event.cause, event.users))
        elif event.part == on.POOL:
            self.pool.job = ""
            self._charge(on.POOL, event.cause, event.users)
        elif event.part == on.SERVICES or not event.service_alive:
            self._restart_service(event)
        else:
            self.learner = Learner()
            self._charge(on.LEARNER, event.cause, event.users)

    def _restart_service(self, event: on.PartFailed) -> None:
        """One transition: a learner cannot log to a new service what it told the old one; it begins at its checkpoint
        when the service is up. That is the service's failure, not the learner's."""
        self.learner = Learner()
        self._attempt(on.LEARNER)
        self.service = Service()
        self._charge(on.SERVICES, event.cause, event.users)

    def _on_control_trained(self, event: on.ControlTrained) -> None:
        self.state.control[event.trial] = {"rows": list(event.rows), "flops": event.flops}
        self.state.flops["control"] = sum(float(trial["flops"]) for trial in self.state.control.values())
        self._do(do.Commit(self.state.copy()))

    def _on_stop_deadline(self, event: on.StopDeadline) -> None:
        if self.verdict is not None:
            self.learner = Learner()
