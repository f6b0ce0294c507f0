"""Runs the controls side by side, as many as there is room for, and decides by their results which to try next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Tuple

import ray
from ray.exceptions import RayError

from cluster.actors.control_trainer import ControlTrainer
from cluster.actors.start import results, start_actor, whole_bundle
from cluster.driver.failures import RunFailed, describe
from pipelines.config.schema import Config
from pipelines.machine.control import Budget, Row, at_once, final_mean, next_trial, place
from pipelines.machine.state import Trial


@dataclass
class ControlSearch:
    """Trials of a run: those that have ended, and those under way. Runs in a thread of its own.

    Args:
        cfg: of the run.
        tokenizer_state: of the run.
        base_dir: release 0.
        done: trials that have ended, by name (`RunState.control`).
        emit: writes an event to the journal.
        tell: takes name, rows and FLOPs of each that has ended.
        check_stop: raises where the run is ending.
    """

    cfg: Config
    tokenizer_state: Dict[str, Any]
    budget: Budget
    base_dir: str
    done: Mapping[str, Mapping[str, Any]]
    emit: Callable[..., Any]
    tell: Callable[[str, List[Row], float], None]
    check_stop: Callable[[], None]
    running: Dict[Any, Tuple[Any, Trial]] = field(default_factory=dict)
    """(actor, trial) by the reference of the call."""
    shown: Dict[str, int] = field(default_factory=dict)
    """Rows in the journal by trial."""

    def run(self) -> None:
        """Go on until nothing is left to try. RunFailed where an actor dies: the same command goes on from there."""
        self.done = dict(self.done)
        if next_trial(self.cfg, self.done, ()) is None:
            return
        actors = [self._start() for _ in range(at_once(self.cfg))]
        try:
            self._work_off(actors)
        except RayError as error:
            raise RunFailed(f"a control died: {describe(error)}; the same command trains it again") from error
        finally:
            for actor in actors:
                ray.kill(actor)

    def _start(self) -> Any:
        """An actor in a place such as a rank of the pool has."""
        options = whole_bundle(self.cfg.ray.pool_bundle(self.cfg.compute.device == "cuda"))
        return start_actor(ControlTrainer, self.cfg, self.tokenizer_state, control=True, **options)

    def _work_off(self, actors: List[Any]) -> None:
        """An actor gets work once it has a place: where there is room for one alone, that one does everything."""
        starting = {actor.ready.remote(): actor for actor in actors}
        idle: List[Any] = []
        while True:
            self.check_stop()
            while idle and (trial := next_trial(self.cfg, self.done, self._trials())) is not None:
                actor = idle.pop(0)
                self._announce(trial)
                self.running[actor.train.remote(trial, self.budget, self.base_dir)] = (actor, trial)
            if not self.running and next_trial(self.cfg, self.done, ()) is None:
                return
            done, _ = ray.wait([*self.running, *starting], timeout=0.5)
            for reference in done:
                if reference in starting:
                    ray.get(reference)
                    idle.append(starting.pop(reference))
                else:
                    idle.append(self._end(reference))
            self._show_progress()

    def _trials(self) -> List[Trial]:
        return [trial for _, trial in self.running.values()]

    def _announce(self, trial: Trial) -> None:
        """Say which of how many trials begins."""
        number, trials = place(self.cfg, self.done, self._trials(), trial)
        told = {"strategy": trial.strategy, "learning_rate": trial.learning_rate}
        self.emit("control_started", **told, trial=number, trials=trials)

    def _end(self, reference: Any) -> Any:
        """Take a result; returns the actor."""
        actor, trial = self.running.pop(reference)
        rows, flops = ray.get(reference)
        self._show(trial, rows)
        told = {"strategy": trial.strategy, "learning_rate": trial.learning_rate}
        self.emit("control_finished", **told, mean=final_mean(rows))
        self.done = {**self.done, trial.name: {"rows": rows, "flops": flops}}
        self.tell(trial.name, rows, flops)
        return actor

    def _show_progress(self) -> None:
        for actor, trial in list(self.running.values()):
            name, rows = results([actor.progress.remote()], self.cfg.failures.call_timeout)[0]
            if name == trial.name:
                self._show(trial, rows)

    def _show(self, trial: Trial, rows: List[Row]) -> None:
        told = {"strategy": trial.strategy, "learning_rate": trial.learning_rate}
        for row in rows[self.shown.get(trial.name, 0) :]:
            self.emit("control", **told, tokens=row["tokens"], row=row["bpb"])
        self.shown[trial.name] = len(rows)
