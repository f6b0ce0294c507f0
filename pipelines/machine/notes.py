"""What a report of the learner changes in the state and says to the journal, its marks apart."""

from __future__ import annotations

from typing import Any, Dict, List

from pipelines.machine.actions import Action, Record
from pipelines.machine.rules import Rules
from pipelines.machine.state import RunState
from pipelines.wake.report import LearnerReport, Look


def note_report(state: RunState, rules: Rules, report: LearnerReport) -> List[Action]:
    """Take a report in. A replay after a restart tells again what it told before: positions count, not sums."""
    state.tokens, state.cursor = report.tokens, report.cursor
    for source, (first, last) in report.spans.items():
        state.starts.setdefault(source, first)
        state.ends[source] = max(last, state.ends.get(source, 0))
    actions: List[Action] = [
        Record("adopted", {"release": one.release, "tokens": one.tokens, "fast_shift_norm": one.shift})
        for one in report.adopted
    ]
    refused = list(report.quarantined)
    for step in report.steps:
        refused += [(source, f"stream key {key}", reason) for key, source, reason in step.quarantined]
    for source, origin, reason in refused:
        actions += _quarantine(state, source, origin, reason)
    if report.steps:
        actions.append(_note_wake(state, rules, report))
    return [*actions, *(Record("look", _told(look)) for look in report.looks)]


def _note_wake(state: RunState, rules: Rules, report: LearnerReport) -> Record:
    tokens = len(report.steps) * rules.step_tokens
    seconds = max(0.0, report.seconds - sum(look.seconds for look in report.looks))
    done = {
        "steps": float(len(report.steps)),
        "tokens": float(tokens),
        "inside": sum(step.seconds for step in report.steps),
        "wall": seconds,
        "waited": sum(step.waited for step in report.steps),
    }
    for key, value in done.items():
        state.wake[key] = state.wake.get(key, 0.0) + value
    state.flops["wake"] = report.tokens * rules.wake_flops
    told = {
        "tokens": report.tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "steps": [dict(vars(step)) for step in report.steps],
        "release": report.release,
    }
    return Record("wake", told)


def _told(look: Look) -> Dict[str, Any]:
    return {"tokens": look.tokens, "release": look.release, "served": look.served, "rested": look.rested}


def _quarantine(state: RunState, source: str, origin: str, reason: str) -> List[Action]:
    if [source, origin, reason] in state.quarantined:
        return []
    state.quarantined.append([source, origin, reason])
    return [Record("quarantined", {"source": source, "origin": origin, "reason": reason})]
