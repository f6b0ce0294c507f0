"""A run's machine, its ground: what it remembers while it runs, and the few steps that everything else is made of."""

from __future__ import annotations

from typing import Dict, List, Optional, Set

from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.actions import Action
from pipelines.machine.budgets import Budgets
from pipelines.machine.records import ReleaseFact
from pipelines.machine.rounds import release_tokens
from pipelines.machine.rules import Rules
from pipelines.machine.state import Phase, RunState
from pipelines.machine.views import Learner, Pool, Service

NAMES = {on.SERVICES: "experience service"}
"""Parts by the name that the journal calls them by, where it is another."""


class Core:
    """State, memory and budgets of one run."""

    def __init__(self, state: RunState, rules: Rules) -> None:
        self.state, self.rules = state, rules
        self.budgets = Budgets.of(rules.failures)
        self.attempts: Dict[str, int] = {on.LEARNER: 0, on.POOL: 0, on.SERVICES: 0, on.CONTROL: 0}
        self.learner, self.pool, self.service = Learner(), Pool(), Service()
        self.newest: Optional[ReleaseFact] = None
        """A release that a crash left published but not entered."""
        self.dreams_due: Optional[int] = None
        """Release whose dreams may not be in the store."""
        self.base_due: Optional[int] = None
        """Sequences of the base mixture, once known."""
        self.asked: Set[Phase] = set()
        """Phases whose work the driver was told to do."""
        self.started = self.over = self.winding = False
        self.verdict: Optional[Action] = None
        """How the run will end, once that is clear before it is through."""
        self.actions: List[Action] = []

    def _attempt(self, part: str) -> int:
        """A new attempt of a part; what the one before still says is dropped."""
        self.attempts[part] += 1
        return self.attempts[part]

    def _do(self, *actions: Action) -> None:
        self.actions += actions

    def _enter(self, phase: Phase) -> None:
        self.state.enter(phase)
        self._do(do.Commit(self.state.copy()))

    def _start_service(self) -> None:
        self.service = Service(started=True)
        self._do(do.StartService(self._attempt(on.SERVICES)))

    def _start_learner(self) -> None:
        self.learner = Learner(started=True, calls=1)
        self._do(do.StartLearner(self._attempt(on.LEARNER)))

    def _call(self, action: Action) -> None:
        self.learner.calls += 1
        self._do(action)

    def _adopt(self, release: int) -> None:
        """Where deterministic: at a fixed distance behind the boundary that the round pinned."""
        rules = self.rules
        not_before = release_tokens(self.state, release) + rules.lag if rules.deterministic else 0
        self._call(do.Adopt(self.attempts[on.LEARNER], release, not_before))

    def _charge(self, part: str, cause: str, users: bool) -> bool:
        """Take a restart from a part's budget and say so; False where the run is to end instead."""
        if self.verdict is not None:
            return False
        if users or not self.budgets.spend(part):
            message = cause if users else self.budgets.used_up(part, cause)
            self._end_with(do.GiveUp(part, message, users))
            return False
        name = NAMES.get(part, part)
        self._do(do.Record("failure", {"part": name, "error": cause, "restarts_left": self.budgets.left[part]}))
        return True

    def _end_with(self, verdict: Action) -> None:
        self.verdict = self.verdict or verdict  # the first reason stands
