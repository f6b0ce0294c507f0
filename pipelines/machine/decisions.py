"""What enters the state, and the actions that make it count, in an order that a crash may cut anywhere.

A release is on disk before its decision is entered. The journal hears first: a line twice does no harm. Then one
`Commit` makes the decision count together with its audit entries. Only then goes what the decision makes superfluous.
"""

from __future__ import annotations

from typing import Any, Dict, List

from pipelines.machine.actions import Action, AuditEntry, Commit, Record, TrackRound, Unpin
from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.machine.replan import Adjustment
from pipelines.machine.rounds import current_adjustment
from pipelines.machine.rules import Rules
from pipelines.machine.state import RunState
from pipelines.wake.report import Mark

FIGURES = ("mean_change", "worst", "recent", "checks")
"""Of a decision's figures, those that stand in the audit log beside the scores."""
TOLD = ("release", "anchor", "fingerprint", "reason", "recent_scale", "lr_scale")


def enter_row(state: RunState, rules: Rules, release: int, tokens: int, bpb: Dict[str, float]) -> Record:
    """Add a row to the matrix."""
    scores = {source: bpb[source] for source in rules.sources}
    state.rows.append({"release": release, "tokens": tokens, "bpb": scores})
    return Record("matrix_row", {"release": release, "tokens": tokens, "row": scores})


def enter_mark(state: RunState, rules: Rules, mark: Mark) -> List[Action]:
    """Queue a round. Rounds that queue up behind a slow pool merge: a later mark covers an earlier one.

    The first one stays, it is with the pool or will be at once; so what merges is a function of the saved queue, also
    where a restart has not got as far as giving the pool its round back.
    """
    first = min(1, len(state.queue))
    state.queue.append(mark)
    state.last_mark = mark.tokens
    while len(state.queue) - first > rules.sleep.max_queued:
        del state.queue[first]
    told = {"tokens": mark.tokens, "snapshot": mark.snapshot, "last_key": mark.last_key, "fast": mark.fast}
    number = state.next_round + len(state.queue) - 1
    entry = AuditEntry("sleep_trigger", {"tokens": mark.tokens, "last_key": mark.last_key, "why": mark.why})
    return [
        Record("round_queued", {"round": number, **told, "why": mark.why}),
        Commit(state.copy(), (entry,)),
    ]


def enter_round(state: RunState, rules: Rules, record: RoundRecord, last_key: int) -> List[Action]:
    """Enter a decided round; its release, if any, is published already.

    Args:
        last_key: last stream key of the round's snapshot.
    """
    before = current_adjustment(state, rules)
    state.queue = [mark for mark in state.queue if mark.tokens > record.tokens]
    state.rounds.append(record)
    state.next_round = record.id + 1
    state.flops["sleep"] += record.flops
    finished = {"steps": record.steps, "seconds": record.seconds, "loss": record.loss}
    gate = {key: getattr(record, key) for key in ("decision", "release", "reason", "figures")}
    actions: List[Action] = [
        Record("round_finished", {"round": record.id, **finished}),
        Record("gate", {"round": record.id, **gate}),
    ]
    if record.release is not None:
        row = record.row or record.figures["candidate"]  # records of earlier versions have no row of their own
        state.live, state.consolidated_key = record.release, last_key
        actions.append(enter_row(state, rules, record.release, record.tokens, row))
    entries = [_decision_entry(record)]
    change = _plan_change(rules, before, current_adjustment(state, rules))
    if change:
        actions.append(Record("plan_changed", {"after_round": record.id, **change}))
        entries.append(AuditEntry("plan_change", {"round": record.id, **change}))
    actions.append(Commit(state.copy(), tuple(entries)))
    actions.append(Unpin(record.tokens, tuple(mark.fast for mark in state.queue)))
    return [*actions, TrackRound(record)]


def enter_rollback(state: RunState, rules: Rules, release: ReleaseFact) -> List[Action]:
    """Enter a release that makes an earlier one live again; it is published already."""
    replaced = state.live
    state.live, state.consolidated_key = release.number, release.last_key
    scores = next(row["bpb"] for row in reversed(state.rows) if row["release"] == release.restores)
    row = enter_row(state, rules, release.number, release.tokens, scores)
    told: Dict[str, Any] = {
        "release": release.number,
        "restores": release.restores,
        "replaces": replaced,
        "fingerprint": release.fingerprint,
    }
    state.rollbacks.append(told)
    entry = AuditEntry("rollback", {"figures": {"bpb": scores}, **told})
    return [row, Record("rollback", {"tokens": release.tokens, **told}), Commit(state.copy(), (entry,))]


def enter_release(state: RunState, rules: Rules, release: ReleaseFact) -> List[Action]:
    """Enter a release that a crash left published but not entered."""
    if release.restores is not None:
        return enter_rollback(state, rules, release)
    assert release.record is not None
    return enter_round(state, rules, release.record, release.last_key)


def _decision_entry(record: RoundRecord) -> AuditEntry:
    figures = {side: record.figures[side] for side in ("candidate", "anchor", "awake")}
    figures.update({key: record.figures[key] for key in FIGURES})
    told = {key: getattr(record, key) for key in TOLD}
    return AuditEntry(
        "promotion" if record.release is not None else "rejection", {"round": record.id, "figures": figures, **told}
    )


def _plan_change(rules: Rules, before: Adjustment, after: Adjustment) -> Dict[str, Any]:
    """What a decision changes in the plans of the rounds to come; empty where nothing."""
    if after == before:
        return {}
    reason = f"{after.rejections} rejections in a row" if after.rejections else "a promotion; as configured again"
    return {
        "reason": reason,
        "recent": rules.sleep.recent * after.recent_scale,
        "lr": rules.sleep.optimizer.lr * after.lr_scale,
    }
