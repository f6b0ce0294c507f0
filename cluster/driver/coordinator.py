"""The coordinator: a state machine in the driver that lets the day and the nights of a run happen.

It sees keys, versions and small reports only; tokens and weights never pass through it.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.actors.experience_service import ExperienceService
from cluster.actors.learner import OnlineLearner
from cluster.actors.start import results, start_actor
from cluster.actors.tracking_client import TrackingClient
from cluster.driver.base_release import prepare_base
from cluster.driver.controls import train_controls
from cluster.driver.failures import Budgets, Stopped, cause_of, describe, is_users
from cluster.driver.ledger import Ledger
from cluster.driver.state import Phase, RunState
from cluster.driver.summary import build_summary
from cluster.pool.rounds import Outcome, RoundRunner
from nl_model.flops import wake_step_flops
from pipelines.config.schema import Config
from pipelines.data.module import Setting
from pipelines.sleep.base import base_records
from pipelines.wake.report import LearnerReport

logger = logging.getLogger(__name__)
CHUNK = 8
"""Wake steps per call of the learner."""


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
        self, cfg: Config, run_dir: Path, setting: Setting, emit: Callable[..., Any], tracking: TrackingClient
    ) -> None:
        self.cfg, self.run_dir, self.setting, self.emit, self.tracking = cfg, run_dir, setting, emit, tracking
        self.state = RunState.load(run_dir)
        self.budgets = Budgets(cfg.failures)
        self.tokenizer_state = setting.tokenizer.state()
        self.runner = RoundRunner(cfg, run_dir, self.tokenizer_state, self.budgets, emit)
        self.ledger = Ledger(cfg, run_dir, self.state, setting.sources, emit, tracking)
        self.period = min(level.period for level in cfg.levels.values() if level.owner == "pool")
        self.wake_flops = wake_step_flops(cfg.model, cfg.levels, setting.tokenizer.vocab_size)
        self.service: Any = None
        self.learner: Any = None
        self.calls: List[Any] = []
        """Calls of the learner in flight, in order."""
        self.round: Optional[Future[Outcome]] = None
        self.released = 0
        """Release that the learner computes with."""
        self.ended = self.finished = self.stop_requested = False
        self.deferring = False
        """Whether a signal may leave the stop to the loop (elsewhere it raises Stopped at once)."""
        self.progress_at = 0.0

    def run(self) -> Dict[str, Any]:
        """Go through the phases; returns the summary. Stopped, RunFailed or ValueError where that cannot be."""
        summary: Dict[str, Any] = {}
        while self.state.phase != Phase.FINISHED:
            start, phase = time.perf_counter(), self.state.phase
            try:
                if phase == Phase.BASE:
                    self._base()
                    self._enter(Phase.STREAM)
                elif phase == Phase.STREAM:
                    self._stream()
                    self._enter(Phase.CONTROL)
                elif phase == Phase.CONTROL:
                    self._control()
                    self._enter(Phase.REPORT)
                else:
                    summary = build_summary(self.cfg, self.run_dir, self.setting, self.state)
                    self._enter(Phase.FINISHED)
            finally:
                spent = self.state.seconds.get(phase.value, 0.0) + time.perf_counter() - start
                self.state.seconds[phase.value] = spent
                self.state.save(self.run_dir)
        return summary or build_summary(self.cfg, self.run_dir, self.setting, self.state)

    def shut_down(self) -> None:
        """End every actor of the run."""
        self.runner.stop()
        for actor in (self.learner, self.service):
            if actor is not None:
                ray.kill(actor)
        self.learner = self.service = None

    def _enter(self, phase: Phase) -> None:
        self.state.enter(phase)
        self.state.save(self.run_dir)

    def _check_stop(self) -> None:
        if self.stop_requested:
            raise Stopped

    def _base(self) -> None:
        self._start_service()
        state = self.state
        sequences, flops = prepare_base(self.cfg, self.run_dir, self.setting, self.runner, self.emit)
        state.flops["base"] = state.flops["base"] or flops
        if state.base_rows < len(sequences):
            self._ask_service("append", base_records(sequences))
            state.base_rows = len(sequences)
        self._check_stop()
        if not self.state.rows:
            directory = str(self.runner.releases.directory(0))
            scores = self.runner.with_pool(lambda group: group.call("score_release", directory))
            self.ledger.add_row(0, 0, {s: v for part in scores for s, v in part.items()})

    def _start_service(self) -> None:
        cfg = self.cfg
        dtype = str(self.setting.tokenizer.dtype)
        arguments = (str(self.run_dir / "store"), cfg.model.context, dtype, cfg.store)
        self.service = start_actor(ExperienceService, *arguments, num_cpus=0)
        try:
            self._get(self.service.status.remote())
        except (RayError, GetTimeoutError) as error:
            if getattr(error, "actor_init_failed", False):
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(f"the experience store did not open: {reason}") from error
            self._restart_service(error)

    def _ask_service(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return self._get(getattr(self.service, method).remote(*arguments))
            except (RayError, GetTimeoutError) as error:
                self._restart_service(error)

    def _restart_service(self, error: Exception) -> None:
        if is_users(error):
            raise cause_of(error) from None
        left = self.budgets.spend("services", error)
        self.emit("failure", part="experience service", error=describe(error), restarts_left=left)
        ray.kill(self.service)
        self._start_service()

    def _stream(self) -> None:
        if self.service is None:
            self._start_service()
        self.ledger.recover()
        self._store_dreams(self.state.live)
        if not self.runner.group.started and not self.cfg.pool.release_after_round:
            self.runner.with_pool(lambda group: group.pids)
        self._start_learner()
        while not (self.finished and not self.calls and self.round is None and not self.state.queue):
            self.deferring = True
            self._check_stop_of_stream()
            self._feed_learner()
            self._feed_pool()
            self._collect_learner()
            self._collect_round()
        self.deferring = False
        self._close_day()

    def _start_learner(self) -> None:
        gpus = self.cfg.ray.gpus if self.cfg.compute.device == "cuda" else 0.0
        options: Dict[str, Any] = {"num_cpus": self.cfg.ray.learner_cpus, "num_gpus": gpus}
        if self.cfg.ray.learner_resource:
            options["resources"] = {self.cfg.ray.learner_resource: 1}
        arguments = (self.cfg, str(self.run_dir), self.tokenizer_state)
        self.learner = start_actor(OnlineLearner, *arguments, control=True, **options)
        self.calls, self.ended, self.finished = [], False, False
        try:
            self._note(self._get(self.learner.restore.remote(self.service)))
        except (RayError, GetTimeoutError) as error:
            self._learner_failed(error)
            return
        for release in range(self.released + 1, self.state.live + 1):
            self._send_adoption(release)

    def _get(self, reference: Any) -> Any:
        return results([reference], self.cfg.failures.call_timeout)[0]

    def _feed_learner(self) -> None:
        depth = 1 if self.cfg.run.deterministic else 2
        while not self.ended and len(self.calls) < depth and not self._must_hold():
            self.calls.append(self.learner.advance.remote(CHUNK, self._until()))

    def _until(self) -> Optional[int]:
        """In deterministic mode the learner waits one period behind a mark until its round is decided."""
        if not self.cfg.run.deterministic or not self.state.queue:
            return None
        return min(mark["tokens"] for mark in self.state.queue) + self.period

    def _must_hold(self) -> bool:
        until = self._until()
        return until is not None and self.state.tokens >= until

    def _collect_learner(self) -> None:
        if not self.calls:
            time.sleep(0.02)
            return
        done, _ = ray.wait(self.calls[:1], timeout=0.2)
        if not done:
            return
        try:
            report = self._get(self.calls.pop(0))
        except (RayError, GetTimeoutError) as error:
            self._learner_failed(error)
            return
        self._note(report)
        self.ended = self.ended or report.ended
        if self.ended and not self.calls and not self.finished:
            self.finished = True
            self.calls.append(self.learner.finish.remote())

    def _learner_failed(self, error: Exception) -> None:
        """A dead learner is started anew; after a failed append it is a live learner that begins at its checkpoint."""
        self._check_stop_of_stream()
        self.deferring = False
        if is_users(error):
            raise cause_of(error) from None
        try:
            results([self.service.status.remote()], 10.0)
        except (RayError, GetTimeoutError) as service_error:
            self._restart_service(service_error)
        else:
            left = self.budgets.spend("learner", error)
            self.emit("failure", part="learner", error=describe(error), restarts_left=left)
        ray.kill(self.learner)
        self._start_learner()

    def _note(self, report: LearnerReport) -> None:
        """Take a report of the learner into the state, the journal and the tracker."""
        state = self.state
        self.released, state.tokens, state.cursor = report.release, report.tokens, report.cursor
        for one in report.adopted:
            self.emit("adopted", release=one.release, tokens=one.tokens, fast_shift_norm=one.shift)
        for look in report.looks:
            self.emit("look", tokens=look.tokens, release=look.release, served=look.served, rested=look.rested)
        for source, (first, last) in report.spans.items():
            state.starts.setdefault(source, first)
            state.ends[source] = max(last, state.ends.get(source, 0))
        for item in report.quarantined:
            self._quarantine(*item)
        for step in report.steps:
            for key, source, reason in step.quarantined:
                self._quarantine(source, f"stream key {key}", reason)
        if report.steps:
            self._note_wake(report)
        for mark in report.marks:
            if mark.tokens > state.last_mark and self._worth_a_round(mark.tokens, report.ended):
                self.ledger.queue(mark, running=self.round is not None)

    def _note_wake(self, report: LearnerReport) -> None:
        wake, inside = self.state.wake, sum(step.seconds for step in report.steps)
        tokens = len(report.steps) * self.cfg.wake.batch * self.cfg.model.context
        done = {"steps": len(report.steps), "tokens": tokens, "inside": inside, "wall": report.seconds}
        for key, value in done.items():
            wake[key] += value
        wake["waited"] = wake.get("waited", 0.0) + sum(step.waited for step in report.steps)
        self.state.flops["wake"] = self.state.tokens * self.wake_flops
        self.emit(
            "wake",
            tokens=report.tokens,
            seconds=report.seconds,
            tokens_per_second=tokens / report.seconds,
            steps=[asdict(step) for step in report.steps],
            release=report.release,
        )
        metrics = {"wake/tokens_per_second": tokens / report.seconds, "wake/release": float(report.release)}
        for step in report.steps:
            metrics.update({f"online_bpb/{s}": v for s, v in step.bpb.items()})
            metrics.update({f"recalled_bpb/{s}": v for s, v in step.recalled.items()})
        self.tracking.log_metrics(metrics, report.tokens)

    def _quarantine(self, source: str, origin: str, reason: str) -> None:
        if [source, origin, reason] not in self.state.quarantined:
            self.state.quarantined.append([source, origin, reason])
            self.emit("quarantined", source=source, origin=origin, reason=reason)

    def _worth_a_round(self, tokens: int, ended: bool) -> bool:
        least = self.period // 10 if ended else 1  # what little the stream ends with may wait for the next run
        return tokens - self.state.last_mark >= least

    def _feed_pool(self) -> None:
        if self.round is not None or not self.state.queue:
            return
        state = self.state
        adjustment = self.ledger.adjustment()
        plan = self.runner.plan(state.next_round, state.queue[0], state.consolidated_key, state.live, adjustment)
        seen = [*self.setting.base_sources, *state.seen_at(plan.tokens)]
        seen = [s for s in self.setting.sources if s in seen]
        self.tracking.start_round(plan.round, plan.snapshot, str(self.run_dir / "store"), plan.to_json())
        self.round = self.runner.start(plan, seen, self.ledger.best())

    def _collect_round(self) -> None:
        if self.round is None:
            return
        if not self.round.done():
            self._show_progress()
            return
        outcome, self.round = self.round.result(), None
        release = self.runner.settle(outcome, self.state.audit)
        self._store_dreams(release)
        self.ledger.settle(outcome.record(release))
        if release is not None and self.learner is not None:
            self._send_adoption(release)

    def _show_progress(self) -> None:
        if time.monotonic() - self.progress_at < 2.0 or not self.runner.group.backend:
            return
        self.progress_at = time.monotonic()
        try:
            step, steps, loss = self.runner.group.progress()
        except (RayError, GetTimeoutError, IndexError):
            return  # the round's own thread sees the failure and deals with it
        self.emit("round_progress", round=self.state.next_round, step=step, steps=steps, loss=loss)

    def _store_dreams(self, release: Optional[int]) -> None:
        """Hand a release's dreams to the store. Doing it again changes nothing, so a crash may fall anywhere."""
        if release and self.runner.releases.read(release).record.get("dreams"):
            self._ask_service("append_dreams", str(self.runner.releases.directory(release)))

    def _send_adoption(self, release: int) -> None:
        """Tell the learner; in deterministic mode at the boundary one period behind the one that the round pinned."""
        not_before = 0
        if self.cfg.run.deterministic:
            not_before = self.runner.releases.read(release).tokens + self.period
        self.calls.append(self.learner.adopt.remote(release, not_before))

    def _close_day(self) -> None:
        """The stream has ended and every round is decided: the learner takes over the last release."""
        while self.released < self.state.live:
            try:
                self._note(self._get(self.learner.adopt.remote(self.state.live, 0, True)))
            except (RayError, GetTimeoutError) as error:
                self._learner_failed(error)
        self.state.save(self.run_dir)
        self.ledger.unpin(self.state.tokens)
        ray.kill(self.learner)
        self.learner = None
        self.runner.group.kill()

    def _check_stop_of_stream(self) -> None:
        """On request: let the learner finish its step and checkpoint, write the state, give up the running round."""
        if not self.stop_requested:
            return
        self.learner.stop.remote()
        self.runner.stop()
        deadline = time.monotonic() + 1.5
        try:
            for call in self.calls:
                self._note(ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
        except (RayError, GetTimeoutError) as error:
            logger.warning("the learner did not report before the stop: %s", describe(error))
        self.state.save(self.run_dir)
        raise Stopped

    def _control(self) -> None:
        self.runner.group.kill()
        if self.cfg.control.enabled:
            base = str(self.runner.releases.directory(0))
            arguments = (self.cfg, self.tokenizer_state)
            train_controls(self.cfg, arguments, base, self.state, self.emit, self._check_stop)
