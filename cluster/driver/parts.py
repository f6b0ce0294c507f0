"""The parts of a run as the coordinator holds them: how each is started, asked and ended, and what it answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import ray
from ray.exceptions import RayError

from cluster.actors.experience_service import ExperienceService
from cluster.actors.learner import OnlineLearner
from cluster.actors.start import start_actor
from cluster.driver.base_release import prepare_base
from cluster.driver.calls import Calls
from cluster.driver.controls import ControlSearch
from cluster.driver.failures import RunFailed, Stopped, is_users
from cluster.pool.group import PoolError
from cluster.pool.rounds import Outcome, RoundRunner
from cluster.storage.releases import Releases
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.control import Budget
from pipelines.machine.events import Event
from pipelines.sleep.base import base_records

Failed = Callable[[int, BaseException], Optional[Event]]
"""Makes an event of an attempt's error."""
PROBE = 10.0
"""Seconds that a service has to say that it lives."""


class ServicePart:
    """The experience service."""

    def __init__(self, cfg: Config, run_dir: Path, setting: DataModule, calls: Calls, failed: Failed) -> None:
        self.cfg, self.run_dir, self.setting, self.calls, self.failed = cfg, run_dir, setting, calls, failed
        self.actor: Any = None

    def start(self, action: do.StartService) -> None:
        """End the one there is, and start one."""
        self.kill()
        cfg, dtype = self.cfg, str(self.setting.tokenizer.dtype)
        arguments = (str(self.run_dir / "store"), cfg.model.context, dtype, cfg.store)
        self.actor = start_actor(ExperienceService, *arguments, num_cpus=0)

        self._ask("status", (), on.ServiceReady(action.attempt))

    def store_base(self, action: do.StoreBase, sequences: List[Any]) -> None:
        """Have the base mixture stored."""
        self._ask("append", (base_records(sequences),), on.BaseStored(action.attempt))

    def store_dreams(self, action: do.StoreDreams) -> None:
        """Have a release's dreams stored. Doing it again changes nothing, so a crash may fall anywhere."""
        directory = str(Releases(self.run_dir / "releases").directory(action.release))
        self._ask("append_dreams", (directory,), on.DreamsStored(action.attempt, action.release))

    def probe(self, told: Callable[[bool], Event]) -> None:
        """Ask whether it lives."""
        reference = self.actor.status.remote()
        self.calls.add("probe", reference, lambda _: told(True), lambda _: told(False), PROBE)

    def _ask(
        self, method: str, arguments: Tuple[Any, ...], answer: Union[on.ServiceReady, on.BaseStored, on.DreamsStored]
    ) -> None:
        reference = getattr(self.actor, method).remote(*arguments)

        def failed(error: Exception) -> Optional[Event]:
            if not getattr(error, "actor_init_failed", False):
                return self.failed(answer.attempt, error)
            reason = str(error).strip().splitlines()[-1]
            return self.failed(answer.attempt, ValueError(f"the experience store did not open: {reason}"))

        self.calls.add("service", reference, lambda _: answer, failed, self.cfg.failures.call_timeout)

    def kill(self) -> None:
        """End it."""
        self.calls.forget("service")
        self.calls.forget("probe")
        if self.actor is not None:
            ray.kill(self.actor)
        self.actor = None


class LearnerPart:
    """The learner."""

    def __init__(self, cfg: Config, run_dir: Path, setting: DataModule, calls: Calls, failed: Failed) -> None:
        self.cfg, self.calls, self.failed = cfg, calls, failed
        self.arguments = (cfg, str(run_dir), setting.tokenizer.state())
        self.actor: Any = None

    def start(self, action: do.StartLearner, service: Any) -> None:
        """End the one there is, and start one at its newest checkpoint."""
        self.kill()
        cfg = self.cfg
        gpus = cfg.ray.gpus if cfg.compute.device == "cuda" else 0.0
        options: Dict[str, Any] = {"num_cpus": cfg.ray.learner_cpus, "num_gpus": gpus}
        if cfg.ray.learner_resource:
            options["resources"] = {cfg.ray.learner_resource: 1}
        self.actor = start_actor(OnlineLearner, *self.arguments, control=True, **options)
        self.calls.add(
            "learner",
            self.actor.restore.remote(service),
            lambda report: on.LearnerReady(action.attempt, report),
            lambda error: self.failed(action.attempt, error),
            cfg.failures.call_timeout,
        )

    def advance(self, action: do.Advance) -> None:
        """Let it take steps."""
        self._told(action.attempt, on.ADVANCE, self.actor.advance.remote(action.steps, action.until))

    def finish(self, action: do.Finish) -> None:
        """Have it pin the stream's end."""
        self._told(action.attempt, on.FINISH, self.actor.finish.remote())

    def adopt(self, action: do.Adopt) -> None:
        """Tell it of a release."""
        reference = self.actor.adopt.remote(action.release, action.not_before, action.at_once)
        self._told(action.attempt, on.ADOPT, reference)

    def _told(self, attempt: int, call: str, reference: Any) -> None:
        """However long it takes: a step has no bound, and a process that is gone is seen by Ray."""
        self.calls.add(
            "learner",
            reference,
            lambda report: on.Advanced(attempt, report, call),
            lambda error: self.failed(attempt, error),
        )

    def stop(self) -> None:
        """Ask it to finish its step and checkpoint; overtakes the calls in flight."""
        if self.actor is not None:
            self.actor.stop.remote()

    def kill(self) -> None:
        """End it."""
        self.calls.forget("learner")
        if self.actor is not None:
            ray.kill(self.actor)
        self.actor = None


