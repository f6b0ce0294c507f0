"""The machine, event by event: what it says to each, and in which order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, Type

from pipelines.config.gate import GateConfig
from pipelines.config.schema import FailureConfig
from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.actions import Action
from pipelines.machine.events import Event
from pipelines.machine.machine import Machine
from pipelines.machine.reactions import LAST
from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.machine.rounds import dreams_stored, trained_steps
from pipelines.machine.rules import Rules
from pipelines.machine.state import Phase, RunState
from pipelines.wake.report import Adoption, LearnerReport, Mark

RULES = Rules(64, 4, ("a", "b"), ("a",), 2.0, 3, gate=GateConfig(patience=2), failures=FailureConfig(1, 1, 1))
SCORES = {"a": 3.0, "b": 3.0}
FIGURES = {
    "candidate": SCORES, "anchor": SCORES, "awake": SCORES, "mean_change": 0.0, "worst": {}, "recent": [], "checks": [],
}  # fmt: skip
JUDGED: Dict[str, Any] = {"figures": FIGURES, "row": FIGURES["candidate"]}


def mark(tokens: int, text: str = "due") -> Mark:
    return Mark(tokens, tokens, tokens // 4 - 1, f"fast-{tokens}", {"text": text})


def report(tokens: int, *marks: Mark, **more: Any) -> LearnerReport:
    return LearnerReport(tokens=tokens, marks=marks, spans={"b": (0, tokens)}, **more)


def base() -> RunState:
    """A run whose stream is to begin."""
    return RunState(phase=Phase.STREAM, rows=[{"release": 0, "tokens": 0, "bpb": SCORES}])


class Script:
    """A machine, and the last actions that it said."""

    def __init__(self, state: RunState | None = None, rules: Rules = RULES) -> None:
        self.machine, self.said = Machine(state or base(), rules), []  # type: ignore[var-annotated]

    @property
    def state(self) -> RunState:
        return self.machine.state

    def hear(self, *events: Event) -> List[str]:
        """Names of what it says to the last of these events."""
        for event in events:
            self.said = self.machine.handle(event)
        return [type(action).__name__ for action in self.said]

    def find(self, kind: Type[Any]) -> Any:
        """The only action of a kind."""
        (found,) = [action for action in self.said if isinstance(action, kind)]
        return found

    def begin(self, newest: ReleaseFact | None = None) -> Script:
        """Until the learner is up; it has been told to go on."""
        self.hear(on.Started(newest or ReleaseFact(0, -1, 0)), on.ServiceReady(1), on.PoolReady(1))
        self.hear(on.LearnerReady(1, report(self.state.tokens)))
        return self

    def advanced(self, told: LearnerReport, call: str = on.ADVANCE) -> List[str]:
        return self.hear(on.Advanced(self.machine.attempts[on.LEARNER], told, call))

    def judged(self, promoted: bool, **more: Any) -> List[str]:
        """The round that runs is decided."""
        start = self.machine.pool.start
        assert start is not None
        plan, word = start.plan, "promoted" if promoted else "rejected"
        record = RoundRecord(
            plan.round,
            plan.tokens,
            plan.anchor,
            None,
            plan.steps,
            word,
            figures=FIGURES,
            row=FIGURES["candidate"],
            **more,
        )
        return self.hear(on.RoundJudged(start.attempt, record))

    def published(self) -> List[str]:
        return self.hear(on.Published(self.machine.attempts[on.POOL]))


def failures(actions: List[Action]) -> List[Any]:
    return [action.fields for action in actions if isinstance(action, do.Record) and action.kind == "failure"]


def test_a_run_begins_with_service_base_and_pool() -> None:
    script = Script(RunState())
    assert script.hear(on.Started()) == ["StartService"]
    assert script.hear(on.ServiceReady(1)) == ["PrepareBase"]
    assert script.hear(on.BaseReady(1, 5, 7.0)) == ["StoreBase"]
    assert script.hear(on.BaseStored(1)) == ["ScoreBase"]
    assert script.hear(on.BaseScored(2, SCORES)) == ["Record", "Commit", "StartLearner"]
    assert script.state.phase is Phase.STREAM and script.state.base_rows == 5 and script.state.flops["base"] == 7.0
    assert script.hear(on.LearnerReady(1, report(0))) == ["Advance", "Advance"]


def test_a_round_starts_when_its_mark_comes_and_the_mark_is_saved_before() -> None:
    script = Script().begin()
    assert script.advanced(report(64, mark(64))) == ["Record", "Commit", "Record", "StartRound", "Advance"]
    plan = script.find(do.StartRound).plan
    assert (plan.first_key, plan.last_key, plan.anchor, plan.snapshot, plan.store_seed) == (0, 15, 0, 64, 3)
    assert script.find(do.StartRound).seen == ("a", "b")
    assert script.find(do.Commit).state.queue == [mark(64)]
    assert script.find(do.Commit).entries[0].kind == "sleep_trigger"


def test_a_decision_is_saved_before_anything_follows_from_it() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    assert script.judged(True) == ["Publish"]
    assert script.find(do.Publish).record.release == 1 and script.state.live == 0
    names = ["Record", "Record", "Record", "Commit", "Unpin", "TrackRound", "Adopt"]
    assert script.published() == names
    saved = script.find(do.Commit).state
    assert (saved.live, saved.queue, saved.next_round, saved.consolidated_key) == (1, [], 2, 15)
    script.state.rounds.clear()
    assert len(saved.rounds) == 1, "what is to be saved is frozen"


def test_dreams_are_durable_before_the_decision() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    script.judged(True, dreams={"kept": 2, "stored": 2})
    assert script.published() == ["StoreDreams"]
    assert script.hear(on.PartFailed(on.SERVICES, 1, "died")) == ["Record", "StartService"]
    assert script.hear(on.DreamsStored(1, 1)) == [], "the old service has nothing to say"
    assert script.hear(on.ServiceReady(2)) == ["StartLearner", "StoreDreams"]
    assert "Commit" in script.hear(on.DreamsStored(2, 1))
    assert script.state.live == 1 and dreams_stored(script.state) == 2


def test_marks_are_told_twice_and_late() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    script.hear(on.PartFailed(on.LEARNER, 1, "died"))
    assert script.hear(on.LearnerReady(2, report(48, mark(64)))) == ["Advance", "Advance"], "told before"
    assert script.advanced(report(64, mark(64))) == ["Advance"], "the replay comes to it again"
    lost = Script(replace(base(), last_mark=64, tokens=64))
    lost.hear(on.Started(ReleaseFact(0, -1, 0)), on.ServiceReady(1), on.PoolReady(1))
    names = lost.hear(on.LearnerReady(1, report(130, mark(64), mark(128))))
    assert names[:4] == ["Record", "Commit", "Record", "StartRound"], "only the checkpoint knows of it"
    assert lost.find(do.StartRound).plan.tokens == 128


def test_a_short_rest_of_the_stream_is_no_round_however_it_is_told() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    script.judged(False)
    script.advanced(report(66, ended=True))
    assert script.advanced(report(66, ended=True)) == ["Finish"]
    assert script.advanced(report(66, mark(66, LAST), ended=True), on.FINISH) == [
        "Commit", "Unpin", "ReleaseLearner", "ReleasePool", "Commit", "BuildSummary",
    ]  # fmt: skip
    again = Script(replace(base(), last_mark=64))
    again.hear(on.Started(ReleaseFact(0, -1, 0)), on.ServiceReady(1), on.PoolReady(1))
    assert again.hear(on.LearnerReady(1, report(66, mark(66, LAST)))) == ["Advance", "Advance"]


def test_rounds_behind_a_slow_pool_merge_but_not_the_one_it_has() -> None:
    script = Script(rules=replace(RULES, sleep=replace(RULES.sleep, max_queued=1))).begin()
    for tokens in (64, 128, 192):
        script.advanced(report(tokens, mark(tokens)))
    assert [one.tokens for one in script.state.queue] == [64, 192]


def test_the_learner_waits_where_the_run_is_deterministic() -> None:
    script = Script(rules=replace(RULES, deterministic=True)).begin()
    script.advanced(report(64, mark(64)))
    assert script.find(do.Advance).until == 128
    assert script.advanced(report(128)) == [], "it holds one period behind the mark"
    script.judged(True)
    script.published()
    assert script.find(do.Adopt).not_before == 128
    assert script.advanced(report(128, release=1, adopted=(Adoption(1, 128, 0.0),)), on.ADOPT) == ["Record", "Advance"]


def test_what_was_published_is_settled_before_a_round_starts() -> None:
    record = RoundRecord(1, 64, 0, 1, 5, "promoted", **JUDGED, dreams={"kept": 1, "stored": 1})
    script = Script(replace(base(), queue=[mark(64), mark(128)], last_mark=128, tokens=130))
    script.hear(on.Started(ReleaseFact(1, 15, 64, "", record)))
    assert script.hear(on.ServiceReady(1)) == ["StoreDreams"]
    script.hear(on.DreamsStored(1, 1))
    assert script.state.live == 1 and [one.tokens for one in script.state.queue] == [128]
    names = script.hear(on.PoolReady(1))
    assert names == ["StartLearner", "Record", "StartRound"] and script.find(do.StartRound).plan.anchor == 1
    assert script.hear(on.LearnerReady(1, report(100))) == ["Adopt", "Advance"]


def test_a_rollback_is_settled_and_its_trainer_is_the_old_one() -> None:
    rounds = [RoundRecord(n, 64 * n, n - 1, n, 10 * n, "promoted", **JUDGED) for n in (1, 2)]
    rows = [{"release": n, "tokens": 64 * n, "bpb": {"a": 3.0 - n, "b": 3.0}} for n in range(3)]
    script = Script(replace(base(), rounds=rounds, rows=rows, live=2, next_round=3))
    assert trained_steps(script.state) == 30
    script.hear(on.Started(ReleaseFact(3, 15, 64, "x", None, restores=1)), on.ServiceReady(1))
    assert script.find(do.Commit).entries[0].kind == "rollback"
    assert script.state.live == 3 and script.state.consolidated_key == 15
    assert script.state.rows[-1]["bpb"]["a"] == 2.0 and trained_steps(script.state) == 10


def test_a_failed_round_is_repeated_within_its_budget() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    first = script.find(do.StartRound)
    assert script.hear(on.RoundFailed(first.attempt, "a rank died")) == ["Record", "StartRound"]
    again = script.find(do.StartRound)
    assert again.retry and again.plan == first.plan and failures(script.said)[0]["restarts_left"] == 0
    assert script.hear(on.RoundFailed(first.attempt, "a rank died")) == [], "the same failure, told twice"
    assert script.hear(on.RoundFailed(again.attempt, "a rank died")) == ["AbandonPool", "StopLearner"]
    script.advanced(report(72, stopped=True))
    assert script.advanced(report(72, stopped=True)) == ["Commit", "GiveUp"]
    assert script.find(do.GiveUp).message == (
        "pool failed 2 times, failures.pool=1 restarts are used up; last error: a rank died. "
        "Run the same command to continue."
    )


def test_a_healthy_round_fills_the_budgets() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    script.hear(on.PartFailed(on.LEARNER, 1, "died"), on.RoundFailed(script.machine.attempts[on.POOL], "died"))
    assert script.machine.budgets.left == {"learner": 0, "pool": 0, "services": 1}
    script.judged(False)
    assert script.machine.budgets.left == script.machine.budgets.full


def test_what_the_user_must_mend_is_not_tried_again() -> None:
    script = Script().begin()
    assert script.hear(on.PartFailed(on.LEARNER, 1, "No space left on device", True)) == ["Commit", "GiveUp"]
    assert script.find(do.GiveUp).users
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    script.judged(True)
    script.hear(on.PublishFailed(script.machine.attempts[on.POOL], "No space left on device", True), on.StopDeadline())
    assert script.find(do.GiveUp).users and script.state.live == 0


def test_a_dead_service_takes_the_learner_with_it_and_is_charged_alone() -> None:
    script = Script().begin()
    assert script.hear(on.PartFailed(on.LEARNER, 1, "died", service_alive=False)) == ["Record", "StartService"]
    assert failures(script.said)[0]["part"] == "experience service"
    assert script.machine.budgets.left == {"learner": 1, "pool": 1, "services": 0}
    assert script.hear(on.PartFailed(on.SERVICES, 1, "died")) == []
    assert script.hear(on.ServiceReady(2)) == ["StartLearner"]


def test_a_stop_is_heard_in_every_state_and_always_ends() -> None:
    assert Script(RunState()).hear(on.StopRequested()) == ["Commit", "End"]
    assert Script(RunState()).hear(on.Started(), on.StopRequested()) == ["Commit", "End"]
    script = Script().begin()
    script.advanced(report(64, mark(64)))
    assert script.hear(on.StopRequested()) == ["AbandonPool", "StopLearner"]
    assert script.advanced(report(128, mark(128))) == ["Record", "Commit"], "kept, and not started"
    assert script.hear(on.PartFailed(on.LEARNER, 1, "died")) == ["Commit", "End"], "no budget is spent on the way out"
    assert script.hear(on.Started()) == []
    script = Script().begin()
    script.hear(on.StopRequested())
    assert script.hear(on.StopDeadline()) == ["Commit", "End"]


def test_the_last_release_is_adopted_at_the_end_also_by_a_learner_that_dies_of_it() -> None:
    script = Script().begin()
    script.advanced(report(64, mark(64), ended=True))
    script.advanced(report(64, ended=True))
    script.judged(True)
    script.published()
    assert script.advanced(report(64, ended=True), on.FINISH) == []
    assert script.advanced(report(64), on.ADOPT) == ["Adopt"] and script.find(do.Adopt).at_once
    script.hear(on.PartFailed(on.LEARNER, 1, "died"))
    assert script.hear(on.LearnerReady(2, report(60))) == ["Adopt", "Advance"]
    script.advanced(report(60), on.ADOPT)
    script.advanced(report(64, ended=True))
    script.advanced(report(64, ended=True))
    assert script.advanced(report(64, mark(64, LAST), ended=True), on.FINISH) == ["Adopt"]
    assert "ReleaseLearner" in script.advanced(report(64, release=1), on.ADOPT)


def test_the_pool_is_given_back_after_a_round() -> None:
    script = Script(rules=replace(RULES, release_after_round=True))
    script.hear(on.Started(ReleaseFact(0, -1, 0)))
    assert script.hear(on.ServiceReady(1)) == ["StartLearner"], "nothing is warmed for it"
    script.hear(on.LearnerReady(1, report(0)))
    script.advanced(report(64, mark(64)))
    assert script.judged(True) == ["ReleasePool", "Publish"]


def test_controls_are_kept_one_by_one() -> None:
    script = Script(replace(base(), phase=Phase.CONTROL), replace(RULES, control=True))
    assert script.hear(on.Started()) == ["TrainControls"]
    assert script.hear(on.ControlTrained(1, "replay@0.1", ({"bpb": 1.0},), 9.0)) == ["Commit"]
    assert script.hear(on.ControlDone(1)) == ["Commit", "BuildSummary"]
    assert script.hear(on.SummaryBuilt()) == ["Commit", "End"]
    assert script.state.control == {"replay@0.1": {"rows": [{"bpb": 1.0}], "flops": 9.0}}
    assert script.state.flops["control"] == 9.0 and script.state.phase is Phase.FINISHED


def test_spans_come_with_every_report() -> None:
    script = Script().begin()
    script.advanced(report(8))
    script.advanced(LearnerReport(tokens=12, spans={"a": (8, 12), "b": (4, 8)}))
    assert script.state.starts == {"b": 0, "a": 8} and script.state.ends == {"b": 8, "a": 12}
