"""Planted bugs: machines and drivers with one mistake each, of the kind that is made. The properties see them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, List, Sequence, Tuple, Type

from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.actions import Action
from pipelines.machine.events import Event
from pipelines.machine.machine import Machine
from pipelines.machine.records import RoundRecord
from pipelines.machine.simulated import Simulation


class StaleAnswersCount(Machine):
    """A round that was given up is decided when its late answer comes."""

    def _is_stale(self, event: Event) -> bool:
        return False


class MarksOfTheCheckpointAreIgnored(Machine):
    """A mark that was told between the learner's checkpoint and the saved state is lost."""

    def _on_learner_ready(self, event: on.LearnerReady) -> None:
        super()._on_learner_ready(replace(event, report=replace(event.report, marks=())))


class MarksLeaveTheQueueEarly(Machine):
    """A mark leaves the queue when its round starts instead of when it is decided."""

    def _feed_pool(self) -> None:
        before = self.pool.job
        super()._feed_pool()
        if not before and self.pool.job == "round":
            del self.state.queue[0]


class AdoptionsComeAgain(Machine):
    """With every new release the learner is told again of the one before, after it."""

    def _adopt(self, release: int) -> None:
        super()._adopt(release)
        if release > 1:
            super()._adopt(release - 1)


class AdoptionsBeforeDecisions(Machine):
    """The learner hears of a release before its decision is saved."""

    def _decide(self, record: RoundRecord) -> None:
        before = len(self.actions)
        super()._decide(record)
        added = self.actions[before:]
        first = [action for action in added if isinstance(action, do.Adopt)]
        self.actions[before:] = [*first, *(action for action in added if action not in first)]


class RetriesAreFree(Machine):
    """A failed round is retried for ever."""

    def _charge(self, part: str, cause: str, users: bool) -> bool:
        return part == on.POOL or super()._charge(part, cause, users)


class RoundsStartTwice(Machine):
    """A mark that comes while a round is under way starts it again."""

    def _on_advanced(self, event: on.Advanced) -> None:
        super()._on_advanced(event)
        if event.report.marks and self.pool.job == "round":
            self.pool.job = ""


class TornReleasesAreForgotten(Machine):
    """A release that was published before a crash is not entered after it."""

    def _on_started(self, event: on.Started) -> None:
        super()._on_started(event)
        self.newest = None


class StopsWaitForTheLearner(Machine):
    """A learner that does not answer holds a stop up for ever."""

    def _on_stop_deadline(self, event: on.StopDeadline) -> None:
        """Nothing."""


class DecisionsWithoutDreams(Machine):
    """A decision counts while its dreams are not durable yet."""

    def _on_published(self, event: on.Published) -> None:
        assert self.pool.record is not None
        self._decide(self.pool.record)


class UnpinsBeforeSaving(Simulation):
    """A driver that carries actions out in another order: what a saved state still needs goes first."""

    def _handle(self, event: Event) -> Sequence[Action]:
        actions = super()._handle(event)
        first: List[Action] = [replace(one, keep=()) for one in actions if isinstance(one, do.Unpin)]
        return [*first, *(one for one in actions if not isinstance(one, do.Unpin))]


class SavesLater(Simulation):
    """A driver that saves at the end of a list what should have been saved before its other actions."""

    def _handle(self, event: Event) -> Sequence[Action]:
        return sorted(super()._handle(event), key=lambda action: isinstance(action, do.Commit))


PLANTED: Dict[str, Tuple[Type[Machine], Type[Simulation]]] = {
    **{
        kind.__name__: (kind, Simulation)
        for kind in (
            StaleAnswersCount, MarksOfTheCheckpointAreIgnored, MarksLeaveTheQueueEarly, AdoptionsComeAgain,
            AdoptionsBeforeDecisions, RetriesAreFree, RoundsStartTwice, TornReleasesAreForgotten,
            StopsWaitForTheLearner, DecisionsWithoutDreams,
        )
    },
    **{kind.__name__: (Machine, kind) for kind in (UnpinsBeforeSaving, SavesLater)},
}  # fmt: skip