class PoolPart:
    """The pool. Its jobs run in the runner's thread; each returns the event that it ends with."""

    def __init__(self, cfg: Config, run_dir: Path, setting: DataModule, calls: Calls, emit: Callable[..., Any]) -> None:
        self.cfg, self.run_dir, self.setting, self.calls, self.emit = cfg, run_dir, setting, calls, emit
        self.runner = RoundRunner(cfg, run_dir, setting.tokenizer.state())
        self.releases = self.runner.releases
        self.base: List[Any] = []
        """Sequences of the base mixture, once prepared."""
        self.outcomes: Dict[int, Outcome] = {}
        """What a round came to, by attempt, until it is published."""
        self.training = ""
        """What the ranks train right now: base, round, or nothing."""
        self.progress_at = 0.0
        self.last_seen = (0.0, 0)
        """When the base was asked last (monotonic seconds), and the step that it was at."""

    @staticmethod
    def is_failure(error: BaseException) -> bool:
        """Whether an error of a job is a part's or the user's, not a mistake of ours."""
        return isinstance(error, (PoolError, RayError)) or is_users(error)

    def prepare_base(self, attempt: int) -> Event:
        """Make sure that release 0 is there."""
        self.training, self.last_seen = "base", (time.monotonic(), 0)
        try:
            self.base, flops = prepare_base(self.cfg, self.run_dir, self.setting, self.runner, self.emit)
        finally:
            self.training = ""
        return on.BaseReady(attempt, len(self.base), flops)

    def score_base(self, attempt: int) -> Event:
        """Measure release 0."""
        directory = str(self.releases.directory(0))
        scores = self.runner.with_pool(lambda group: group.call("score_release", directory))
        return on.BaseScored(attempt, {source: bpb for part in scores for source, bpb in part.items()})

    def warm(self, attempt: int) -> Event:
        """Start the ranks."""
        self.runner.with_pool(lambda group: group.pids)
        return on.PoolReady(attempt)

    def run_round(self, action: do.StartRound) -> Event:
        """Train and judge a candidate."""
        self.training = "round"
        try:
            outcome = self.runner.run_round(action.plan, action.seen, action.best)
        finally:
            self.training = ""
        self.outcomes = {action.attempt: outcome}
        return on.RoundJudged(action.attempt, outcome.record())

    def publish(self, action: do.Publish, audit: Dict[str, Any]) -> None:
        """Make the candidate a release."""
        self.runner.publish(self.outcomes[action.attempt], action.record, audit)

    def release(self) -> None:
        """End the ranks; the next job starts them again."""
        self.runner.group.kill()

    def stop(self) -> None:
        """End the pool for good."""
        self.runner.stop()

    def show_progress(self, number: int) -> None:
        """Every two seconds: ask rank 0 how far round or base is. Its answer goes to the journal when it comes."""
        group = self.runner.group
        if time.monotonic() - self.progress_at < 2.0 or not group.backend or self.calls.has("progress"):
            return
        self.progress_at = time.monotonic()
        workers = group.workers
        if not workers or not self.training:
            return

        asked = self.training

        def show(progress: Tuple[int, int, float]) -> None:
            step, steps, loss = progress
            if asked != self.training or not steps:
                return
            if asked == "base":
                self._show_base(step, steps, loss)
            else:
                self.emit("round_progress", round=number, step=step, steps=steps, loss=loss)

        # A failure is the round's own: its thread sees it and deals with it.
        self.calls.add("progress", workers[0].progress.remote(), show, lambda _: None)

    def _show_base(self, step: int, steps: int, loss: float) -> None:
        """How far the base is, and how fast since it was asked last."""
        now, size = time.monotonic(), self.cfg.base.batch * self.cfg.model.context
        (then, before), self.last_seen = self.last_seen, (now, step)
        speed = max(0, step - before) * size / max(now - then, 1e-9)
        self.emit("base_progress", tokens=step * size, of=steps * size, tokens_per_second=speed, loss=loss)


def train_in_thread(
    action: do.TrainControls,
    cfg: Config,
    tokenizer_state: Dict[str, Any],
    base: str,
    done: Mapping[str, Mapping[str, Any]],
    emit: Callable[..., Any],
    put: Callable[[Any], None],
    ending: Callable[[], bool],
) -> None:
    """Train the controls beside the loop; what they come to is put into its inbox.

    Args:
        done: trials that have ended, by name.
        ending: whether the run is ending.
    """

    def check_stop() -> None:
        if ending():
            raise Stopped

    def tell(trial: str, rows: List[Dict[str, Any]], flops: float) -> None:
        put(on.ControlTrained(action.attempt, trial, tuple(rows), flops))

    def train() -> None:
        budget = Budget(action.flops_per_token, action.tokens)
        try:
            ControlSearch(cfg, tokenizer_state, budget, base, done, emit, tell, check_stop).run()
            put(on.ControlDone(action.attempt))
        except Stopped:
            return
        except RunFailed as error:
            put(on.PartFailed(on.CONTROL, action.attempt, str(error)))
        except Exception as error:  # noqa: BLE001 (a mistake of ours; the loop raises it)
            put(error)

    threading.Thread(target=train, daemon=True, name="controls").start()
