"""Events of the journal as lines of text: what plain output, `circadian logs` and the panel's last messages say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.report.events import Event, describe_round, short_number, stamp
from pipelines.report.looks import look_points

SECONDS = 5.0
"""Least time between two lines of a kind that says how far something is."""
OFTEN = ("wake", "round_progress", "base_progress")


@dataclass
class Lines:
    """Events as lines, those that come often at most every five seconds of their kind."""

    last: dict[str, float] = field(default_factory=dict)
    """When each of these kinds was last given a line, in unix seconds."""

    def line(self, event: Event) -> str:
        """The line of an event, with its time in front; empty where it has none."""
        text = self._text(event)
        return f"{stamp(float(event['t']))}  {text}" if text and "t" in event else text

    def _text(self, event: Event) -> str:
        kind, now = str(event["event"]), float(event.get("t", 0.0))
        if kind in OFTEN:
            if now - self.last.get(kind, float("-inf")) < SECONDS:
                return ""
            self.last[kind] = now
        return describe(event)


def describe(event: Event) -> str:
    """One line about an event; empty for kinds that say nothing to people."""
    kind, tokens = event["event"], f"{int(event.get('tokens') or 0):,}"
    number = f"round {event.get('round')}"
    if kind == "run_started":
        levels = ", ".join(f"{name} every {level['period']:,}" for name, level in event.get("levels", {}).items())
        verb = "resumed" if event.get("resumed") else "started"
        about = f"about {int(event.get('stream_tokens') or 0):,} tokens of {', '.join(event.get('sources', ()))}"
        return f"{verb} {about}" + (f"; levels: {levels} tokens" if levels else "")
    if kind == "wake":
        scores = _scores(dict(pair for step in event.get("steps", ()) for pair in (step.get("bpb") or {}).items()))
        return f"wake   {tokens} tokens  {short_number(event.get('tokens_per_second') or 0)} tok/s  {scores}".rstrip()
    if kind == "gate":
        figures = describe_round(event.get("decision"), event.get("figures") or {})
        reason = event.get("reason")
        return f"{number} {figures}" + (f" ({reason})" if reason and event.get("decision") != "promoted" else "")
    if kind == "round_progress":
        loss = event.get("loss")
        return f"{number} step {event.get('step')} of {event.get('steps')}" + (
            "" if loss is None else f", loss {loss:.3f}"
        )
    lines = {
        "base_finished": lambda: f"base   {event['origin']}, {tokens} tokens in {event.get('seconds') or 0:.1f} s",
        "round_queued": lambda: (
            f"{number} queued at {tokens} tokens, snapshot {event.get('snapshot')}"
            + (f": {event['why']['text']}" if event.get("why") else "")
        ),
        "plan_changed": lambda: (
            f"plan   {event.get('reason')}: share of recent experience {event.get('recent'):.3g}, "
            f"step size {event.get('lr'):.3g}"
        ),
        "rollback": lambda: f"release {event.get('release')} restores release {event.get('restores')}",
        "audit_damaged": lambda: f"audit log: {event.get('missing')} entries are missing; {event.get('remedy')}",
        "round_started": lambda: (
            f"{number} started: {event.get('steps')} steps on {event.get('ranks')} ranks, "
            f"ZeRO {event.get('zero_stage')}, from release {event.get('anchor')}"
        ),
        "round_finished": lambda: f"{number} trained: {event.get('steps')} steps in {event.get('seconds') or 0:.1f} s",
        "adopted": lambda: f"adopted release {event.get('release')} at {tokens} tokens",
        "matrix_row": lambda: f"probe  release {event.get('release')}: {_scores(event.get('row') or {})}",
        "quarantined": lambda: f"quarantined {event.get('source')} {event.get('origin')}: {event.get('reason')}",
        "failure": lambda: (
            f"failure in {event.get('part')}: {event.get('error')}; {event.get('restarts_left')} restarts left"
        ),
        "base_started": lambda: f"base   training on {tokens} tokens of {', '.join(event.get('sources') or ())}",
        "base_progress": lambda: (
            f"base   {tokens} of {int(event.get('of') or 0):,} tokens  "
            f"{short_number(event.get('tokens_per_second') or 0)} tok/s"
        ),
        "control_started": lambda: (
            f"control {event.get('strategy')} lr {event.get('learning_rate'):g} started: "
            f"trial {event.get('trial')} of {event.get('trials')}"
        ),
        "failed": lambda: f"failed: {event.get('error')}",
        "control": lambda: (
            f"control {event.get('strategy')} lr {event.get('learning_rate'):g} at {tokens} tokens: "
            f"{_scores(event.get('row') or {})}"
        ),
        "control_finished": lambda: (
            f"control {event.get('strategy')} lr {event.get('learning_rate'):g} ended: {describe_ending(event)}"
        ),
        "no_controls": lambda: f"no controls: {event.get('reason')}",
        "look": lambda: _describe_look(event),
        "view_off": lambda: f"view   {event.get('reason')}",
        "stopped": lambda: f"stopped at {tokens} tokens: {event.get('reason')}",
        "finished": lambda: f"finished in {event.get('seconds') or 0:.1f} s",
    }
    return lines[kind]() if kind in lines else ""


def describe_ending(event: Event) -> str:
    """What a trial of a control came to."""
    return "it diverged" if event.get("mean") is None else f"mean {event['mean']:.2f} bpb"


def _describe_look(event: Event) -> str:
    points = look_points([event])
    if not points:
        return ""
    served, rested = points[0].served, points[0].rested
    return (
        f"look   served {served:.3f}, release {points[0].release} alone {rested:.3f} bpb on {points[0].sources} sources"
    )


def _scores(row: dict[str, Any]) -> str:
    known = [f"{source} {value:.2f}" for source, value in row.items() if value is not None]
    return f"{', '.join(known)} bpb" if known else ""
