"""What a round is made of: its plan, and what its gate looks at. Pure functions of the state, so that a restart that
plans a round again comes to the same plan."""

from __future__ import annotations

import math
from typing import Dict, Tuple

from pipelines.machine.replan import Adjustment, adjustment
from pipelines.machine.rules import Rules
from pipelines.machine.state import RunState
from pipelines.sleep.plan import RoundPlan, num_steps
from pipelines.wake.report import Mark


def plan_round(state: RunState, rules: Rules) -> RoundPlan:
    """The plan of a round over everything between the last consolidated key and the first mark of the queue."""
    mark, changes = state.queue[0], current_adjustment(state, rules)
    first = state.consolidated_key + 1
    return RoundPlan(
        round=state.next_round,
        snapshot=mark.snapshot,
        first_key=first,
        last_key=mark.last_key,
        fast=mark.fast,
        anchor=state.live,
        tokens=mark.tokens,
        steps=num_steps(rules.sleep, _budgeted_from(state, mark), mark.last_key),
        seed=rules.seed * 1_000_003 + state.next_round,
        recent_scale=changes.recent_scale,
        lr_scale=changes.lr_scale,
        trained_steps=trained_steps(state),
        store_seed=rules.seed,
        dreams_stored=dreams_stored(state),
    )


def _budgeted_from(state: RunState, mark: Mark) -> int:
    """First stream key that no round has had steps for yet.

    A rejected round has spent its FLOPs. Its experience is recent again in the next one, but brings no second budget: a
    gate that rejects often would multiply what a run costs.
    """
    if not state.rounds or not mark.tokens:
        return 0
    return state.rounds[-1].tokens * (mark.last_key + 1) // mark.tokens


def current_adjustment(state: RunState, rules: Rules) -> Adjustment:
    """What the decisions so far change in the next round's plan."""
    return adjustment([record.decision for record in state.rounds], rules.gate)


def seen_sources(state: RunState, rules: Rules, tokens: int) -> Tuple[str, ...]:
    """Sources that the gate counts at a stream position, in the run's order."""
    seen = {*rules.base_sources, *state.seen_at(tokens)}
    return tuple(source for source in rules.sources if source in seen)


def best_scores(state: RunState, rules: Rules) -> Dict[str, float]:
    """Best bits per byte of any live release so far, by source, on the text that the gate decides on.

    Rows of the matrix are of other text, which no decision may see. Infinite where no round has measured a source yet.
    """
    best = dict.fromkeys(rules.sources, math.inf)
    for record in state.rounds:
        for side in ("anchor", "candidate") if record.promoted else ("anchor",):
            for source, bpb in record.figures.get(side, {}).items():
                best[source] = min(best.get(source, math.inf), bpb)
    return best


def trained_steps(state: RunState) -> int:
    """Steps that lie behind the live release. One that restores another stands where that one stood."""
    behind = {0: 0}
    made = {record.release: (record.anchor, record.steps) for record in state.rounds if record.release is not None}
    restored = {told["release"]: (told["restores"], 0) for told in state.rollbacks}
    for number, (origin, steps) in sorted({**made, **restored}.items()):
        behind[number] = behind.get(origin, 0) + steps
    return behind.get(state.live, 0)


def dreams_stored(state: RunState) -> int:
    """Dreams that promoted rounds left in the store: the last record that tells of some keeps the running sum."""
    for record in reversed(state.rounds):
        if record.release is not None and record.dreams:
            return int(record.dreams.get("stored", 0))
    return 0


def release_tokens(state: RunState, release: int) -> int:
    """Stream position that a release was made at."""
    return next(int(row["tokens"]) for row in reversed(state.rows) if row["release"] == release)
